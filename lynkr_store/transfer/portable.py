"""Stored values in the one form that every database and file can hold.

SQLite keeps what another program stored: a fraction in a column of whole numbers, text in a
column of numbers. PostgreSQL and Parquet refuse such values. So each copy converts them, into
whatever it copies, and the copies of one source are equal.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from types import NoneType
from typing import Any, Final

from sqlalchemy import Float, String, Table

from lynkr_store.db.column_types import EpochMillis, Flag
from lynkr_store.db.models import SUMMED
from lynkr_store.ingest.batch import Columns
from lynkr_store.schemas import LONG_FIELDS, NAME_MAX_CHARS, Reading, sanitize_text
from lynkr_store.schemas.events import as_json
from lynkr_store.schemas.units import COUNT
from lynkr_store.schemas.values import INT64_MAX, INT64_MIN, epoch_ms

Coerced = Counter[tuple[str, str]]
"""How many values were changed, by column and kind of change."""

Change = Callable[[str], None]
"""Counts one changed value by the kind of change."""


_EXACT: Final = 2**53
"""Up to here, doubles hold every whole number."""


class Kind(Enum):
    """What a column holds."""

    WHOLE = "whole number"
    REAL = "number"
    FLAG = "flag"
    INSTANT = "instant"
    NAME = "name"
    LONG_TEXT = "text"


def kinds_of(table: Table) -> dict[str, Kind]:
    """What each column of a table holds."""
    return {column.name: _kind(column.name, column.type) for column in table.c}


def _kind(name: str, type_: object) -> Kind:
    if isinstance(type_, EpochMillis):
        return Kind.INSTANT
    if isinstance(type_, Flag):
        return Kind.FLAG
    if isinstance(type_, String):
        return Kind.LONG_TEXT if name in LONG_FIELDS else Kind.NAME
    # latency_ms is declared INTEGER in the gateway's file, and sometimes holds a fraction
    fraction = isinstance(type_, Float) or SUMMED.get(name, COUNT) is not COUNT
    return Kind.REAL if fraction else Kind.WHOLE


def required(table: Table) -> tuple[str, ...]:
    """The columns without which no row is: they identify it."""
    return tuple(column.name for column in table.c if not column.nullable)


class Converter:
    """Converts the columns of one table, and counts what it changed.

    Args:
        table: The table.

    Attributes:
        coerced: How many values were changed: ``rounded`` to a whole number, ``parsed`` from a
            text, ``unreadable`` and so stored as NULL, ``cut`` to 512 characters, or a character
            that databases cannot store (``nul``, ``surrogate``) was replaced.
        left_out: How many rows lack a value that the table requires, by that column.
    """

    def __init__(self, table: Table) -> None:
        self._kinds = kinds_of(table)
        self._required = required(table)
        self.coerced: Coerced = Counter()
        self.left_out: Counter[str] = Counter()

    def convert(self, columns: Mapping[str, Sequence[Any]]) -> Columns:
        """The rows with portable values, without rows that lack a required value."""
        found: Columns = {
            name: _READERS[self._kinds[name]](values, self._counter(name))
            for name, values in columns.items()
        }
        lacking: dict[int, str] = {}
        for name in self._required:
            values = found.get(name)
            if values is None:
                lacking |= dict.fromkeys(range(_length(found)), name)
            elif None in values:
                lacking |= {n: name for n, value in enumerate(values) if value is None}
        if not lacking:
            return found
        self.left_out.update(lacking.values())
        kept = [n for n in range(_length(found)) if n not in lacking]
        return {name: [values[n] for n in kept] for name, values in found.items()}

    def _counter(self, name: str) -> Change:
        def count(change: str) -> None:
            self.coerced[name, change] += 1

        return count


def _length(columns: Columns) -> int:
    return max(map(len, columns.values()), default=0)


def _wholes(values: Sequence[Any], changed: Change) -> Sequence[int | None]:
    if set(map(type, values)) <= {int, NoneType} and _in_64_bits(values):
        return values
    return [_whole(value, changed) for value in values]


def _in_64_bits(values: Iterable[int | None]) -> bool:
    numbers = [value for value in values if value is not None]
    return not numbers or (min(numbers) >= INT64_MIN and max(numbers) <= INT64_MAX)


def _whole(value: object, changed: Change) -> int | None:
    """The number, rounded half up, as statistics round it."""
    number = _number(value, changed)
    if number is None:
        return None
    rounded = number if isinstance(number, int) else math.floor(number + 0.5)
    if not INT64_MIN <= rounded <= INT64_MAX:
        changed("unreadable")
        return None
    if rounded != number:
        changed("rounded")
    return rounded


def _number(value: object, changed: Change) -> int | float | None:
    if value is None or type(value) is int:
        return value
    number = None if isinstance(value, bool) else Reading().number(value)
    if number is None:
        changed("unreadable")
    elif isinstance(value, str):
        changed("parsed")
    return number


def _reals(values: Sequence[Any], changed: Change) -> Sequence[int | float | None]:
    types = set(map(type, values))
    if types <= {float, int, NoneType}:
        numbers = [value for value in values if value is not None]
        if int not in types:
            exact = all(map(math.isfinite, numbers))
        else:
            exact = all(-_EXACT <= number <= _EXACT for number in numbers)
        if exact:
            return values
    return [_real(value, changed) for value in values]


def _real(value: object, changed: Change) -> int | float | None:
    number = _number(value, changed)
    if not isinstance(number, int) or -_EXACT <= number <= _EXACT:
        return number
    try:
        real = float(number)
    except OverflowError:
        changed("unreadable")
        return None
    if real != number:
        changed("rounded")
    return real


def _flags(values: Sequence[Any], changed: Change) -> Sequence[int | None]:
    return [_flag(value, changed) for value in values]


def _flag(value: object, changed: Change) -> int | None:
    if value is None:
        return None
    if value in (0, 1):
        return int(bool(value))
    changed("unreadable")
    return None


def _instants(values: Sequence[Any], changed: Change) -> Sequence[int | None]:
    if set(map(type, values)) <= {int} and _in_64_bits(values):
        return values
    return [_instant(value, changed) for value in values]


def _instant(value: object, changed: Change) -> int | None:
    """Epoch milliseconds; fractions are cut, as a window's bounds treat them."""
    if isinstance(value, str):
        with suppress(ValueError):
            found = epoch_ms(value)
            changed("parsed")
            return found
    number = _number(value, changed)
    if number is None:
        return None
    cut = math.floor(number)
    if not INT64_MIN <= cut <= INT64_MAX:
        changed("unreadable")
        return None
    if cut != number:
        changed("rounded")
    return cut


def _names(values: Sequence[Any], changed: Change) -> Sequence[str | None]:
    texts = _texts(values, changed)
    if max(map(len, filter(None, texts)), default=0) <= NAME_MAX_CHARS:
        return texts
    return [_cut(text, changed) for text in texts]


def _cut(text: str | None, changed: Change) -> str | None:
    if text is None or len(text) <= NAME_MAX_CHARS:
        return text
    changed("cut")
    return text[:NAME_MAX_CHARS]


def _texts(values: Sequence[Any], changed: Change) -> Sequence[str | None]:
    if set(map(type, values)) <= {str, NoneType} and _storable("".join(filter(None, values))):
        return values
    return [_text(value, changed) for value in values]


def _storable(text: str) -> bool:
    return sanitize_text(text)[1] is None


def _text(value: object, changed: Change) -> str | None:
    if value is None:
        return None
    if isinstance(value, dict | list):  # JSON in a line of JSON
        return _json(value, changed)
    text = Reading().text(value)
    if not isinstance(value, str):
        changed("parsed")
    sanitized, cause = sanitize_text(text or "")
    if cause:
        changed(cause)
    return sanitized


def _json(value: object, changed: Change) -> str | None:
    causes: list[str] = []
    try:
        text = as_json(value, causes)
    except ValueError:  # Parquet has parts that JSON cannot express
        causes, text = ["unreadable"], None
    for cause in causes:
        changed("unreadable" if cause == "not_finite" else cause)
    return text


_READERS: Final[Mapping[Kind, Callable[[Sequence[Any], Change], Sequence[Any]]]] = {
    Kind.WHOLE: _wholes,
    Kind.REAL: _reals,
    Kind.FLAG: _flags,
    Kind.INSTANT: _instants,
    Kind.NAME: _names,
    Kind.LONG_TEXT: _texts,
}
