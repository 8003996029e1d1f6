"""What can be asked: a window of time, the dimensions of a row, how many rows. Knows no SQL."""

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import islice
from typing import Annotated, Any, Final, Self, TypeVar

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from lynkr_store.exceptions import BadArgument
from lynkr_store.schemas import epoch_ms, values
from lynkr_store.schemas.base import FrozenInput
from lynkr_store.schemas.events import NAME_MAX_CHARS, sanitize_text

_MAX_VALUES: Final = 1_000  # well below what one statement can bind on either backend


def _bound(value: object) -> object:
    return None if value is None else epoch_ms(value, round_up=True)


class Window(FrozenInput):
    """The half-open range of time ``[since, until)``.

    Both ends are instants as `RoutingEvent.timestamp` takes them, and are kept as epoch
    milliseconds.
    In a statistic a missing ``until`` is now, included, and a missing ``since`` the statistic's
    own look-back (24 hours unless its docstring says otherwise); in lists a missing end is open.
    An empty or inverted window holds no row. The gateway's own ranges include both ends: its
    ``until=U`` is ``until=U + 1`` here.
    """

    since: Annotated[datetime | int | None, BeforeValidator(_bound)] = None
    until: Annotated[datetime | int | None, BeforeValidator(_bound)] = None

    @property
    def since_ms(self) -> int | None:
        """The first millisecond inside, or None for an open end."""
        return None if self.since is None else epoch_ms(self.since)

    @property
    def until_ms(self) -> int | None:
        """The first millisecond after, or None for an open end."""
        return None if self.until is None else epoch_ms(self.until)

    def resolved(self, now_ms: int, look_back: timedelta) -> tuple[int, int]:
        """Both ends in epoch milliseconds, as a statistic takes them.

        Args:
            now_ms: The present, which a missing ``until`` includes.
            look_back: How long before the present a missing ``since`` lies.
        """
        since, until = self.since_ms, self.until_ms
        if since is None:
            since = now_ms - look_back // timedelta(milliseconds=1)
        return since, now_ms + 1 if until is None else until


def _several(value: object, convert: Callable[[object], Any], say: str) -> list[Any] | None:
    """The value, or each of several, converted; None for none.

    Raises:
        ValueError: One is not of the dimension's kind, or they are none, or too many.
    """
    if value is None:
        return None
    try:
        try:
            return [convert(value)]
        except ValueError:
            if isinstance(value, str | bytes) or not isinstance(value, Collection):
                raise
            found = [convert(item) for item in islice(value, _MAX_VALUES + 1)]
    except Exception:  # noqa: BLE001 - a value's own methods may raise anything
        raise ValueError(f"give {say}, or several in a list") from None
    if not 0 < len(found) <= _MAX_VALUES:
        raise ValueError(f"give from 1 to {_MAX_VALUES} values, or leave it out to match all")
    return found


def _texts(value: object) -> object:
    texts = _several(value, values.text, "a text")
    # mended as records are on their way in, so that a text finds what was recorded with it
    return texts and tuple(sorted({sanitize_text(text)[0][:NAME_MAX_CHARS] for text in texts}))


def _codes(value: object) -> object:
    codes = _several(value, values.code, "a whole number")
    return codes and tuple(sorted({values.in_64_bits(code, "a whole number") for code in codes}))


def _finite(value: object) -> object:
    if value is None:
        return None
    with suppress(ValueError):
        if math.isfinite(number := values.real(value)):
            return number
    raise ValueError("a bound is a finite number, which a float can hold")


_Texts = Annotated[str | Collection[str] | None, PlainValidator(_texts)]
_Codes = Annotated[int | Collection[int] | None, PlainValidator(_codes)]
_Bound = Annotated[float | None, BeforeValidator(_finite)]
_YesNo = Annotated[
    bool | None, Field(strict=True), BeforeValidator(values.taking(values.flag, bool))
]


class RoutingFilter(FrozenInput):
    """Which rows: every dimension given must match; one left out matches all.

    A dimension takes one value or several, of which one must match: the values that `RoutingEvent`
    takes in the field of that name. An empty text is a value.
    Bounds include their own value; a row where the number was not measured is outside them.
    """

    provider: _Texts = None
    tier: _Texts = None
    model: _Texts = None
    session_id: _Texts = None
    request_id: _Texts = None
    request_type: _Texts = None
    routing_method: _Texts = None
    status_code: _Codes = None
    has_error: _YesNo = None
    """True for rows with an error type, False for rows without."""
    was_fallback: _YesNo = None
    min_latency_ms: _Bound = None
    max_latency_ms: _Bound = None
    min_cost_usd: _Bound = None
    max_cost_usd: _Bound = None
    min_quality_score: _Bound = None
    max_quality_score: _Bound = None
    min_input_tokens: _Bound = None
    max_input_tokens: _Bound = None
    min_output_tokens: _Bound = None
    max_output_tokens: _Bound = None

    @model_validator(mode="before")
    @classmethod
    def _known_dimensions(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and (unknown := set(data) - set(cls.model_fields)):
            known = ", ".join(cls.model_fields)
            raise ValueError(f"no dimension {', '.join(map(repr, unknown))}; there are {known}")
        return data

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        for name in ("latency_ms", "cost_usd", "quality_score", "input_tokens", "output_tokens"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{name} is greater than max_{name}: exchange them")
        return self


_Value = TypeVar("_Value")


def checked_window(window: Window | None) -> Window:
    """The window; one without ends for None.

    Raises:
        BadArgument: Another type.
    """
    return _of_type("window", Window, window)


def checked_criteria(criteria: RoutingFilter | None) -> RoutingFilter:
    """The filter; one that matches every row for None.

    Raises:
        BadArgument: Another type.
    """
    return _of_type("criteria", RoutingFilter, criteria)


def checked_provider(provider: object) -> str:
    """A provider's name.

    Raises:
        BadArgument: No text.
    """
    if type(provider) is str:  # asked for each time that a kept answer is given
        return provider
    return _checked("provider", "give the provider's name as a text", values.text, provider)


def checked_limit(limit: object, name: str = "limit", least: int = 0) -> int:
    """A whole number of rows.

    Raises:
        BadArgument: Fewer than ``least``, fractional, NaN, or no number.
    """
    words = f"give a whole number of rows, {least} or more"
    rows = _checked(name, words, values.whole, limit)
    if not least <= rows <= values.INT64_MAX:
        raise BadArgument(f"{name}: {words}")
    return rows


def checked_age(older_than: object) -> timedelta:
    """An age in the past.

    Raises:
        BadArgument: Negative, or no ``timedelta``.
    """
    words = "give a timedelta of 0 or more, as in timedelta(days=30)"
    age = _checked("older_than", words, values.duration, older_than)
    if age < timedelta():
        raise BadArgument(f"older_than: {words}")
    return age


def checked_seconds(seconds: object, name: str) -> float:
    """A time to wait, in seconds; infinity is one.

    Raises:
        BadArgument: Negative, NaN, too large for a float, or no number.
    """
    words = "give seconds, 0 or more"
    found = _checked(name, words, values.real, seconds)
    if not found >= 0:
        raise BadArgument(f"{name}: {words}")
    return found


def _of_type(name: str, kind: type[_Value], value: _Value | None) -> _Value:
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise BadArgument(f"{name}: give a {kind.__name__}")
    return value


def _checked(name: str, words: str, convert: Callable[[object], _Value], value: object) -> _Value:
    with suppress(ValueError):
        return convert(value)
    raise BadArgument(f"{name}: {words}")
