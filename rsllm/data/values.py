"""Columns of text as numbers, times and ids; a value that is none of these is never guessed at."""

import re
from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rsllm.data.sequences import Bools

MAX_TIME = 2**32 * 1000
"""Milliseconds since 1970 (year 2106); beyond it a time is in another unit."""
UNITS = {"seconds": 1e3, "milliseconds": 1.0, "microseconds": 1e-3, "nanoseconds": 1e-6}
"""Milliseconds in one of each."""
_DATES = (
    *("%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%Y/%m/%d", "%Y.%m.%d"),
    *("%m %d, %Y", "%b %d, %Y", "%B %d, %Y", "%d %b %Y", "%d %B %Y", "%d-%b-%Y"),
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
FORMATS = (
    *map("".join, product(_DATES, _CLOCKS)),
    *("%a, %d %b %Y %H:%M:%S %z", "%a %b %d %H:%M:%S %z %Y", "%d/%b/%Y:%H:%M:%S %z"),
)
_DAY = r"^(19|20)\d\d(0[1-9]|1[0-2])([0-2]\d|3[01])$"
"""As seconds, these would all be days of 1970."""
_FLOAT_ID = r"^(-?[0-9]+)\.0$"


def as_text(column: pa.Array, no_text: dict[int, str]) -> pa.Array:
    """Return a column as strings; `no_text` takes the rows that are no UTF-8, and why."""
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        values = column.to_pylist()
    for row, value in enumerate(values):
        try:
            values[row] = value.decode()
        except UnicodeDecodeError as error:
            values[row] = value.decode(errors="backslashreplace")
            no_text[row] = f"undecodable text at byte {error.start} of a field"
    return pa.array(values)


def fold_ids(ids: pa.Array) -> tuple[pa.Array, Bools]:
    """Ids without the ".0" of floats, and which of them had it."""
    if not pc.any(pc.ends_with(ids, ".0")).as_py():
        return ids, np.zeros(len(ids), bool)
    plain = pc.replace_substring_regex(ids, _FLOAT_ID, r"\1")
    return plain, np.asarray(pc.not_equal(plain, ids))


def fold_id(text: str) -> str:
    """One id without the ".0" of floats."""
    return re.sub(_FLOAT_ID, r"\1", text)


def numbers(column: pa.Array) -> tuple[NDArray[np.float64], Bools]:
    """Return the values of a column, and which of them are no finite numbers."""
    try:
        values_R = np.asarray(column.cast(pa.float64()))
    except pa.ArrowInvalid:
        values_R = np.asarray(pd.to_numeric(column.to_pandas(), errors="coerce"), np.float64)
    return values_R, ~np.isfinite(values_R)


def times(column: pa.Array, unit: str) -> tuple[NDArray[np.int64], Bools]:
    """Return milliseconds since 1970, and which values are no time between then and 2106."""
    if unit in UNITS:
        time_R, bad_R = numbers(column)
        time_R = time_R * UNITS[unit]
    else:
        form = unit
        if unit == "iso8601":
            form = "ISO8601"
            # Without a zone that only says UTC in letters, and with a point before fractions.
            for pattern, written in ((r"\s*(UTC|GMT)$", ""), (r"(:\d\d),(\d+)", r"\1.\2")):
                column = pc.replace_substring_regex(column, pattern, written)
        stamps = pd.to_datetime(column.to_pandas(), errors="coerce", format=form, utc=True)
        time_R = stamps.to_numpy("datetime64[ms]").astype(np.int64).astype(np.float64)
        bad_R = stamps.isna().to_numpy()
    bad_R = bad_R | (time_R < 0) | (time_R > MAX_TIME)
    return np.where(bad_R, 0, time_R).round().astype(np.int64), bad_R


def time_units(values: Sequence[str]) -> dict[str, int]:
    """The units and formats that read most of some times, and how many each; several may tie."""
    column = pa.array([value for value in values if value.strip()], pa.string())
    days = int(pc.sum(pc.match_substring_regex(column, _DAY)).as_py() or 0)
    if days and days == len(column):
        return {"%Y%m%d": days}
    value_R, bad_R = numbers(column)
    if len(column) and bad_R.mean() < 0.5:
        middle = float(np.median(np.abs(value_R[~bad_R])))
        fits = (unit for unit, size in UNITS.items() if middle * size <= MAX_TIME)
        return {next(fits, "seconds"): int((~bad_R).sum())}
    read = {unit: int((~times(column, unit)[1]).sum()) for unit in ("iso8601", *FORMATS)}
    most = max(read.values())
    return {unit: count for unit, count in read.items() if count == most > 0}
