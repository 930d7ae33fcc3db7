"""The notebook, cell by cell as it stands, on a small world: only its parameters are others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jobs
import pytest

from rsllm.data.synthetic import write_world

NOTEBOOK = Path(__file__).parents[1] / "experiments" / "first_steps.ipynb"


@pytest.mark.ray
def test_first_steps(
    tiny_llm: Path,
    trained_here: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_world(Path("world"), num_users=60, num_items=70, length=9, noise=0.3, seed=0)
    small = {"DATA": "world", "BACKBONE": str(tiny_llm), "CHANGES": jobs.SETTINGS}
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        assert not cell.get("outputs"), "what is shown belongs to who runs it"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert names.keys() >= small.keys()
            names |= small
    said = capsys.readouterr().out
    assert "70 items; " in said
    assert f"the right one of {jobs.SETTINGS['data.num_candidates']} first" in said
    assert "adapter_config.json" in said
    lists = names["model"].recommend(names["history"], k=5)
    assert len(lists) == 5
    assert not {*lists["title"]} & {*names["history"]}
