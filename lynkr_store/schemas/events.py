"""The record: one routing event as a gateway reports it, sanitized and checked on the way in."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from difflib import get_close_matches
from functools import lru_cache
from types import NoneType
from typing import Annotated, Any, Final, Self

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from lynkr_store.schemas import values
from lynkr_store.schemas.base import FrozenInput
from lynkr_store.schemas.units import (
    COUNT,
    DOLLARS,
    INSTANT_MAX_MS,
    INSTANT_MIN_MS,
    MILLISECONDS,
    SCORE,
)

REPLACEMENT: Final = "\ufffd"
TEXT_FIELDS: Final = ("request_text", "response_text")
"""The two fields with the text of people and models."""

FLAG_FIELDS: Final = ("was_fallback", "pinned", "stream", "cache_tokens_included")
"""The boolean fields."""

NAME_MAX_CHARS: Final = 512
"""Maximum characters of any other text that is not JSON: PostgreSQL's indexes hold 2,704 bytes."""

JSON_FIELDS: Final = ("candidates", "cache_decision", "attributes")
"""The fields that hold JSON text of any content."""
LONG_FIELDS: Final = (*TEXT_FIELDS, *JSON_FIELDS)
"""The fields of free text: the two texts and the JSON fields."""


def sanitize_text(text: str) -> tuple[str, str | None]:
    """Replace each character that a database cannot store by U+FFFD.

    PostgreSQL's text cannot contain NUL, and UTF-8 has no encoding for a lone surrogate. Both
    backends store the same text, so that they give the same answers.

    Returns:
        The text, and the cause under which the change is counted: ``nul``, ``surrogate`` or None.
    """
    cause = None
    if "\0" in text:
        text, cause = text.replace("\0", REPLACEMENT), "nul"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            cause = "surrogate"
            text = "".join(REPLACEMENT if "\ud800" <= c <= "\udfff" else c for c in text)
    return text, cause


def instant_in_domain(value: object) -> int | None:
    """A record's timestamp as epoch milliseconds; None stays None.

    Raises:
        ValueError: The value is not an instant, is naive, or is out of its domain.
    """
    if value is None:
        return None
    ms = values.epoch_ms(value)
    if not INSTANT_MIN_MS <= ms < INSTANT_MAX_MS:
        raise PydanticCustomError(
            "out_of_domain",
            "the year of a record's timestamp must be 2000 to 2099: give milliseconds, not seconds",
        )
    return ms


encoded: Final = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False
).encode
"""Encode an object or a list as JSON text, in the gateway's format. Raises ValueError, TypeError or
RecursionError if JSON cannot express a part of it."""

_NO_JSON: Final = "give JSON text, or an object or list that JSON can express"


def _json_text(value: object) -> object:
    """Keep JSON text as it is; encode objects and lists as JSON."""
    if value is None or type(value) is str:
        return value
    return as_json(value, []) if _is_container(value) else values.text(value)


def as_json(value: object, causes: list[str]) -> str:
    """The value as JSON text; adds a cause for each kind of part that was sanitized.

    Raises:
        ValueError: JSON cannot express a part of the value.
    """
    try:
        try:
            text = encoded(value)
        except (TypeError, ValueError):
            text = encoded(_expressible(value, causes))
    except Exception:  # noqa: BLE001 - a part's own methods may raise any exception
        raise ValueError(_NO_JSON) from None
    text, cause = sanitize_text(text)
    if cause:
        causes.append(cause)
    return text


def _expressible(value: object, causes: list[str]) -> object:
    """The same value with parts that JSON can express: None for NaN and infinities."""
    container: Any = value
    if issubclass(type(value), Mapping):
        return {values.plain(key): _expressible(item, causes) for key, item in container.items()}
    if _is_container(value):
        return [_expressible(item, causes) for item in container]
    part = values.plain(value)
    if isinstance(part, Decimal):
        return values.real(part)
    if isinstance(part, float) and not math.isfinite(part):
        causes.append("not_finite")
        return None
    return part


def _is_container(value: object) -> bool:
    """Whether it is a JSON object or list, by its type only, because ``__class__`` may raise."""
    return issubclass(type(value), (Mapping, list, tuple))


def _provider(value: object) -> object:
    if value is None:
        raise PydanticCustomError("no_provider", "provider is required: give its name as a text")
    return value


def flag_number(flag: bool | None) -> int | None:  # noqa: FBT001 - its only argument
    """A flag as it is stored. SQLite's driver would look up an adapter for each bool."""
    return None if flag is None else int(flag)


_whole: Final = BeforeValidator(values.validator(values.whole, int))
_real: Final = BeforeValidator(values.validator(values.real, float))
_text: Final = BeforeValidator(values.validator(values.text, str))
_flag: Final = BeforeValidator(values.validator(values.flag, bool))

_Json = Annotated[str | Mapping[str, Any] | Sequence[Any] | None, PlainValidator(_json_text)]
_Count = Annotated[int | None, Field(strict=True, ge=-COUNT.limit, le=COUNT.limit), _whole]
_Code = Annotated[
    int | None,
    Field(strict=True, ge=-COUNT.limit, le=COUNT.limit),
    BeforeValidator(values.validator(values.code, int)),
]
_Milliseconds = Annotated[
    float | None, Field(strict=True, ge=-MILLISECONDS.limit, le=MILLISECONDS.limit), _real
]
_Dollars = Annotated[float | None, Field(strict=True, ge=-DOLLARS.limit, le=DOLLARS.limit), _real]
_Score = Annotated[float | None, Field(strict=True, ge=-SCORE.limit, le=SCORE.limit), _real]
_Text = Annotated[str | None, Field(strict=True), _text]
_Flag = Annotated[bool | None, Field(strict=True), _flag]
_FlagOrFalse = Annotated[
    bool, Field(strict=True), _flag, BeforeValidator(lambda v: False if v is None else v)
]


class RoutingEvent(FrozenInput):
    """One routed request, as passed to the writer. Only ``provider`` is required.

    None means not measured, which is different from 0. Values of other libraries are converted to
    the plain values with the same meaning (see `lynkr_store.schemas.values`). Numbers outside the
    limits of `lynkr_store.schemas.units`, other types, unknown names and naive datetimes are
    errors. What a database cannot store is sanitized, and the cause is listed in `mended`: NUL and
    lone surrogates in text become U+FFFD, NaN and infinities become None, and names are cut at 512
    characters.

    Fields with an OpenTelemetry GenAI attribute give its name in brackets.
    """

    request_id: _Text = None
    """The client's or gateway's own id; not unique. Default: a new UUID."""
    session_id: _Text = None
    """The conversation [gen_ai.conversation.id]."""
    timestamp: Annotated[datetime | int | None, BeforeValidator(instant_in_domain)] = None
    """When it happened, kept as epoch milliseconds. Give an aware datetime, a whole number of epoch
    milliseconds, or ISO 8601 text with a zone. Default: the time of recording."""
    complexity_score: _Score = None
    """The difficulty that the router saw in the request; higher is harder."""
    tier: _Text = None
    """The tier chosen: SIMPLE, MEDIUM, COMPLEX, REASONING or any other text."""
    agentic_type: _Text = None
    """The kind of agent's work that the router recognised; None if none."""
    tool_count: _Count = None
    """Tools offered to the model."""
    input_tokens: _Count = None
    """Tokens in [gen_ai.usage.input_tokens]; see `cache_tokens_included`."""
    message_count: _Count = None
    """Messages in the conversation so far."""
    request_type: _Text = None
    """What was asked for, such as chat or embedding [gen_ai.operation.name]."""
    provider: Annotated[str, Field(strict=True), _text, BeforeValidator(_provider)]
    """The provider that answered [gen_ai.provider.name]."""
    model: _Text = None
    """The model that answered [gen_ai.response.model]."""
    routing_method: _Text = None
    """How the choice was made: a method such as tier_config or risk, with a +suffix for each
    adjustment."""
    was_fallback: _FlagOrFalse = False
    """The first choice failed, and this one answered instead."""
    output_tokens: _Count = None
    """Tokens out, reasoning included [gen_ai.usage.output_tokens]."""
    latency_ms: _Milliseconds = None
    """Milliseconds from the request to the end of the answer."""
    status_code: _Code = None
    """HTTP status, also as a text of digits; 599 means a broken stream."""
    error_type: _Text = None
    """What failed [error.type]. Any text, including an empty one, counts as an error."""
    cost_usd: _Dollars = None
    """The price of the request in US dollars; None if unknown."""
    tool_calls_made: _Count = None
    """Calls of tools in the answer."""
    retry_count: Annotated[_Count, BeforeValidator(lambda v: 0 if v is None else v)] = 0
    """Further tries at the same provider."""
    circuit_breaker_state: _Text = None
    """The state of the provider's circuit breaker, such as CLOSED or OPEN."""
    quality_score: _Score = None
    """The gateway's estimate of the answer, 0 to 100."""
    tokens_per_second: _Score = None
    """Output tokens per second of `latency_ms`."""
    cost_efficiency: _Score = None
    """Quality for the money, in a scale of the gateway's own."""
    request_text: _Text = None
    """The last user message, unless capturing is off."""
    response_text: _Text = None
    """The text of the answer, unless capturing is off."""
    base_tier: _Text = None
    """The tier before escalation."""
    escalation_source: _Text = None
    """Why the tier was changed from `base_tier`, such as risk or context; None if it was not."""
    propensity: _Score = None
    """The probability with which this choice was made, 0 to 1."""
    candidates: _Json = None
    """JSON text: the models that were considered."""
    pinned: _FlagOrFalse = False
    """The session was pinned to this model."""
    switch_reason: _Text = None
    """Why a pinned session was moved to another model."""
    cache_decision: _Json = None
    """JSON text: the record of a decision to stay with or leave a model because of its prompt
    cache."""
    cache_read_tokens: _Count = None
    """Tokens read from the provider's prompt cache [gen_ai.usage.cache_read.input_tokens]; see
    `cache_tokens_included`."""
    cache_creation_tokens: _Count = None
    """Tokens written to the provider's prompt cache [gen_ai.usage.cache_creation.input_tokens]."""
    trace_id: _Text = None
    """The same for all attempts of one request."""
    attempt_index: _Count = None
    """0 for the first attempt."""
    requested_model: _Text = None
    """The model the client asked for [gen_ai.request.model]."""
    ttft_ms: _Milliseconds = None
    """Milliseconds to the first token of a stream."""
    stream: _Flag = None
    """Whether the answer was streamed."""
    cache_tokens_included: _Flag = None
    """Whether `input_tokens` includes the cached ones; None if unknown."""
    reasoning_tokens: _Count = None
    """The part of `output_tokens` that the model spent on reasoning."""
    finish_reason: _Text = None
    """Why the model stopped, such as stop or length [gen_ai.response.finish_reasons]."""
    attributes: _Json = None
    """JSON text: anything else worth keeping."""

    _mended: tuple[str, ...] = PrivateAttr(default=())

    @property
    def mended(self) -> tuple[str, ...]:
        """A cause for each sanitized value: ``nul``, ``surrogate``, ``not_finite``, ``cut``."""
        return self._mended

    @model_validator(mode="wrap")
    @classmethod
    def _sanitize(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not issubclass(type(data), Mapping):
            return handler(data)
        causes: list[str] = []
        try:
            event = handler({name: _sanitize(name, value, causes) for name, value in data.items()})
        except ValidationError as error:
            raise _with_similar_names(error) from None
        event._mended = tuple(causes)  # noqa: SLF001 - its own instance
        return event


@lru_cache(maxsize=256)  # a service that misspells a field does so in each record
def similar_field(name: str) -> str:
    """``; did you mean model?`` for a name that is similar to a field's, else nothing."""
    similar = get_close_matches(name, RoutingEvent.model_fields, n=1)
    return "".join(f"; did you mean {each}?" for each in similar)


def _with_similar_names(error: ValidationError) -> ValidationError:
    """The same error, in which an unknown name is answered by a similar one."""
    found = error.errors(include_url=False)
    if all(each["type"] != "extra_forbidden" for each in found):
        return error
    lines = []
    for each in found:
        words: Any = each["msg"]
        if each["type"] == "extra_forbidden":
            words = f"a record has no such field{similar_field(str(each['loc'][0])[:_SHORT])}"
        kind: Any = each["type"]
        lines.append(
            InitErrorDetails(
                type=PydanticCustomError(kind, words), loc=each["loc"], input=each["input"]
            )
        )
    return ValidationError.from_exception_data(error.title, lines, hide_input=True)


_SHORT: Final = 64  # characters of a name that may be a field's
_USUAL: Final = frozenset({str, int, float, bool, NoneType})


def _sanitize(name: str, value: Any, causes: list[str]) -> Any:
    if type(value) not in _USUAL:
        with suppress(Exception):  # the field's validator reports what is wrong
            value = values.plain(value)
    kind = type(value)
    if kind is str:
        value, cause = sanitize_text(value)
        if cause:
            causes.append(cause)
        if len(value) > NAME_MAX_CHARS and name not in LONG_FIELDS:
            causes.append("cut")
            value = value[:NAME_MAX_CHARS]
    elif kind is float and not math.isfinite(value):
        causes.append("not_finite")
        return None
    elif name in JSON_FIELDS and _is_container(value):
        with suppress(ValueError):  # here too
            return as_json(value, causes)
    return value
