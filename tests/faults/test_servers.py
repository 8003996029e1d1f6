"""Web servers with several processes: what they recorded is stored when they are told to end."""

import http.client
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from tests.support.recorded import ROOT
from tests.support.stores import eventually

REQUESTS = 30
END_S = 20


class Connection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=END_S)
        self._path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def ask(at, path="/"):
    with closing(Connection(at)) as connection:
        connection.request("GET", path)
        return connection.getresponse().read().decode()


def answers(at):
    try:
        return ask(at)
    except OSError:
        return None


def gunicorn(worker, *more):
    app = "tests.support.served:asgi" if "Uvicorn" in worker else "tests.support.served:wsgi"
    return lambda at: ["gunicorn", "-b", f"unix:{at}", "-w", "2", "-k", worker, *more, app]


def uvicorn(*more):
    return lambda at: ["uvicorn", "--uds", at, *more, "tests.support.served:asgi"]


UVICORN_WORKER = "uvicorn_worker.UvicornWorker"
SERVERS = {
    "gunicorn sync": gunicorn("sync"),
    "gunicorn sync preload": gunicorn("sync", "--preload"),
    "gunicorn gthread": gunicorn("gthread"),
    "gunicorn gthread preload": gunicorn("gthread", "--preload"),
    "gunicorn uvicorn": gunicorn(UVICORN_WORKER),
    "gunicorn uvicorn preload": gunicorn(UVICORN_WORKER, "--preload"),
    "uvicorn": uvicorn(),
    "uvicorn workers": uvicorn("--workers", "2"),
}


@pytest.mark.sample(3)
@pytest.mark.sample(3)
@pytest.mark.parametrize("server", SERVERS)
def test_a_server_that_is_told_to_end_stores_what_it_recorded(server, new_url, tmp_path):
    url, at = new_url("sqlite-file", at_head=True), str(tmp_path / "socket")
    process = subprocess.Popen(
        [sys.executable, "-m", *SERVERS[server](at)],
        cwd=ROOT,
        env=os.environ | {"LYNKR_STORE_URL": url, "HANDLE_SIGTERM": "yes"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        eventually(lambda: answers(at))
        ids = [ask(at) for _ in range(REQUESTS)]
        slow = threading.Thread(target=lambda: ids.append(ask(at, "/slow")))
        slow.start()
        slow.join(0.2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=END_S)
        slow.join()
    finally:
        process.kill()
    assert len(ids) == REQUESTS + 1, said
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        rows = [row for (row,) in connection.execute("SELECT request_id FROM routing_telemetry")]
    assert len(rows) == len(set(rows))
    assert set(ids) <= set(rows), said
