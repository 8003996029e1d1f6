"""Files of Parquet, by pyarrow, an extra.

Instants are timestamps in milliseconds with the zone UTC, flags booleans. On the way in, other
types that mean the same are taken: integers of any width, floats for whole numbers, as pandas
writes them beside missing values, dictionaries of texts, instants of any unit with a zone.
"""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from lynkr_store.db.models import TELEMETRY
from lynkr_store.exceptions import BadArgument, MissingDriver
from lynkr_store.ingest.batch import Columns
from lynkr_store.process.files import alone, identity_of, make_private
from lynkr_store.schemas.events import similar_field
from lynkr_store.schemas.values import INT64_MAX
from lynkr_store.transfer.portable import Kind, kinds_of, required
from lynkr_store.transfer.tables import ANCHORS, NOTHING, PAGE_ROWS

_KINDS: Final = kinds_of(TELEMETRY)
_REQUIRED: Final = tuple(name for name in required(TELEMETRY) if name != "id")
_GROUP_BYTES: Final = 64 * 2**20  # of a row group in memory: texts may have 128 KB a row
_PER_MS: Final = {"ms": 1, "us": 1_000, "ns": 1_000_000}


def _arrow() -> tuple[Any, ModuleType]:
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as missing:
        raise MissingDriver(
            "pyarrow is not installed: pip install 'lynkr-store[parquet]'"
        ) from missing
    return pa, parquet


@cache
def _schema() -> Any:
    arrow, _ = _arrow()
    types = {
        Kind.WHOLE: arrow.int64(),
        Kind.REAL: arrow.float64(),
        Kind.FLAG: arrow.bool_(),
        Kind.INSTANT: arrow.timestamp("ms", "UTC"),
        Kind.NAME: arrow.string(),
        Kind.LONG_TEXT: arrow.string(),
    }
    return arrow.schema([(name, types[kind]) for name, kind in _KINDS.items()])


def _opened(path: Path) -> Any:
    arrow, parquet = _arrow()
    try:
        return parquet.ParquetFile(path)
    except arrow.ArrowException:
        raise BadArgument(f"{path}: not a Parquet file, or it was not written to its end") from None


def count(path: Path) -> int:
    """The number of rows of a file."""
    with _opened(path) as file:
        return int(file.metadata.num_rows)


def read(path: Path) -> Iterator[Columns]:
    """The rows of a file, in pages; a file without ids has them numbered from 1.

    Raises:
        BadArgument: It is not a Parquet file, has other columns, or its ids do not ascend.
        MissingDriver: pyarrow is not installed.
    """
    arrow, _ = _arrow()
    with _opened(path) as file:
        readers = _readers(arrow, file.schema_arrow, path)
        last, rows = NOTHING, 0
        try:
            for batch in file.iter_batches(PAGE_ROWS):
                page = {n: readers[n](batch.column(n)) for n in batch.schema.names}
                if "id" not in page:
                    page["id"] = range(rows + 1, rows + 1 + batch.num_rows)
                last = _last_id(page["id"], last, path)
                rows += batch.num_rows
                yield page
        except (arrow.ArrowException, OSError):
            raise BadArgument(f"{path}: the file is damaged after row {rows:,}") from None


def newest(path: Path) -> Columns:
    """What identifies the last rows of a file; empty without rows.

    Raises:
        BadArgument: It is not a Parquet file, or has other columns.
        MissingDriver: pyarrow is not installed.
    """
    arrow, _ = _arrow()
    with _opened(path) as file:
        readers = _readers(arrow, file.schema_arrow, path)
        names = [name for name in required(TELEMETRY) if name in readers]
        for group in reversed(range(file.num_row_groups)):
            table = file.read_row_group(group, columns=names)
            if table.num_rows:
                last = table.slice(max(0, table.num_rows - ANCHORS))
                return {name: readers[name](last.column(name)) for name in names}
    return {}


def _last_id(ids: Sequence[Any], last: int, path: Path) -> int:
    for row_id in ids:
        if type(row_id) is not int or not last < row_id <= INT64_MAX:
            raise BadArgument(
                f"{path}: ids must be whole numbers of 64 bits that ascend; sort the rows by id"
            )
        last = row_id
    return last


def _readers(arrow: Any, schema: Any, path: Path) -> dict[str, Callable[[Any], Sequence[Any]]]:
    for name in schema.names:
        if name not in _KINDS:
            raise BadArgument(f"{path}: unknown column {name[:64]!r}{similar_field(name)}")
        if schema.names.count(name) > 1:
            raise BadArgument(f"{path}: more than one column is named {name}; rename one of them")
    for name in _REQUIRED:
        if name not in schema.names:
            raise BadArgument(
                f"{path}: the column {name} is missing; each row needs {', '.join(_REQUIRED)}"
            )
    return {field.name: _reader(arrow, field, path) for field in schema}


def _reader(arrow: Any, field: Any, path: Path) -> Callable[[Any], Sequence[Any]]:
    type_ = field.type
    if arrow.types.is_timestamp(type_):
        if type_.tz is None:
            raise BadArgument(
                f"{path}: the column {field.name} has no time zone; write it as a timestamp with "
                "the zone UTC"
            )
        return lambda column: _milliseconds(column.cast(arrow.int64()).to_pylist(), type_.unit)
    if arrow.types.is_decimal(type_) or (field.name == "id" and arrow.types.is_floating(type_)):
        return lambda column: [_plain(value) for value in column.to_pylist()]
    return lambda column: column.to_pylist()


def _milliseconds(values: Sequence[int | None], unit: str) -> Sequence[int | None]:
    if unit == "s":
        return [None if value is None else value * 1_000 for value in values]
    return [None if value is None else value // _PER_MS[unit] for value in values]


def _plain(value: Decimal | float | None) -> int | float | None:
    if value is None:
        return None
    return int(value) if value == value // 1 else float(value)


@contextmanager
def written(path: Path) -> Iterator[Callable[[Columns], None]]:
    """Write a file anew: the rows that it has, then those that are passed; it replaces it at last.

    Raises:
        BadArgument: The file has other columns than a copy writes.
        MissingDriver: pyarrow is not installed.
    """
    arrow, parquet = _arrow()
    part = path.with_name(f"{path.name}.part")  # an interrupted copy may have left one
    make_private(part)
    with part.open("r+b") as file, alone(file, path):
        if identity_of(part) != identity_of(file.fileno()):  # it was put in its place meanwhile
            raise OSError(errno.EBUSY, "another process has written it meanwhile")
        file.truncate()
        with parquet.ParquetWriter(file, _schema(), compression="zstd") as writer:
            if path.exists():
                _take_over(path, writer)
            groups = _Groups(arrow, writer)
            yield groups.add
            groups.flush()
        os.fsync(file.fileno())
        part.replace(path)


def _take_over(path: Path, writer: Any) -> None:
    with _opened(path) as file:
        if not file.schema_arrow.equals(_schema()):
            raise BadArgument(
                f"{path}: its columns are not those that a copy writes; give another path"
            )
        for group in range(file.num_row_groups):
            writer.write_table(file.read_row_group(group))


class _Groups:
    """Collects rows to row groups: a small group is read slowly, a large one needs memory."""

    def __init__(self, arrow: Any, writer: Any) -> None:
        self._arrow = arrow
        self._writer = writer
        self._batches: list[Any] = []

    def add(self, columns: Columns) -> None:
        length = max(map(len, columns.values()), default=0)
        nothing = (None,) * length
        arrays = [
            self._arrow.array(_values(columns.get(field.name, nothing), field.name), field.type)
            for field in _schema()
        ]
        self._batches.append(self._arrow.RecordBatch.from_arrays(arrays, schema=_schema()))
        if sum(batch.nbytes for batch in self._batches) >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._batches:
            self._writer.write_table(self._arrow.Table.from_batches(self._batches))
            self._batches = []


def _values(values: Sequence[Any], name: str) -> Sequence[Any]:
    if _KINDS[name] is Kind.FLAG:
        return [None if value is None else bool(value) for value in values]
    return values
