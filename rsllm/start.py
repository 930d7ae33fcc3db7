"""`rsllm start`: from a user's own table to a tuned model, recommendations and a report."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rsllm.assets.catalogue import ASSETS, fetch
from rsllm.config import DataConfig, Experiment
from rsllm.config.plain import replace_in
from rsllm.config.presets import HISTORIES
from rsllm.data import sources
from rsllm.data.prepare import raw_location
from rsllm.data.raw import read_interactions, read_items, settle_titles, titles_beside
from rsllm.data.tables import chunks_of
from rsllm.errors import DataError
from rsllm.flags import recommend_command
from rsllm.store.artifacts import Store, cache_root
from rsllm.terminal import Progress, say

TO_BEAT = "the language model beats the recommender"
SHORT: dict[str, Any] = {
    "data.split": "leave-one-out",
    "stage2.samples": 288,
    "stage2.validations": 2,
    "evaluation.validation_rows": 200,
    "evaluation.test_rows": 300,
}
"""A tuning of minutes on a few cores: enough to see the flow, too little to judge the method."""


def start(file: str, changes: Mapping[str, Any], storage: str, *, sure: bool) -> list[str]:
    """Say what a table holds and what would be run; on yes train, judge and write the report.

    Args:
        file: the table, or a folder of them.
        changes: settings by dotted paths, which win over those that are proposed.
        storage: of all that is made.
        sure: nothing is asked.

    Returns:
        The command that recommends with the model, or nothing if the answer was no.

    Raises:
        ConfigError, DataError: the table, a setting or the backbone cannot be used.
    """
    place = Path(file).expanduser()
    source = str(place.absolute()) if place.exists() else file
    wanted = {"data.source": source, **HISTORIES, **SHORT, **changes}
    data = replace_in(Experiment(), wanted).data
    wanted = {**fitting(look(data), data), **wanted}
    experiment, store = replace_in(Experiment(), wanted), Store.open(storage)
    config = store.root / f"start-{place.stem}.toml"
    where = f"--config {shlex.quote(str(config))} --storage {shlex.quote(storage)}"
    backbone = experiment.backbone.source
    absent = backbone in ASSETS and not (cache_root() / backbone).exists()
    print(
        f"\nOn yes, {config} gets the settings, and these are run with {backbone}"
        f"{', which is downloaded first' if absent else ''}:\n"
        + "".join(f"  rsllm {verb} {where}\n" for verb in ("prepare", "fit", "train"))
        + f"  rsllm recommend MODEL --users USER --k 5 --storage {shlex.quote(storage)}\n"
        "The model is judged on test users beside its recommender; a report says how good it is.",
        flush=True,
    )
    if not sure and not answered_yes():
        print("Nothing was computed. --yes runs it without a question.")
        return []
    config.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{path} = {json.dumps(v, ensure_ascii=False)}\n" for path, v in wanted.items()]
    config.write_text("".join(lines), "utf-8")
    say("rsllm: loading PyTorch and Ray")
    return train_and_judge(experiment, storage, place.name)


def look(config: DataConfig) -> list[str]:
    """Print what is understood of a table, and return the titles of its items."""
    titles, users, times, rows = Counter[tuple[str, ...]](), set[str](), list[int](), 0
    with raw_location(config, fetch) as location:
        data = sources.find(location, config.table, config.layout)
        table = data.layout.interactions
        chunks = chunks_of(data.interactions, table)
        if data.layout.items:
            items = read_items(data.items, data.layout.items)
        else:
            for chunk in chunks:
                titles += titles_beside(chunk, table)
            items = settle_titles(titles, table)
        ids, broken = pa.array(items.ids, pa.string()), len(items.rejects)
        how: dict[str, Any] = {"desc": "look", "total": len(chunks), "unit": " parts", "delay": 2}
        for chunk in Progress(chunks, **how):
            for part in read_interactions(chunk, table, ids):
                rows, broken = rows + len(part.table), broken + len(part.broken)
                users |= set(part.table["user"].unique().to_pylist())
                times += pc.min_max(part.table["time"]).as_py().values() if len(part.table) else []
    if not rows:
        raise DataError(f"{config.source} has no usable row; is it the right file?")
    columns = [data.layout.items.columns if data.layout.items else {}, table.columns]
    named = ", ".join(f"{role} is {name}" for part in columns for role, name in part.items())
    print(f"{config.source} is read as {data.layout.name}: {named}")
    for name, found in data.found.items():
        print(f"  {name}: {found}")
    print(f"  {rows:,} rows of {len(users):,} users and {len(items.ids):,} items")
    if broken:
        print(f"  {broken:,} rows cannot be used; rsllm prepare says which")
    if data.layout.timed:
        first, last = (datetime.fromtimestamp(t / 1000, UTC) for t in (min(times), max(times)))
        print(f"  from {first:%Y-%m-%d} to {last:%Y-%m-%d}")
    print(f"  titles such as {'; '.join(items.titles[:3])}")
    return items.titles


def fitting(titles: list[str], config: DataConfig) -> dict[str, Any]:
    """Smaller windows and candidate sets, where a catalogue is too small for the usual ones."""
    distinct = len(set(titles))
    if distinct >= config.window + config.num_candidates:
        return {}
    window, half = max(config.min_history, distinct // 3), max(2, distinct // 2)
    return {"data.window": window, "data.num_candidates": half}


def answered_yes() -> bool:
    """Whether the user agrees; where nobody can answer, nobody does."""
    try:
        return input("Run them? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def train_and_judge(experiment: Experiment, storage: str, name: str) -> list[str]:
    """Run the study of one tuning, name its report, and return the command that recommends."""
    from rsllm.data.prepared import PreparedData
    from rsllm.pipeline import Pipeline
    from rsllm.study.claims import Claim
    from rsllm.study.study import ALONE, Study, run

    pipeline = Pipeline(experiment, storage)
    pipeline.check()
    own = "RSLLM"
    study = Study(
        title=f"Start with {name}",
        question=f"What does a short tuning learn from {name}?",
        base=experiment,
        twins=lambda nothing: {own: {}},
        claims=[Claim(own, "zero-shot", "tuning helps"), Claim(own, ALONE, TO_BEAT)],
    )
    report = run(study, storage) / "report.html"
    user, *_ = PreparedData.open(pipeline.prepare()).user_ids()
    command = recommend_command(pipeline.train(), storage, "--users", user, "--k", "5")
    print(f"report: {report}\n\n{command}", flush=True)
    return shlex.split(command)[1:]
