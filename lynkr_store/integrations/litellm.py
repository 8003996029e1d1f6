"""LiteLLM's calls as rows: one for each attempt, written by `StoreLogger`.

The fields come from LiteLLM's standard logging payload
(https://docs.litellm.ai/docs/proxy/logging_spec). No key, end user, address, full URL or upstream
error text is stored; prompts and answers only if the store keeps texts.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Final

from lynkr_store import MissingDriver, Recorder
from lynkr_store.integrations.records import (
    ROUTING_FIELDS,
    Fields,
    checked_names,
    checked_store,
    forget_oldest,
    host_of,
    is_new,
    mapping_of,
    without_invalid,
)

try:
    from litellm.integrations.custom_logger import CustomLogger
    from litellm.types.utils import CallTypes
except ImportError as error:
    raise MissingDriver("litellm is not installed: pip install 'lynkr-store[litellm]'") from error

_CALL_TYPES: Final = frozenset(each.value for each in CallTypes)
_STATUS_DIGITS: Final = 3
_numbers: Final = itertools.count(1)


class StoreLogger(CustomLogger):
    """Records each attempt of LiteLLM's in a store: ``litellm.callbacks = [StoreLogger(store)]``.

    It implements the sync and the async hooks; an attempt that LiteLLM reports twice is one row. A
    hook never raises and never waits. Your router may add what LiteLLM does not know:
    ``metadata={"lynkr": {"tier": "SIMPLE"}}``.

    Args:
        store: A `Store` or an `AsyncStore`. The caller closes it.
        keep_metadata: Names of LiteLLM's metadata to keep in ``attributes``, such as
            ``user_api_key_team_id``. By default none is kept: they may be personal.

    Raises:
        BadArgument: It is no store, or the names are a single text.
    """

    def __init__(self, store: Recorder, *, keep_metadata: Collection[str] = ()) -> None:
        super().__init__()
        # LiteLLM drops a second callback whose class and public numbers and texts are the same
        self.number = next(_numbers)
        self._store = checked_store(store, "record")
        self._keep_metadata = checked_names(keep_metadata, "keep_metadata")
        # no lock, which a child of a fork would inherit: each use of these is one atomic step
        self._seen: dict[tuple[Any, ...], object] = {}
        self._attempts: dict[tuple[Any, ...], int] = {}

    def log_success_event(
        self,
        kwargs: Any,
        response_obj: Any,  # noqa: ARG002 - LiteLLM passes it by name
        start_time: Any,
        end_time: Any,
    ) -> None:
        """LiteLLM calls it for an attempt that succeeded, made by a plain call."""
        self._record(kwargs, start_time, end_time, failed=False)

    def log_failure_event(
        self,
        kwargs: Any,
        response_obj: Any,  # noqa: ARG002 - LiteLLM passes it by name
        start_time: Any,
        end_time: Any,
    ) -> None:
        """LiteLLM calls it for an attempt that failed, made by a plain call."""
        self._record(kwargs, start_time, end_time, failed=True)

    async def async_log_success_event(
        self,
        kwargs: Any,
        response_obj: Any,  # noqa: ARG002 - LiteLLM passes it by name
        start_time: Any,
        end_time: Any,
    ) -> None:
        """LiteLLM calls it for an attempt that succeeded, made by a coroutine."""
        self._record(kwargs, start_time, end_time, failed=False)

    async def async_log_failure_event(
        self,
        kwargs: Any,
        response_obj: Any,  # noqa: ARG002 - LiteLLM passes it by name
        start_time: Any,
        end_time: Any,
    ) -> None:
        """LiteLLM calls it for an attempt that failed, made by a coroutine."""
        self._record(kwargs, start_time, end_time, failed=True)

    async def async_post_call_failure_deployment_hook(
        self,
        request_data: Any,
        exception: Any,
        call_type: Any,  # noqa: ARG002 - LiteLLM passes it by position
        fallback_depth: Any = None,  # noqa: ARG002 - LiteLLM passes it by name
    ) -> None:
        """LiteLLM calls it for every attempt that failed, made by a coroutine.

        The attempts of a request to the proxy share one logging object, which reports the first
        failure alone by the hook above. This one records the others.
        """
        with suppress(Exception):  # another release's logging object
            logging = request_data["litellm_logging_obj"]
            kwargs = logging.model_call_details
            reported = not logging.should_run_logging(event_type="async_failure")
            if reported and logging.should_run_callback(
                callback=self,
                litellm_params=kwargs["litellm_params"],
                event_hook="async_failure_handler",
            ):
                began, ended = kwargs["api_call_start_time"], datetime.now()  # noqa: DTZ005 - as LiteLLM
                if began <= kwargs["end_time"]:  # an earlier attempt's: this one sent nothing
                    began = ended
                self._record(_of_failure(kwargs, exception), began, ended, failed=True)

    def _record(self, kwargs: Any, start: Any, end: Any, *, failed: bool) -> None:
        with suppress(Exception):  # a strict store; LiteLLM must go on
            fields = self._fields(mapping_of(kwargs), start, end, failed=failed)
            if fields is not None:
                self._store.record(fields)

    def _fields(
        self, kwargs: Mapping[str, Any], start: Any, end: Any, *, failed: bool
    ) -> Fields | None:
        """The record of an attempt; None if it is recorded already."""
        try:
            if not is_new(self._seen, _event_of(kwargs, start, failed=failed)):
                return None
            fields = fields_of(
                kwargs,
                start,
                end,
                failed=failed,
                attempt_index=self._attempt_index(kwargs),
                keep_metadata=self._keep_metadata,
            )
            return without_invalid(fields)
        except Exception:  # noqa: BLE001 - a newer LiteLLM may say it otherwise
            return _least(kwargs, failed=failed)

    def _attempt_index(self, kwargs: Mapping[str, Any]) -> int:
        """The number of earlier attempts of the same request.

        LiteLLM does not say it: its ``previous_models`` has at most four, and some twice. The
        router keeps one trace id for a request's attempts, a call with fallbacks one call id.
        """
        metadata = _metadata(kwargs)
        routed = metadata.get("attempted_fallbacks") is not None
        request = (routed, kwargs.get("litellm_trace_id" if routed else "litellm_call_id"))
        begins = not (metadata.get("attempted_fallbacks") or metadata.get("attempted_retries"))
        if routed and begins:  # the caller may give several requests one trace id
            self._attempts.pop(request, None)
        index = self._attempts.get(request, 0)
        self._attempts[request] = index + 1
        forget_oldest(self._attempts)
        return index


def _of_failure(details: Mapping[str, Any], exception: Any) -> Fields:
    """A hook's arguments for a failed attempt of which LiteLLM makes no payload."""
    metadata = _metadata(details)
    payload = {
        "call_type": details.get("call_type"),
        "model_group": metadata.get("model_group"),
        "model_id": mapping_of(metadata.get("model_info")).get("id"),
        "model_parameters": details.get("optional_params"),
        "error_information": {"error_code": getattr(exception, "status_code", None)},
    }
    return {**details, "exception": exception, "standard_logging_object": payload}


def fields_of(
    kwargs: Mapping[str, Any],
    start: datetime | None,
    end: datetime | None,
    *,
    failed: bool,
    attempt_index: int = 0,
    keep_metadata: Sequence[str] = (),
) -> Fields:
    """Build a record's fields from a hook's arguments.

    Without a payload they are what the other arguments say. None means that LiteLLM does not know:
    it says 0 tokens and a cost of 0 where nothing was measured.
    """
    payload = mapping_of(kwargs.get("standard_logging_object"))
    params = mapping_of(kwargs.get("litellm_params"))
    metadata = _metadata(kwargs)
    provider = payload.get("custom_llm_provider") or kwargs.get("custom_llm_provider")
    began, ended = _seconds(payload.get("startTime"), start), _seconds(payload.get("endTime"), end)
    called = kwargs.get("api_call_start_time")
    if began and attempt_index and isinstance(called, datetime):
        began = max(began, called.timestamp())  # the proxy's stream: since the first attempt
    fallbacks = metadata.get("attempted_fallbacks")
    given = mapping_of(metadata.get("lynkr"))
    return {name: given[name] for name in ROUTING_FIELDS if name in given} | {
        "request_id": payload.get("litellm_call_id")
        or kwargs.get("litellm_call_id")
        or payload.get("id"),
        "trace_id": kwargs.get("litellm_trace_id") or payload.get("trace_id") or None,
        "session_id": params.get("litellm_session_id") or metadata.get("session_id") or None,
        "timestamp": began and round(began * 1000),
        "latency_ms": (ended - began) * 1000 if began and ended else None,
        "provider": provider or "unknown",
        "model": _model(payload.get("model") or kwargs.get("model"), provider),
        "requested_model": metadata.get("original_model_group")
        or payload.get("model_group")
        or None,
        "request_type": _request_type(payload.get("call_type") or kwargs.get("call_type")),
        "was_fallback": (attempt_index if fallbacks is None else fallbacks) > 0,
        "retry_count": metadata.get("attempted_retries") or 0,
        "attempt_index": attempt_index,
        **_stream(payload, kwargs, began),
        **_usage(payload),
        **_failure(payload, kwargs, failed=failed),
        **_answer(payload, kwargs),
        "attributes": _attributes(payload, params, metadata, keep_metadata) or None,
    }


def _least(kwargs: Mapping[str, Any], *, failed: bool) -> Fields:
    """What is recorded of an attempt whose other arguments cannot be read."""
    texts = {
        name: value
        for name, key in (
            ("request_id", "litellm_call_id"),
            ("trace_id", "litellm_trace_id"),
            ("model", "model"),
            ("provider", "custom_llm_provider"),
        )
        if isinstance(value := kwargs.get(key), str)
    }
    exception = kwargs.get("exception")
    kind = type(exception).__name__ if exception is not None else "unknown"
    return {"provider": "unknown", **texts, "error_type": kind if failed else None}


def _metadata(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's metadata; some of LiteLLM's calls take it under another name."""
    params = mapping_of(kwargs.get("litellm_params"))
    return {**mapping_of(params.get("litellm_metadata")), **mapping_of(params.get("metadata"))}


def _event_of(kwargs: Mapping[str, Any], start: Any, *, failed: bool) -> tuple[Any, ...]:
    """Identify an attempt. The call's id is not enough: with fallbacks all attempts share it."""
    payload = mapping_of(kwargs.get("standard_logging_object"))
    call = payload.get("litellm_call_id") or kwargs.get("litellm_call_id")
    return call, failed, payload.get("startTime") or start


def _seconds(payload: object, argument: object) -> float | None:
    if isinstance(payload, float | int):
        return payload
    return argument.timestamp() if isinstance(argument, datetime) else None


def _model(name: Any, provider: Any) -> Any:
    """The model as it was sent upstream; the router puts the provider before it."""
    return name.removeprefix(f"{provider}/") if isinstance(name, str) else None


def _request_type(call_type: Any) -> str | None:
    """LiteLLM's call type, which has a leading ``a`` for a coroutine."""
    name = getattr(call_type, "value", call_type) or None
    if isinstance(name, str) and name.startswith("a") and name[1:] in _CALL_TYPES:
        return name[1:]
    return name


def _stream(payload: Mapping[str, Any], kwargs: Mapping[str, Any], began: float | None) -> Fields:
    first, ended = payload.get("completionStartTime"), payload.get("endTime")
    stream = payload.get("stream") or kwargs.get("stream")
    known = stream and began and isinstance(first, float) and first != ended
    return {
        "stream": stream if isinstance(stream, bool) else None,
        "ttft_ms": (first - began) * 1000 if known and first and began else None,
    }


def _usage(payload: Mapping[str, Any]) -> Fields:
    """Tokens and cost; LiteLLM says 0 for failures, answers without usage and unpriced models."""
    usage = mapping_of(mapping_of(payload.get("metadata")).get("usage_object"))
    asked = mapping_of(usage.get("prompt_tokens_details"))
    answered = mapping_of(usage.get("completion_tokens_details"))
    fields: Fields = {
        "cache_read_tokens": _first(usage.get("cache_read_input_tokens"), asked, "cached_tokens"),
        "cache_creation_tokens": _first(
            usage.get("cache_creation_input_tokens"), asked, "cache_creation_tokens"
        ),
        "reasoning_tokens": answered.get("reasoning_tokens"),
    }
    measured = bool(payload.get("total_tokens"))
    if measured:
        fields |= {
            "input_tokens": payload.get("prompt_tokens"),
            "output_tokens": payload.get("completion_tokens"),
            "cache_tokens_included": True,
        }
    if payload.get("cache_hit") is True:
        fields["cost_usd"] = 0.0
    elif measured and not payload.get("response_cost_failure_debug_info"):
        fields["cost_usd"] = payload.get("response_cost")
    return fields


def _first(value: Any, details: Mapping[str, Any], name: str) -> Any:
    return details.get(name) if value is None else value


def _failure(payload: Mapping[str, Any], kwargs: Mapping[str, Any], *, failed: bool) -> Fields:
    if not failed:
        return {}
    found = mapping_of(payload.get("error_information"))
    exception = kwargs.get("exception")
    kind = found.get("error_class") or (type(exception).__name__ if exception else "unknown")
    code = str(found.get("error_code") or "")
    if not code.isdecimal():
        code = "".join(filter(str.isdecimal, str(found.get("normalized_error") or "")))
    return {"error_type": kind, "status_code": int(code) if len(code) == _STATUS_DIGITS else None}


def _answer(payload: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Fields:
    """What the answer's messages say, of chat's form or of the Responses API's."""
    response = mapping_of(payload.get("response"))
    tools = mapping_of(payload.get("model_parameters")).get("tools")
    fields: Fields = {
        "tool_count": len(tools) if isinstance(tools, Sequence) else None,
        "request_text": _last_user_text(payload.get("messages", kwargs.get("messages"))),
    }
    if choices := response.get("choices"):
        choice = mapping_of(choices[0])
        message = mapping_of(choice.get("message"))
        return fields | {
            "finish_reason": choice.get("finish_reason"),
            "tool_calls_made": len(message.get("tool_calls") or ()),
            "response_text": _text(message.get("content") or choice.get("text")),
        }
    if output := response.get("output"):
        items = [mapping_of(item) for item in output]
        texts = [_text(item.get("content")) for item in items if item.get("type") == "message"]
        return fields | {
            "tool_calls_made": sum(item.get("type") == "function_call" for item in items),
            "response_text": "\n".join(filter(None, texts)) or None,
        }
    return fields


def _last_user_text(messages: Any) -> str | None:
    if isinstance(messages, str):
        return messages
    for message in reversed(messages if isinstance(messages, Sequence) else ()):
        if mapping_of(message).get("role") == "user":
            return _text(message.get("content"))
    return None


def _text(content: Any) -> str | None:
    """The text of a message, whose content is a text or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    texts = [mapping_of(part).get("text") for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str)) or None


def _attributes(
    payload: Mapping[str, Any],
    params: Mapping[str, Any],
    metadata: Mapping[str, Any],
    keep_metadata: Sequence[str],
) -> Fields:
    base = payload.get("api_base") or params.get("api_base")
    breakdown = mapping_of(payload.get("cost_breakdown"))
    found = {
        "call_type": payload.get("call_type"),
        "model_id": payload.get("model_id"),
        "api_host": host_of(base),
        "request_tags": metadata.get("tags"),  # not the payload's, which has headers' values
        "cost_breakdown": {k: v for k, v in breakdown.items() if isinstance(v, int | float)},
        "litellm_overhead_time_ms": mapping_of(payload.get("hidden_params")).get(
            "litellm_overhead_time_ms"
        ),
        **{name: metadata.get(name) for name in keep_metadata},
    }
    return {name: value for name, value in found.items() if value not in (None, "", [], {})}
