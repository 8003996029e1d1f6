"""From what a caller recorded to the row that is stored: checked, mended, redacted, completed."""

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from lynkr_store.rows import Row
from lynkr_store.schemas import (
    FLAG_FIELDS,
    LONG_FIELDS,
    TEXT_FIELDS,
    RoutingEvent,
    mend_text,
    plain_row,
)

_CAUSES: Final = {
    "missing": "no_provider",
    "extra_forbidden": "unknown_name",
    "greater_than_equal": "out_of_domain",
    "less_than_equal": "out_of_domain",
    "out_of_domain": "out_of_domain",
    "naive_datetime": "naive_datetime",
}


@dataclass(frozen=True)
class TextPolicy:
    """What is kept of what people and models wrote.

    Attributes:
        capture: Keep the two texts at all.
        max_chars: Characters kept of each of the two.
        redact: Takes each free text, the JSON ones too, and returns what is kept of it.
    """

    capture: bool = True
    max_chars: int = 65_536
    redact: Callable[[str], str] | None = None


def new_ids() -> Iterator[str]:
    """UUIDs of version 4, as many as are wanted.

    The system is asked for chance once in 64 times. Each time lets go of the interpreter, which
    beside threads that are at work may take 5 ms to get back.
    """
    while True:
        digits = os.urandom(64 * 16).hex()
        for at in range(0, len(digits), 32):
            d = digits[at : at + 32]  # not by uuid.UUID, which takes twice as long
            variant = "89ab"[int(d[16], 16) % 4]
            yield f"{d[:8]}-{d[8:12]}-4{d[13:16]}-{variant}{d[17:20]}-{d[20:]}"


def _new_id() -> str:
    return str(uuid.uuid4())


def row_of(
    record: Mapping[str, Any] | RoutingEvent,
    stamp_ms: int,
    policy: TextPolicy,
    new_id: Callable[[], str] = _new_id,
) -> tuple[Row, tuple[str, ...]]:
    """Make the row of one record.

    Args:
        record: What was recorded.
        stamp_ms: The instant of a record that names none, in epoch milliseconds.
        policy: What is kept of the texts.
        new_id: Names a record that has no ``request_id``.

    Returns:
        The row, and one cause for each value that was mended.

    Raises:
        ValidationError: The record is not one; the error names the field, and no value.
    """
    earlier: tuple[str, ...] = ()
    if isinstance(record, RoutingEvent):
        # checked again: model_copy(update=…) and model_construct() check nothing
        earlier = record.mended
        record = {k: v for k, v in vars(record).items() if k in RoutingEvent.model_fields}
    event = RoutingEvent.model_validate(record)
    row = vars(event).copy()
    for name in FLAG_FIELDS:  # as they are stored: SQLite's driver looks for an adapter of a bool
        row[name] = None if row[name] is None else int(row[name])
    return row, earlier + event.mended + _completed(row, stamp_ms, policy, new_id)


def row_of_plain(
    record: dict[str, Any],
    stamp_ms: int,
    policy: TextPolicy,
    new_id: Callable[[], str] = _new_id,
) -> tuple[Row, tuple[str, ...]]:
    """As `row_of`, in a third of the time where nothing is to be mended.

    The record is of builtin types alone; see `lynkr_store.schemas.plain_row`.
    """
    row = plain_row(record)
    if row is None:
        return row_of(record, stamp_ms, policy, new_id)
    return row, _completed(row, stamp_ms, policy, new_id)


def _completed(
    row: Row, stamp_ms: int, policy: TextPolicy, new_id: Callable[[], str]
) -> tuple[str, ...]:
    """Fill in what a checked record left out, and apply the policy; a cause for what was mended."""
    mended: tuple[str, ...] = ()
    if row.get("request_id") is None:
        row["request_id"] = new_id()
    if row.get("timestamp") is None:
        row["timestamp"] = stamp_ms
    if not policy.capture:
        row.update(dict.fromkeys(TEXT_FIELDS))
    if policy.redact is not None:
        mended = _redact(row, policy.redact)
    for name in TEXT_FIELDS:
        text = row.get(name)
        if text is not None and len(text) > policy.max_chars:
            row[name] = text[: policy.max_chars]
            mended += ("cut",)
    return mended


def _redact(row: Row, redact: Callable[[str], str]) -> tuple[str, ...]:
    """Pass every free text of the row through the caller's function, before it is cut.

    Where that fails, the row keeps none of them: what should have gone must not stay.
    """
    try:
        for name in LONG_FIELDS:
            if (text := row.get(name)) is not None:
                row[name], _ = mend_text(redact(text))
    except Exception:  # noqa: BLE001 - the caller's own function
        row.update(dict.fromkeys(LONG_FIELDS))
        return ("redact_failed",)
    return ()


def cause_of(error: ValidationError) -> str:
    """Why a record was rejected, in one word for the count of rejections."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return _CAUSES.get(first["type"], "wrong_type")
