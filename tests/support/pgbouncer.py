"""The real pgbouncer in front of a server of the tests, in transaction mode.

It listens on a Unix socket in a folder of its own, and runs as the user that the server runs as.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy import make_url

from tests.support import postgres

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
SERVER_CONNECTIONS = 4

AS_IT_COMES: dict[str, str] = {}
IGNORING = {"ignore_startup_parameters": "options,extra_float_digits"}
"""Set up to take clients that send startup options, and not to pass them on."""

_START_S = 30.0
_STOP_S = 10.0


@contextmanager
def pooled(url: str, settings: dict[str, str]) -> Iterator[str]:
    """The URL by which a database of a server is reached over a pgbouncer of these settings."""
    assert PROGRAM
    server, user = make_url(url), postgres._unprivileged_user()
    folder = Path(tempfile.mkdtemp(prefix="pgb", dir=postgres._SHORT_LIVED))
    try:
        (folder / "pgbouncer.ini").write_text(_configuration(url, folder, settings))
        if user:
            for path in (folder, folder / "pgbouncer.ini"):
                os.chown(path, user.pw_uid, user.pw_gid)
        with (folder / "log").open("wb") as log:
            command = [PROGRAM, "--quiet", f"{folder}/pgbouncer.ini"]
            process = postgres._spawn(command, log, folder, user)
        try:
            reached = f"postgresql://pooled@/{server.database}?host={folder}&port=6432"
            _await_answer(reached, folder)
            yield reached
        finally:
            process.terminate()
            process.wait(_STOP_S)
    finally:
        shutil.rmtree(folder)


def _configuration(url: str, folder: Path, settings: dict[str, str]) -> str:
    given = make_url(url).translate_connect_args(username="user")
    given |= {name: make_url(url).query[name] for name in ("host", "port") if name not in given}
    server = " ".join(f"{name}={value}" for name, value in given.items() if name != "database")
    own = {
        "listen_addr": "",
        "listen_port": 6432,
        "unix_socket_dir": folder,
        "auth_type": "any",
        "pool_mode": "transaction",
        "default_pool_size": SERVER_CONNECTIONS,
        **settings,
    }
    lines = [f"{name} = {value}" for name, value in own.items()]
    return "\n".join(["[databases]", f"* = {server}", "[pgbouncer]", *lines, ""])


def _await_answer(url: str, folder: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            psycopg.connect(url, connect_timeout=2).close()
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                said = (folder / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"pgbouncer did not start:\n{said}") from None
            time.sleep(0.02)
        else:
            return
