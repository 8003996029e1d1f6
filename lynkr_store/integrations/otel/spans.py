"""GenAI spans as rows.

The attributes are those of the GenAI semantic conventions
(https://github.com/open-telemetry/semantic-conventions-genai), which are in development: names of
version 1.41 and the older ones that instrumentations still send. No status text, exception message,
end user or full URL is stored; messages only if the store keeps texts.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode

from lynkr_store import AsyncStoreProtocol, StoreProtocol
from lynkr_store.integrations.records import (
    ROUTING_FIELDS,
    Fields,
    answer_of,
    checked_names,
    checked_store,
    forget_oldest,
    host_of,
    is_new,
    mapping_of,
    without_invalid,
)

_OPERATIONS: Final = {
    "chat": "chat",
    "text_completion": "text_completion",
    "generate_content": "generate_content",
    "embeddings": "embeddings",
    "tool_call": "chat",  # Traceloop's word for a chat with tools
    "chat.completions": "chat",  # and Semantic Kernel's words
    "chat.streaming_completions": "chat",
    "text.completions": "text_completion",
    "text.streaming_completions": "text_completion",
}
"""The operations that ask a model; an agent's or a tool's call makes no row."""
_OLD_OPERATIONS: Final = {
    "chat": "chat",
    "completion": "text_completion",
    "embedding": "embeddings",
}
"""The same in ``llm.request.type``, before there was ``gen_ai.operation.name``."""

_PROVIDERS: Final = {
    "azure.ai.openai": "azure-openai",
    "az.ai.openai": "azure-openai",
    "aws.bedrock": "bedrock",
    "gcp.vertex_ai": "vertex",
    "vertex_ai": "vertex",
    "moonshot_ai": "moonshot",
    "OpenAI": "openai",  # Traceloop's older spelling
    "Anthropic": "anthropic",
}
"""OpenTelemetry's names of providers whose rows have another one. ``anthropic`` stays: it is not
known to be Azure's."""

_NUMBERS: Final = re.compile(
    r"gen_ai\.(evaluation\.score\.value|usage\.(text|audio|image|video)\.[\w.]{1,64})", re.ASCII
)
"""Numbers that have no field of their own and are kept under their names."""
_NAME: Final = re.compile(r"[\w.:-]{1,128}", re.ASCII)
"""A name that a program gives, such as a finish reason: no text that somebody wrote."""
_ERROR_TYPE: Final = re.compile(r"[A-Za-z_][\w.:-]{0,99}|\d{1,6}|<class '[\w.]{1,99}'>", re.ASCII)
_OTHER: Final = "_OTHER"  # what the conventions say where there is no name of an error
_STATUS: Final = re.compile(r"[1-5]\d\d")
_SHUTDOWN_MS: Final = 5_000.0  # as a store's close()


class StoreSpanExporter(SpanExporter):
    """Records each GenAI span that asks a model in a store.

    ``provider.add_span_processor(BatchSpanProcessor(StoreSpanExporter(store)))``. Other spans make
    no row. If the spans of two instrumentations report one call, one directly within the other, the
    inner span is the row.

    Your router may add what an instrumentation does not know, as attributes of the span such as
    ``lynkr.tier``.

    Args:
        store: A `Store` or an `AsyncStore`. The caller closes it, after the tracer provider.
        keep_attributes: Names of other attributes, of the span or of its resource, to keep in
            ``attributes``, such as ``service.name``. By default none is kept: they may be personal.

    Raises:
        BadArgument: It is no store, or the names are a single text.
    """

    def __init__(
        self,
        store: StoreProtocol | AsyncStoreProtocol,
        *,
        keep_attributes: Collection[str] = (),
    ) -> None:
        self._store = checked_store(store, "record", "flush")
        self._keep_attributes = checked_names(keep_attributes, "keep_attributes")
        self._is_shut_down = False
        self._seen: dict[tuple[int, int], object] = {}
        self._around: dict[tuple[int, int], bool] = {}  # spans with a model's call in them

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Queue the spans' records. Never raises, never waits.

        Returns:
            FAILURE after `shutdown`, and if the store did not take a record; it counts the reason.
        """
        if self._is_shut_down:
            return SpanExportResult.FAILURE
        taken = [self._is_taken(span) for span in spans or ()]
        return SpanExportResult.SUCCESS if all(taken) else SpanExportResult.FAILURE

    def force_flush(self, timeout_millis: float | None = 30_000) -> bool:
        """Wait until the records are written; False if that takes longer, or fails."""
        try:
            timeout_s = max(0.0, 30.0 if timeout_millis is None else timeout_millis / 1000)
            return answer_of(lambda: self._store.flush(timeout_s))
        except Exception:  # noqa: BLE001 - it must not raise
            return False

    def shutdown(self, timeout_millis: float = _SHUTDOWN_MS) -> None:
        """Take no more spans, and wait up to 5 seconds until the records are written."""
        if not self._is_shut_down:
            self._is_shut_down = True
            self.force_flush(min(timeout_millis, _SHUTDOWN_MS))

    def _is_taken(self, span: ReadableSpan) -> bool:
        try:
            return self._record(span)
        except Exception:  # noqa: BLE001 - a strict store, or an object that is no span
            return False

    def _record(self, span: ReadableSpan) -> bool:
        """Queue the record of a span, if it makes a row; False if the store did not take it."""
        operation, context = _operation(_attributes(span)), span.context
        if operation is None or context is None or span.end_time is None:
            return True
        key, embeds = (context.trace_id, context.span_id), operation == "embeddings"
        is_around = self._around.get(key) == embeds
        if span.parent is not None:
            self._around[span.parent.trace_id, span.parent.span_id] = embeds
            forget_oldest(self._around)
        if is_around or not is_new(self._seen, key):
            return True
        try:
            fields = fields_of(span, keep_attributes=self._keep_attributes)
        except Exception:  # noqa: BLE001 - another release may say it in another form
            fields = _times_and_ids(span)
        taken = self._store.record(without_invalid(fields))
        if not taken:
            self._seen.pop(key, None)  # it may be exported again
        return taken


def fields_of(span: ReadableSpan, *, keep_attributes: Sequence[str] = ()) -> Fields:
    """Build a record's fields from a span of a model's call. None means that it does not say."""
    found = _attributes(span)
    operation = _operation(found)
    asked = found.get("gen_ai.request.model")
    provider = _first(found, "gen_ai.provider.name", "gen_ai.system") or "unknown"
    given = {name: found[f"lynkr.{name}"] for name in ROUTING_FIELDS if f"lynkr.{name}" in found}
    request_type = found.get("lynkr.request_type")
    return given | {
        **_times_and_ids(span),
        "session_id": _first(found, "gen_ai.conversation.id", "session.id"),
        "provider": _PROVIDERS.get(str(provider), provider),
        "model": found.get("gen_ai.response.model") or asked,
        "requested_model": asked,
        "request_type": request_type or operation,
        "stream": _first(found, "gen_ai.request.stream", "gen_ai.is_streaming", "llm.is_streaming"),
        "ttft_ms": _milliseconds(found.get("gen_ai.response.time_to_first_chunk")),
        "finish_reason": next(iter(_finish_reasons(found)), None),
        **_usage(found),
        **_failure(span, found),
        **_messages(span, found),
        "attributes": _kept(span, found, operation if request_type else None, keep_attributes)
        or None,
    }


def _times_and_ids(span: ReadableSpan) -> Fields:
    began, ended = span.start_time, span.end_time
    return {
        "provider": "unknown",
        "request_id": span.context and f"{span.context.span_id:016x}",
        "trace_id": span.context and f"{span.context.trace_id:032x}",
        "timestamp": began and began // 1_000_000,
        "latency_ms": (ended - began) / 1_000_000 if began and ended else None,
    }


def _attributes(span: ReadableSpan) -> Mapping[str, Any]:
    return mapping_of(span.attributes)


def _operation(found: Mapping[str, Any]) -> str | None:
    name = found.get("gen_ai.operation.name")
    if name is not None:
        return _OPERATIONS.get(str(name))
    old = found.get("llm.request.type")
    if old is None and _first(found, "gen_ai.request.model", "gen_ai.response.model"):
        return "chat"  # of an older release, or the SDK's limit of attributes cut the name off
    return _OLD_OPERATIONS.get(str(old))


def _first(found: Mapping[str, Any], *names: str) -> Any:
    return next((found[name] for name in names if found.get(name) not in (None, "")), None)


def _milliseconds(seconds: Any) -> Any:
    return seconds * 1000 if type(seconds) in (int, float) else None


def _usage(found: Mapping[str, Any]) -> Fields:
    tokens = "gen_ai.usage."
    asked = _first(found, f"{tokens}input_tokens", f"{tokens}prompt_tokens")
    read = _first(
        found,
        f"{tokens}cache_read.input_tokens",
        f"{tokens}cache_read_input_tokens",
        f"{tokens}input_tokens.cached",
    )
    written = _first(
        found,
        f"{tokens}cache_write.input_tokens",
        f"{tokens}cache_creation.input_tokens",
        f"{tokens}cache_creation_input_tokens",
    )
    return {
        "input_tokens": asked,
        "output_tokens": _first(found, f"{tokens}output_tokens", f"{tokens}completion_tokens"),
        "cache_read_tokens": read,
        "cache_creation_tokens": written,
        "reasoning_tokens": _first(
            found,
            f"{tokens}reasoning.output_tokens",
            f"{tokens}reasoning_tokens",
            "llm.usage.reasoning_tokens",
        ),
        "cache_tokens_included": _cache_is_included(asked, read, written),
    }


def _cache_is_included(asked: Any, read: Any, written: Any) -> bool | None:
    """True, as the conventions say, unless the numbers refute it; None without any."""
    if not isinstance(asked, int):
        return None
    return asked >= sum(tokens for tokens in (read, written) if isinstance(tokens, int))


def _failure(span: ReadableSpan, found: Mapping[str, Any]) -> Fields:
    """The error's class and the status; a status alone is no error, and a text may be private."""
    kind = found.get("error.type")
    if kind is None and span.status.status_code is StatusCode.ERROR:
        kinds = (mapping_of(event.attributes).get("exception.type") for event in span.events)
        kind = next((each for each in kinds if each), _OTHER)
    if kind is not None and not _ERROR_TYPE.fullmatch(str(kind)):
        kind = _OTHER
    status = found.get("http.response.status_code")
    if status is None and kind is not None and _STATUS.fullmatch(str(kind)):
        status = int(str(kind))
    return {"error_type": kind and str(kind), "status_code": status}


def _finish_reasons(found: Mapping[str, Any]) -> list[str]:
    reasons = _first(found, "gen_ai.response.finish_reasons", "gen_ai.completion.0.finish_reason")
    several = _list(reasons) or [reasons]
    return [each for each in several if isinstance(each, str) and _NAME.fullmatch(each)]


def _list(value: Any) -> list[Any] | None:
    """A list that an attribute holds, as a sequence or as JSON text; None if it holds none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return list(value) if isinstance(value, list | tuple) else None


def _messages(span: ReadableSpan, found: Mapping[str, Any]) -> Fields:
    """The last user's message and the answer, if the instrumentation sends them."""
    asked = _list(found.get("gen_ai.input.messages")) or _old_messages(span, found, "prompt")
    answers = _list(found.get("gen_ai.output.messages")) or []
    users = [message for message in asked if mapping_of(message).get("role") == "user"]
    texts = map(_text, answers or _old_messages(span, found, "completion"))
    calls = [part for answer in answers for part in _parts(answer, "tool_call")]
    tools = _list(found.get("gen_ai.tool.definitions"))
    return {
        "request_text": _text(users[-1]) if users else None,
        "response_text": "\n".join(filter(None, texts)) or None,
        "tool_count": None if tools is None else len(tools),
        "tool_calls_made": len(calls) if answers else None,
    }


def _old_messages(span: ReadableSpan, found: Mapping[str, Any], kind: str) -> list[Any]:
    """Messages as older instrumentations send them: in an event, as JSON, or in flat attributes."""
    name = f"gen_ai.{kind}"
    events = (mapping_of(event.attributes).get(name) for event in span.events)
    for value in (found.get(name), *events):
        if messages := _list(value):
            return messages
    flat: dict[int, dict[str, Any]] = {}
    for key, value in found.items():
        if at := re.fullmatch(rf"gen_ai\.{kind}\.(\d{{1,6}})\.(role|content)", key):
            flat.setdefault(int(at[1]), {})[at[2]] = value
    return [flat[at] for at in sorted(flat)]


def _text(message: Any) -> str | None:
    content = mapping_of(message).get("content")
    if isinstance(content, str):
        return content
    texts = [part.get("content", part.get("text")) for part in _parts(message, "text")]
    return "\n".join(text for text in texts if isinstance(text, str)) or None


def _parts(message: Any, kind: str) -> list[Mapping[str, Any]]:
    known = mapping_of(message)
    parts = map(mapping_of, _list(known.get("parts") or known.get("content")) or ())
    return [part for part in parts if part.get("type") == kind]


def _kept(
    span: ReadableSpan,
    found: Mapping[str, Any],
    operation: str | None,
    keep_attributes: Sequence[str],
) -> Fields:
    resource = mapping_of(getattr(span.resource, "attributes", None))
    response_id = found.get("gen_ai.response.id")
    kept = {
        "gen_ai.operation.name": operation,
        "gen_ai.response.id": response_id if _NAME.fullmatch(str(response_id)) else None,
        "gen_ai.response.finish_reasons": _finish_reasons(found)[1:],
        "server.address": host_of(_first(found, "server.address", "gen_ai.openai.api_base")),
        **{
            name: value
            for name, value in found.items()
            if type(value) in (int, float) and _NUMBERS.fullmatch(name)
        },
        **{name: found.get(name, resource.get(name)) for name in keep_attributes},
    }
    return {name: value for name, value in kept.items() if value not in (None, "", [], ())}
