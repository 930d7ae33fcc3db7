"""Which of the data sets of LLM recommendation can carry a claim about sequences?

Prepares every data set at hand and audits it. LLaRA's files are audited if they were imported
(`experiments/import_llara.py`); a data set that is not there is named and left out.

    python experiments/audit_data.py

Cost: a minute on 2 cores. Result (results/audit_data/2-cores.json): LLaRA's LastFM stands in one
global order of items, so its order is not of time and no sequential claim can rest on it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rsllm import Experiment, Pipeline, RsllmError, replace_in
from rsllm.cli import run_script
from rsllm.data.audit import audit, table
from rsllm.data.prepared import PreparedData
from rsllm.store.artifacts import Store, provenance, write_json
from rsllm.study.results import results_folder

STORAGE = Path("rsllm-store")
GIVEN = {"data.split": "given"}
DATA = {
    "movielens-100k": {},
    "llara-lastfm": GIVEN,
    "llara-steam": GIVEN,
    "llara-steam-sample": GIVEN,
    "llara-movielens": GIVEN,
    "llara-movielens-heldout": GIVEN,
}


def main() -> None:
    """Audit what there is, and write the findings."""
    found = {}
    for name, settings in DATA.items():
        try:
            experiment = replace_in(Experiment(), {"data.source": name, **settings})
            path = Pipeline(experiment, STORAGE).prepare()
        except RsllmError as error:
            print(f"{name} is left out: {str(error).splitlines()[-1].strip()}\n")
            continue
        findings = audit(path)
        print(f"\n{name}\n{table(findings)}\n")
        counts = PreparedData.open(path).facts["counts"]
        found[name] = {"counts": counts, "findings": [asdict(finding) for finding in findings]}
    with results_folder(Store.open(STORAGE), "audit_data") as folder:
        write_json(folder / "results.json", {"data": found, "provenance": provenance()})


if __name__ == "__main__":
    run_script(main)
