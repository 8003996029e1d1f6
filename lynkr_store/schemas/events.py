"""The record: one routing event as a gateway reports it, mended and checked on the way in."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from types import NoneType
from typing import Annotated, Any, Final, Self

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    PrivateAttr,
    model_validator,
)
from pydantic_core import PydanticCustomError

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
"""The two fields that hold what people and models wrote."""

FLAG_FIELDS: Final = ("was_fallback", "pinned", "stream", "cache_tokens_included")
"""The fields that say yes or no."""

NAME_MAX_CHARS: Final = 512
"""Characters kept of every other text that is no JSON: PostgreSQL's indexes hold 2,704 bytes."""

JSON_FIELDS: Final = ("candidates", "cache_decision", "attributes")
"""The fields of JSON text of any content."""
LONG_FIELDS: Final = (*TEXT_FIELDS, *JSON_FIELDS)
"""The fields of free text: those two, and the JSON ones."""


def sanitize_text(text: str) -> tuple[str, str | None]:
    """Replace what a database cannot hold, one U+FFFD for each character.

    PostgreSQL's text holds no NUL, and UTF-8 has no form for a lone surrogate. Both backends get
    the same text, so that they give the same answers.

    Returns:
        The text and the cause for the count of mended values: ``nul``, ``surrogate`` or None.
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
    """A record's instant as epoch milliseconds, if it names one.

    Raises:
        ValueError: It is none, is naive, or lies outside of its domain.
    """
    if value is None:
        return None
    ms = values.epoch_ms(value)
    if not INSTANT_MIN_MS <= ms < INSTANT_MAX_MS:
        raise PydanticCustomError(
            "out_of_domain", "a record's instant lies from 2000 to 2099: give epoch milliseconds"
        )
    return ms


def encoding_by(encoder: json.JSONEncoder) -> Callable[[object], str]:
    """As ``encoder.encode`` of an object or a list, in half of the time.

    ``encode`` makes the function in C that does its work anew for each call.
    """
    make: Any = json.encoder.c_make_encoder  # type: ignore[attr-defined]
    try:
        pieces = make(
            None,
            encoder.default,
            json.encoder.encode_basestring,
            encoder.indent,
            encoder.key_separator,
            encoder.item_separator,
            encoder.sort_keys,
            encoder.skipkeys,
            encoder.allow_nan,
        )
    except TypeError:  # Python without it, or with another one
        return encoder.encode
    return lambda value: "".join(pieces(value, 0))


encoded: Final = encoding_by(
    json.JSONEncoder(
        ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False
    )
)
"""An object or a list as JSON text, as the gateway writes it; ValueError, TypeError or
RecursionError where JSON has no form for a part of it."""

_NO_JSON: Final = "give JSON text, or an object or list that JSON can express"


def _json_text(value: object) -> object:
    """Keep JSON text as it is; write objects and lists as JSON, as the gateway does."""
    if value is None or type(value) is str:
        return value
    return _as_json(value, []) if _is_container(value) else values.text(value)


def _as_json(value: object, causes: list[str]) -> str:
    """The value as JSON text; a cause is added for each kind of part that was mended.

    Raises:
        ValueError: It has a part that JSON cannot express.
    """
    try:
        try:
            text = encoded(value)
        except (TypeError, ValueError):
            text = encoded(_expressible(value, causes))
    except Exception:  # noqa: BLE001 - a part's own methods may raise anything
        raise ValueError(_NO_JSON) from None
    text, cause = sanitize_text(text)
    if cause:
        causes.append(cause)
    return text


def _expressible(value: object, causes: list[str]) -> object:
    """The same value of parts that JSON has a form for: None for NaN and infinities."""
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
    """Whether it is an object or a list of JSON; by its type alone, for ``__class__`` may fail."""
    return issubclass(type(value), (Mapping, list, tuple))


def _provider(value: object) -> object:
    if value is None:
        raise PydanticCustomError("no_provider", "give the provider's name as a text")
    return value


def flag_number(flag: bool | None) -> int | None:  # noqa: FBT001 - its only argument
    """A flag as it is stored: SQLite's driver looks for an adapter of each bool that it binds."""
    return None if flag is None else int(flag)


_whole: Final = BeforeValidator(values.taking(values.whole, int))
_real: Final = BeforeValidator(values.taking(values.real, float))
_text: Final = BeforeValidator(values.taking(values.text, str))
_flag: Final = BeforeValidator(values.taking(values.flag, bool))

_Json = Annotated[str | Mapping[str, Any] | Sequence[Any] | None, PlainValidator(_json_text)]
_Count = Annotated[int | None, Field(strict=True, ge=-COUNT.limit, le=COUNT.limit), _whole]
_Code = Annotated[
    int | None,
    Field(strict=True, ge=-COUNT.limit, le=COUNT.limit),
    BeforeValidator(values.taking(values.code, int)),
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
    """One routed request, as handed to the writer. Only ``provider`` is required.

    None means not measured, which is never 0. Values of other libraries are taken as the plain
    values that say the same (see `lynkr_store.schemas.values`). Numbers outside the limits of
    `lynkr_store.schemas.units`, other types, unknown names and naive datetimes are errors.
    What a database cannot hold is mended and named in `mended`: NUL and lone surrogates in text
    become U+FFFD, NaN and infinities None, and names are cut at 512 characters.

    Each field's OpenTelemetry GenAI attribute stands in brackets where there is one.
    """

    request_id: _Text = None
    """The client's or gateway's own id, not unique. Default: a new UUID."""
    session_id: _Text = None
    """The conversation [gen_ai.conversation.id]."""
    timestamp: Annotated[datetime | int | None, BeforeValidator(instant_in_domain)] = None
    """When it happened, kept as epoch milliseconds: an aware datetime, a whole number of them, or
    ISO 8601 text with a zone. Default: the moment of recording."""
    complexity_score: _Score = None
    tier: _Text = None
    """The tier chosen: SIMPLE, MEDIUM, COMPLEX, REASONING or any other text."""
    agentic_type: _Text = None
    tool_count: _Count = None
    """Tools offered to the model."""
    input_tokens: _Count = None
    """Tokens in [gen_ai.usage.input_tokens]; see `cache_tokens_included`."""
    message_count: _Count = None
    request_type: _Text = None
    provider: Annotated[str, Field(strict=True), _text, BeforeValidator(_provider)]
    """Who answered [gen_ai.provider.name]."""
    model: _Text = None
    """The model that answered [gen_ai.response.model]."""
    routing_method: _Text = None
    was_fallback: _FlagOrFalse = False
    output_tokens: _Count = None
    """Tokens out, reasoning included [gen_ai.usage.output_tokens]."""
    latency_ms: _Milliseconds = None
    status_code: _Code = None
    """HTTP status, also as a text of digits; 599 stands for a stream that broke."""
    error_type: _Text = None
    """What failed [error.type]; any text, the empty one too, counts as an error."""
    cost_usd: _Dollars = None
    """The price of the request in US dollars; None when unknown."""
    tool_calls_made: _Count = None
    retry_count: Annotated[_Count, BeforeValidator(lambda v: 0 if v is None else v)] = 0
    circuit_breaker_state: _Text = None
    quality_score: _Score = None
    """The gateway's estimate of the answer, 0 to 100."""
    tokens_per_second: _Score = None
    cost_efficiency: _Score = None
    request_text: _Text = None
    """The last user message, unless capturing is off."""
    response_text: _Text = None
    """The answer's text, unless capturing is off."""
    base_tier: _Text = None
    """The tier before escalation."""
    escalation_source: _Text = None
    propensity: _Score = None
    """The probability with which this choice was made, 0 to 1."""
    candidates: _Json = None
    """JSON text: the models that were considered."""
    pinned: _FlagOrFalse = False
    """The session was pinned to this model."""
    switch_reason: _Text = None
    cache_decision: _Json = None
    """JSON text: the receipt of a decision to hold or switch for the prompt cache's sake."""
    cache_read_tokens: _Count = None
    """[gen_ai.usage.cache_read.input_tokens]"""
    cache_creation_tokens: _Count = None
    """[gen_ai.usage.cache_creation.input_tokens]"""
    trace_id: _Text = None
    """Joins the attempts of one request."""
    attempt_index: _Count = None
    """0 for the first attempt."""
    requested_model: _Text = None
    """The model the client asked for [gen_ai.request.model]."""
    ttft_ms: _Milliseconds = None
    """Milliseconds to the first token of a stream."""
    stream: _Flag = None
    cache_tokens_included: _Flag = None
    """Whether `input_tokens` includes the cached ones; None when not known."""
    reasoning_tokens: _Count = None
    finish_reason: _Text = None
    attributes: _Json = None
    """JSON text: anything else worth keeping."""

    _mended: tuple[str, ...] = PrivateAttr(default=())

    @property
    def mended(self) -> tuple[str, ...]:
        """One cause for each mended value: ``nul``, ``surrogate``, ``not_finite``, ``cut``."""
        return self._mended

    @model_validator(mode="wrap")
    @classmethod
    def _mend(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not issubclass(type(data), Mapping):
            return handler(data)
        causes: list[str] = []
        event = handler({name: _mend(name, value, causes) for name, value in data.items()})
        event._mended = tuple(causes)  # noqa: SLF001 - its own instance
        return event


_USUAL: Final = frozenset({str, int, float, bool, NoneType})


def _mend(name: str, value: Any, causes: list[str]) -> Any:
    if type(value) not in _USUAL:
        with suppress(Exception):  # its field's validator says what is wrong
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
        with suppress(ValueError):  # likewise
            return _as_json(value, causes)
    return value
