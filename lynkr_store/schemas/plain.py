"""The record that needs no mending, checked in one call.

Most records are right as they are. `RoutingEvent` looks at each value in Python before it checks
any; here the same rules run in pydantic's core, and Python only sees what they leave open.
"""

from typing import Annotated, Any, Final

from pydantic import StringConstraints, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreConfig, CoreSchema, SchemaValidator, core_schema

from lynkr_store.domains import COUNT, INSTANT_MAX_MS, INSTANT_MIN_MS
from lynkr_store.schemas.events import (
    FLAG_FIELDS,
    JSON_FIELDS,
    NAME_MAX_CHARS,
    TEXT_FIELDS,
    RoutingEvent,
    encoded,
    mend_text,
)

_NO_NUL: Final = r"^[^\x00]*$"
_MendedName: Final = StringConstraints(max_length=NAME_MAX_CHARS, pattern=_NO_NUL)


def plain_row(record: dict[str, Any]) -> dict[str, Any] | None:
    """A record's fields as `RoutingEvent` has them, if it needs no mending.

    Args:
        record: Of builtin types alone, subclasses of them excluded: those have methods of their
            own. No container in it contains itself.

    Returns:
        Those that were given, and those of which None is not the default; flags as 0 or 1. None
        where a value must be mended, or is wrong: `RoutingEvent` tells which.
    """
    try:
        row: dict[str, Any] = _checked(record)
    except (ValidationError, TypeError, RecursionError):
        return None
    if len(row) < len(record):
        return None  # there are unknown names
    for name in TEXT_FIELDS:  # over long ones a pattern takes ten times as long
        text = row.get(name)
        if text is not None and mend_text(text)[1]:
            return None
    for name, value in _DEFAULTS:
        row.setdefault(name, value)
    return row


def _plain_json(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, dict | list):
        text = encoded(value)
        if mend_text(text)[1] is None:
            return text
    raise ValueError


# What is tried before a field's own rules where these run in Python.
_AT_ONCE: Final[dict[str, CoreSchema]] = {
    "timestamp": core_schema.int_schema(strict=True, ge=INSTANT_MIN_MS, lt=INSTANT_MAX_MS),
    "retry_count": core_schema.int_schema(strict=True, ge=-COUNT.limit, le=COUNT.limit),
    **dict.fromkeys(FLAG_FIELDS, core_schema.bool_schema(strict=True)),
    **dict.fromkeys(JSON_FIELDS, core_schema.str_schema(strict=True, pattern=_NO_NUL)),
}


def _schema(name: str, field: FieldInfo) -> core_schema.TypedDictField:
    """A field's own rules, but for what would be mended, which is refused."""
    if name in JSON_FIELDS:
        schema: CoreSchema = core_schema.no_info_plain_validator_function(_plain_json)
    else:
        annotation = field.rebuild_annotation()
        is_name = field.annotation in (str, str | None) and name not in TEXT_FIELDS
        own = TypeAdapter(Annotated[annotation, _MendedName] if is_name else annotation)
        schema = own.core_schema
    if name in _AT_ONCE:
        schema = core_schema.union_schema([_AT_ONCE[name], schema], mode="left_to_right")
    if name in FLAG_FIELDS:  # as they are stored: SQLite's driver looks for an adapter of a bool
        number = core_schema.nullable_schema(core_schema.int_schema())
        schema = core_schema.chain_schema([schema, number])
    return core_schema.typed_dict_field(schema, required=field.is_required())


# Defaults and unknown names are left to `plain_row`: here either takes a microsecond more.
_checked: Final = SchemaValidator(
    core_schema.typed_dict_schema(
        {name: _schema(name, field) for name, field in RoutingEvent.model_fields.items()},
        extra_behavior="ignore",
    ),
    CoreConfig(hide_input_in_errors=True),
).validate_python
_DEFAULTS: Final = [
    (name, int(field.default))
    for name, field in RoutingEvent.model_fields.items()
    if not field.is_required() and field.default is not None
]
