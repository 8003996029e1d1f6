"""A server that speaks the protocols of OpenAI and Anthropic, and answers by the model's name.

``fail-429`` is answered by that status, ``nousage`` without usage.
"""

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = "the answer"
UPSTREAM = "a secret of upstream"
USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 20,
    "total_tokens": 120,
    "prompt_tokens_details": {"cached_tokens": 30},
    "completion_tokens_details": {"reasoning_tokens": 5},
}
RESPONSES_USAGE = {
    "input_tokens": 100,
    "output_tokens": 20,
    "total_tokens": 120,
    "input_tokens_details": {"cached_tokens": 30},
    "output_tokens_details": {"reasoning_tokens": 5},
}
MESSAGES_USAGE = {
    "input_tokens": 60,
    "output_tokens": 20,
    "cache_read_input_tokens": 30,
    "cache_creation_input_tokens": 10,
}
CALL = {"id": "call-1", "type": "function", "function": {"name": "look", "arguments": "{}"}}

_numbers = itertools.count(1)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = body["model"]
        if model.startswith("fail-"):
            error = {"message": UPSTREAM, "type": "upstream", "code": model[5:]}
            self._say(int(model[5:]), {"error": error})
        elif self.path.endswith("/chat/completions"):
            self._chat(body)
        elif self.path.endswith("/messages"):
            self._messages(body)
        elif self.path.endswith("/embeddings"):
            data = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
            usage = {"prompt_tokens": 7, "total_tokens": 7}
            self._say(200, {"object": "list", "model": model, "data": data, "usage": usage})
        elif self.path.endswith("/responses"):
            self._responses(body)
        else:
            self._say(404, {})

    def _say(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, events: list[str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for event in events:
            self.wfile.write(f"{event}\n\n".encode())
        self.close_connection = True

    def _chat(self, body: dict[str, Any]) -> None:
        common = {"id": "chat-1", "created": 1, "model": body["model"]}
        usage = {} if body["model"].startswith("nousage") else {"usage": USAGE}
        if body.get("stream"):
            common["object"] = "chat.completion.chunk"
            deltas: list[tuple[Any, str | None]] = [
                ({"role": "assistant", "content": ANSWER[:3]}, None),
                ({"content": ANSWER[3:]}, None),
                ({}, "stop"),
            ]
            chunks: list[Any] = [
                {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
                for delta, reason in deltas
            ]
            if (body.get("stream_options") or {}).get("include_usage"):
                chunks.append({"choices": [], **usage})
            self._stream(
                [*(f"data: {json.dumps(common | chunk)}" for chunk in chunks), "data: [DONE]"]
            )
            return
        message: dict[str, Any] = {"role": "assistant", "content": ANSWER}
        if body.get("tools"):
            message |= {"content": None, "tool_calls": [CALL]}
        reason = "tool_calls" if body.get("tools") else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        self._say(200, common | {"object": "chat.completion", "choices": [choice]} | usage)

    def _messages(self, body: dict[str, Any]) -> None:
        message = {"id": "msg-1", "type": "message", "role": "assistant", "model": body["model"]}
        ended = {"stop_reason": "end_turn", "stop_sequence": None}
        if body.get("stream"):
            begun = {"content": [], "usage": MESSAGES_USAGE | {"output_tokens": 1}}
            events = {
                "message_start": {"message": message | begun},
                "content_block_start": {"index": 0, "content_block": {"type": "text", "text": ""}},
                "content_block_delta": {
                    "index": 0,
                    "delta": {"type": "text_delta", "text": ANSWER},
                },
                "content_block_stop": {"index": 0},
                "message_delta": {"delta": ended, "usage": {"output_tokens": 20}},
                "message_stop": {},
            }
            self._stream(
                [
                    f"event: {kind}\ndata: {json.dumps({'type': kind, **value})}"
                    for kind, value in events.items()
                ]
            )
            return
        content = [{"type": "text", "text": ANSWER}]
        self._say(200, message | ended | {"content": content, "usage": MESSAGES_USAGE})

    def _responses(self, body: dict[str, Any]) -> None:
        content = [{"type": "output_text", "text": ANSWER, "annotations": []}]
        message = {"type": "message", "id": "m", "status": "completed", "role": "assistant"}
        answer = {
            "id": f"resp-{next(_numbers)}",  # an instrumentation merges responses of one id
            "object": "response",
            "created_at": 1,
            "status": "completed",
            "model": body["model"],
            "output": [message | {"content": content}],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": RESPONSES_USAGE,
        }
        if not body.get("stream"):
            self._say(200, answer)
            return
        events = [
            {"type": "response.created", "response": answer | {"output": [], "usage": None}},
            {
                "type": "response.output_text.delta",
                "item_id": "m",
                "output_index": 0,
                "content_index": 0,
                "delta": ANSWER,
            },
            {"type": "response.completed", "response": answer},
        ]
        self._stream([f"event: {event['type']}\ndata: {json.dumps(event)}" for event in events])


@contextmanager
def serving() -> Iterator[str]:
    """Serve on a free port of the loopback address; give the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
