"""A grid of made-up cells: nothing is trained, all else is as in a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsllm.config import Experiment
from rsllm.config.plain import to_dict
from rsllm.evaluate.metrics import METRICS
from rsllm.flags import Budget
from rsllm.store.versions import deciding_results
from rsllm.study.claims import Claim
from rsllm.study.grid import Grid, GridArguments, datasets
from rsllm.study.results import Cells, Entry, slug

BUDGET = Budget(summary="none", seeds=1)


def estimate(value: float, n: int = 95) -> dict[str, Any]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": n}


def small_grid(*names: str, text: str = "made up", **more: Any) -> Grid:
    """Of language models by these names, the first claimed to be better than the second."""
    entries = [Entry(name=n, settings={"stage2.samples": 8 * i}) for i, n in enumerate(names, 1)]
    settings = {
        "title": text,
        "question": text,
        "base": Experiment(),
        "entries": lambda base: entries,
        "budgets": {"none": BUDGET},
        "data": {text: {}},
        "claims": [
            Claim(text=text, first=names[0], second=names[1], gains={"movielens-100k": 0.1})
        ],
        "notes": [text],
    }
    return Grid(**{**settings, **more})


def arguments_for(grid: Grid, folder: Path, **more: Any) -> GridArguments:
    """What a user who chose all of a grid would have chosen, but for `more`."""
    settings = {
        "budget_name": "none",
        "budget": BUDGET,
        "settings": {},
        "data": list(grid.data),
        "only": (),
        "num_seeds": 1,
        "storage": str(folder / "store"),
        "cells": Cells(folder / "cells"),
        "command": "python experiments/made_up.py",
        "render": True,
    }
    return GridArguments(**{**settings, **more})


def cell(name: str, key: str, value: float = 0.4, **more: Any) -> dict[str, Any]:
    rule = {"n": 95, "ValidRatio": estimate(0.9), "hits_of_all": estimate(0.31)}
    rule |= {"hits_of_valid": estimate(0.35), "perfect_invalid": 0.0}
    whole = {
        "entry": name,
        "key": key,
        "kind": "tuned",
        "judged": {},
        "seeds": [0],
        "data": {
            "set": "x",
            "source": "x",
            "split": "user",
            "key": "abc",
            "raw": {"items": {"u.item": "0123abcd"}},
            "counts": {},
        },
        "backbone": "",
        "scorer": "pointer",
        "n": 95,
        "metrics": {metric: estimate(value) for metric in METRICS},
        "by_seed": {},
        "generation": {"free": {"LLaRA": rule, "strict": rule}},
        "ranking_seconds": 1.0,
        "gamma": 0.0,
        "samples": 24.0,
        "seconds": 10.0,
        "tokens": 100.0,
        "trainable": 5,
        "doubts": [[]],
        "predictions": {"scores": [slug(name)]},
        "experiment": to_dict(Experiment()),
        "layout": {"precision": "fp32"},
        "code": deciding_results(),
        "provenance": {"rsllm": "0", "machine": "none", "time": "now"},
    }
    return whole | more


def comparison(value: float, p: float = 0.001, detectable: float = 0.08) -> dict[str, Any]:
    difference = {"difference": estimate(value), "p": p, "test": "none"}
    test = difference | {"minimum_detectable": detectable}
    return {"n": 95, "seeds": [[0], [0]], "tests": {"HR@1": test, "MRR": test}}


def put_on_file(grid: Grid, arguments: GridArguments, values: dict[str, float]) -> None:
    """A cell for each value, on every data set, and the comparison of the first two."""
    for dataset in datasets(grid, arguments):
        cells = {name: cell(name, dataset.key(name), value) for name, value in values.items()}
        for name, one in cells.items():
            dataset.cells.write(dataset.name, dataset.key(name), slug(name), one)
        first, second, *_ = cells.values()
        dataset.cells.write_comparison(dataset.name, first, second, comparison(0.2))
