"""LiteLLM's real proxy with the example's files: one row for each attempt, and none is lost."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import httpx
import openai
import pytest

from lynkr_store import RoutingFilter, Store
from tests.support.litellm_proxy import KEY, UPSTREAM_KEY, running
from tests.support.model_server import ANSWER, UPSTREAM, serving
from tests.support.stores import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_800)]  # the first one installs the proxy

QUESTION = "why is it so?"
MESSAGES = [{"role": "user", "content": QUESTION}]
PERSON = "a.person@example.org"


@pytest.fixture(scope="module")
def models():
    with serving() as url:
        yield url.replace("127.0.0.1", "localhost")  # so that a client's address is another text


@pytest.fixture(scope="module")
def proxy(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("proxy")
    with running(models, folder, LYNKR_STORE_CAPTURE_TEXT="false") as proxy:
        yield proxy


@pytest.fixture
def chat(proxy):
    """Calls the proxy as its clients do, and gives the header that names the request."""

    def ask(model, **given):
        create = proxy.client().chat.completions.with_raw_response.create
        try:
            answer = create(model=model, messages=MESSAGES, user=PERSON, **given)
        except openai.APIStatusError as error:
            answer = error.response
        else:
            parsed = answer.parse()
            text = (
                "".join(chunk.choices[0].delta.content or "" for chunk in parsed if chunk.choices)
                if given.get("stream")
                else parsed.choices[0].message.content
            )
            assert text == ANSWER
        return answer.headers["x-litellm-call-id"]

    return ask


@pytest.fixture
def rows_of(proxy):
    """The rows of a request, in the order of its attempts, when that many are there."""
    with Store(proxy.store_url) as store:

        def rows(request_id, count):
            criteria = RoutingFilter(request_id=request_id)
            eventually(lambda: len(store.query(criteria)) >= count)
            found = store.query(criteria)
            assert len(found) == count
            return sorted(found, key=lambda row: row.attempt_index)

        yield rows


ANSWERED = {
    "provider": "openai",
    "model": "gpt-4o-mini",
    "requested_model": "openai/gpt-4o-mini",
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
    "request_text": None,
    "response_text": None,
}
FAILED = ANSWERED | dict.fromkeys(
    (
        *("input_tokens", "output_tokens", "cache_read_tokens", "reasoning_tokens"),
        *("cache_tokens_included", "cost_usd", "finish_reason", "tool_calls_made"),
    )
)


def failed(status, kind):
    """The rows of a model that fails: the router tries it three times."""
    fields = {"model": f"fail-{status}", "requested_model": f"openai/fail-{status}"}
    fields |= {"status_code": status, "error_type": kind}
    return [FAILED | fields | {"attempt_index": n, "retry_count": n} for n in range(3)]


def check(rows, expected):
    for row, fields in zip(rows, expected, strict=True):
        assert {name: getattr(row, name) for name in fields} == fields
        assert 0 < row.latency_ms < 30_000
        assert (row.ttft_ms is not None) == (row.stream and row.error_type is None)
        assert json.loads(row.attributes)["api_host"] == "localhost"
    assert len({row.trace_id for row in rows}) == 1
    assert len({json.loads(row.attributes)["model_id"] for row in rows}) == len(
        {row.model.startswith("fail") for row in rows}
    )
    for earlier, later in pairwise(rows):
        ended = earlier.timestamp + timedelta(milliseconds=earlier.latency_ms)
        assert ended < later.timestamp + timedelta(milliseconds=2)  # both are rounded


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_one_row(chat, rows_of, stream):
    check(rows_of(chat("openai/gpt-4o-mini", stream=stream), 1), [ANSWERED | {"stream": stream}])


def test_a_model_without_a_price_has_no_cost(chat, rows_of):
    fields = {"model": "nobody-knows-it", "requested_model": "openai/nobody-knows-it"}
    check(rows_of(chat("openai/nobody-knows-it"), 1), [ANSWERED | fields | {"cost_usd": None}])


@pytest.mark.parametrize("stream", [False, True])
def test_each_try_of_a_model_that_fails_is_a_row(chat, rows_of, stream):
    request = chat("openai/fail-429", stream=stream, extra_body={"disable_fallbacks": True})
    expected = [row | {"stream": stream} for row in failed(429, "RateLimitError")]
    check(rows_of(request, 3), expected)


@pytest.mark.parametrize("stream", [False, True])
def test_a_fallback_is_the_last_attempt(chat, rows_of, stream):
    answered = {"requested_model": "openai/fail-500", "attempt_index": 3, "was_fallback": True}
    expected = [*failed(500, "InternalServerError"), ANSWERED | answered]
    request = chat("openai/fail-500", stream=stream)
    check(rows_of(request, 4), [row | {"stream": stream} for row in expected])


def test_an_embedding(proxy, rows_of):
    model = "text-embedding-3-small"
    create = proxy.client().embeddings.with_raw_response.create
    answer = create(model=f"openai/{model}", input=[QUESTION], user=PERSON)
    fields = {"request_type": "embedding", "model": model, "requested_model": f"openai/{model}"}
    fields |= {"input_tokens": 7, "output_tokens": 0, "cost_usd": pytest.approx(1.4e-07)}
    [row] = rows_of(answer.headers["x-litellm-call-id"], 1)
    assert {name: getattr(row, name) for name in fields} == fields
    assert row.finish_reason is row.tool_calls_made is row.response_text is None


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_s_protocol(proxy, rows_of, stream):
    """LiteLLM's releases have reported these calls twice."""
    body = {"model": "openai/gpt-4o-mini", "messages": MESSAGES, "max_tokens": 9, "stream": stream}
    answer = proxy.client().post("/messages", body=body, cast_to=httpx.Response)
    assert ANSWER in answer.read().decode()
    fields = {"request_type": "anthropic_messages", "stream": stream}
    check(rows_of(answer.headers["x-litellm-call-id"], 1), [ANSWERED | fields])


def test_a_refused_request_is_one_row(proxy):
    """LiteLLM calls two hooks for it."""
    with pytest.raises(openai.APIStatusError):
        proxy.client("sk-of-nobody").embeddings.create(model="openai/refused", input=[QUESTION])
    with Store(proxy.store_url) as store:
        criteria = RoutingFilter(model="refused")
        eventually(lambda: store.query(criteria))
        time.sleep(1)  # longer than a second row would take
        [row] = store.query(criteria)
    assert (row.error_type, row.status_code) == ("ProxyException", 400)
    assert row.input_tokens is row.cost_usd is row.finish_reason is None


def test_several_at_once(chat, rows_of):
    with ThreadPoolExecutor(16) as threads:
        models = ["openai/gpt-4o-mini"] * 48
        requests = list(threads.map(lambda model: chat(model, stream=True), models))
    assert len(set(requests)) == 48
    for request in requests:
        check(rows_of(request, 1), [ANSWERED | {"stream": True}])


def test_nothing_private_is_stored_or_logged(proxy, chat, rows_of):
    rows_of(chat("openai/gpt-4o-mini"), 1)
    rows_of(chat("openai/fail-400", extra_body={"disable_fallbacks": True}), 1)
    folder = Path(proxy.log).parent
    stored = b"".join(file.read_bytes() for file in folder.glob("telemetry.db*"))
    assert b"gpt-4o-mini" in stored
    for secret in (KEY, UPSTREAM_KEY, PERSON, "127.0.0.1", "http", QUESTION, ANSWER, UPSTREAM):
        assert secret.encode() not in stored, secret
    assert "lynkr" not in proxy.log.read_text()


# uvicorn kills a worker that is still importing after this time, and starts another
PATIENT = ["--timeout_worker_healthcheck", "120"]


@pytest.mark.parametrize(
    "options", [[], ["--num_workers", "2", *PATIENT]], ids=["alone", "two workers"]
)
def test_its_end_writes_every_row(models, tmp_path, options):
    with running(models, tmp_path, *options) as proxy:
        create = proxy.client().chat.completions.with_raw_response.create

        def ask(number):
            answer = create(
                model="openai/gpt-4o-mini", messages=[{"role": "user", "content": str(number)}]
            )
            return answer.headers["x-litellm-call-id"]

        with ThreadPoolExecutor(16) as threads:
            requests = list(threads.map(ask, range(48)))
        assert proxy.end() == (0 if options else -signal.SIGTERM)
        with Store(proxy.store_url) as store:
            rows = store.query()
        assert sorted(row.request_id for row in rows) == sorted(requests)
        assert {row.request_text for row in rows} == {str(number) for number in range(48)}
