"""Files of JSON Lines: one row a line, as an object of its columns; absent columns are NULL.

Instants are epoch milliseconds, flags true or false. On the way in an instant may also be ISO 8601
text with a zone, and a JSON column an object or list.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final

from lynkr_store.db.models import TELEMETRY
from lynkr_store.exceptions import BadArgument
from lynkr_store.ingest.batch import Columns, by_column
from lynkr_store.schemas import encoded, epoch_ms
from lynkr_store.schemas.events import similar_field
from lynkr_store.schemas.values import INT64_MAX
from lynkr_store.transfer.portable import Kind, kinds_of, required
from lynkr_store.transfer.tables import ANCHORS, NOTHING, PAGE_ROWS

_KINDS: Final = kinds_of(TELEMETRY)
_FLAGS: Final = frozenset(name for name, kind in _KINDS.items() if kind is Kind.FLAG)
_BOM: Final = b"\xef\xbb\xbf"
_COMPRESSED: Final = {b"\x1f\x8b": "gunzip -c", b"\x28\xb5\x2f\xfd": "zstd -dc"}
_TAIL_BYTES: Final = 65_536
_FIRST: Final = b'{"id":'  # how each line begins that a copy writes


def read_lines(lines: Iterable[bytes], name: str) -> Iterator[Columns]:
    """The rows of a file, in pages, as they are; a file without ids has them numbered from 1.

    Raises:
        BadArgument: A line is not a JSON object, or has an unknown field, or its id is not greater
            than the one before. The message names the file and the line.
    """
    rows = _rows(lines, name)
    while page := list(islice(rows, PAGE_ROWS)):
        yield by_column(page)


def _rows(lines: Iterable[bytes], name: str) -> Iterator[dict[str, Any]]:
    last, numbered = NOTHING, False
    for number, line in enumerate(lines, 1):
        given = line if number > 1 else _without_bom(line, name)
        if not given.strip():
            continue
        where = f"{name}: line {number}"
        row = _row(given, where)
        if last == NOTHING:
            numbered = "id" not in row
        if numbered != ("id" not in row):
            raise BadArgument(f"{where}: give an id in every line, or in none")
        row_id = row.setdefault("id", max(last, 0) + 1)
        if type(row_id) is not int or not last < row_id <= INT64_MAX:
            raise BadArgument(
                f"{where}: ids must be whole numbers of 64 bits that ascend; sort the lines by id"
            )
        last = row_id
        yield row


def _without_bom(line: bytes, name: str) -> bytes:
    for magic, command in _COMPRESSED.items():
        if line.startswith(magic):
            raise BadArgument(
                f"{name}: the file is compressed; decompress it first, as in {command} FILE | "
                "lynkr-store copy - TARGET"
            )
    return line.removeprefix(_BOM)


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or a number of thousands of digits
        ends = "" if line.endswith(b"\n") else ", and the file ends within it"
        raise BadArgument(f"{where}: not JSON in UTF-8{ends}; write one object a line") from None
    if not isinstance(row, dict):
        raise BadArgument(f"{where}: not a JSON object; write one object a line")
    row.pop("cursor", None)  # of the rows that `lynkr-store query --json` shows
    for field in row.keys() - _KINDS.keys():
        raise BadArgument(f"{where}: unknown field {field[:64]!r}{similar_field(field)}")
    if type(row.get("timestamp")) is str:
        with suppress(ValueError):
            row["timestamp"] = epoch_ms(row["timestamp"])
    return row


def lines_of(columns: Columns) -> bytes:
    """The rows as lines."""
    names = list(columns)
    values = [
        [None if v is None else bool(v) for v in each] if name in _FLAGS else each
        for name, each in columns.items()
    ]
    rows = (
        encoded({n: v for n, v in zip(names, row, strict=True) if v is not None})
        for row in zip(*values, strict=True)
    )
    return "".join([f"{row}\n" for row in rows]).encode()


def newest(path: Path) -> Columns:
    """What identifies the last whole rows of a file that a copy wrote; empty without rows.

    Raises:
        BadArgument: The file was written by another program, or changed.
    """
    with path.open("rb") as file:
        end = _whole_lines(file, file.seek(0, os.SEEK_END))
        file.seek(end)
        if not _FIRST.startswith(file.read(len(_FIRST))):
            raise BadArgument(f"{path}: it ends with a line that no copy wrote; give another path")
        start = end
        for _ in range(ANCHORS):
            start = _whole_lines(file, start - 1)
        file.seek(start)
        lines = file.read(end - start).split(b"\n")[:-1]
    rows = [_row(line, f"{path}: the last lines") for line in lines]
    if any(type(row.get("id")) is not int for row in rows):
        raise BadArgument(
            f"{path}: one of the last lines has no id, so no copy wrote it; give another path"
        )
    return by_column([{name: row.get(name) for name in required(TELEMETRY)} for row in rows])


def cut_incomplete(file: IO[bytes]) -> None:
    """Remove the incomplete line that an interrupted copy left at the end."""
    file.truncate(_whole_lines(file, file.seek(0, os.SEEK_END)))
    file.seek(0, os.SEEK_END)


def _whole_lines(file: IO[bytes], size: int) -> int:
    """The number of bytes up to the last line's end."""
    end = size
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0
