"""Makes the stored row from a caller's record: checks, sanitizes, redacts and completes it."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lynkr_store.exceptions import BadArgument
from lynkr_store.ingest.batch import BatchBuilder, Columns, Row, RowBatch, by_column
from lynkr_store.schemas import (
    FLAG_FIELDS,
    LONG_FIELDS,
    TEXT_FIELDS,
    Rejection,
    RoutingEvent,
    flag_number,
    sanitize_text,
    type_name,
)
from lynkr_store.settings import TextSettings

_CAUSES: Final = {
    "missing": "no_provider",
    "no_provider": "no_provider",
    "extra_forbidden": "unknown_name",
    "greater_than_equal": "out_of_domain",
    "less_than_equal": "out_of_domain",
    "out_of_domain": "out_of_domain",
    "naive_datetime": "naive_datetime",
}

_WORDS: Final = {"missing": "give a value", "extra_forbidden": "a record has no such field"}
"""Instead of pydantic's words, which are those of its own methods."""

_NAME_CHARS: Final = 64
_FIELDS: Final = RoutingEvent.model_fields


@dataclass(frozen=True)
class TextPolicy:
    """What is kept of the texts that people and models wrote.

    Attributes:
        capture: Whether the two texts are kept at all.
        max_chars: The most characters kept of each of the two.
        redact: Takes each free text, also JSON, and returns what is kept of it. It must accept its
            own results: texts from another process's spool are redacted again.
    """

    capture: bool = True
    max_chars: int = 65_536
    redact: Callable[[str], str] | None = None


def new_ids() -> Iterator[str]:
    """An endless sequence of UUIDs of version 4.

    It reads random bytes for 64 of them at once: each read releases the interpreter lock, and while
    other threads compute, it may take 5 ms to get the lock back.
    """
    while True:
        digits = os.urandom(64 * 16).hex()
        for at in range(0, len(digits), 32):
            d = digits[at : at + 32]  # not with uuid.UUID, which takes twice as long
            variant = "89ab"[int(d[16], 16) % 4]
            yield f"{d[:8]}-{d[8:12]}-4{d[13:16]}-{variant}{d[17:20]}-{d[20:]}"


def row_of(
    record: Mapping[str, Any] | RoutingEvent,
    stamp_ms: int,
    policy: TextPolicy,
) -> tuple[Row, tuple[str, ...]]:
    """Make the row of one record.

    Args:
        record: The caller's record.
        stamp_ms: The instant for a record without one, in epoch milliseconds.
        policy: Decides what is kept of the texts.

    Returns:
        The row, and one cause for each value that was changed.

    Raises:
        ValidationError: The record is not valid; the error names the field, and no value.
    """
    columns, mended = _completed([checked(record, stamp_ms)], policy)
    return {name: column[0] for name, column in columns.items()}, tuple(mended)


def rows_of(
    records: Iterable[Mapping[str, Any] | RoutingEvent], stamp_ms: int, policy: TextPolicy
) -> tuple[Columns, list[str]]:
    """As `row_of`, for several records; returns the columns of their rows.

    Raises:
        BadArgument: A record is not valid; the message names its place, its fields, and what they
            need. Or ``records`` is no iterable of records.
    """
    if isinstance(records, Mapping) or not isinstance(records, Iterable):
        raise BadArgument("records: give several records, as in a list")
    each = []
    for place, record in enumerate(records):
        try:
            each.append(checked(record, stamp_ms))
        except ValidationError as error:
            refused = _refused(f"record {place}", error, record)
        else:
            continue
        raise refused
    return _completed(each, policy) if each else ({}, [])


def _completed(
    each: list[tuple[Row, tuple[str, ...]]], policy: TextPolicy
) -> tuple[Columns, list[str]]:
    columns = by_column([row for row, _ in each])
    mended = [cause for _, causes in each for cause in causes]
    return columns, mended + complete(columns, policy, new_ids().__next__)


def checked(record: Mapping[str, Any] | RoutingEvent, stamp_ms: int) -> tuple[Row, tuple[str, ...]]:
    """Check and sanitize one record; `complete` then makes its row. See `row_of`."""
    earlier: tuple[str, ...] = ()
    if isinstance(record, RoutingEvent):
        # checked again, because model_copy(update=…) and model_construct() check nothing
        earlier = record.mended
        record = {k: v for k, v in vars(record).items() if k in _FIELDS}
    elif isinstance(record, Mapping) and len(record) > len(_FIELDS):
        record = _with_one_unknown(record)
    event = RoutingEvent.model_validate(record)
    row = dict(vars(event))
    for name in FLAG_FIELDS:
        row[name] = flag_number(row[name])
    if row["timestamp"] is None:
        row["timestamp"] = stamp_ms
    return row, earlier + event.mended


def _with_one_unknown(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record with only the first of its unknown names: pydantic creates an error for each."""
    unknown = (name for name in record if name not in _FIELDS)
    known = (name for name in _FIELDS if name in record)
    return {name: record[name] for name in chain(known, islice(unknown, 1))}


def complete(columns: Columns, policy: TextPolicy, new_id: Callable[[], str]) -> list[str]:
    """Give rows without a ``request_id`` one, and apply the policy.

    Args:
        columns: Every column of checked records; this function changes them.
        policy: Decides what is kept of the texts.
        new_id: Returns a new id.

    Returns:
        One cause for each value that was changed.
    """
    columns["request_id"] = [new_id() if one is None else one for one in columns["request_id"]]
    if not policy.capture:
        for name in TEXT_FIELDS:
            columns[name] = [None] * len(columns[name])
    mended = [] if policy.redact is None else _redact(columns, policy.redact)
    most = policy.max_chars
    for name in TEXT_FIELDS:
        long = sum(length > most for length in map(len, filter(None, columns[name])))
        if long:
            columns[name] = [text and text[:most] for text in columns[name]]
            mended += ["cut"] * long
    return mended


def taken_over(rows: Sequence[Row], policy: TextPolicy) -> tuple[RowBatch, Counter[str]]:
    """Apply the policy to rows that another process completed by its own, which may keep more.

    Args:
        rows: One or more.
        policy: Decides what is kept of the texts.

    Returns:
        The rows, and the number of changed values by cause: ``not_captured`` for a text that was
        left out, ``redacted`` for one that redaction changed, and the causes of `complete`.

    Raises:
        ValueError: The rows have an unknown column.
    """
    columns = by_column(rows)
    if not columns.keys() <= RoutingEvent.model_fields.keys():
        raise ValueError("an unknown column")
    for name in ("request_id", *LONG_FIELDS):
        columns.setdefault(name, [None] * len(rows))
    changed: Counter[str] = Counter()
    if not policy.capture:
        texts = chain.from_iterable(columns[name] for name in TEXT_FIELDS)
        changed["not_captured"] = sum(text is not None for text in texts)
    if policy.redact is not None:
        policy = replace(policy, redact=_counted(policy.redact, changed))
    changed.update(complete(columns, policy, new_ids().__next__))
    gathering = BatchBuilder()
    gathering.add(columns)
    return gathering.take(), +changed


def _counted(redact: Callable[[str], str], changed: Counter[str]) -> Callable[[str], str]:
    def redacted(text: str) -> str:
        kept, _ = sanitize_text(redact(text))
        changed["redacted"] += kept != text
        return kept

    return redacted


def _redact(columns: Columns, redact: Callable[[str], str]) -> list[str]:
    """Apply the caller's function to every free text, before texts are cut.

    If the function fails, the row keeps none of its free texts: what it would have removed must not
    be stored.
    """
    mended = []
    rows = list(zip(*(columns[name] for name in LONG_FIELDS), strict=True))
    for at, texts in enumerate(rows):
        try:
            rows[at] = tuple(
                None if text is None else str.__str__(sanitize_text(redact(text))[0])
                for text in texts
            )
        except BaseException:  # noqa: BLE001 - the caller's own function; the thread must continue
            rows[at] = (None,) * len(texts)
            mended.append("redact_failed")
    columns.update(zip(LONG_FIELDS, zip(*rows, strict=True), strict=True))
    return mended


def rejection_of(error: ValidationError, record: object) -> Rejection:
    """Why a record is rejected: the first error, with the type of the value as it was given."""
    return _rejection(_errors(error)[0], record)


def _errors(error: ValidationError) -> list[ErrorDetails]:
    return error.errors(include_url=False, include_context=False, include_input=False)


def _rejection(first: ErrorDetails, record: object) -> Rejection:
    name = first["loc"][0] if first["loc"] else None
    value: Any = record
    if name is not None:
        fields = vars(record) if isinstance(record, RoutingEvent) else record
        value = fields[name] if isinstance(fields, Mapping) and name in fields else _NO_VALUE
    unknown = value is _NO_VALUE or (name is None and value is None)  # it could not be read
    kind = None if unknown else _fit(type_name(value))
    cause = _CAUSES.get(first["type"], "wrong_type")
    return Rejection(cause=cause, field=_fit(name), value_type=kind)


_NO_VALUE: Final = object()


def _fit(name: object) -> str | None:
    """The name, if it cannot be a text that somebody wrote to a model."""
    if type(name) is str and len(name) <= _NAME_CHARS and name.isidentifier():
        return name
    return None


def refuse_invalid(record: Mapping[str, Any] | RoutingEvent) -> None:
    """Raise an error for a record that would be rejected.

    Raises:
        BadArgument: The record is not valid; the message names each field and what it needs.
    """
    try:
        checked(record, 0)
    except ValidationError as error:
        refused = _refused("record", error, record)
    except Exception as error:  # noqa: BLE001 - a value's own methods
        raise BadArgument(f"record: a value raised {type(error).__name__}") from None
    else:
        return
    raise refused


def _refused(which: str, error: ValidationError, record: object) -> BadArgument:
    found = _errors(error)
    return BadArgument(f"{which}: {'; '.join(map(_words, found))} ({_rejection(found[0], record)})")


def _words(error: ErrorDetails) -> str:
    words = _WORDS.get(error["type"], error["msg"])
    return ": ".join([*(str(part) for part in error["loc"][:1]), words])


def policy_of(settings: TextSettings) -> TextPolicy:
    """The policy in the settings."""
    return TextPolicy(settings.capture_text, settings.text_max_chars, settings.redact)
