"""Stored records as they are read, whatever another program stored.

SQLite keeps what it is given: a real in an integer column, text in a number's column, invalid
UTF-8. `Reading` converts each stored value to what its column means, and counts values that it
cannot interpret.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from types import NoneType
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer

from lynkr_store.exceptions import BadArgument
from lynkr_store.schemas import values
from lynkr_store.schemas.base import FrozenInput, FrozenOutput, construct_all, utc
from lynkr_store.schemas.events import RoutingEvent

_CURSOR_TEXT: Final = re.compile(r"(-?\d{1,19}(\.\d+)?(e[+-]?\d+)?):(-?\d{1,19})", re.ASCII)

Number = int | float
"""A stored number. A real in an integer column is returned as it is (``79.5``)."""

StoredInstant = int | float | str | bytes
"""The timestamp column's raw value; anything but an int was stored by another program."""

# What SQLite itself reads as a number; Python's float() would also accept "1_0", "nan" and "٣".
# Each character can match only one part, so a text that is not a number fails in one pass.
_NUMERIC_TEXT: Final = re.compile(r"\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?\s*", re.ASCII)
_LONGEST_NUMBER: Final = 1_000  # characters; a double has at most 767 digits


def _place(value: object) -> int | float:
    """The timestamp of a cursor that a caller creates.

    Raises:
        ValueError: Not an instant, and not a number of epoch milliseconds within 64 bits.
    """
    with suppress(ValueError):
        number = values.real(value)
        if not number.is_integer() and abs(number) < values.INT64_MAX:
            return number  # as an SQLite file may hold it
    return values.epoch_ms(value)


def _row_id(value: object) -> int:
    return values.in_64_bits(values.whole(value), "a row's id")


class Cursor(FrozenInput):
    """A position in the order ``(timestamp, id)`` of the rows, from which the next page continues.

    A row's own cursor has the stored timestamp, whatever it is. A cursor that a caller creates
    accepts what `RoutingEvent.timestamp` accepts, and fractions of a millisecond.
    """

    timestamp: Annotated[
        StoredInstant, BeforeValidator(_place, json_schema_input_type=datetime | int | float)
    ]
    """The row's timestamp, in epoch milliseconds."""
    id: Annotated[int, BeforeValidator(_row_id)]
    """The row's id."""

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return f"{self.timestamp!s}:{self.id}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the text form, ``<epoch ms>:<id>``.

        Raises:
            BadArgument: The text has another form.
        """
        with suppress(ValueError):
            if found := _CURSOR_TEXT.fullmatch(text):
                instant, *parts, row_id = found.groups()
                timestamp = float(instant) if any(parts) else int(instant)
                return cls(timestamp=timestamp, id=int(row_id))
        raise BadArgument(
            "before: give the cursor of the previous page's last row; its text is <epoch ms>:<id>"
        )


class Reading:
    """Converts stored values to their column's meaning, and counts those it cannot interpret."""

    def __init__(self) -> None:
        self.unreadable = 0

    def number(self, value: object) -> Number | None:
        """The number as stored, also from a text; None for anything else, which is counted."""
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
        """Text; bytes are decoded, with U+FFFD for invalid UTF-8."""
        if value is None or isinstance(value, str):
            return value
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

    def flag(self, value: object) -> bool | None:
        """True or False for 1 or 0; None for anything else, which is counted unless NULL."""
        if value is None:
            return None
        if value in (0, 1):
            return bool(value)
        self.unreadable += 1
        return None

    def instant(self, value: object) -> datetime | None:
        """An aware UTC datetime; None if the stored value is not an instant, which is counted."""
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


def _cursor(value: object) -> object:
    return Cursor.parse(value) if isinstance(value, str) else value


class RoutingRowBrief(FrozenOutput):
    """A stored record without its two texts. None means not measured.

    The fields are those of `RoutingEvent`, plus `id` and `cursor`.
    """

    described_like: ClassVar[type[BaseModel]] = RoutingEvent

    id: int
    """The row's number in its database, in the order of storing."""
    request_id: str | None
    session_id: str | None
    timestamp: datetime | None
    """UTC; None if the stored value is not an instant (`cursor` has the stored value)."""
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
    cursor: Annotated[
        Cursor,
        BeforeValidator(_cursor),
        PlainSerializer(str, when_used="json"),
        Field(repr=False),
    ]
    """This row's position in the list; pass it as ``before=`` for the next page. In JSON it is a
    text, which `Cursor.parse` reads."""

    # The columns that only this store has; the gateway's answers do not include them.
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
        """Convert stored rows, by column, because most columns need no check of each value.

        Args:
            names: The names of the rows' columns.
            rows: Their values, straight from the database.
            reading: Counts the values that it cannot interpret.
        """
        columns = dict(zip(names, zip(*rows, strict=True), strict=False))
        if not columns:
            return []
        read = {name: read(reading, columns[name]) for name, read in _READERS[cls].items()}
        places = zip(columns["timestamp"], columns["id"], strict=True)
        read["cursor"] = construct_all(
            Cursor, ({"timestamp": at, "id": row_id} for at, row_id in places)
        )
        whole = zip(*read.values(), strict=True)
        return construct_all(cls, (dict(zip(read, row, strict=True)) for row in whole))

    def to_gateway(self) -> dict[str, Any]:
        """The row as the gateway's ``query`` returns it: its column names, 0/1 flags, epoch ms."""
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
    """Reads a column: unchanged if it has only the usual types, otherwise value by value."""
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
"""How each model's columns are read."""
