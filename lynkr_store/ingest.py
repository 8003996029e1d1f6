"""From what a caller recorded to the row that is stored: checked, mended, completed."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from lynkr_store.schemas import TEXT_FIELDS, RoutingEvent

Row = dict[str, Any]
"""Column name to value, for every column but ``id``."""

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
    """What is kept of the two texts.

    Attributes:
        capture: Keep them at all.
        max_chars: Characters kept of each.
    """

    capture: bool = True
    max_chars: int = 65_536


def row_of(
    record: Mapping[str, Any] | RoutingEvent, stamp_ms: int, policy: TextPolicy
) -> tuple[Row, tuple[str, ...]]:
    """Make the row of one record.

    Args:
        record: What was recorded.
        stamp_ms: The instant of a record that names none, in epoch milliseconds.
        policy: What is kept of the texts.

    Returns:
        The row, and one cause for each value that was mended.

    Raises:
        ValidationError: The record is not one; the error names the field, and no value.
    """
    event = record if isinstance(record, RoutingEvent) else RoutingEvent.model_validate(record)
    row = dict(event)
    mended = event.mended
    if row["request_id"] is None:
        row["request_id"] = str(uuid.uuid4())
    if row["timestamp"] is None:
        row["timestamp"] = stamp_ms
    for name in TEXT_FIELDS:
        text = row[name]
        if not policy.capture:
            row[name] = None
        elif text is not None and len(text) > policy.max_chars:
            row[name] = text[: policy.max_chars]
            mended += ("cut",)
    return row, mended


def cause_of(error: ValidationError) -> str:
    """Why a record was rejected, in one word for the count of rejections."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return _CAUSES.get(first["type"], "wrong_type")
