"""A service whose calls of a model one instrumentation reports: ``genai`` or ``traceloop``.

A process of its own for each, because one of them leaves its wrappers when it is taken off. It
prints the rows of each call as JSON: those of a store that keeps texts, and of one that does not.
"""

import asyncio
import json
import logging
import os
import sys
import warnings
from typing import Any

warnings.simplefilter("ignore")  # what other packages say at their import
os.environ["OTEL_SEMCONV_STABILITY_OPT_IN"] = "gen_ai_latest_experimental"
os.environ["OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"] = "SPAN_ONLY"

import openai  # noqa: E402 - after the filter
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402

from lynkr_store import Store, StoreSettings  # noqa: E402
from lynkr_store.integrations.otel import StoreSpanExporter  # noqa: E402

KEY = "sk-a-secret"
PERSON = "a-person"
QUESTION = "why is it so?"
MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": QUESTION}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CHAT = {"model": "gpt-4o-mini", "messages": MESSAGES}
RESPONSE = {"model": "gpt-4o-mini", "input": QUESTION}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("chat.completions", CHAT | {"user": PERSON}),
    "chat streamed": ("chat.completions", CHAT | STREAMED),
    "tools": ("chat.completions", CHAT | {"tools": TOOLS}),
    "response": ("responses", RESPONSE),
    "response streamed": ("responses", RESPONSE | {"stream": True}),
    "response fails": ("responses", RESPONSE | {"model": "fail-429"}),
    "embedding": ("embeddings", {"model": "text-embedding-3-small", "input": QUESTION}),
    **{
        f"fails with {status}": ("chat.completions", CHAT | {"model": f"fail-{status}"})
        for status in (400, 401, 429, 500)
    },
    "away": ("chat.completions", CHAT),
}


def called(server: str, api: str, arguments: dict[str, Any], how: str) -> None:
    """Make a call; its error is the instrumentation's to report."""
    options: Any = {"base_url": f"{server}/v1", "api_key": KEY, "max_retries": 0}
    streamed = arguments.get("stream")

    def create(client: Any) -> Any:
        part = client
        for name in api.split("."):
            part = getattr(part, name)
        return part.create(**arguments)

    async def call_later() -> None:
        async with openai.AsyncOpenAI(**options) as client:
            answer = await create(client)
            if streamed:
                async for _ in answer:
                    pass

    try:
        if how == "async":
            asyncio.run(call_later())
            return
        with openai.OpenAI(**options) as client:
            answer = create(client)
            if streamed:
                list(answer)
    except openai.OpenAIError:
        pass


def main(name: str, server: str) -> None:
    if name == "genai":
        from opentelemetry.instrumentation.genai.openai import OpenAIInstrumentor  # noqa: PLC0415
    else:
        from opentelemetry.instrumentation.openai import OpenAIInstrumentor  # noqa: PLC0415
    logging.basicConfig(level=logging.DEBUG)  # to standard error, which the test reads
    logging.getLogger("lynkr_store").setLevel(logging.DEBUG)
    for other in ("openai", "httpx", "httpcore", "asyncio", "urllib3"):
        logging.getLogger(other).setLevel(logging.CRITICAL)
    provider = TracerProvider(shutdown_on_exit=False)
    stores = [
        Store("sqlite://", settings=StoreSettings(capture_text=kept)) for kept in (True, False)
    ]
    for store in stores:
        provider.add_span_processor(SimpleSpanProcessor(StoreSpanExporter(store)))
    OpenAIInstrumentor().instrument(tracer_provider=provider)
    rows: dict[str, list[list[Any]]] = {}
    known = [0, 0]
    for case, (api, arguments) in CALLS.items():
        for how in ("sync", "async"):
            called("http://127.0.0.1:9" if case == "away" else server, api, arguments, how)
            found = rows[f"{case} {how}"] = []
            for at, store in enumerate(stores):
                assert store.flush(30)
                new = [row for row in store.query(limit=1000) if row.id > known[at]]
                known[at] += len(new)
                found.append([json.loads(row.model_dump_json()) for row in new])
    for store in stores:
        store.close()
        assert store.health().rejected == 0, store.health().rejections
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
