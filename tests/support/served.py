"""An application for the servers of `test_servers`: it records each request, and answers its id."""

import itertools
import os
import time

from lynkr_store import Store, StoreSettings

store = Store(settings=StoreSettings(handle_sigterm=os.environ.get("HANDLE_SIGTERM") == "yes"))
_numbers = itertools.count()


def _recorded(path):
    if path == "/slow":  # in progress when the server is told to end
        time.sleep(0.5)
    request_id = f"{os.getpid()}-{next(_numbers)}"
    assert store.record(provider="p", request_id=request_id)
    return request_id.encode()


def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [_recorded(environ["PATH_INFO"])]


async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        store.check()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = _recorded(scope["path"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
