"""Converts values of any library to Python's own types: one rule for records and questions.

Hosts pass what their libraries create: members of enumerations, UUIDs, NumPy's numbers, Decimals,
pendulum's datetimes. A value is accepted if a plain value means the same, and refused otherwise;
the rule is the same in records, filters, windows and cursors. Only a filter also takes numbers and
flags as texts, as a URL's query has them.

No library is imported. A value is recognised by its class, or by the methods of Python's number
protocol. If these methods raise an exception, the value is refused because of its type.
"""

import math
import operator
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from functools import wraps
from types import NoneType
from typing import Any, Final, LiteralString, TypeVar
from uuid import UUID

from pydantic_core import PydanticCustomError

INT64_MAX: Final = 2**63 - 1
"""The greatest whole number that either backend stores."""

INT64_MIN: Final = -(2**63)
"""The lowest whole number that either backend stores."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)

_PLAIN: Final = frozenset({str, int, float, bool, NoneType, list, dict})
_TO_DATETIME: Final = ("to_stdlib", "py_datetime", "datetime")  # whenever, older ones, arrow
_NAME_OF_CLASS: Final = type.__dict__["__name__"]
_DIGITS: Final = re.compile(r"[0-9]{1,19}")

_T = TypeVar("_T")


def _or_refuse(words: LiteralString) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """Raise a ValueError with these words if the function, or the value's own methods, raise."""

    def decorate(convert: Callable[..., _T]) -> Callable[..., _T]:
        @wraps(convert)
        def converted(value: object, **options: object) -> _T:
            refusal = None
            try:
                return convert(value, **options)
            except PydanticCustomError as error:
                refusal = error
            except Exception:  # noqa: BLE001, S110 - raised below, without what the value raised
                pass
            raise refusal or PydanticCustomError("wrong_type", words)

        return converted

    return decorate


def plain(value: Any) -> Any:
    """The value of Python's own types with the same meaning.

    Returns:
        A text, number, bool or datetime (see `datetime_of`) of exactly that type. A ``Decimal``
        that a float cannot hold exactly stays a Decimal, for `real` to round. Any other value is
        returned unchanged; no field accepts it.

    Raises:
        ValueError: It is a number that a float cannot hold.
        Exception: What the value's own methods raise.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    for base, convert in _BY_CLASS.items():
        if issubclass(kind, base):
            return convert(value)
    instant = datetime_of(value)
    if instant is not None:
        return instant
    if hasattr(kind, "__index__") or hasattr(kind, "__float__"):
        return _number(value)
    if hasattr(kind, "urn"):
        return str(UUID(value.urn))  # a UUID of uuid_utils, say
    return value


_BY_CLASS: Final[dict[type, Callable[[Any], Any]]] = {
    str: str.__str__,  # the base class's method, because a subclass may override it
    int: int.__int__,
    float: float.__float__,
    UUID: UUID.__str__,
    Enum: lambda member: plain(member.value),
}


def datetime_of(value: object) -> datetime | None:
    """The standard library's datetime for a datetime of any library; None for another value.

    Its zone is the offset at that moment, or None, because arithmetic and zones of other libraries
    may not work with the standard library's, and a zone object may be large.

    Raises:
        Exception: What the methods of the value or its zone raise.
    """
    kind = type(value)
    if not issubclass(kind, datetime):
        for name in _TO_DATETIME:
            if hasattr(kind, name):
                other = getattr(value, name)
                other = other() if callable(other) else other
                return datetime_of(other) if issubclass(type(other), datetime) else None
        return None
    given: Any = value
    offset = datetime.utcoffset(given)
    zone = None if offset is None else timezone(timedelta.__pos__(offset))
    return datetime.combine(datetime.date(given), datetime.time(given), zone)


def _number(value: Any) -> Any:
    """The number, or the bool, of an object with Python's number protocol.

    Arrays and their bools and complex numbers have this protocol too; ``dtype``, where it exists,
    tells them apart.
    """
    dtype = str(getattr(value, "dtype", float))
    if getattr(value, "shape", ()) != ():
        return value
    if "bool" in dtype:
        return bool(value)
    if "int" not in dtype and "float" not in dtype:
        return value
    with suppress(TypeError):  # an array of floats has this method too
        return operator.index(value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isnan(number) or value == number:
        return number
    if issubclass(type(value), Decimal):
        return value
    if math.isinf(number):
        raise _too_large()
    raise PydanticCustomError(
        "wrong_type", "a float cannot hold this number exactly: give float(value) to round it"
    )


def _too_large() -> PydanticCustomError:
    return PydanticCustomError("out_of_domain", "the number is too large for a float")


@_or_refuse("give a text")
def text(value: object) -> str:
    """A text: a ``str``, a UUID, or a member of an enumeration of texts.

    Raises:
        ValueError: Any other value.
    """
    found = plain(value)
    if type(found) is not str:
        raise TypeError
    return found


@_or_refuse("give a whole number")
def whole(value: object) -> int:
    """A whole number: an ``int``, or another number without a fraction; not a bool.

    Raises:
        ValueError: Any other value.
    """
    return _whole(plain(value))


def _whole(number: object) -> int:
    if type(number) is float and number.is_integer():
        return int(number)
    if type(number) is not int:
        raise TypeError
    return number


@_or_refuse("give a whole number, or its digits as a text")
def code(value: object) -> int:
    """A whole number, or a text of its digits, as HTTP libraries give it.

    Raises:
        ValueError: Any other value.
    """
    found = plain(value)
    return int(found) if type(found) is str and _DIGITS.fullmatch(found) else _whole(found)


@_or_refuse("give a number")
def real(value: object) -> float:
    """A number as a float, including NaN and infinities; not a bool.

    A Decimal is rounded to the nearest float, like a literal in a program. A float must be able to
    hold any other number exactly.

    Raises:
        ValueError: Any other value.
    """
    found = plain(value)
    if type(found) is float:
        return found
    if type(found) is not int and not issubclass(type(found), Decimal):
        raise TypeError
    with suppress(OverflowError):
        if math.isfinite(number := float(found)):
            return number
    raise _too_large()


@_or_refuse("give True or False, or 1 or 0")
def flag(value: object) -> bool:
    """A bool, also of another library, or the number 1 or 0.

    Raises:
        ValueError: Any other value.
    """
    found = plain(value)
    if type(found) not in (bool, int, float) or found not in (0, 1):
        raise TypeError
    return bool(found)


@_or_refuse("give a timedelta")
def duration(value: object) -> timedelta:
    """A ``timedelta``, also of another library, as the standard library's.

    Raises:
        ValueError: Any other value.
    """
    if not issubclass(type(value), timedelta):
        raise TypeError
    return timedelta.__pos__(value)  # type: ignore[arg-type]


@_or_refuse(
    "an instant is an aware datetime, an integer of epoch milliseconds, or ISO 8601 text with a "
    "zone, as in 2026-01-31T12:00Z"
)
def epoch_ms(value: object, *, round_up: bool = False) -> int:
    """An instant as epoch milliseconds.

    Args:
        value: An aware datetime, also of another library; ISO 8601 text with a date, a time and a
            zone; or a whole number that already is epoch milliseconds.
        round_up: Round a fraction of a millisecond up. A window's bounds need it: for whole
            milliseconds t, ``t >= x`` is ``t >= ceil(x)``. A record's own timestamp is rounded
            down.

    Returns:
        Whole milliseconds since 1970-01-01T00:00Z, within 64 bits.

    Raises:
        ValueError: A naive datetime, another type, or a number beyond 64 bits.
    """
    found = plain(value)
    if type(found) is str:
        found = _parsed(found)
    if type(found) is datetime:
        if found.tzinfo is None:
            raise PydanticCustomError(
                "naive_datetime",
                "a naive datetime has no time zone: give it one, as in tzinfo=UTC, or "
                "2026-01-31T12:00Z as text",
            )
        ms, rest = divmod(found - _EPOCH, _MILLISECOND)
        return ms + 1 if round_up and rest else ms
    return in_64_bits(_whole(found), "an instant in epoch milliseconds")


def _parsed(given: str) -> datetime:
    """The datetime of an ISO 8601 text; lower-case letters are accepted, as in RFC 3339.

    Raises:
        ValueError: Another text, or a date alone, which is not an instant.
    """
    with suppress(ValueError):
        date.fromisoformat(given)
        raise TypeError
    return datetime.fromisoformat(given.upper())


def type_name(value: object) -> str:
    """The name that the definition of the value's class gave it; a metaclass may tell another."""
    name: str = _NAME_OF_CLASS.__get__(type(value))
    return name


def in_64_bits(number: int, what: str) -> int:
    """The whole number, if a database can store it.

    Raises:
        ValueError: It does not fit in 64 bits.
    """
    if abs(number) > INT64_MAX:
        raise PydanticCustomError("wrong_type", "{what} must fit in 64 bits", {"what": what})
    return number


def validator(convert: Callable[[object], Any], *usual: type) -> Callable[[object], Any]:
    """A field's validator: keeps None and values of the usual types, and converts others."""
    types = frozenset({*usual, NoneType})

    def validated(value: object) -> Any:
        return value if type(value) in types else convert(value)

    return validated
