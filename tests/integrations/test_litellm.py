"""LiteLLM's real package against a local server: one row for each attempt, field by field."""

import asyncio
import json
import time
import warnings
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import pairwise

import pytest

from lynkr_store import BadArgument, RoutingEvent, Store, StoreSettings
from tests.support.model_server import ANSWER, UPSTREAM
from tests.support.stores import adds_up, eventually

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it and its dependencies say at their import
    import litellm
    from litellm.caching import Cache
    from litellm.utils import Rules, function_setup

    from lynkr_store.integrations.litellm import StoreLogger, fields_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of LiteLLM's own code

KEY = "sk-a-secret"
QUESTION = "why is it so?"
MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": QUESTION}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@pytest.fixture(autouse=True)
def reported(store, monkeypatch):
    """LiteLLM reports to the store, and to nothing else."""
    for name in ("callbacks", "success_callback", "failure_callback"):
        monkeypatch.setattr(litellm, name, [])
    for name in ("_async_success_callback", "_async_failure_callback", "input_callback"):
        monkeypatch.setattr(litellm, name, [])
    monkeypatch.setattr(litellm, "suppress_debug_info", True)
    monkeypatch.setattr(litellm, "cache", None)
    litellm.callbacks = [StoreLogger(store)]


def rows_of(store, count):
    """The rows, the oldest first, when that many are there; and no more come soon."""
    eventually(lambda: store.flush() and len(store.query()) >= count)
    time.sleep(0.1)
    assert store.flush()
    rows = store.query()[::-1]
    assert len(rows) == count
    assert adds_up(store.health())
    assert store.health().rejected == 0, store.health().rejections
    return rows


# -- single attempts -------------------------------------------------------------------------------

KNOWN = {
    "provider": "openai",
    "model": "gpt-4o-mini",
    "requested_model": None,
    "request_type": "completion",
    "error_type": None,
    "status_code": None,
    "input_tokens": 100,
    "output_tokens": 20,
    "cache_read_tokens": 30,
    "cache_creation_tokens": None,
    "reasoning_tokens": 5,
    "cache_tokens_included": True,
    "cost_usd": pytest.approx(2.475e-05),
    "finish_reason": "stop",
    "tool_count": None,
    "tool_calls_made": 0,
    "stream": False,
    "attempt_index": 0,
    "retry_count": 0,
    "was_fallback": False,
    "session_id": None,
    "tier": None,
    "quality_score": None,
    "request_text": QUESTION,
    "response_text": ANSWER,
}
"""What OpenAI's protocol says of a plain call."""
NO_TOKENS = dict.fromkeys(
    (
        *("input_tokens", "output_tokens", "cache_read_tokens", "cache_creation_tokens"),
        *("reasoning_tokens", "cache_tokens_included", "cost_usd"),
    )
)
FAILED = NO_TOKENS | {"finish_reason": None, "tool_calls_made": None, "response_text": None}
ANTHROPIC = {
    "provider": "anthropic",
    "model": "claude-sonnet-4-5",
    "cache_creation_tokens": 10,
    "reasoning_tokens": 0,
    "cost_usd": pytest.approx(0.0005265),
}
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def failing(status, kind):
    return {"model": f"fail-{status}", "error_type": kind, "status_code": status} | FAILED


CASES = {
    "plain": ({"model": "openai/gpt-4o-mini"}, {}),
    "streamed": ({"model": "openai/gpt-4o-mini", **WITH_USAGE}, {"stream": True}),
    "tools": (
        {"model": "openai/gpt-4o-mini", "tools": TOOLS},
        {
            "tool_count": 1,
            "tool_calls_made": 1,
            "finish_reason": "tool_calls",
            "response_text": None,
        },
    ),
    "unpriced": (
        {"model": "openai/nobody-knows-it"},
        {"model": "nobody-knows-it", "cost_usd": None},
    ),
    "without usage": ({"model": "openai/nousage"}, {"model": "nousage"} | NO_TOKENS),
    "anthropic": ({"model": "anthropic/claude-sonnet-4-5"}, ANTHROPIC),
    "anthropic streamed": (
        {"model": "anthropic/claude-sonnet-4-5", "stream": True},
        ANTHROPIC | {"stream": True},
    ),
    **{
        f"fails with {status}": ({"model": f"openai/fail-{status}"}, failing(status, kind))
        for status, kind in {
            400: "BadRequestError",
            401: "AuthenticationError",
            404: "NotFoundError",
            429: "RateLimitError",
            500: "InternalServerError",
            503: "ServiceUnavailableError",
        }.items()
    },
    "of a session": (
        {
            "model": "openai/gpt-4o-mini",
            "metadata": {"session_id": "s-1", "lynkr": {"tier": "SIMPLE", "quality_score": 71}},
        },
        {"session_id": "s-1", "tier": "SIMPLE", "quality_score": 71},
    ),
}


def in_a_loop(store, make, attempts=1):
    """Run a coroutine, and its loop until LiteLLM has reported that many attempts."""
    before = store.health().submitted

    async def all_of_it():
        try:
            return await make()
        finally:
            deadline = time.monotonic() + 30
            while store.health().submitted < before + attempts:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)

    return asyncio.run(all_of_it())


def called(store, server, given, how):
    """Make a call, and return its error."""
    at = server if given["model"].startswith("anthropic") else f"{server}/v1"
    arguments = {"api_base": at, "api_key": KEY, "max_retries": 0, "messages": MESSAGES} | given

    def call():
        answer = litellm.completion(**arguments)
        if given.get("stream"):
            list(answer)

    async def call_later():
        answer = await litellm.acompletion(**arguments)
        if given.get("stream"):
            async for _ in answer:
                pass

    try:
        call() if how == "sync" else in_a_loop(store, call_later)
    except Exception as error:  # noqa: BLE001 - of any status
        return error
    return None


@pytest.mark.sample(4)
@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize(("given", "differs"), CASES.values(), ids=CASES)
def test_an_attempt_is_one_row(store, server, given, differs, how):
    error = called(store, server, given, how)
    assert (error is None) == ("error_type" not in differs)
    [row] = rows_of(store, 1)
    expected = KNOWN | differs
    assert {name: getattr(row, name) for name in expected} == expected
    assert row.request_id
    assert row.trace_id
    assert row.latency_ms > 0
    assert (row.ttft_ms is not None) == bool(given.get("stream"))
    assert row.ttft_ms is None or 0 < row.ttft_ms <= row.latency_ms
    attributes = json.loads(row.attributes)
    assert attributes["api_host"] == "127.0.0.1"
    assert attributes["call_type"] == ("completion" if how == "sync" else "acompletion")
    check_private(store)


def check_private(store):
    """Neither keys nor URLs nor upstream's words are in any column."""
    for row in store.query():
        dumped = row.model_dump_json()
        for secret in (KEY, UPSTREAM, "http://", "Traceback", "/v1"):
            assert secret not in dumped, secret


# -- other calls -----------------------------------------------------------------------------------


def at(server):
    return {"api_base": f"{server}/v1", "api_key": KEY, "max_retries": 0}


@pytest.mark.parametrize("how", ["sync", "async"])
def test_an_embedding(store, server, how):
    arguments = {"model": "openai/text-embedding-3-small", "input": [QUESTION], **at(server)}
    if how == "sync":
        litellm.embedding(**arguments)
    else:
        in_a_loop(store, lambda: litellm.aembedding(**arguments))
    [row] = rows_of(store, 1)
    assert (row.request_type, row.model) == ("embedding", "text-embedding-3-small")
    assert (row.input_tokens, row.output_tokens) == (7, 0)
    assert row.cost_usd == pytest.approx(1.4e-07)
    assert row.finish_reason is row.tool_calls_made is row.response_text is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["sync", "async"])
def test_the_responses_api(store, server, how, stream):
    arguments = {"model": "openai/gpt-4o-mini", "input": QUESTION, "stream": stream, **at(server)}
    if how == "sync":
        answer = litellm.responses(**arguments)
        if stream:
            list(answer)
    else:

        async def call():
            answer = await litellm.aresponses(**arguments)
            if stream:
                async for _ in answer:
                    pass

        in_a_loop(store, call)
    [row] = rows_of(store, 1)
    expected = KNOWN | {
        "request_type": "responses",
        "finish_reason": None,
        "stream": row.stream,
    }
    assert {name: getattr(row, name) for name in expected} == expected
    assert bool(row.stream) == stream


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_from_the_cache_costs_nothing(store, server, stream, monkeypatch):
    monkeypatch.setattr(litellm, "cache", Cache(type="local"))
    given = {"model": "openai/gpt-4o-mini", "caching": True, "stream": stream}
    for _ in range(2):
        assert called(store, server, given, "async") is None
    first, second = rows_of(store, 2)
    assert first.cost_usd > 0
    assert second.cost_usd == 0.0
    assert first.request_id != second.request_id
    assert second.model == "gpt-4o-mini"


def router(server, **options):
    models = {
        "first": "openai/fail-500",
        "second": "openai/gpt-4o-mini",
        "third": "openai/fail-503",
    }
    return litellm.Router(
        model_list=[
            {"model_name": name, "litellm_params": {"model": model, **at(server)}}
            for name, model in models.items()
        ],
        retry_after=0,
        **options,
    )


@pytest.mark.slow
def test_a_router_s_retries_and_fallbacks_are_attempts_of_one_request(store, server):
    routed = router(server, fallbacks=[{"first": ["second"]}], num_retries=1)
    asked = {"model": "first", "messages": MESSAGES, "metadata": {"session_id": "s-1"}}
    in_a_loop(store, lambda: routed.acompletion(**asked), 3)
    rows = rows_of(store, 3)
    assert [row.attempt_index for row in rows] == [0, 1, 2]
    assert [row.retry_count for row in rows] == [0, 1, 0]
    assert [row.was_fallback for row in rows] == [False, False, True]
    assert [row.model for row in rows] == ["fail-500", "fail-500", "gpt-4o-mini"]
    assert [row.error_type for row in rows] == ["InternalServerError"] * 2 + [None]
    assert {row.requested_model for row in rows} == {"first"}
    assert {row.session_id for row in rows} == {"s-1"}
    assert len({row.trace_id for row in rows}) == 1
    assert len({row.request_id for row in rows}) == 3
    check_private(store)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_attempts_that_share_a_logging_object_are_all_rows(store, server, stream):
    """The proxy makes one for each request, and it reports the first failure alone."""
    started = datetime.now()  # noqa: DTZ005 - as LiteLLM does
    asked = {"model": "first", "messages": MESSAGES, "stream": stream, "litellm_call_id": "call-1"}
    logging, _ = function_setup("acompletion", Rules(), started, **asked)
    routed = router(server, fallbacks=[{"first": ["third", "second"]}], num_retries=1)

    async def ask():
        answer = await routed.acompletion(**asked, litellm_logging_obj=logging)
        if stream:
            async for _ in answer:
                pass

    in_a_loop(store, ask, 5)
    rows = rows_of(store, 5)
    assert [row.attempt_index for row in rows] == [*range(5)]
    assert [row.retry_count for row in rows] == [0, 1, 0, 1, 0]
    assert [row.was_fallback for row in rows] == [False, False, True, True, True]
    assert [row.model for row in rows] == [*["fail-500"] * 2, *["fail-503"] * 2, "gpt-4o-mini"]
    assert [row.status_code for row in rows] == [500, 500, 503, 503, None]
    assert {row.requested_model for row in rows} == {"first"}
    assert {row.request_id for row in rows} == {"call-1"}
    for earlier, later in pairwise(rows):
        ended = earlier.timestamp + timedelta(milliseconds=earlier.latency_ms)
        assert ended < later.timestamp + timedelta(milliseconds=2)  # both are rounded
    check_private(store)


def test_fallbacks_without_a_router_are_rows_of_their_own(store, server):
    """They keep one call id for all attempts."""
    arguments = {
        "model": "openai/fail-500",
        "messages": MESSAGES,
        "fallbacks": ["openai/gpt-4o-mini"],
        **at(server),
    }
    in_a_loop(store, lambda: litellm.acompletion(**arguments), 2)
    rows = rows_of(store, 2)
    assert [row.error_type for row in rows] == ["InternalServerError", None]
    assert [row.attempt_index for row in rows] == [0, 1]
    assert [row.was_fallback for row in rows] == [False, True]


@pytest.mark.slow
def test_a_long_chain_of_attempts_is_counted(store, server):
    routed = router(server, fallbacks=[{"first": ["third", "second"]}], num_retries=2)
    asked = {"model": "first", "messages": MESSAGES, "litellm_trace_id": "of several requests"}
    for _ in range(2):
        in_a_loop(store, lambda: routed.acompletion(**asked), 7)
    rows = rows_of(store, 14)
    assert [row.attempt_index for row in rows] == [*range(7)] * 2
    assert [row.was_fallback for row in rows] == ([False] * 3 + [True] * 4) * 2


# -- the logger ------------------------------------------------------------------------------------


def test_a_second_store_gets_its_rows_too(store, server):
    with Store("sqlite://") as other:
        litellm.callbacks.append(StoreLogger(other))
        assert called(store, server, {"model": "openai/gpt-4o-mini"}, "async") is None
        [mine], [others] = rows_of(store, 1), rows_of(other, 1)
        assert mine.request_id == others.request_id


def test_texts_are_stored_only_if_the_store_keeps_them(server):
    with Store("sqlite://", settings=StoreSettings(capture_text=False)) as store:
        litellm.callbacks = [StoreLogger(store)]
        assert called(store, server, {"model": "openai/gpt-4o-mini"}, "async") is None
        [row] = rows_of(store, 1)
        assert QUESTION not in row.model_dump_json()
        assert ANSWER not in row.model_dump_json()


def test_only_the_metadata_that_is_asked_for_is_kept(store):
    metadata = {
        "user_api_key_team_id": "team",
        "user_api_key_user_email": "a@b.example",
        "tags": ["blue"],
    }
    payload = {
        "litellm_call_id": "c",
        "custom_llm_provider": "openai",
        "request_tags": ["blue", "User-Agent: browser", "x-user-email: a@b.example"],
        "end_user": "a person",
        "requester_ip_address": "10.0.0.1",
        "user_agent": "browser",
        "api_base": "https://user:password@api.example/v1?key=secret",
    }
    kwargs = {"standard_logging_object": payload, "litellm_params": {"metadata": metadata}}
    logger = StoreLogger(store, keep_metadata=["user_api_key_team_id"])
    logger.log_success_event(kwargs, None, None, None)
    [row] = rows_of(store, 1)
    assert json.loads(row.attributes) == {
        "api_host": "api.example",
        "request_tags": ["blue"],
        "user_api_key_team_id": "team",
    }
    for secret in ("person", "10.0.0.1", "browser", "password", "@"):
        assert secret not in row.model_dump_json()


def test_a_missing_payload_is_a_partial_row(store):
    now = datetime.now()  # noqa: DTZ005 - as LiteLLM does
    logger = StoreLogger(store)
    logger.log_success_event(
        {"model": "m", "litellm_call_id": "c", "call_type": "acompletion"}, None, now, now
    )
    [row] = rows_of(store, 1)
    assert (row.provider, row.model, row.request_id) == ("unknown", "m", "c")
    assert row.request_type == "completion"
    assert row.latency_ms == 0


ODD = {
    "instant": {"standard_logging_object": {"startTime": "soon", "litellm_call_id": "a"}},
    "choices": {"standard_logging_object": {"response": {"choices": 5}, "litellm_call_id": "a"}},
    "message": {
        "standard_logging_object": {"messages": [{"role": "user", "content": [{"text": {}}]}]}
    },
    "messages": {"standard_logging_object": {"messages": 5}},
    "url": {"standard_logging_object": {"api_base": "http://[::1"}},
    "count": {"litellm_params": {"metadata": {"attempted_retries": "many"}}},
    "identity": {"litellm_call_id": [], "model": "m"},
    "nothing": None,
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("kwargs", ODD.values(), ids=ODD)
def test_what_another_release_or_a_client_says_otherwise_is_a_row(store, kwargs):
    StoreLogger(store).log_failure_event(kwargs, None, None, None)
    [row] = rows_of(store, 1)
    assert row.provider == "unknown"
    assert row.error_type


def test_wrong_values_of_the_callers_own_cost_no_row(store):
    metadata = {"lynkr": {"tier": 5, "pinned": "yes", "base_tier": "SIMPLE"}, "team": {1, 2}}
    logger = StoreLogger(store, keep_metadata=["team"])
    logger.log_success_event({"litellm_params": {"metadata": metadata}}, None, None, None)
    [row] = rows_of(store, 1)
    assert (row.tier, row.pinned, row.base_tier, row.attributes) == (None, False, "SIMPLE", None)


def test_metadata_by_either_name(store, server):
    routed = router(server)
    asked = {"model": "second", "messages": MESSAGES}
    said = {"session_id": "s-1", "lynkr": {"tier": "SIMPLE"}}
    in_a_loop(store, lambda: routed.acompletion(**asked, litellm_metadata=said))
    [row] = rows_of(store, 1)
    assert (row.session_id, row.tier) == ("s-1", "SIMPLE")


def test_thoughts_are_no_answer():
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}
    said = {"type": "message", "content": [{"type": "output_text", "text": ANSWER}]}
    call = {"type": "function_call", "name": "look"}
    payload = {"response": {"output": [thought, said, call]}}
    fields = fields_of({"standard_logging_object": payload}, None, None, failed=False)
    assert (fields["response_text"], fields["tool_calls_made"]) == (ANSWER, 1)


def test_a_text_completion_has_its_answer():
    payload = {"response": {"choices": [{"text": ANSWER, "finish_reason": "stop"}]}}
    fields = fields_of({"standard_logging_object": payload}, None, None, failed=False)
    assert (fields["response_text"], fields["finish_reason"]) == (ANSWER, "stop")


def test_what_is_remembered_is_bounded(store, monkeypatch):
    monkeypatch.setattr("lynkr_store.integrations.records._REMEMBERED", 10)
    logger = StoreLogger(store)
    for number in range(30):
        logger.log_success_event({"litellm_call_id": str(number)}, None, None, None)
    rows_of(store, 30)
    assert len(logger._seen) == len(logger._attempts) == 10


def test_an_attempt_that_is_reported_twice_is_one_row(store):
    payload = {"litellm_call_id": "c", "custom_llm_provider": "p", "startTime": 1.75e9}
    logger = StoreLogger(store)
    for _ in range(2):
        logger.log_success_event({"standard_logging_object": payload}, None, None, None)
        asyncio.run(
            logger.async_log_success_event({"standard_logging_object": payload}, None, None, None)
        )
    rows_of(store, 1)
    logger.log_failure_event({"standard_logging_object": payload}, None, None, None)
    rows_of(store, 2)


def test_a_store_that_raises_does_not_stop_a_call():
    class Strict:
        asked = 0

        def record(self, *_, **__):
            self.asked += 1
            raise BadArgument("record: of a strict store")

    store = Strict()
    StoreLogger(store).log_success_event({"model": "m"}, None, None, None)
    assert store.asked == 1


def test_arguments_are_checked(store):
    with pytest.raises(BadArgument, match="store: give a Store"):
        StoreLogger("sqlite://")
    with pytest.raises(BadArgument, match="keep_metadata: give a list"):
        StoreLogger(store, keep_metadata="team")


def test_the_fields_are_those_of_a_record():
    assert set(fields_of({}, None, None, failed=True)) <= RoutingEvent.model_fields.keys()


# -- under load ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callbacks", "failures"),
    [
        (("callbacks",), 40),
        # LiteLLM tells these of no coroutine's failure
        (("success_callback", "failure_callback"), 20),
    ],
)
def test_threads_and_coroutines_at_once(server, callbacks, failures, monkeypatch):
    monkeypatch.setattr(litellm, "callbacks", [])
    models = ["openai/gpt-4o-mini"] * 4 + ["openai/fail-500"]
    with Store("sqlite://", settings=StoreSettings(flush_interval_s=0.05)) as store:
        for name in callbacks:
            monkeypatch.setattr(litellm, name, [StoreLogger(store)])

        def call(number):
            with suppress(litellm.InternalServerError):
                litellm.completion(model=models[number % 5], messages=MESSAGES, **at(server))

        async def call_later(number):
            with suppress(litellm.InternalServerError):
                await litellm.acompletion(model=models[number % 5], messages=MESSAGES, **at(server))

        async def main():
            in_threads = [asyncio.to_thread(call, number) for number in range(100)]
            in_loop = [call_later(number) for number in range(100)]
            await asyncio.gather(*in_threads, *in_loop)

        in_a_loop(store, main, 160 + failures)
        time.sleep(0.5)
        assert store.flush(30)
        health = store.health()
        assert adds_up(health)
        assert (health.written, health.rejected, health.dropped) == (160 + failures, 0, 0)
        rows = store.query(limit=1000)
    assert len({row.request_id for row in rows}) == 160 + failures
    assert sum(row.error_type is not None for row in rows) == failures
