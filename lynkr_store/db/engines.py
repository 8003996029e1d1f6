"""Engine factories: which driver, which PRAGMAs, which BEGIN, which pool, and why."""

import sqlite3
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from operator import methodcaller
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeVar, assert_never, cast
from urllib.parse import quote, unquote, urlsplit

from sqlalchemy import URL, Connection, Engine, QueuePool, StaticPool, create_engine, event
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.pool import ConnectionPoolEntry, SingletonThreadPool

from lynkr_store.backend import OLDEST, VERSION_TABLE, Backend
from lynkr_store.db import psycopg_async
from lynkr_store.db.errors import said_of_file
from lynkr_store.db.forking import keep_out_of_children
from lynkr_store.db.postgresql import TEMPORARY, as_text, options_of, path_of, schema_of
from lynkr_store.db.urls import (
    REMEDY,
    is_memory,
    is_utf8,
    parameters,
    prepare_threshold,
    read_url,
    settings_in,
    without_secrets,
)
from lynkr_store.exceptions import (
    BadArgument,
    MissingDriver,
    SchemaBehind,
    SchemaError,
    StoreUnavailable,
    UnsupportedDatabase,
)
from lynkr_store.process.files import identity_of, make_private
from lynkr_store.settings import checked_schema

_BEGIN: Final = "lynkr_store_begin"  # the execution option that chooses SQLite's BEGIN
_AT_ONCE: Final = "lynkr_store_at_once"  # and that which has it fail rather than wait
_SETTINGS: Final = "lynkr_store_settings"  # what holds in each transaction on PostgreSQL
_PREPARE: Final = "lynkr_store_prepare"  # after how many times a statement is prepared there
_PREPARE_AFTER: Final = 5  # psycopg's own default

# what is known of a connection
_SET_PAGES: Final = "lynkr_store_wal_pages"  # what `checkpoint_after` told it
_PATIENT: Final = "lynkr_store_patient"  # it waits for locks
_OVERWRITES: Final = "lynkr_store_overwrites"  # what is removed, with zeros
_IN_WAL: Final = "lynkr_store_in_wal"  # a commit needs no lock beside that which BEGIN took

_SECURE_DELETE: Final = "secure_delete"
_BUSY_MS: Final = 3_000  # the gateway writes the same file and waits as long
WAL_PAGES: Final = 1_000
"""Pages in the WAL after which a commit moves them to the file, by SQLite's default."""

_CONNECTION_PRAGMAS: Final = (
    ("busy_timeout", _BUSY_MS),
    ("synchronous", "NORMAL"),  # with WAL: no corruption on a power cut, the last commits may go
    ("cache_size", -16_384),  # KiB, so 16 MB
    ("temp_store", "MEMORY"),  # sorting never writes prompt texts to another file
    # what is removed is overwritten with zeros; measured: less than 1 % of the ingest's time
    (_SECURE_DELETE, "ON"),
)
_OF_OTHERS_PRAGMAS: Final = (
    ("cell_size_check", "ON"),  # a damaged page is told when it is read, not while it is used
    # What somebody put into the file's schema may call no function that does more than compute.
    # Not where the store writes: with it, SQLite before 3.42 refuses a host's trigger that calls
    # json().
    ("trusted_schema", "OFF"),
)
_OF_OTHERS_LIMITS: Final = {
    # rows hold two texts of some ten thousand characters; SQLite's own limit is 1 GB a value
    sqlite3.SQLITE_LIMIT_LENGTH: 64 * 2**20,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
_DEADLINE: Final = "lynkr_store_deadline"  # until when a statement may take
_STEPS: Final = 100_000  # of SQLite's machine between two looks at the clock: some ms
_STEPS_OF_SCHEMA: Final = 1_000  # each may take a look at all tables that were read before
_SCHEMA_S: Final = 60.0  # to read the schema of a file that the store opens to write
_FRESH_FILE_PRAGMAS: Final = (
    # Both are fixed with the file's first page, so they come before WAL.
    ("page_size", 8_192),  # rows of 2 KB: 31 % less on disk than pages of 4 KB
    ("auto_vacuum", "INCREMENTAL"),  # retention can give space back
)

# PostgreSQL over a network: a machine that vanished without a word is noticed after a minute; the
# system alone would take two hours. Without effect on a Unix socket.
_NETWORK: Final = {
    "keepalives_idle": 30,  # s
    "keepalives_interval": 10,  # s
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # ms
}

_DRIVERS: Final = {
    Backend.SQLITE: ("pysqlite", "aiosqlite"),
    Backend.POSTGRESQL: ("psycopg", "psycopg_async"),
}
_SYNC_DRIVER: Final = {
    Backend.SQLITE: "sqlite+pysqlite",
    Backend.POSTGRESQL: "postgresql+psycopg",
}
_ASYNC_DRIVER: Final = {
    Backend.SQLITE: "sqlite+aiosqlite",
    Backend.POSTGRESQL: "postgresql+psycopg",
}


def parse_url(url: str | URL) -> URL:
    """The URL of a supported database, with its driver and a file's whole path written out.

    The whole path, because the engine opens the file again and again, and a process may change its
    working directory in between.

    Raises:
        UnsupportedDatabase: Not a URL, another database, or a driver that is not supported.
    """
    parsed = read_url(url)
    backend = _backend_named(parsed.get_backend_name())
    driver = parsed.get_dialect().driver
    if "+" in parsed.drivername and driver not in _DRIVERS[backend]:
        raise UnsupportedDatabase(f"url: the driver {driver} is not supported; {REMEDY}")
    parsed = parsed.set(drivername=_SYNC_DRIVER[backend])
    path = None if backend is not Backend.SQLITE or is_memory(parsed) else parsed.database
    if path and not path.startswith("file:"):
        parsed = parsed.set(database=str(Path(path).absolute()))
    return parsed


def backend_of(engine: Engine | Connection) -> Backend:
    """The backend an engine or connection speaks to."""
    return _backend_named(engine.dialect.name)


def _backend_named(name: str) -> Backend:
    try:
        return Backend(name)
    except ValueError:
        raise UnsupportedDatabase(f"url: {name} is not supported; {REMEDY}") from None


def require_supported(connection: Connection) -> None:
    """Make sure that the database is not too old.

    Raises:
        UnsupportedDatabase: It is; the message says which version is needed.
    """
    backend = backend_of(connection)
    version, oldest = connection.dialect.server_version_info, OLDEST[backend]
    if version is not None and version < oldest:
        found, needed = (".".join(map(str, each)) for each in (version, oldest))
        where = " (Python's sqlite3 brings it)" if backend is Backend.SQLITE else ""
        raise UnsupportedDatabase(
            f"{backend.value} {found} is too old: use version {needed} or newer{where}"
        )


def create_store_engine(
    url: str | URL,
    *,
    connect_timeout_s: int = 5,
    statement_timeout_s: float = 30.0,
    schema: str | None = None,
    echo: bool = False,
) -> Engine:
    """An Engine as the store wants it; nothing is opened before its first connection.

    Args:
        url: A supported database.
        connect_timeout_s: PostgreSQL: seconds to wait for a new connection.
        statement_timeout_s: PostgreSQL: seconds after which a statement is given up.
        schema: PostgreSQL: where everything of the store's is; None or ``""``: where the server
            puts it, ``public`` as a rule.
        echo: Log statements; values never are.

    Raises:
        UnsupportedDatabase: Another database or driver.
        MissingDriver: The driver is not installed.
        BadArgument: PostgreSQL takes no schema of that name.
    """
    target = parse_url(url)
    try:
        options = _engine_options(target, connect_timeout_s, statement_timeout_s, schema)
        if is_memory(target):
            # One connection is the whole database: threads take turns, and none may drop it.
            options |= {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
            options["connect_args"] = {"check_same_thread": False}
        engine = create_engine(without_secrets(target), echo=echo, hide_parameters=True, **options)
    except ModuleNotFoundError as missing:
        raise _missing_driver(missing, "postgres") from missing
    _listen(engine)
    return engine


def create_store_async_engine(
    url: str | URL,
    *,
    connect_timeout_s: int = 5,
    statement_timeout_s: float = 30.0,
    schema: str | None = None,
    echo: bool = False,
) -> Any:
    """The asynchronous twin of `create_store_engine`, over aiosqlite or psycopg.

    Returns:
        An ``sqlalchemy.ext.asyncio.AsyncEngine``.

    Raises:
        UnsupportedDatabase: Another database or driver, or SQLite in memory, which only one
            connection can see.
        MissingDriver: The driver is not installed.
    """
    target = parse_url(url)
    if is_memory(target):
        raise UnsupportedDatabase("url: an SQLite database in memory has one connection only")
    backend = _backend_named(target.get_backend_name())
    try:
        from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - an extra

        options = _engine_options(target, connect_timeout_s, statement_timeout_s, schema)
        if backend is Backend.POSTGRESQL:
            options["connect_args"]["async_creator_fn"] = psycopg_async.connect
        engine = create_async_engine(
            without_secrets(target).set(drivername=_ASYNC_DRIVER[backend]),
            echo=echo,
            hide_parameters=True,
            **options,
        )
    except ImportError as missing:
        extra = "async" if backend is Backend.SQLITE else "postgres,async"
        raise _missing_driver(missing, extra) from missing
    _listen(engine.sync_engine)
    return engine


def _missing_driver(missing: ImportError, extra: str) -> MissingDriver:
    return MissingDriver(f"{missing.name} is not installed: pip install 'lynkr-store[{extra}]'")


def _engine_options(
    target: URL, connect_timeout_s: int, statement_timeout_s: float, schema: str | None
) -> dict[str, Any]:
    schema = checked_schema(schema)
    backend = _backend_named(target.get_backend_name())
    match backend:
        case Backend.SQLITE:
            return {}
        case Backend.POSTGRESQL:
            own_network = {k: v for k, v in _NETWORK.items() if k not in target.query}
            arguments: dict[str, Any] = {"connect_timeout": connect_timeout_s, **own_network}
            arguments |= parameters(target)
            settings = _settings(arguments["options"], statement_timeout_s, schema)
            return {
                # a server that restarted, or a proxy that hung up, costs a retry and no error
                "pool_pre_ping": True,
                "execution_options": {
                    **options_of(schema),
                    _SETTINGS: tuple(settings.items()),
                    _PREPARE: prepare_threshold(target, _PREPARE_AFTER),
                },
                # which psycopg looks up by an operator that another role could have made
                "use_native_hstore": False,
                # prepared is only where a transaction finds that it may be
                "connect_args": {**arguments, "prepare_threshold": None},
            }
        case _:
            assert_never(backend)


def _settings(options: str, statement_timeout_s: float, schema: str | None) -> dict[str, str]:
    """What holds in each of the store's transactions on PostgreSQL; the URL's own options win."""
    settings = {
        "statement_timeout": str(int(statement_timeout_s * 1000)),
        "timezone": "UTC",
        "extra_float_digits": "1",  # a double is read as it was stored
        # statements of milliseconds, which the server would compile where it expects many rows
        "jit": "off",
    }
    settings |= {
        name: value
        for name, value in settings_in(options)
        if name in settings or name == "search_path"
    }
    if path := settings.get("search_path"):  # see `path_of`
        settings["search_path"] = f"{path}, {TEMPORARY}"
    return settings | {"client_encoding": "UTF8"} | path_of(schema)


def create_reading_engine(
    path: Path, *, views: Sequence[str] = (), statement_timeout_s: float = 30.0
) -> Engine:
    """An Engine that cannot alter the SQLite file, whoever made it.

    Whatever is in the file, a statement takes a bounded time, and a value of it bounded memory.

    Args:
        path: The file.
        views: What each connection runs for itself, ``CREATE TEMP VIEW …``.
        statement_timeout_s: Seconds after which a statement is given up.

    Raises:
        StoreUnavailable: There is no such file, or it is no database.
    """
    _require_regular_file(path)
    if identity_of(path) is None:
        raise StoreUnavailable(f"{path}: there is no such file, or this user may not look for it")
    said = ""
    for uri in _reading_uris(path):
        engine = _reading_engine(path, uri, views, statement_timeout_s)
        try:
            with engine.connect():
                return engine
        except DBAPIError as error:
            said = said_of_file(cast("sqlite3.Error", error.orig))
    raise StoreUnavailable(f"{path}: cannot be opened for reading, or is no database: {said}")


def _reading_engine(path: Path, uri: str, views: Sequence[str], timeout_s: float) -> Engine:
    engine = create_engine(URL.create("sqlite", database=str(path)), hide_parameters=True)
    keep_out_of_children(engine)

    def do_connect(*_: object) -> sqlite3.Connection:
        connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
        try:
            for category, limit in _OF_OTHERS_LIMITS.items():
                connection.setlimit(category, limit)
            _load_schema(connection, timeout_s)
        except BaseException:
            connection.close()
            raise
        return connection

    def on_connect(connection: Any, record: ConnectionPoolEntry) -> None:
        _set_up(connection)
        record.info[_DEADLINE] = _Deadline(connection, timeout_s, _STEPS)
        with closing(connection.cursor()) as cursor:
            for name, value in (*_CONNECTION_PRAGMAS, *_OF_OTHERS_PRAGMAS):
                cursor.execute(f"PRAGMA {name} = {value}")
            for view in views:
                cursor.execute(view)
            cursor.execute("PRAGMA query_only = 1")

    def before_statement(connection: Connection, *_: object) -> None:
        connection.info[_DEADLINE].begin()

    event.listen(engine, "do_connect", do_connect)
    event.listen(engine, "connect", on_connect)
    event.listen(engine, "before_cursor_execute", before_statement)
    event.listen(engine, "begin", _on_begin)
    return engine


def _reading_uris(path: Path) -> Iterator[str]:
    """Ways to open a file without altering it, the better first."""
    uri = f"file:{quote(str(path.resolve()))}"
    if any(path.with_name(path.name + end).exists() for end in ("-wal", "-journal")):
        # Somebody is writing, or was interrupted: a connection that may write would tidy up.
        yield f"{uri}?mode=ro"
        return
    # Read-only, a file in WAL mode would be left with an empty -wal beside it; this connection,
    # which PRAGMA query_only keeps from writing, takes its own away again.
    yield f"{uri}?mode=rw"
    yield f"{uri}?mode=ro"
    yield f"{uri}?mode=ro&immutable=1"  # in a folder where nothing may be made


class _Deadline:
    """Ends a statement of an SQLite connection that takes too long, with SQLITE_INTERRUPT."""

    def __init__(self, connection: sqlite3.Connection, seconds: float, steps: int) -> None:
        self._seconds = seconds
        self.begin()
        connection.set_progress_handler(self._is_over, steps)

    def begin(self) -> None:
        """A statement begins."""
        self._at = time.monotonic() + self._seconds

    def _is_over(self) -> bool:
        return time.monotonic() > self._at


def _load_schema(connection: sqlite3.Connection, timeout_s: float) -> None:
    """Have SQLite read what a file's tables are, in a bounded time.

    It does so before the first statement, and takes a time that grows with their number's square:
    measured with one query, 6 s for 30,000 views and 42 s for 100,000, on a busy machine.
    """
    _Deadline(connection, timeout_s, _STEPS_OF_SCHEMA)
    try:
        connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
    finally:
        connection.set_progress_handler(None, 0)


def _require_regular_file(path: Path) -> None:
    """Refuse what is no file, before SQLite makes of it what it likes, or waits for ever.

    Raises:
        StoreUnavailable: A directory stands there, or a pipe, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # it is not there, or SQLite says what is wrong
        return
    if stat.S_ISDIR(mode):
        raise StoreUnavailable(
            f"{path}: a directory stands there; give the path of a file, such as one in it"
        )
    if not stat.S_ISREG(mode):
        raise StoreUnavailable(
            f"{path}: a pipe, a device or a socket stands there; give the path of a file"
        )


def check_host_engine(engine: Engine) -> None:
    """Refuse a host's engine that the store cannot share.

    Raises:
        BadArgument: Not an Engine; one whose pool hands one connection to several threads, or
            each thread a database of its own; or one whose options have it commit by itself.
        UnsupportedDatabase: Another database or driver.
    """
    if not isinstance(engine, Engine):
        raise BadArgument("engine: give an sqlalchemy Engine")
    parse_url(engine.url)
    if isinstance(engine.pool, StaticPool | SingletonThreadPool):
        raise BadArgument(
            "engine: its pool cannot be shared with the writer's thread; for SQLite in memory use "
            "Store('sqlite://') and its engine"
        )
    if engine.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        # it would win over the store's own option, and a batch must be one transaction
        raise BadArgument(
            "engine: its execution options have it commit each statement by itself; give the "
            "engine from which it was made"
        )


def in_schema(engine: Engine, schema: str | None) -> Engine:
    """A host's engine, whose transactions work in the schema when they are the store's.

    Each sets the path for itself, and the host's own stay where they were.
    """
    if schema is None or engine.dialect.name != Backend.POSTGRESQL:
        return engine
    # a path for a transaction needs one, whatever the host's engine is set to
    own = engine.execution_options(isolation_level="READ COMMITTED", **options_of(schema))
    if _SETTINGS not in own.get_execution_options():  # or it is one of the store's, which listens
        event.listen(own, "begin", _set_up_transaction)
    return own


def by_itself(engine: Engine) -> Connection:
    """A PostgreSQL connection, not the pool's, that commits each statement by itself.

    Nothing is set for its statements: they must name their tables with the schema.
    """
    connection = engine.connect()
    # the connection's options, for an engine's own isolation level would win over another engine's
    connection.execution_options(isolation_level="AUTOCOMMIT", **options_of(None))
    connection.detach()
    return connection


def require_utf8(connection: Connection) -> None:
    """Make sure that no text is altered on its way, or refused, for want of a character.

    Raises:
        UnsupportedDatabase: The database, or the connection of a host's engine, has another
            encoding.
    """
    if backend_of(connection) is not Backend.POSTGRESQL:
        return
    reported = driver_of(connection).info.parameter_status  # by the server, without asking it
    if not is_utf8(encoding := reported("server_encoding")):
        raise UnsupportedDatabase(
            f"the database's encoding is {encoding}, and texts of any language need UTF8: "
            "make one by CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        )
    if not is_utf8(encoding := reported("client_encoding")):
        raise UnsupportedDatabase(
            f"engine: the client encoding of its connections is {encoding}, and texts of any "
            "language need UTF8: give create_engine() client_encoding='utf8'"
        )


def is_direct(connection: Connection) -> bool:
    """Whether this transaction's, or statement's, PostgreSQL backend is the connection's own.

    One behind a pooler in transaction mode is that of another process for each transaction: what
    stays in a session, a setting or a prepared statement, is others' then, or is not there.
    """
    pid = connection.exec_driver_sql("SELECT pg_catalog.pg_backend_pid()").scalar()
    return bool(pid == driver_of(connection).info.backend_pid)


class _Optioned(Protocol):
    def execution_options(self, **options: Any) -> Self: ...


_E = TypeVar("_E", bound=_Optioned)


def writing(engine: _E) -> _E:
    """The same engine and pool, whose SQLite transactions take the write lock at BEGIN.

    A transaction that starts reading and then writes can fail half-way when another writer came
    between; one that starts IMMEDIATE waits its turn instead.
    """
    return engine.execution_options(**{_BEGIN: "IMMEDIATE"})


def writing_at_once(engine: _E) -> _E:
    """As `writing`, but BEGIN fails where another has the lock; see `storage.write_lock`."""
    return engine.execution_options(**{_BEGIN: "IMMEDIATE", _AT_ONCE: True})


def plan_for_any(connection: Connection) -> None:
    """Have PostgreSQL plan this transaction's statements once, for whatever their parameters are.

    For a statement that has one good plan: planned anew each time, as the server would where it
    expects any range to be half a percent of a large table, it takes twice as long. It is planned
    once for each connection, when psycopg has seen it five times and prepares it. See
    https://www.postgresql.org/docs/current/runtime-config-query.html#GUC-PLAN-CACHE-MODE

    A host's engine may commit each statement by itself; there it does nothing.
    """
    if backend_of(connection) is Backend.POSTGRESQL and not driver_of(connection).autocommit:
        connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")


def ensure_begun(connection: Connection) -> None:
    """Begin an SQLite transaction before a SAVEPOINT, on a host's engine too.

    Python's driver does not by itself: the SAVEPOINT would then be the transaction, and its
    RELEASE the commit.
    """
    if backend_of(connection) is Backend.SQLITE and not driver_of(connection).in_transaction:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def driver_of(connection: Connection) -> Any:
    """The driver's own connection."""
    pooled = connection.connection
    return pooled.driver_connection or pooled.dbapi_connection  # the latter if detached


def checkpoint_after(connection: Connection, pages: int) -> None:
    """Have SQLite move what stands in its WAL to the file when it is so many pages at a commit."""
    if connection.info.get(_SET_PAGES) != pages:
        connection.exec_driver_sql(f"PRAGMA wal_autocheckpoint = {pages}")
        connection.info[_SET_PAGES] = pages


def checkpoint(connection: Connection) -> int:
    """Move what stands in SQLite's WAL to the file, as far as it goes without waiting for anybody.

    Outside of a transaction. A failure is left to the next one, as SQLite does with its own.

    Returns:
        Pages that stand in the WAL; a writer begins it anew when all of them are in the file.
    """
    driver = driver_of(connection)
    try:
        _, pages, _ = driver.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    except connection.dialect.loaded_dbapi.Error:
        return 0
    return int(pages)


def empty_wal(connection: Connection) -> None:
    """Move what stands in SQLite's WAL to the file and make the WAL empty, if nobody uses either.

    Otherwise the WAL keeps the pages as they were before texts were removed from them, until new
    ones take their place. Outside of a transaction. It waits for nobody, and a failure is left to
    the next time.
    """
    driver = driver_of(connection)
    with suppress(connection.dialect.loaded_dbapi.Error):
        (patience_ms,) = driver.execute("PRAGMA busy_timeout").fetchone()
        driver.execute("PRAGMA busy_timeout = 0")
        try:
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            driver.execute(f"PRAGMA busy_timeout = {patience_ms}")


@contextmanager
def overwriting(connection: Connection) -> Iterator[None]:
    """Have SQLite overwrite what is removed or moved with zeros, on a host's connection too.

    By default SQLite only notes that the place is free. A host's connection is afterwards as it
    was. Other backends are left alone: PostgreSQL's VACUUM clears what nobody sees any more.
    """
    if backend_of(connection) is not Backend.SQLITE:
        yield
        return
    if connection.info.get(_OVERWRITES):  # our own
        yield
        return
    before = connection.exec_driver_sql(f"PRAGMA {_SECURE_DELETE}").scalar_one()
    connection.exec_driver_sql(f"PRAGMA {_SECURE_DELETE} = ON").close()
    try:
        yield
    finally:
        with suppress(DBAPIError, InvalidRequestError):  # after a fault it may be closed
            name = ("OFF", "ON", "FAST")[before]
            connection.exec_driver_sql(f"PRAGMA {_SECURE_DELETE} = {name}").close()


@contextmanager
def disposing(engine: Engine) -> Iterator[Engine]:
    """The engine, disposed in the end."""
    try:
        yield engine
    finally:
        engine.dispose()


def _listen(engine: Engine) -> None:
    if engine.dialect.name == Backend.SQLITE:
        event.listen(engine, "do_connect", _before_connect)
        event.listen(engine, "connect", _on_connect)
        event.listen(engine, "begin", _on_begin)
    else:
        event.listen(engine, "begin", _set_up_transaction)
    keep_out_of_children(engine)


def _before_connect(
    dialect: Dialect,  # noqa: ARG001
    record: ConnectionPoolEntry,  # noqa: ARG001
    arguments: list[Any],
    options: dict[str, Any],
) -> None:
    """Make the file's directory, and the file, which its owner alone may read: it holds prompts.

    SQLite gives the mode to its ``-wal`` and ``-shm`` too. A file that is there keeps its mode.
    """
    path = arguments[0]
    if path == ":memory:":
        return
    if options.get("uri"):
        if "mode=memory" not in path:
            _require_regular_file(Path(unquote(urlsplit(path).path)))
        return
    _require_regular_file(Path(path))
    try:
        # whoever else may write there could put another file in its place
        Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnavailable(
            f"url: the directory {Path(path).parent} cannot be made ({error.strerror}); "
            "give a path where this user may write"
        ) from error
    with suppress(OSError, RuntimeError):  # then SQLite makes it, or says why it cannot be
        make_private(Path(path).resolve())  # where a link leads, for there SQLite makes it


def _on_connect(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    _set_up(connection)
    if isinstance(connection, sqlite3.Connection):  # not aiosqlite's, which come later
        _load_schema(connection, _SCHEMA_S)
    cursor = connection.cursor()
    try:
        for name, value in _CONNECTION_PRAGMAS:
            cursor.execute(f"PRAGMA {name} = {value}")
        record.info[_OVERWRITES] = True
        cursor.execute("PRAGMA page_count")
        fresh = cursor.fetchall() == [(0,)]
        if fresh:
            for name, value in _FRESH_FILE_PRAGMAS:
                cursor.execute(f"PRAGMA {name} = {value}")
        # A file of somebody else's stays as it is, down to its header, until it is adopted.
        if fresh or _is_ours(cursor):
            # Locked: another connection is switching, and the mode is the file's, not ours.
            # Read-only: then there is nothing to switch for.
            with suppress(sqlite3.OperationalError):
                cursor.execute("PRAGMA journal_mode = WAL")
                record.info[_IN_WAL] = cursor.fetchall() == [("wal",)]
    finally:
        cursor.close()


def _set_up(connection: Any) -> None:
    # The driver's own BEGIN is off: it comes too late for SELECTs and not at all for SAVEPOINT.
    connection.isolation_level = None
    driver = getattr(connection, "driver_connection", connection)
    driver.text_factory = _decoded


_decoded: Final = methodcaller("decode", errors="replace")  # of each text that is read


def _is_ours(cursor: Any) -> bool:
    cursor.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (VERSION_TABLE,))
    return cursor.fetchone() is not None


def _on_begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    at_once = options.get(_AT_ONCE, False)
    _set_patience(connection, patient=not at_once)
    connection.exec_driver_sql(f"BEGIN {options.get(_BEGIN, 'DEFERRED')}")
    if at_once and not connection.info.get(_IN_WAL):
        _set_patience(connection, patient=True)


def _set_up_transaction(connection: Connection) -> None:
    """Set all that a transaction rests on, in one statement and for itself alone.

    What a connection was started with may not have reached the server, and what its session was
    told another one may have: poolers hand the server's connections round. See
    https://www.pgbouncer.org/features.html#sql-feature-map-for-pooling-modes

    Raises:
        SchemaBehind: The transaction is to write, and the schema is not there.
        SchemaError: Statements that are committed one by one cannot have a schema set for them.
        UnsupportedDatabase: The database's encoding is another than UTF-8.
    """
    options, driver = connection.get_execution_options(), driver_of(connection)
    schema = schema_of(connection)
    if driver.autocommit:
        if schema:
            raise SchemaError(
                f"schema_name: to work in the schema {schema} takes transactions; leave the "
                "isolation level AUTOCOMMIT out"
            )
        return
    own = _SETTINGS in options
    if own:
        driver.prepare_threshold = None
    *_, found, pid = connection.exec_driver_sql(_setting(options.get(_SETTINGS, ()), schema)).one()
    if own and pid == driver.info.backend_pid:
        driver.prepare_threshold = options[_PREPARE]
    require_utf8(connection)
    if schema and found != schema and options.get(_BEGIN):
        raise SchemaBehind(
            f"the schema {schema} is not there, or this user has no USAGE of it: "
            "run lynkr-store upgrade, or have its owner GRANT USAGE"
        )


@lru_cache
def _setting(settings: tuple[tuple[str, str], ...], schema: str | None) -> str:
    """The statement that sets the settings, and tells the schema and the server's process.

    Written out: with parameters it takes half as long again.
    """
    values = dict(settings) | path_of(schema)
    sets = [f"pg_catalog.set_config({as_text(n)}, {as_text(v)}, true)" for n, v in values.items()]
    if "search_path" not in values:  # see `path_of`
        path = f"pg_catalog.current_setting('search_path') || ', {TEMPORARY}'"
        sets.append(f"pg_catalog.set_config('search_path', {path}, true)")
    told = ("pg_catalog.current_schema()", "pg_catalog.pg_backend_pid()")
    return f"SELECT {', '.join((*sets, *told))}".replace("%", "%%")  # not the driver's parameters


def _set_patience(connection: Connection, *, patient: bool) -> None:
    if connection.info.get(_PATIENT, True) != patient:  # as a rule the last one wanted the same
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {_BUSY_MS if patient else 0}")
        connection.info[_PATIENT] = patient
