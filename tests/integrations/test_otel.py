"""GenAI spans of two real instrumentations, through the real SDK: a row each, field by field."""

import asyncio
import json
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing, suppress
from importlib.metadata import version
from importlib.util import find_spec

import pytest

from lynkr_store import AsyncStore, BadArgument, RoutingEvent, Store, StoreSettings
from tests.support.instrumented import CALLS, KEY, PERSON, QUESTION
from tests.support.model_server import ANSWER, UPSTREAM
from tests.support.recorded import ROOT
from tests.support.stores import adds_up

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they say at their import
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import (
        BatchSpanProcessor,
        SimpleSpanProcessor,
        SpanExportResult,
    )
    from opentelemetry.trace import Status, StatusCode

    from lynkr_store.integrations.otel import StoreSpanExporter
    from lynkr_store.integrations.otel.spans import fields_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of the instrumentations' own code


def provider_of(exporter, processor=SimpleSpanProcessor, **resource):
    provider = TracerProvider(resource=Resource(resource), shutdown_on_exit=False)
    provider.add_span_processor(processor(exporter))
    return provider


@pytest.fixture
def tracer(store):
    return provider_of(StoreSpanExporter(store)).get_tracer("test")


MINOR = int(version("opentelemetry-instrumentation-openai").split(".")[1])
INSTRUMENTATIONS = [
    pytest.param(
        "genai",
        marks=pytest.mark.skipif(
            find_spec("opentelemetry.instrumentation.genai") is None,
            reason="it needs OpenTelemetry 1.43",
        ),
    ),
    pytest.param("traceloop", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=INSTRUMENTATIONS)
def reported(request, server):
    """By call, its rows in a store that keeps texts, and in one that does not; and the log."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.instrumented", request.param, server],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=True,
    )
    name = request.param
    if name == "traceloop" and MINOR < 50:
        name = "traceloop, with the older names"
    return name, json.loads(done.stdout), done.stderr


def rows_of(store, count):
    """The rows, the oldest first, when that many are there."""
    assert store.flush(30)
    assert adds_up(store.health())
    assert store.health().rejected == 0, store.health().rejections
    rows = sorted(store.query(), key=lambda row: row.id)
    assert len(rows) == count, rows
    return rows


# -- two instrumentations --------------------------------------------------------------------------

KNOWN = {
    "provider": "openai",
    "model": "gpt-4o-mini",
    "requested_model": "gpt-4o-mini",
    "request_type": "chat",
    "error_type": None,
    "status_code": None,
    "input_tokens": 100,
    "output_tokens": 20,
    "cache_read_tokens": 30,
    "cache_creation_tokens": None,
    "reasoning_tokens": 5,
    "cache_tokens_included": True,
    "cost_usd": None,
    "quality_score": None,
    "finish_reason": "stop",
    "tool_calls_made": 0,
    "tool_count": None,
    "session_id": None,
    "tier": None,
    "was_fallback": False,
    "retry_count": 0,
    "attempt_index": None,
    "request_text": QUESTION,
    "response_text": ANSWER,
}
NO_ANSWER = dict.fromkeys(
    (
        *("input_tokens", "output_tokens", "cache_read_tokens", "cache_creation_tokens"),
        *("reasoning_tokens", "cache_tokens_included", "finish_reason", "tool_calls_made"),
        "response_text",
    )
)


def failing(status, kind):
    model = f"fail-{status}"
    return {"model": model, "requested_model": model, "error_type": kind} | NO_ANSWER


DIFFERS = {
    "chat streamed": {"stream": True},
    "tools": {"tool_count": 1, "tool_calls_made": 1, "response_text": None},
    "response streamed": {"stream": True},
    "response fails": failing(429, "RateLimitError"),
    "embedding": NO_ANSWER
    | {
        "request_type": "embeddings",
        "model": "text-embedding-3-small",
        "requested_model": "text-embedding-3-small",
        "input_tokens": 7,
        "cache_tokens_included": True,
    },
    "fails with 400": failing(400, "BadRequestError"),
    "fails with 401": failing(401, "AuthenticationError"),
    "fails with 429": failing(429, "RateLimitError"),
    "fails with 500": failing(500, "InternalServerError"),
    "away": {"error_type": "APIConnectionError"} | NO_ANSWER,
}
SAYS = {
    "genai": {
        "errors": "openai.",
        "streams": None,
        "embedding": {"request_text": None},
        "tools": {"finish_reason": "tool_calls"},
    },
    "traceloop": {
        "errors": "",
        "streams": False,
        "embedding": {"cache_read_tokens": 0},
        "tools": {"finish_reason": "tool_call"},
        "chat streamed": {"reasoning_tokens": None},
    },
    "traceloop, with the older names": {
        "errors": None,
        "streams": False,
        "all": {"provider": "OpenAI", "reasoning_tokens": None, "tool_calls_made": None},
        "embedding": {"request_text": None, "cache_read_tokens": 0},
        "tools": {"finish_reason": "tool_calls", "tool_count": None},
        "chat streamed": dict.fromkeys(
            ("input_tokens", "output_tokens", "cache_read_tokens", "cache_tokens_included")
        ),
    },
}
"""What each says in its own way, or not at all."""


@pytest.mark.sample(3)
@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_one_row(reported, call, how):
    name, rows, _ = reported
    says = SAYS[name]
    if says["errors"] is None and call.startswith("response"):  # it does not instrument these
        assert rows[f"{call} {how}"] == [[], []]
        return
    [row], [without_text] = rows[f"{call} {how}"]
    expected = KNOWN | {"stream": says["streams"]} | DIFFERS.get(call, {})
    expected |= says.get("all", {}) | says.get(call, {})
    if expected["error_type"]:
        known = says["errors"] is not None
        expected["error_type"] = says["errors"] + expected["error_type"] if known else "_OTHER"
    assert {field: row[field] for field in expected} == expected
    assert (len(row["trace_id"]), len(row["request_id"])) == (32, 16)
    assert row["latency_ms"] > 0
    if name == "genai" and row["stream"]:
        assert 0 < row["ttft_ms"] <= row["latency_ms"]
    else:
        assert row["ttft_ms"] is None
    kept = json.loads(row["attributes"] or "{}")
    assert kept.get("server.address", "127.0.0.1") == "127.0.0.1"
    assert kept.keys() <= {"server.address", "gen_ai.response.id"}
    assert without_text | {"id": 0} == row | {
        "id": 0,
        "request_text": None,
        "response_text": None,
    }


def test_no_row_or_line_of_the_log_has_a_secret(reported):
    _, rows, log = reported
    for secret in (KEY, PERSON, UPSTREAM, "http://", "Traceback", "/v1"):
        assert secret not in json.dumps(rows), secret
    for text in (KEY, PERSON, UPSTREAM, QUESTION, ANSWER):
        assert text not in log, text


# -- names of other instrumentations ---------------------------------------------------------------


def spanned(tracer, attributes, **options):
    with tracer.start_as_current_span("call", attributes=attributes, **options):
        pass


OLD = {
    "llm.request.type": "chat",
    "gen_ai.system": "az.ai.openai",
    "gen_ai.request.model": "gpt-4o",
    "gen_ai.response.model": "gpt-4o-2024",
    "gen_ai.usage.prompt_tokens": 7,
    "gen_ai.usage.completion_tokens": 3,
    "gen_ai.usage.cache_read_input_tokens": 2,
    "gen_ai.usage.cache_creation_input_tokens": 1,
    "gen_ai.usage.reasoning_tokens": 1,
    "gen_ai.prompt.0.role": "system",
    "gen_ai.prompt.0.content": "be kind",
    "gen_ai.prompt.1.role": "user",
    "gen_ai.prompt.1.content": QUESTION,
    "gen_ai.completion.0.role": "assistant",
    "gen_ai.completion.0.content": ANSWER,
    "gen_ai.openai.api_base": "https://user:password@api.example/v1",
    "llm.is_streaming": False,
    "session.id": "s-1",
    "gen_ai.user": PERSON,
    "llm.headers": KEY,
}


def test_the_older_names(store, tracer):
    spanned(tracer, OLD)
    [row] = rows_of(store, 1)
    expected = KNOWN | {
        "provider": "azure-openai",
        "model": "gpt-4o-2024",
        "requested_model": "gpt-4o",
        "input_tokens": 7,
        "output_tokens": 3,
        "cache_read_tokens": 2,
        "cache_creation_tokens": 1,
        "reasoning_tokens": 1,
        "session_id": "s-1",
        "finish_reason": None,
        "tool_calls_made": None,
        "stream": False,
    }
    assert {name: getattr(row, name) for name in expected} == expected
    assert json.loads(row.attributes) == {"server.address": "api.example"}
    for secret in (PERSON, KEY, "password"):
        assert secret not in row.model_dump_json()


NEW = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai"}


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"gen_ai.operation.name": "tool_call"}, {"request_type": "chat"}),
        ({"gen_ai.operation.name": "generate_content"}, {"request_type": "generate_content"}),
        ({"gen_ai.provider.name": "aws.bedrock"}, {"provider": "bedrock"}),
        ({"gen_ai.provider.name": "gcp.vertex_ai"}, {"provider": "vertex"}),
        ({"gen_ai.provider.name": "moonshot_ai"}, {"provider": "moonshot"}),
        ({"gen_ai.provider.name": "AWS.Bedrock"}, {"provider": "AWS.Bedrock"}),
        ({"gen_ai.provider.name": "anthropic"}, {"provider": "anthropic"}),
        ({"gen_ai.provider.name": ""}, {"provider": "unknown"}),
        ({"gen_ai.conversation.id": "c", "session.id": "s"}, {"session_id": "c"}),
        ({"error.type": "429"}, {"error_type": "429", "status_code": 429}),
        ({"error.type": "20"}, {"error_type": "20", "status_code": None}),
        (
            {"error.type": "<class 'openai.RateLimitError'>", "http.response.status_code": 429},
            {"error_type": "<class 'openai.RateLimitError'>", "status_code": 429},
        ),
        ({"error.type": f"it said: {UPSTREAM}"}, {"error_type": "_OTHER"}),
        ({"http.response.status_code": 200}, {"error_type": None, "status_code": 200}),
        ({"error.type": "https://host.internal/v1/sk-proj-a"}, {"error_type": "_OTHER"}),
        ({"error.type": "\u5bc6\u94a5\u65e0\u6548"}, {"error_type": "_OTHER"}),
        ({"gen_ai.usage.input_tokens.cached": 3}, {"cache_read_tokens": 3}),
        (
            {"gen_ai.usage.input_tokens": 9, "gen_ai.usage.cache_write.input_tokens": 3},
            {"cache_creation_tokens": 3, "cache_tokens_included": True},
        ),
        (
            {"gen_ai.usage.input_tokens": 9, "gen_ai.usage.cache_read.input_tokens": 10},
            {"cache_read_tokens": 10, "cache_tokens_included": False},
        ),
        (
            {"server.address": "https://user:password@api.example/v1?key=secret"},
            {"attributes": '{"server.address":"api.example"}'},
        ),
        (
            {"server.address": "api.example:443"},
            {"attributes": '{"server.address":"api.example"}'},
        ),
        ({"gen_ai.tool.definitions": '[{"name": "a"}, {"na'}, {"tool_count": None}),
        ({"gen_ai.operation.name": "chat.streaming_completions"}, {"request_type": "chat"}),
        (
            {"gen_ai.response.finish_reasons": [QUESTION, "stop"], "gen_ai.response.id": QUESTION},
            {"finish_reason": "stop", "attributes": None},
        ),
        ({"gen_ai.usage.text.input_tokens": QUESTION}, {"attributes": None}),
        ({"gen_ai.request.stream": True}, {"stream": True}),
        ({"gen_ai.response.time_to_first_chunk": 0.25}, {"ttft_ms": 250}),
        ({"gen_ai.tool.definitions": '[{"name": "a"}, {"name": "b"}]'}, {"tool_count": 2}),
        (
            {"gen_ai.response.finish_reasons": ["stop", "length"]},
            {
                "finish_reason": "stop",
                "attributes": '{"gen_ai.response.finish_reasons":["length"]}',
            },
        ),
        ({"gen_ai.response.finish_reasons": '["stop"]'}, {"finish_reason": "stop"}),
        ({"gen_ai.response.finish_reasons": "stop"}, {"finish_reason": "stop"}),
        (
            {"gen_ai.usage.audio.input_tokens": 5, "gen_ai.evaluation.score.value": 0.5},
            {
                "quality_score": None,
                "attributes": '{"gen_ai.usage.audio.input_tokens":5,'
                '"gen_ai.evaluation.score.value":0.5}',
            },
        ),
        (
            {"lynkr.tier": "SIMPLE", "lynkr.quality_score": 71, "lynkr.request_type": "coding"},
            {
                "tier": "SIMPLE",
                "quality_score": 71,
                "request_type": "coding",
                "attributes": '{"gen_ai.operation.name":"chat"}',
            },
        ),
        (
            {"gen_ai.prompt": f'[{{"role": "user", "content": "{QUESTION}"}}]'},
            {"request_text": QUESTION},
        ),
        (
            {
                "gen_ai.input.messages": '[{"role":"user","parts":[{"type":"text","content":"a"},'
                '{"type":"uri","uri":"http://x"},{"type":"text","content":"b"}]}]'
            },
            {"request_text": "a\nb"},
        ),
    ],
)
def test_an_attribute_has_its_field(store, tracer, attributes, expected):
    spanned(tracer, NEW | attributes)
    [row] = rows_of(store, 1)
    assert {name: getattr(row, name) for name in expected} == expected


def test_a_span_that_lost_its_operation_is_a_chat(store, tracer):
    """Many messages in flat attributes overflow the SDK's limit, which removes the oldest."""
    flat = {f"gen_ai.prompt.{number}.content": QUESTION for number in range(200)}
    with tracer.start_as_current_span("call", attributes=OLD | flat) as span:
        span.set_attribute("gen_ai.response.model", "gpt-4o")
    [row] = rows_of(store, 1)
    assert (row.request_type, row.model, row.provider) == ("chat", "gpt-4o", "unknown")


def test_messages_in_an_event(store, tracer):
    with tracer.start_as_current_span("call", attributes=NEW) as span:
        asked = json.dumps([{"role": "user", "content": QUESTION}])
        span.add_event("gen_ai.content.prompt", {"gen_ai.prompt": asked})
        answered = json.dumps([{"role": "assistant", "content": ANSWER}])
        span.add_event("gen_ai.content.completion", {"gen_ai.completion": answered})
    [row] = rows_of(store, 1)
    assert (row.request_text, row.response_text) == (QUESTION, ANSWER)


def test_a_failed_span_without_a_type_has_its_exceptions(store, tracer):
    with suppress(OSError), tracer.start_as_current_span("call", attributes=NEW):
        raise OSError(UPSTREAM)
    with tracer.start_as_current_span("call", attributes=NEW) as span:
        span.set_status(Status(StatusCode.ERROR, UPSTREAM))
    rows = rows_of(store, 2)
    assert [row.error_type for row in rows] == ["OSError", "_OTHER"]
    assert UPSTREAM not in "".join(row.model_dump_json() for row in rows)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"http.request.method": "POST"},
        {"gen_ai.operation.name": "invoke_agent", "gen_ai.provider.name": "openai"},
        {"gen_ai.operation.name": "execute_tool"},
        {"openinference.span.kind": "LLM", "llm.model_name": "gpt-4o", "llm.provider": "openai"},
        {"llm.request.type": "rerank", "gen_ai.system": "Cohere"},
    ],
)
def test_another_span_makes_no_row(store, tracer, attributes):
    spanned(tracer, attributes)
    rows_of(store, 0)
    assert store.health().submitted == 0


# -- the exporter ----------------------------------------------------------------------------------


def test_a_call_that_two_instrumentations_report_is_one_row(store, tracer):
    """A framework's span is around the client's."""
    with (
        tracer.start_as_current_span("framework", attributes=NEW),
        tracer.start_as_current_span("client", attributes=NEW | {"gen_ai.usage.input_tokens": 7}),
    ):
        pass
    [row] = rows_of(store, 1)
    assert row.input_tokens == 7


def test_three_reports_of_one_call_in_other_words_are_one_row(store, tracer):
    other = {"gen_ai.operation.name": "generate_content"}
    with (
        tracer.start_as_current_span("agents", attributes=NEW),
        tracer.start_as_current_span("framework", attributes=NEW),
        tracer.start_as_current_span("client", attributes=NEW | other),
    ):
        pass
    [row] = rows_of(store, 1)
    assert row.request_type == "generate_content"


def test_a_call_within_another_kind_of_call_is_a_row_too(store, tracer):
    """As a tool of a chat that asks for an embedding."""
    embedding = NEW | {"gen_ai.operation.name": "embeddings"}
    with tracer.start_as_current_span("chat", attributes=NEW):
        spanned(tracer, embedding)
        with tracer.start_as_current_span("tool", attributes={"gen_ai.operation.name": "x"}):
            spanned(tracer, NEW)
    rows = rows_of(store, 3)
    assert [row.request_type for row in rows] == ["embeddings", "chat", "chat"]
    assert len({row.trace_id for row in rows}) == 1


def test_a_span_that_is_exported_twice_is_one_row(store):
    exporter = StoreSpanExporter(store)
    provider = provider_of(exporter)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    spanned(provider.get_tracer("test"), NEW)
    provider.shutdown()
    rows_of(store, 1)


def test_attributes_that_are_asked_for_are_kept(store):
    exporter = StoreSpanExporter(store, keep_attributes=["service.name", "team", "absent"])
    provider = provider_of(exporter, **{"service.name": "chat", "host.name": "h"})
    spanned(provider.get_tracer("test"), NEW | {"team": "blue", "enduser.id": PERSON})
    [row] = rows_of(store, 1)
    assert json.loads(row.attributes) == {"service.name": "chat", "team": "blue"}


ODD = {
    "gen_ai.provider.name": 5,
    "gen_ai.request.model": True,
    "gen_ai.usage.input_tokens": "many",
    "gen_ai.usage.output_tokens": 10**30,
    "gen_ai.input.messages": "no json",
    "gen_ai.output.messages": '[5, {"parts": 5}, {"parts": [5, {"type": "text", "content": {}}]}]',
    "gen_ai.tool.definitions": "{}",
    "gen_ai.response.finish_reasons": (1, 2),
    "gen_ai.response.time_to_first_chunk": "soon",
    "gen_ai.openai.api_base": "http://[::1",
    "http.response.status_code": "teapot",
    "error.type": 5,
    "gen_ai.prompt.9999999999999999999999.role": "user",
    "lynkr.tier": 5,
    "lynkr.pinned": "yes",
}


def test_values_of_another_form_cost_no_row(store, tracer):
    spanned(tracer, {"gen_ai.operation.name": "chat"} | ODD)
    for name, value in ODD.items():
        spanned(tracer, NEW | {name: value})
    rows = rows_of(store, 1 + len(ODD))
    assert {row.request_type for row in rows} == {"chat"}


@pytest.mark.parametrize("name", ["gen_ai.input.messages", "gen_ai.tool.definitions"])
def test_json_of_any_depth_costs_no_row(store, tracer, name):
    spanned(tracer, NEW | {name: "[" * 100_000 + "]" * 100_000})
    [row] = rows_of(store, 1)
    assert (row.request_text, row.tool_count, row.provider) == (None, None, "openai")


def test_a_span_of_another_form_is_a_row_of_what_is_known(store, tracer, monkeypatch):
    monkeypatch.setattr("lynkr_store.integrations.otel.spans._usage", None)
    spanned(tracer, NEW)
    [row] = rows_of(store, 1)
    assert (row.provider, len(row.trace_id)) == ("unknown", 32)
    assert row.latency_ms > 0


def test_a_span_that_has_not_ended_waits_for_its_end(store, tracer):
    exporter = StoreSpanExporter(store)
    span = tracer.start_span("call", attributes=NEW)
    assert exporter.export([span]) is SpanExportResult.SUCCESS
    rows_of(store, 0)
    span.end()
    rows_of(store, 1)


def test_a_span_that_was_refused_may_be_exported_again():
    with Store("sqlite://", settings=StoreSettings(queue_max_bytes=4_096)) as store:
        exporter = StoreSpanExporter(store)
        provider = TracerProvider(shutdown_on_exit=False)
        text = json.dumps([{"role": "user", "content": QUESTION * 1_000}])
        span = provider.get_tracer("test").start_span(
            "call", attributes=NEW | {"gen_ai.input.messages": text}
        )
        span.end()
        for _ in range(2):
            assert exporter.export([span]) is SpanExportResult.FAILURE
        assert store.health().dropped_by == {"queue_full": 2}


def test_the_fields_are_those_of_a_record():
    provider = TracerProvider(shutdown_on_exit=False)
    span = provider.get_tracer("test").start_span("call", attributes=OLD)
    assert fields_of(span).keys() <= RoutingEvent.model_fields.keys()


def test_an_export_never_raises(store, caplog):
    class Strict(Store):
        def record(self, *_, **__):
            raise BadArgument("record: of a strict store")

    exporter = StoreSpanExporter(Strict("sqlite://"))
    spanned(provider_of(exporter).get_tracer("test"), NEW)
    assert exporter.export([]) is SpanExportResult.SUCCESS
    assert "Exception" not in caplog.text


def test_a_span_that_cannot_be_read_costs_no_other(store, tracer):
    span = tracer.start_span("call", attributes=NEW)
    span.end()
    exporter = StoreSpanExporter(store)
    assert exporter.export([object(), span, None]) is SpanExportResult.FAILURE
    rows_of(store, 2)


def test_after_shutdown_nothing_is_taken(store):
    exporter = StoreSpanExporter(store)
    provider = provider_of(exporter)
    tracer = provider.get_tracer("test")
    spanned(tracer, NEW)
    provider.shutdown()
    assert store.health().written == 1, "shutdown waits for what was taken"
    spanned(tracer, NEW)
    assert exporter.export([]) is SpanExportResult.FAILURE
    exporter.shutdown()
    rows_of(store, 1)


def test_a_closed_store_counts_what_comes_later(store):
    exporter = StoreSpanExporter(store)
    tracer = provider_of(exporter).get_tracer("test")
    store.close()
    spanned(tracer, NEW)
    assert store.health().dropped_by == {"closed": 1}
    assert exporter.force_flush(0)


@pytest.mark.parametrize("kind", [Store, AsyncStore])
def test_an_export_does_not_wait_and_a_flush_keeps_its_deadline(tmp_path, kind):
    """With a database that nobody can write to."""
    path = tmp_path / "telemetry.db"
    with Store(path) as before:
        before.check()
    store = kind(path)
    exporter = StoreSpanExporter(store)
    tracer = provider_of(exporter).get_tracer("test")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        for _ in range(100):
            spanned(tracer, NEW)
        print(f"100 exports: {time.monotonic() - began:.3f} s")
        for wait in (exporter.force_flush, exporter.shutdown):
            began = time.monotonic()
            assert not wait(200)
            print(f"{wait.__name__}: {time.monotonic() - began:.3f} s")
        assert store._health().pending == 100
    assert StoreSpanExporter(store).force_flush()
    assert store._health().written == 100
    closed = store.close()
    if kind is AsyncStore:
        asyncio.run(closed)


def test_an_async_store_is_flushed_from_within_a_loop_too():
    async def main():
        async with AsyncStore("sqlite://") as store:
            exporter = StoreSpanExporter(store)
            spanned(provider_of(exporter).get_tracer("test"), NEW)
            assert exporter.force_flush()
            assert (await store.health()).written == 1

    asyncio.run(main())


@pytest.mark.parametrize("timeout_millis", [None, 0, -5, 10.5])
def test_any_timeout_is_taken(store, timeout_millis):
    assert StoreSpanExporter(store).force_flush(timeout_millis)


@pytest.mark.parametrize("timeout_millis", ["soon", 10**400])
def test_a_flush_never_raises(store, timeout_millis):
    assert not StoreSpanExporter(store).force_flush(timeout_millis)


def test_arguments_are_checked(store):
    with pytest.raises(BadArgument, match="store: give a Store"):
        StoreSpanExporter(None)
    with pytest.raises(BadArgument, match="keep_attributes: give a list"):
        StoreSpanExporter(store, keep_attributes="service.name")


def test_an_async_store_is_flushed_at_the_interpreters_end():
    program = """if True:
        import asyncio, atexit
        from lynkr_store import AsyncStore
        from lynkr_store.integrations.otel import StoreSpanExporter
        store = AsyncStore("sqlite://")
        exporter = StoreSpanExporter(store)

        async def at_the_end():
            print(exporter.force_flush(5_000), (await store.health()).written)

        atexit.register(lambda: asyncio.run(at_the_end()))
        store.record(provider="p")
    """
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True 1\n", "")


def test_what_is_remembered_is_bounded(store, monkeypatch):
    monkeypatch.setattr("lynkr_store.integrations.records._REMEMBERED", 10)
    exporter = StoreSpanExporter(store)
    tracer = provider_of(exporter).get_tracer("test")
    with tracer.start_as_current_span("agent"):
        for _ in range(30):
            spanned(tracer, NEW)
    rows_of(store, 30)
    assert len(exporter._seen) == 10
    assert len(exporter._around) == 1


# -- under load ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_threads_and_coroutines_at_once(open_store):
    store = open_store(flush_interval_s=0.05)
    exporter = StoreSpanExporter(store)
    provider = provider_of(exporter, BatchSpanProcessor)
    tracer = provider.get_tracer("test")

    def in_thread():
        for _ in range(100):
            spanned(tracer, NEW)

    async def in_loop():
        for _ in range(100):
            spanned(tracer, NEW)
            await asyncio.sleep(0)

    async def main():
        await asyncio.gather(*(in_loop() for _ in range(4)))

    threads = [threading.Thread(target=in_thread) for _ in range(4)]
    for thread in threads:
        thread.start()
    asyncio.run(main())
    for thread in threads:
        thread.join()
    provider.shutdown()
    health = store.health()
    assert adds_up(health)
    assert (health.written, health.rejected, health.dropped) == (800, 0, 0)
    assert len({row.request_id for row in store.query(limit=1000)}) == 800
