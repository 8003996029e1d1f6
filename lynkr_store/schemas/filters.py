"""What a question consists of: a window of time, filters, a number of rows. Knows no SQL."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import islice
from typing import Annotated, Any, ClassVar, Final, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, model_validator

from lynkr_store.exceptions import BadArgument
from lynkr_store.schemas import epoch_ms, values
from lynkr_store.schemas.base import FrozenInput, epoch_ms_now
from lynkr_store.schemas.events import NAME_MAX_CHARS, RoutingEvent, sanitize_text
from lynkr_store.schemas.units import INSTANT_MAX_MS, INSTANT_MIN_MS

_MAX_VALUES: Final = (
    1_000  # well below the number of parameters that a statement may have on either backend
)


_SECONDS: Final = range(10**9, 10**10)  # of the years 2001 to 2286; milliseconds of spring 1970


def _bound(value: object) -> object:
    if value is None:
        return None
    ms = epoch_ms(value, round_up=True)
    if type(value) is int and ms in _SECONDS:
        raise ValueError("as milliseconds, this is in 1970: give milliseconds, not seconds")
    return ms


class Window(FrozenInput):
    """The half-open range of time ``[since, until)``.

    Both ends accept what `RoutingEvent.timestamp` accepts, and are kept as epoch milliseconds. In a
    statistic a missing ``until`` means now, inclusive, and a missing ``since`` means the
    statistic's look-back (24 hours unless its docstring says otherwise). In lists a missing end is
    open. An empty or inverted window contains no rows. The gateway's own ranges include both ends:
    its ``until=U`` is ``until=U + 1`` here.
    """

    since: Annotated[datetime | int | None, BeforeValidator(_bound)] = None
    """The first instant in the window."""
    until: Annotated[datetime | int | None, BeforeValidator(_bound)] = None
    """The first instant after the window."""

    @classmethod
    def last(cls, age: timedelta) -> Self:
        """The time from an age ago on, as in ``Window.last(timedelta(hours=6))``.

        Its beginning does not move; for a cached statistic, ask for the same window again.

        Raises:
            BadArgument: The age is negative, or not a ``timedelta``.
        """
        return cls(since=epoch_ms_now() - checked_age(age, "age") // timedelta(milliseconds=1))

    @property
    def since_ms(self) -> int | None:
        """The first millisecond in the window; None for an open end."""
        return None if self.since is None else epoch_ms(self.since)

    @property
    def until_ms(self) -> int | None:
        """The first millisecond after the window; None for an open end."""
        return None if self.until is None else epoch_ms(self.until)

    def resolved(self, now_ms: int, look_back: timedelta) -> tuple[int, int]:
        """Both ends in epoch milliseconds, with a statistic's defaults.

        Args:
            now_ms: The present, which is included if ``until`` is missing.
            look_back: How long before the present the window begins if ``since`` is missing.
        """
        since, until = self.since_ms, self.until_ms
        if since is None:
            since = now_ms - look_back // timedelta(milliseconds=1)
        return since, now_ms + 1 if until is None else until


def _several(value: object, convert: Callable[[object], Any], say: str) -> list[Any] | None:
    """The value, or each of several values, converted; None for None.

    Raises:
        ValueError: A value has the wrong type, or there are no values or too many.
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
    except Exception:  # noqa: BLE001 - a value's own methods may raise any exception
        raise ValueError(f"give {say}, or several in a list") from None
    if not 0 < len(found) <= _MAX_VALUES:
        raise ValueError(
            f"give 1 to {_MAX_VALUES} values, or leave the filter out to match all rows"
        )
    return found


def _texts(value: object) -> object:
    texts = _several(value, values.text, "a text")
    # sanitized as records are, so that a text finds what was recorded with it
    return texts and tuple(sorted({sanitize_text(text)[0][:NAME_MAX_CHARS] for text in texts}))


def _codes(value: object) -> object:
    codes = _several(value, values.code, "a whole number")
    return codes and tuple(sorted({values.in_64_bits(code, "a whole number") for code in codes}))


def _finite(value: object) -> object:
    if value is None:
        return None
    with suppress(ValueError):
        number = float(value) if type(value) is str else values.real(value)
        if math.isfinite(number):
            return number
    raise ValueError("give a finite number that fits in a float")


_FLAGS: Final = {"true": True, "1": True, "false": False, "0": False}


def _flag(value: object) -> object:
    if type(value) is str:
        value = _FLAGS.get(value.lower(), value)
    return value if value is None else values.flag(value)


# Sequence, because FastAPI takes a parameter that is repeated only for that
_Texts = Annotated[
    str | Sequence[str] | AbstractSet[str] | None,
    PlainValidator(_texts, json_schema_input_type=str | list[str] | None),
]
_Codes = Annotated[
    int | Sequence[int] | AbstractSet[int] | None,
    PlainValidator(_codes, json_schema_input_type=int | list[int] | None),
]
_Bound = Annotated[float | None, BeforeValidator(_finite)]
_YesNo = Annotated[bool | None, Field(strict=True), BeforeValidator(_flag)]


class RoutingFilter(FrozenInput):
    """Which rows: every filter that is set must match; a filter that is left out matches all rows.

    A filter takes one value or several, of which one must match. It accepts the values that
    `RoutingEvent` accepts in the field of the same name. An empty text is a value, not a missing
    filter. Bounds are inclusive; a row whose number was not measured is never within bounds.

    Numbers and flags may be texts, as in a URL's query: in FastAPI, ``Annotated[RoutingFilter,
    Query()]`` takes every filter as a parameter, repeated for several values.
    """

    described_like: ClassVar[type[BaseModel]] = RoutingEvent

    provider: _Texts = None
    tier: _Texts = None
    model: _Texts = None
    session_id: _Texts = None
    request_id: _Texts = None
    request_type: _Texts = None
    routing_method: _Texts = None
    status_code: _Codes = None
    has_error: _YesNo = None
    """True: rows with an error type. False: rows without one."""
    was_fallback: _YesNo = None
    min_latency_ms: _Bound = None
    """The least milliseconds that match."""
    max_latency_ms: _Bound = None
    """The most milliseconds that match."""
    min_cost_usd: _Bound = None
    """The least US dollars that match."""
    max_cost_usd: _Bound = None
    """The most US dollars that match."""
    min_quality_score: _Bound = None
    """The least points that match."""
    max_quality_score: _Bound = None
    """The most points that match."""
    min_input_tokens: _Bound = None
    """The least tokens that match."""
    max_input_tokens: _Bound = None
    """The most tokens that match."""
    min_output_tokens: _Bound = None
    """The least tokens that match."""
    max_output_tokens: _Bound = None
    """The most tokens that match."""

    @model_validator(mode="before")
    @classmethod
    def _known_filters(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and (unknown := set(data) - set(cls.model_fields)):
            names, valid = ", ".join(sorted(map(repr, unknown))), ", ".join(cls.model_fields)
            raise ValueError(f"unknown filter {names}; valid filters: {valid}")
        return data

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        for name in ("latency_ms", "cost_usd", "quality_score", "input_tokens", "output_tokens"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{name} is greater than max_{name}: swap them")
        return self


_Value = TypeVar("_Value")
_EXAMPLES: Final[Mapping[type, str]] = {
    Window: "Window.last(timedelta(hours=6))",
    RoutingFilter: 'RoutingFilter(provider="ollama")',
}


def checked_window(window: Window | None) -> Window:
    """The window; an unbounded one for None.

    Raises:
        BadArgument: The value has another type.
    """
    return _of_type("window", Window, window)


def checked_criteria(criteria: RoutingFilter | None) -> RoutingFilter:
    """The filter; one that matches every row for None.

    Raises:
        BadArgument: The value has another type.
    """
    return _of_type("criteria", RoutingFilter, criteria)


def checked_provider(provider: object) -> str:
    """A provider's name.

    Raises:
        BadArgument: The value is not a text.
    """
    if type(provider) is str:  # the usual case, on the path of every cached answer
        return provider
    return _checked("provider", "give the provider's name as a text", values.text, provider)


def checked_limit(limit: object, name: str = "limit", least: int = 0) -> int:
    """A whole number of rows.

    Raises:
        BadArgument: Less than ``least``, fractional, NaN, or not a number.
    """
    words = f"give a whole number of rows, {least} or more"
    rows = _checked(name, words, values.whole, limit)
    if not least <= rows <= values.INT64_MAX:
        raise BadArgument(f"{name}: {words}")
    return rows


def checked_after(after: object) -> int | None:
    """A row's id; None for None.

    Raises:
        BadArgument: Not a whole number of 64 bits.
    """
    if after is None:
        return None
    words = "give a row's id, 0 for all rows, or None for those that are stored from now on"
    row_id = _checked("after", words, values.whole, after)
    if not values.INT64_MIN <= row_id <= values.INT64_MAX:
        raise BadArgument(f"after: {words}")
    return row_id


def checked_age(older_than: object, name: str = "older_than") -> timedelta:
    """An age.

    Raises:
        BadArgument: Negative, or not a ``timedelta``.
    """
    words = "give a timedelta of 0 or more, as in timedelta(days=30)"
    age = _checked(name, words, values.duration, older_than)
    if age < timedelta():
        raise BadArgument(f"{name}: {words}")
    return age


def checked_clock(clock: Callable[[], int]) -> Callable[[], int]:
    """A clock that tells epoch milliseconds.

    Raises:
        BadArgument: It raises an exception, or returns something else, such as seconds.
    """
    words = "give a function that returns epoch milliseconds, as in time.time_ns() // 1_000_000"
    try:
        now: object = clock()
    except Exception as error:
        raise BadArgument(f"clock: {words}; this one raised {type(error).__name__}") from error
    if type(now) is not int or not INSTANT_MIN_MS <= now < INSTANT_MAX_MS:
        raise BadArgument(f"clock: {words}, of the years 2000 to 2099")
    return clock


def checked_seconds(seconds: object, name: str) -> float:
    """A time to wait, in seconds; infinity is allowed.

    Raises:
        BadArgument: Negative, NaN, too large for a float, or not a number.
    """
    words = "give seconds, 0 or more"
    found = _checked(name, words, values.real, seconds)
    if not found >= 0:
        raise BadArgument(f"{name}: {words}")
    return found


def checked_interval(seconds: object, name: str) -> float:
    """Seconds between two reads.

    Raises:
        BadArgument: Not more than 0, NaN, or not a number.
    """
    found = checked_seconds(seconds, name)
    if found == 0:
        raise BadArgument(f"{name}: give seconds, more than 0")
    return found


def _of_type(name: str, kind: type[_Value], value: _Value | None) -> _Value:
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise BadArgument(f"{name}: give a {kind.__name__}, as in {_EXAMPLES[kind]}")
    return value


def _checked(name: str, words: str, convert: Callable[[object], _Value], value: object) -> _Value:
    with suppress(ValueError):
        return convert(value)
    raise BadArgument(f"{name}: {words}")
