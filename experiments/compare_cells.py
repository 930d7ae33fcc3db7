"""Is the first of these finished cells better than the others, whatever settings each had?

A grid compares what has the same settings. This takes any cells of one data set whose predictions
are in the store: the first against each other one, paired by user, with Holm's correction over
the others; and HR@1 by the third of the candidates' list in which the target stands. With
--outside N it leaves out the users of evaluations on N rows, to confirm on fresh ones what was
chosen on those.

    python experiments/compare_cells.py RSLLM.json SASREC.json --storage rsllm-store
    python experiments/compare_cells.py RSLLM.json SASREC.json --outside 300 --out pairs.json

Cost: seconds. Last measured: experiments/results/compare_cells/.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from rsllm.cli import run_script
from rsllm.config.plain import flat
from rsllm.data.prepared import PreparedData
from rsllm.errors import DataError
from rsllm.evaluate.compare import estimates, stack_seeds
from rsllm.evaluate.metrics import Floats
from rsllm.evaluate.rank import held_out, target_places
from rsllm.flags import add_storage_flag
from rsllm.report.tables import Table, pairs, show
from rsllm.store.artifacts import Store, provenance, read_json, write_json
from rsllm.study import claims
from rsllm.study.claims import Claim
from rsllm.study.measure import stored_scores
from rsllm.study.results import Cell

METRICS = ("HR@1", "MRR")
SETTINGS = ("judged", "experiment")
FACTS = ("entry", "kind", "key", "seeds", "data", *SETTINGS)
THIRDS = ("first third", "second third", "last third")


def measure(path: Path, store: Store, outside: int = 0) -> tuple[Cell, dict[str, Floats]]:
    """One cell's facts with estimates, and its metrics [S, R], on the users asked for.

    Raises:
        DataError: it is no cell of a method, the store lacks its predictions, or no user is left.
    """
    cell = read_json(path)
    if "predictions" not in cell:
        raise DataError(f"{path} is no cell of a method; a comparison has two dashes in its name")
    prepared = store.root / "data" / cell["data"]["key"]
    if not (scores := stored_scores(cell["predictions"], store)) or not prepared.is_dir():
        raise DataError(f"{path}: predictions not in {store.location}; name their --storage")
    data = PreparedData.open(prepared)
    draws = held_out(data, "test", scores[0].shape[1])
    known_K = held_out(data, "test", outside)[0].user_R[:outside]
    fresh_R = ~np.isin(draws[0].user_R, known_K)
    if not fresh_R.any():
        raise DataError(f"{path}: all of its {len(fresh_R)} rows are of users left out")
    draws = [rows.take(fresh_R) for rows in draws]
    found = stack_seeds([scores_DRC[:, fresh_R] for scores_DRC in scores], draws)
    values = {metric: found[metric] for metric in METRICS}
    third_R = target_places(draws[0]) * 3 // scores[0].shape[2]
    by_third = {name: values["HR@1"][:, third_R == i] for i, name in enumerate(THIRDS)}
    kept = {name: cell[name] for name in FACTS}
    return kept | estimates(values | {n: own for n, own in by_third.items() if own.size}), values


def compare(paths: list[Path], store: Store, outside: int = 0) -> dict[str, Any]:
    """The cells, each with the settings in which it differs from the first, and their pairs.

    Raises:
        DataError: a cell that cannot be measured, or is of other rows than the first.
    """
    measured = {path: measure(path, store, outside) for path in paths}
    (first, first_values), cells = measured[paths[0]], []
    for path, (cell, values) in measured.items():
        rows = (cell["data"]["key"], values["MRR"].shape[1])
        if rows != (first["data"]["key"], first_values["MRR"].shape[1]):
            raise DataError(f"{path}: its test rows are not those of {paths[0]}")
        plain = {name: value for name, value in cell.items() if name not in SETTINGS}
        cells.append(plain | {"data": cell["data"]["set"], "differs": differing(cell, first)})
    claimed = [Claim(first["key"], cell["key"]) for cell in cells[1:]]
    vectors = {cell["key"]: values for cell, values in measured.values()}
    tested = [pair for metric in METRICS for pair in claims.compare(vectors, claimed, [metric])]
    return {"outside": outside, "cells": cells, "pairs": tested}


def differing(cell: Cell, other: Cell) -> dict[str, Any]:
    """The settings, by their paths, that the other does not have; of another kind, only that."""
    if cell["kind"] != other["kind"]:
        return {"kind": cell["kind"]}
    theirs = dict(flat({name: other[name] for name in SETTINGS}))
    own = flat({name: cell[name] for name in SETTINGS})
    return {path: value for path, value in own if value != theirs.get(path)}


def main() -> None:
    """Compare; print two tables and write all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--outside", type=int, default=0, metavar="N", help="without these users")
    add_storage_flag(parser)
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    values = parser.parse_args()
    found = compare(values.cells, Store.at(values.storage), values.outside)
    columns = ("key", "entry", *METRICS, *THIRDS)
    rows = [{name: cell.get(name) for name in columns} for cell in found["cells"]]
    for table in (Table("Cells", rows), pairs(found)):
        print(f"{table.title}\n{tabulate(table.cells(show), headers=table.header)}\n")
    for cell in found["cells"]:
        if cell["differs"]:
            print(f"{cell['key']} ({cell['entry']}): {cell['differs']}")
    if values.out:
        write_json(values.out, {**found, "provenance": provenance()})


if __name__ == "__main__":
    run_script(main)
