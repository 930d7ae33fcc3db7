"""Raw files as columns of strings: delimited text, JSON and Parquet, in bounded pieces.

A large file is cut into chunks that are read independently of each other; a chunk is read in
pieces, and no line of it is lost: it is in a piece, blank, or in the piece's list of broken lines.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rsllm.data import objects
from rsllm.data.delimited import fields, read_delimited, spans_lines
from rsllm.data.files import Chunk, Piece, RawFile, TableFormat, head, seekable
from rsllm.data.values import UNITS
from rsllm.errors import ConfigError, DataError

CHUNK_BYTES = 32 << 20
ROWS_PER_PIECE = 1 << 18


def chunks_of(files: Sequence[RawFile], table: TableFormat) -> list[Chunk]:
    """The chunks of all files, in their order; a file that can only be read from its beginning
    is one chunk."""
    chunks = []
    for file in files:
        if file.suffix == ".parquet":
            groups = parquet(file).num_row_groups
            chunks += [Chunk(file, group, group + 1) for group in range(groups)]
        elif (
            file.compression
            or not seekable(table.encoding)
            or objects.is_array(file)
            or (table.quote and spans_lines(file, table))
        ):
            chunks.append(Chunk(file))
        else:
            size = int(file.system.size(file.path))
            starts = range(0, size, CHUNK_BYTES)
            chunks += [Chunk(file, start, min(start + CHUNK_BYTES, size)) for start in starts]
    return chunks


def check(files: Sequence[RawFile], table: TableFormat) -> None:
    """Look at the columns of all files. Only those of the table's roles need be the same in all.

    Raises:
        ConfigError: a file lacks a column, or has other columns than the first one.
    """
    wanted, first = table.columns.values(), dict[str, str]()
    for file in files:
        types = dict.fromkeys(columns_of(file, table), "text")
        if file.suffix == ".parquet":
            types = {field.name: str(field.type) for field in parquet(file).schema_arrow}
        missing = [column for column in wanted if column not in types]
        # A JSON file without objects names no columns, and is no fault.
        if missing and (types or file.suffix not in objects.SUFFIXES):
            held = f"it has {', '.join(types)}" if types else "it is empty"
            raise ConfigError(f"{file.name} has no column {missing[0]!r}; {held}. {table.remedy}")
        types = {column: types.get(column, "text") for column in wanted}
        first = first or types
        if other := sorted(types.items() ^ first.items()):
            raise ConfigError(
                f"{file.name} differs from {files[0].name} in column {other[0][0]!r}; give all"
                " files of a table the same columns"
            )


def parquet(file: RawFile) -> pq.ParquetFile:
    """Return a Parquet file, open.

    Raises:
        DataError: it is none, or not whole.
    """
    try:
        return pq.ParquetFile(file.open(), page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.name} is no whole Parquet file: {error}") from error


def columns_of(file: RawFile, table: TableFormat) -> tuple[str, ...]:
    """The columns of a file, in order; those of JSON as its first thousand objects have them.

    Raises:
        ConfigError: its lines end as nothing here does.
    """
    if table.header:
        return tuple(table.header)
    if file.suffix == ".parquet":
        return tuple(parquet(file).schema_arrow.names)
    if file.suffix in objects.SUFFIXES:
        return objects.names_in(file, table.encoding)
    line = "".join(head(file, table.encoding))
    if "\r" in line:
        raise ConfigError(
            f"{file.name} has carriage returns for line ends; convert them to newlines"
        )
    return tuple(fields(line, table) or line.split(table.separator)) if line else ()


def read_all(files: Sequence[RawFile], table: TableFormat) -> Iterator[tuple[RawFile, int, Piece]]:
    """All pieces of some files, each with the line of its file, from 1, that it counts from."""
    for file in files:
        first = 1
        for chunk in chunks_of([file], table):
            num_lines = 0
            for piece in read(chunk, table):
                yield file, first, piece
                num_lines += piece.num_lines
            first += num_lines


def read(chunk: Chunk, table: TableFormat) -> Iterator[Piece]:
    """Yield the pieces of a chunk, in order."""
    if chunk.file.suffix == ".parquet":
        yield from _read_parquet(chunk, table)
    elif chunk.file.suffix in objects.SUFFIXES:
        yield from objects.read_objects(chunk, table)
    else:
        yield from read_delimited(chunk, table, columns_of(chunk.file, table))


def _read_parquet(chunk: Chunk, table: TableFormat) -> Iterator[Piece]:
    first = 0
    wanted = list(table.columns.values())
    try:
        batches = parquet(chunk.file).iter_batches(
            ROWS_PER_PIECE, row_groups=list(range(chunk.start, chunk.stop or 0)), columns=wanted
        )
        for batch in batches:
            columns = [_plain(batch.column(name), table.time_unit) for name in wanted]
            lines = range(first, first + len(batch))
            yield Piece(pa.table(columns, names=list(table.columns)), lines, {}, len(batch))
            first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{chunk.file.name} is damaged: {error}") from error


def _plain(column: pa.Array, unit: str) -> pa.Array:
    """A typed column as the text that a file would hold; times in the unit, null as empty."""
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("ms"), safe=False)
        if unit in UNITS:
            column = pc.divide(column.cast(pa.int64()).cast(pa.float64()), UNITS[unit])
        elif unit != "iso8601":
            column = pc.strftime(column, unit)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    if pa.types.is_nested(column.type):
        return pa.array([objects.text_of(value) for value in column.to_pylist()], pa.string())
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return column.cast(pa.binary()).fill_null(b"")
    return column.cast(pa.string()).fill_null("")
