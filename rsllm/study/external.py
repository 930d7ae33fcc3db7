"""Any other system's scores on our candidate sets: our metrics, intervals and paired tests."""

# Axes: D draws, R rows, C candidates, N lines of the file.

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from rsllm.data.dialect import settle
from rsllm.data.files import TableFormat, find_files
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import NO_ITEM, Rows, Split
from rsllm.data.tables import check, columns_of, read_all
from rsllm.data.values import as_text
from rsllm.errors import ConfigError, DataError
from rsllm.evaluate.compare import estimates, per_user
from rsllm.evaluate.metrics import Floats, compared_metrics
from rsllm.evaluate.rank import candidate_sets, held_out
from rsllm.evaluate.run import ANSWERS, read_scores
from rsllm.report.tables import inert, show
from rsllm.store.artifacts import Mirror, Store, manifest, read_json
from rsllm.study.claims import Claim, compare

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".parquet": ""}
_NAMES = {"user": "user_id", "item": "item_id", "score": "score"}


def export_candidates(data: PreparedData, split: Split, path: Path) -> Path:
    """Write the candidate sets for another system: draw, user_id, history, item_id, title.

    A line per candidate, in CSV or Parquet by the suffix. Histories are item ids, oldest first
    (in CSV a JSON list). Titles that a spreadsheet would run are quoted in CSV; ids have to stay as
    they are. Which candidate is the target is not said.
    """
    separator = _separator(path)
    draws = held_out(data, split)
    users, items = np.array(data.user_ids()), np.array(data.source_ids)
    wanted, (draw_N, row_N, _) = _wanted(draws)
    item_N = wanted.get_level_values(2)
    past_R = [items[draws[0].histories(i)].tolist() for i in range(len(draws[0]))]
    columns = {
        "draw": draw_N,
        "user_id": users[wanted.get_level_values(1)],
        "history": [past_R[row] for row in row_N],
        "item_id": items[item_N],
        "title": np.array(data.titles)[item_N],
    }
    table = pd.DataFrame(columns)
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table["history"] = table["history"].map(json.dumps)
        table["title"] = table["title"].map(inert)
        table.to_csv(path, index=False, sep=separator)
    return path


def read_predictions(path: Path, data: PreparedData, split: Split) -> Floats:
    """The scores of a file, as `[D, R, C]`, for the split's rows in their order.

    It is CSV, TSV or Parquet with the columns user_id, item_id (as in the raw data), score (higher
    is better) and, where there are several draws, draw.

    Raises:
        ConfigError: another kind of file.
        DataError: a line that is broken, repeated or of no candidate, or a candidate without a
            score; says which.
    """
    lines = _lines(path)
    print(f"opening the {split} split for {show(path.stem)}", flush=True)
    draws = held_out(data, split)
    score_N = pd.to_numeric(lines["score"], errors="coerce").to_numpy(np.float64)
    _refuse(path, lines, ~np.isfinite(score_N), "has a score that is no finite number")
    draw_N = pd.to_numeric(lines["draw"], errors="coerce").to_numpy(np.float64)
    _refuse(path, lines, ~np.isin(draw_N, range(len(draws))), f"names none of {len(draws)} draws")
    user_N = pd.Index(data.user_ids()).get_indexer(pd.Index(lines["user"]))
    item_N = pd.Index(data.source_ids).get_indexer(pd.Index(lines["item"]))
    _refuse(path, lines, user_N < 0, "names a user that the data does not have")
    _refuse(path, lines, item_N < 0, "names an item that the data does not have")
    wanted, places = _wanted(draws)
    found_N = wanted.get_indexer(pd.MultiIndex.from_arrays([draw_N.astype(int), user_N, item_N]))
    _refuse(path, lines, found_N < 0, f"is none of the {split} candidates")
    _refuse(path, lines, pd.Series(found_N).duplicated().to_numpy(), "repeats a candidate")
    missing = np.setdiff1d(np.arange(len(wanted)), found_N)
    if missing.size:
        sets = wanted[missing].droplevel(2).nunique()
        draw, user, item = wanted[missing[0]]
        raise DataError(
            f"{path} lacks {missing.size:,} of {len(wanted):,} {split} candidates, in {sets:,}"
            f" sets; first: draw {draw}, user_id {data.user_ids()[user]!r}, item_id"
            f" {data.source_ids[item]!r}. Score every candidate"
        )
    shape = (len(draws), *candidate_sets(draws[0]).shape)
    scores_DRC = np.full(shape, np.finfo(np.float64).min)
    scores_DRC[tuple(index[found_N] for index in places)] = score_N
    return scores_DRC


def judge(path: Path, data: PreparedData, split: Split, store: Store) -> dict[str, Any]:
    """Metrics of a file of predictions, and paired tests against every evaluation in the store.

    An evaluation of a fixed sample of the rows is compared on these, which the file's name says.
    """
    scores_DRC, own = read_predictions(path, data, split), path.stem
    draws = held_out(data, split)
    vectors = {own: per_user(scores_DRC, draws)}
    methods: list[dict[str, Any]] = [{"name": own, "scorer": "file", "seconds": None}]
    claims = []
    for name, stored_DRC, seconds in _stored(data, split, store):
        some = held_out(data, split, stored_DRC.shape[1])
        first, label = own, name if name not in vectors else f"{name} ({len(vectors)})"
        if len(some[0]) < len(draws[0]):
            first = f"{own} (on {len(some[0])} rows)"
            common_R = np.isin(draws[0].user_R, some[0].user_R)
            vectors[first] = per_user(scores_DRC[:, common_R], some)
        vectors[label] = per_user(stored_DRC, some)
        methods.append({"name": label, "scorer": "rsllm", "seconds": seconds})
        claims.append(Claim(first, label))
    for method in methods:
        found = vectors[method["name"]]
        method.update(n=len(found["MRR"]), metrics=estimates(found), generation=None)
    return {
        "split": split,
        "data": data.path.name,
        "draws": len(draws),
        "methods": methods,
        "pairs": compare(vectors, claims, compared_metrics()),
    }


def _stored(data: PreparedData, split: Split, store: Store) -> Iterator[tuple[str, Floats, float]]:
    for name in Mirror(store.below("evaluation")).names():
        folder = store.local(f"evaluation/{name}")
        inputs = manifest(folder)["inputs"]
        if inputs["data"] == data.path.name and inputs["split"] == split:
            answers = read_json(folder / ANSWERS)
            yield answers["name"], read_scores(folder)["scores"], answers["seconds"]


def _separator(path: Path) -> str:
    if path.suffix not in _SEPARATORS:
        raise ConfigError(f"{path} is no .csv, .tsv or .parquet file; rename or convert it")
    return _SEPARATORS[path.suffix]


def _lines(path: Path) -> pd.DataFrame:
    """The lines as text: user, item, score, draw, and each one's number in the file."""
    _separator(path)
    files = find_files(str(path), "*")
    if not files:
        raise ConfigError(f"there is no file {path}")
    remedy = "It needs user_id, item_id, score and, for several draws, draw"
    table = TableFormat(files=path.name, columns=_NAMES, encoding="utf-8", remedy=remedy)
    table, _ = settle(table, files)
    if "draw" in columns_of(files[0], table):
        table = replace(table, columns=_NAMES | {"draw": "draw"})
    check(files, table)
    parts = []
    for _, first, piece in read_all(files, table):
        for line, (reason, _) in piece.broken.items():
            raise DataError(f"{path}:{first + line} is no prediction: {reason}")
        texts = {role: as_text(piece.columns[role].combine_chunks(), {}) for role in table.columns}
        parts.append(pa.table(texts).to_pandas().assign(line=first + np.array(piece.lines)))
    lines = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if lines.empty:
        raise DataError(f"{path} has no predictions")
    return lines if "draw" in lines else lines.assign(draw="0")


def _refuse(path: Path, lines: pd.DataFrame, bad_N: NDArray[np.bool_], what: str) -> None:
    bad = lines[bad_N]
    if len(bad):
        first = bad.iloc[0]
        raise DataError(
            f"{path}:{first['line']} {what}: user_id {first['user']!r}, item_id"
            f" {first['item']!r}, score {first['score']!r}, draw {first['draw']!r}"
            f" ({len(bad):,} such lines)"
        )


def _wanted(draws: Sequence[Rows]) -> tuple[pd.MultiIndex, list[NDArray[np.int64]]]:
    """(draw, user, item) of every candidate, and where its score belongs in `[D, R, C]`."""
    assert len(np.unique(draws[0].user_R)) == len(draws[0]), "no split holds out a user twice"
    sets_DRC = np.stack([candidate_sets(rows) for rows in draws])
    places = list(np.nonzero(sets_DRC != NO_ITEM))
    users = draws[0].user_R[places[1]]
    return pd.MultiIndex.from_arrays([places[0], users, sets_DRC[tuple(places)]]), places
