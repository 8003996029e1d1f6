"""Packs a record into one MessagePack string; the writer unpacks and checks it.

Most records need no change. `RoutingEvent` converts each value in Python before it checks it; here
msgspec applies the same rules, and checks while it unpacks. That takes two thirds of the time of
unpacking alone, and returns the values in the order of the fields.
"""

from collections.abc import Sequence
from datetime import datetime
from functools import reduce
from operator import itemgetter, or_
from types import NoneType
from typing import Annotated, Any, Final, Literal

import msgspec
import ormsgpack
from pydantic.fields import FieldInfo

from lynkr_store.ingest.batch import Columns
from lynkr_store.schemas import (
    FLAG_FIELDS,
    JSON_FIELDS,
    NAME_MAX_CHARS,
    TEXT_FIELDS,
    RoutingEvent,
    encoded,
    flag_number,
    instant_in_domain,
    sanitize_text,
)
from lynkr_store.schemas.units import INSTANT_MAX_MS, INSTANT_MIN_MS

STAMP: Final = "at the call"
"""The key of the call's instant in epoch milliseconds, in a record without one; no field has it."""

# Only values that are unpacked exactly as they were are packed. A tuple, for example, would become
# a list; a record that contains one is copied part by part instead.
AS_IT_IS: Final = reduce(
    or_,
    (
        ormsgpack.OPT_PASSTHROUGH_DATACLASS,
        ormsgpack.OPT_PASSTHROUGH_DATETIME,
        ormsgpack.OPT_PASSTHROUGH_ENUM,
        ormsgpack.OPT_PASSTHROUGH_SUBCLASS,
        ormsgpack.OPT_PASSTHROUGH_TUPLE,
        ormsgpack.OPT_PASSTHROUGH_UUID,
    ),
)
"""The options for packing a record with ``ormsgpack.packb(record, packable, AS_IT_IS)``."""

_INSTANT: Final = 1  # the extension type of a datetime

Packed = tuple[bytes, Any, Any]
"""A record packed without its two texts, and the two texts."""


def packable(value: object) -> ormsgpack.Ext:
    """The packed form of a datetime, which MessagePack does not have.

    Raises:
        TypeError: The value is not a datetime, so the record cannot be packed.
    """
    if type(value) is not datetime:
        raise TypeError
    return ormsgpack.Ext(_INSTANT, value.isoformat().encode())


def unpacked(packed: bytes) -> dict[str, Any]:
    """The record as it was; if it has more names than there are fields, with one unknown name only.

    One unknown name is enough to reject it. All of them could take many times the packed size.
    """
    if _names_of(packed) > len(_NAMES):
        fields = msgspec.structs.asdict(_decode_known(packed))
        stamp = fields.pop("stamp")
        known = {STAMP: stamp} | fields | {_UNKNOWN: None}
        return {name: value for name, value in known.items() if value is not msgspec.UNSET}
    record: dict[str, Any] = ormsgpack.unpackb(packed, ext_hook=_instant)
    return record


def _names_of(packed: bytes) -> int:
    """The number of names in a packed record, or 0 if it is below 16; see MessagePack's map."""
    width = {0xDE: 2, 0xDF: 4}.get(packed[0], 0)
    return int.from_bytes(packed[1 : 1 + width])


def _instant(_: int, data: bytes | memoryview) -> datetime:
    return datetime.fromisoformat(bytes(data).decode())


def plain_columns(records: Sequence[Packed]) -> tuple[Columns, list[int]]:
    """The columns of the records that need no sanitizing, as `RoutingEvent` would give them.

    Args:
        records: One or more; a record that is not packed counts as one of the others.

    Returns:
        The columns, with flags as 0 or 1, and the call's instant for records without one. Then the
        positions of the other records, in order: a value must be sanitized or is wrong, and
        `RoutingEvent` decides which.
    """
    rows, others = [], []
    for at, record in enumerate(records):
        try:
            rows.append(_plain_values(*record))
        except (ValueError, TypeError, RecursionError, msgspec.MsgspecError):
            others.append(at)
    if not rows:
        return {}, others
    columns: Columns = dict(zip(_NAMES, zip(*rows, strict=True), strict=True))
    del columns["stamp"]
    for name, numbers in _FLAGS.items():
        columns[name] = list(map(numbers.__getitem__, columns[name]))
    for name, default in _DEFAULTS.items():
        columns[name] = [default if value is None else value for value in columns[name]]
    return columns, others


def _plain_values(packed: bytes, request: Any, response: Any) -> tuple[Any, ...]:
    """The values of one record in the order of `_NAMES`.

    Raises:
        ValueError: A value must be sanitized, or is wrong.
        MsgspecError: The same.
        TypeError: The same; or the record is not packed.
        RecursionError: A JSON value is nested too deeply.
    """
    if type(request) not in _TEXT or type(response) not in _TEXT:
        raise TypeError
    event = _decode(packed)
    event.request_text, event.response_text = request, response
    instant = event.timestamp
    if instant is None:
        event.timestamp = event.stamp
    elif type(instant) is not int:
        event.timestamp = instant_in_domain(_instant(instant.code, instant.data))
    for name in JSON_FIELDS:
        if type(value := getattr(event, name)) not in _TEXT:
            setattr(event, name, encoded(value))
    values: tuple[Any, ...] = msgspec.structs.astuple(event)
    if sanitize_text("".join(filter(None, _texts(values))))[1]:
        raise ValueError
    return values


def _type_of(name: str, field: FieldInfo) -> Any:
    """A field's rules for msgspec; a value that would have to be sanitized is refused."""
    if name in JSON_FIELDS:
        return str | dict[Any, Any] | list[Any] | None
    if name in FLAG_FIELDS:
        return bool | Literal[0, 1] | None
    if name == "timestamp":
        limits = msgspec.Meta(ge=INSTANT_MIN_MS, lt=INSTANT_MAX_MS)
        return Annotated[int, limits] | msgspec.msgpack.Ext | None
    kind = next(kind for kind in (str, int, float) if field.annotation in (kind, kind | None))
    if name in TEXT_FIELDS:
        return str | None  # not packed
    if kind is str:
        limits = msgspec.Meta(max_length=NAME_MAX_CHARS)
    else:
        limits = msgspec.Meta(ge=_limit(field, "ge"), le=_limit(field, "le"))
    return Annotated[kind, limits] if field.is_required() else Annotated[kind, limits] | None


def _limit(field: FieldInfo, which: str) -> Any:
    return next(getattr(rule, which) for rule in field.metadata if hasattr(rule, which))


_Event: Final = msgspec.defstruct(
    "_Event",
    [
        *(
            (name, _type_of(name, field), *(() if field.is_required() else (None,)))
            for name, field in RoutingEvent.model_fields.items()
        ),
        ("stamp", int | None, msgspec.field(default=None, name=STAMP)),
    ],
    kw_only=True,
    forbid_unknown_fields=True,
    gc=False,
)
_NAMES: Final = _Event.__struct_fields__
_decode: Final[Any] = msgspec.msgpack.Decoder(_Event).decode

_Known: Final = msgspec.defstruct(
    "_Known",
    [
        (name, Any, msgspec.field(default=msgspec.UNSET, name=STAMP if name == "stamp" else name))
        for name in _NAMES
    ],
)
_decode_known: Final[Any] = msgspec.msgpack.Decoder(_Known, ext_hook=_instant).decode
_UNKNOWN: Final = "one of many"  # no field has this name

_FLAGS: Final = {
    name: {None: flag_number(RoutingEvent.model_fields[name].default), 0: 0, 1: 1}
    for name in FLAG_FIELDS
}
_DEFAULTS: Final = {
    name: field.default
    for name, field in RoutingEvent.model_fields.items()
    if name not in FLAG_FIELDS and not field.is_required() and field.default is not None
}
_TEXT: Final = frozenset({str, NoneType})
_texts: Final = itemgetter(
    *(
        at
        for at, field in enumerate(RoutingEvent.model_fields.values())
        if field.annotation in (str, str | None)
    ),
    *(_NAMES.index(name) for name in JSON_FIELDS),
)
