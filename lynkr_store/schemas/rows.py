"""Stored records as they come out, whatever was stored.

SQLite keeps what it was given: a real in an integer column, text in a number's column, bytes that
are no UTF-8. `Reading` turns each stored value into what its column means and counts what could
not be read.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from types import NoneType
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import BeforeValidator, Field

from lynkr_store.schemas import values
from lynkr_store.schemas.base import FrozenInput, FrozenOutput, made, utc

_CURSOR_TEXT: Final = re.compile(r"(-?\d{1,19}(\.\d+)?(e[+-]?\d+)?):(-?\d{1,19})", re.ASCII)

Number = int | float
"""A stored number: a real in an integer's column comes out as it is (``79.5``)."""

StoredInstant = int | float | str | bytes
"""The timestamp column's raw value; anything but an int was stored by another writer."""

# What SQLite itself takes for a number; Python's float() would also accept "1_0", "nan" and "٣".
# Each character can be of one part only, so that a text which is none is told in one pass.
_NUMERIC_TEXT: Final = re.compile(r"\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?\s*", re.ASCII)
_LONGEST_NUMBER: Final = 1_000  # characters; a double's digits are 767 at most


def _place(value: object) -> int | float:
    """The timestamp of a cursor that a caller makes.

    Raises:
        ValueError: It is no instant, and no number of epoch milliseconds within 64 bits.
    """
    with suppress(ValueError):
        number = values.real(value)
        if not number.is_integer() and abs(number) < values.INT64_MAX:
            return number  # as an SQLite file may hold it
    return values.epoch_ms(value)


def _row_id(value: object) -> int:
    return values.in_64_bits(values.whole(value), "a row's id")


class Cursor(FrozenInput):
    """A place in the order ``(timestamp, id)`` of the rows, from which paging goes on.

    A row's own cursor has the timestamp that is stored, whatever that is. One that a caller makes
    takes what `RoutingEvent.timestamp` takes, and a fraction of a millisecond.
    """

    timestamp: Annotated[
        StoredInstant, BeforeValidator(_place, json_schema_input_type=datetime | int | float)
    ]
    id: Annotated[int, BeforeValidator(_row_id)]

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return f"{self.timestamp!s}:{self.id}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form, ``<epoch ms>:<id>``.

        Raises:
            ValueError: Another form.
        """
        with suppress(ValueError):
            if found := _CURSOR_TEXT.fullmatch(text):
                instant, *parts, row_id = found.groups()
                timestamp = float(instant) if any(parts) else int(instant)
                return cls(timestamp=timestamp, id=int(row_id))
        raise ValueError("a cursor is <epoch ms>:<id>, as the last row's cursor says")


class Reading:
    """Reads stored values by their column's meaning and counts those it could not read."""

    def __init__(self) -> None:
        self.unreadable = 0

    def number(self, value: object) -> Number | None:
        """The number as stored; text that is one becomes one; anything else is None, counted."""
        if value is None or type(value) is int:
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        if (
            isinstance(value, str)
            and len(value) <= _LONGEST_NUMBER
            and _NUMERIC_TEXT.fullmatch(value)
        ):
            number = float(value)
            if math.isfinite(number):
                return int(number) if number.is_integer() else number
        self.unreadable += 1
        return None

    def text(self, value: object) -> str | None:
        """Text; bytes are decoded with U+FFFD for what is no UTF-8."""
        if value is None or isinstance(value, str):
            return value
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

    def flag(self, value: object) -> bool | None:
        """True or False for 1 or 0; anything else is None, counted unless NULL."""
        if value is None:
            return None
        if value in (0, 1):
            return bool(value)
        self.unreadable += 1
        return None

    def instant(self, value: object) -> datetime | None:
        """An aware UTC datetime; None, counted, where the stored value names none."""
        if isinstance(value, datetime):
            return value
        number = self.number(value)
        if number is None:
            return None
        try:
            return utc(math.floor(number))
        except OverflowError:
            self.unreadable += 1
            return None


class RoutingRowBrief(FrozenOutput):
    """A stored record without its two texts. None means not measured.

    The fields are those of `RoutingEvent`, plus `id` and `cursor`.
    """

    id: int
    request_id: str | None
    session_id: str | None
    timestamp: datetime | None
    """UTC; None where the stored value names no instant (`cursor` has it as it is)."""
    complexity_score: Number | None
    tier: str | None
    agentic_type: str | None
    tool_count: Number | None
    input_tokens: Number | None
    message_count: Number | None
    request_type: str | None
    provider: str | None
    model: str | None
    routing_method: str | None
    was_fallback: bool | None
    output_tokens: Number | None
    latency_ms: Number | None
    status_code: Number | None
    error_type: str | None
    cost_usd: Number | None
    tool_calls_made: Number | None
    retry_count: Number | None
    circuit_breaker_state: str | None
    quality_score: Number | None
    tokens_per_second: Number | None
    cost_efficiency: Number | None
    base_tier: str | None
    escalation_source: str | None
    propensity: Number | None
    candidates: str | None
    pinned: bool | None
    switch_reason: str | None
    cache_decision: str | None
    cache_read_tokens: Number | None
    cache_creation_tokens: Number | None
    trace_id: str | None
    attempt_index: Number | None
    requested_model: str | None
    ttft_ms: Number | None
    stream: bool | None
    cache_tokens_included: bool | None
    reasoning_tokens: Number | None
    finish_reason: str | None
    attributes: str | None
    cursor: Annotated[Cursor, Field(exclude=True, repr=False)]
    """Where this row stands in the order of the list; pass it as ``before=`` for the next page."""

    # The columns that only this store has: the gateway's own answer leaves them out.
    _OWN: ClassVar[frozenset[str]] = frozenset(
        {
            "trace_id",
            "attempt_index",
            "requested_model",
            "ttft_ms",
            "stream",
            "cache_tokens_included",
            "reasoning_tokens",
            "finish_reason",
            "attributes",
        }
    )

    @classmethod
    def from_stored(
        cls, names: Sequence[str], rows: Iterable[Sequence[Any]], reading: Reading
    ) -> list[Self]:
        """Read stored rows, a column at a time: most need no look at each of their values.

        Args:
            names: Of the rows' columns.
            rows: Their values, straight from the database.
            reading: Counts the values that could not be read.
        """
        columns = dict(zip(names, zip(*rows, strict=True), strict=False))
        if not columns:
            return []
        read = {name: read(reading, columns[name]) for name, read in _READERS[cls].items()}
        places = zip(columns["timestamp"], columns["id"], strict=True)
        read["cursor"] = made(Cursor, ({"timestamp": at, "id": row_id} for at, row_id in places))
        whole = zip(*read.values(), strict=True)
        return made(cls, (dict(zip(read, row, strict=True)) for row in whole))

    def to_gateway(self) -> dict[str, Any]:
        """The row as the gateway's ``query`` gives it: its column names, 0/1 flags, epoch ms."""
        values: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        values["timestamp"] = values.pop("cursor").timestamp
        return {
            name: int(value) if isinstance(value, bool) else value
            for name, value in values.items()
            if name not in self._OWN
        }


class RoutingRow(RoutingRowBrief):
    """A stored record with its texts. None means not measured, or not captured."""

    request_text: str | None
    response_text: str | None


_Read = Callable[[Reading, Sequence[Any]], Sequence[Any]]


def _column_of(one: Callable[[Reading, Any], Any], *usual: type) -> _Read:
    """Reads a column: as it is where it holds the usual types alone, else each value by itself."""
    types = {*usual, NoneType}

    def read(reading: Reading, values: Sequence[Any]) -> Sequence[Any]:
        found = set(map(type, values))
        if found <= types and (float not in found or all(map(math.isfinite, filter(None, values)))):
            return values
        return [one(reading, value) for value in values]

    return read


def _reader_of(annotation: object) -> _Read:
    if annotation == str | None:
        return _column_of(Reading.text, str)
    if annotation == bool | None:
        return _column_of(Reading.flag)
    if annotation == datetime | None:
        return _column_of(Reading.instant)
    return _column_of(Reading.number, int, float)


_READERS: Final = {
    model: {
        name: _reader_of(field.annotation)
        for name, field in model.model_fields.items()
        if name != "cursor"
    }
    for model in (RoutingRowBrief, RoutingRow)
}
"""How a model's columns are read."""
