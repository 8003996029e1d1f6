"""Which backend a URL, an engine or a connection belongs to, and how its transactions begin."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeVar

from sqlalchemy import URL, Connection, Engine

from lynkr_store.backend import OLDEST, Backend
from lynkr_store.db.urls import (
    REMEDY,
    is_memory,
    read_url,
)
from lynkr_store.exceptions import (
    BadArgument,
    UnsupportedDatabase,
)
from lynkr_store.settings import DatabaseSettings

BEGIN: Final = "lynkr_store_begin"  # the execution option that chooses SQLite's BEGIN
AT_ONCE: Final = "lynkr_store_at_once"  # the option that makes it fail instead of waiting
_DRIVERS: Final = {
    Backend.SQLITE: ("pysqlite", "aiosqlite"),
    Backend.POSTGRESQL: ("psycopg", "psycopg_async"),
}
_SYNC_DRIVER: Final = {
    Backend.SQLITE: "sqlite+pysqlite",
    Backend.POSTGRESQL: "postgresql+psycopg",
}


def parse_url(url: str | Path | URL) -> URL:
    """The URL of a supported database, with its driver and the file's absolute path.

    The path is absolute because the engine opens the file many times, and the process may change
    its working directory in between.

    Raises:
        UnsupportedDatabase: Not a URL, another database, or a driver that is not supported.
    """
    parsed = read_url(url)
    backend = backend_named(parsed.get_backend_name())
    driver = parsed.get_dialect().driver
    if "+" in parsed.drivername and driver not in _DRIVERS[backend]:
        raise UnsupportedDatabase(f"url: the driver {driver} is not supported; {REMEDY}")
    parsed = parsed.set(drivername=_SYNC_DRIVER[backend])
    path = None if backend is not Backend.SQLITE or is_memory(parsed) else parsed.database
    if path and not path.startswith("file:"):
        parsed = parsed.set(database=str(Path(path).absolute()))
    return parsed


def checked_migrate_url(migrate_url: str | None, backend: Backend) -> URL | None:
    """The URL for changes of the schema of a database of this backend; None if none was given.

    Raises:
        BadArgument: It, or the database, is not PostgreSQL's.
    """
    if not migrate_url:
        return None
    try:
        url = parse_url(migrate_url)
    except BadArgument as error:
        raise type(error)(f"migrate_{error}") from None
    if backend != Backend.POSTGRESQL or url.get_backend_name() != Backend.POSTGRESQL:
        raise BadArgument(
            "migrate_url: it is for PostgreSQL, as another URL of the database that url leads to; "
            f"url leads to {backend.value}, and migrate_url to {url.get_backend_name()}"
        )
    return url


def url_to_migrate(settings: DatabaseSettings) -> URL:
    """The URL by which the schema is changed: ``migrate_url``, else ``url``.

    Raises:
        UnsupportedDatabase: Not a URL, another database, or a driver that is not supported.
        BadArgument: The two lead to databases of different kinds.
    """
    url = parse_url(settings.url)
    given = "url" in settings.model_fields_set  # else it need not be there to migrate
    backend = backend_named(url.get_backend_name()) if given else Backend.POSTGRESQL
    return checked_migrate_url(settings.migrate_url, backend) or url


def backend_of(engine: Engine | Connection) -> Backend:
    """The backend of an engine or connection."""
    return backend_named(engine.dialect.name)


def backend_named(name: str) -> Backend:
    """The backend with this name in SQLAlchemy.

    Raises:
        UnsupportedDatabase: The name is another database's.
    """
    try:
        return Backend(name)
    except ValueError:
        raise UnsupportedDatabase(f"url: {name} is not supported; {REMEDY}") from None


def require_supported(connection: Connection) -> None:
    """Refuse a database that is too old.

    Raises:
        UnsupportedDatabase: The message says which version is needed.
    """
    backend = backend_of(connection)
    version, oldest = connection.dialect.server_version_info, OLDEST[backend]
    if version is not None and version < oldest:
        found, needed = (".".join(map(str, each)) for each in (version, oldest))
        where = " (Python's sqlite3 brings it)" if backend is Backend.SQLITE else ""
        raise UnsupportedDatabase(
            f"{backend.value} {found} is too old: use version {needed} or newer{where}"
        )


class _Optioned(Protocol):
    def execution_options(self, **options: Any) -> Self: ...


_E = TypeVar("_E", bound=_Optioned)


def writing(engine: _E) -> _E:
    """The same engine and pool, whose SQLite transactions take the write lock at BEGIN.

    A transaction that reads first and then writes can fail half-way if another process wrote in
    between. With BEGIN IMMEDIATE it waits for the lock instead.
    """
    return engine.execution_options(**{BEGIN: "IMMEDIATE"})


def writing_at_once(engine: _E) -> _E:
    """As `writing`, but BEGIN fails if the lock is taken; see `storage.write_lock`."""
    return engine.execution_options(**{BEGIN: "IMMEDIATE", AT_ONCE: True})


def driver_of(connection: Connection) -> Any:
    """The driver's own connection."""
    pooled = connection.connection
    return pooled.driver_connection or pooled.dbapi_connection  # the latter if detached


@contextmanager
def disposing(engine: Engine) -> Iterator[Engine]:
    """Dispose the engine at the end of the body."""
    try:
        yield engine
    finally:
        engine.dispose()
