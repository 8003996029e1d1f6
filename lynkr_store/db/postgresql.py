"""PostgreSQL: the settings of each of the store's transactions, and the schema of its tables.

Statements name tables without a schema, so they are the same in every schema and on SQLite. The
transaction's ``search_path`` names the schema. It names nothing else, so tables of the same name in
other schemas are not found.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Final

from sqlalchemy import (
    Connection,
    Engine,
    Text,
    cast,
    func,
    select,
)
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.schema import CreateSchema

from lynkr_store.backend import Backend
from lynkr_store.db.dialect import BEGIN, backend_of, driver_of
from lynkr_store.db.errors import sqlstate_of
from lynkr_store.db.urls import (
    is_utf8,
    settings_in,
)
from lynkr_store.exceptions import (
    SchemaBehind,
    SchemaError,
    UnsupportedDatabase,
)

_SCHEMA: Final = "lynkr_store_schema"  # the execution option that names it
TEMPORARY: Final = "pg_temp"
"""The schema of a session's temporary tables."""
_NOT_PERMITTED: Final = "42501"
SETTINGS: Final = "lynkr_store_settings"  # the settings of each transaction on PostgreSQL
PREPARE: Final = "lynkr_store_prepare"  # executions after which a statement is prepared there
PREPARE_AFTER: Final = 5  # psycopg's own default
# PostgreSQL over a network: a machine that vanished silently is noticed after a minute; by the
# system's own defaults that takes two hours. Without effect on a Unix socket.
NETWORK: Final = {
    "keepalives_idle": 30,  # s
    "keepalives_interval": 10,  # s
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # ms
}
# The server shows it in pg_stat_activity; the URL's application_name and PGAPPNAME override it.
APPLICATION: Final = {"fallback_application_name": "lynkr-store"}


def options_of(schema: str | None) -> dict[str, str | None]:
    """The execution options of an engine that works in the schema."""
    return {_SCHEMA: schema}


def path_of(schema: str | None) -> dict[str, str]:
    """The settings of a transaction that works in the schema.

    The schema of temporary tables is named last. Otherwise PostgreSQL searches it first, and a
    session that a pool or pooler shares may have a temporary table of the same name.
    """
    return {"search_path": f"{quoted(schema)}, {TEMPORARY}"} if schema else {}


def schema_of(of: Engine | Connection) -> str | None:
    """The schema that the store's engine or connection was given."""
    schema: str | None = of.get_execution_options().get(_SCHEMA)
    return schema


def set_path(connection: Connection, search_path: str) -> None:
    """Set the search path for the rest of the transaction.

    Not by SET, because a driver would look for parameters in its text.
    """
    connection.execute(select(func.pg_catalog.set_config("search_path", search_path, True)))  # noqa: FBT003


def require_schema(connection: Connection, schema: str | None) -> None:
    """Make sure that a transaction creates its tables in the schema.

    Raises:
        SchemaError: They would be in another schema, in none, or temporary.
    """
    found = connection.scalar(select(func.pg_catalog.current_schema()))
    if not schema and (found is None or str(found).startswith(TEMPORARY)):
        user = cast(func.current_user(), Text())
        role = connection.scalar(select(func.pg_catalog.quote_ident(user)))
        raise SchemaError(
            "nothing was changed: this user may use no schema of its search path. Have the "
            f"schema's owner run GRANT USAGE, CREATE ON SCHEMA public TO {role}, or name another "
            "schema (LYNKR_STORE_SCHEMA)"
        )
    if schema and found != schema:
        raise SchemaError(
            f"nothing was changed: this transaction does not work in the schema {schema}. Give a "
            f"connection in a transaction, of a user who has USAGE on the schema"
        )


def quoted(schema: str) -> str:
    """The name as a quoted identifier."""
    return '"' + schema.replace('"', '""') + '"'


def make_schema(connection: Connection, schema: str | None) -> None:
    """Create the named schema if it does not exist.

    Raises:
        SchemaError: This user may not create it.
    """
    there = func.pg_catalog.to_regnamespace(quoted(schema or ""), type_=Text())
    if not schema or connection.scalar(select(there.is_not(None))):
        return
    user = connection.scalar(select(func.current_user()))
    try:
        connection.execute(CreateSchema(schema, if_not_exists=True))
    except ProgrammingError as error:
        if sqlstate_of(error) != _NOT_PERMITTED:
            raise
        raise SchemaError(
            f"the schema {schema} does not exist, and this user may not create it: have the "
            f"database's owner run CREATE SCHEMA {quoted(schema)} AUTHORIZATION {quoted(str(user))}"
        ) from None


@contextmanager
def within(connection: Connection, schema: str | None) -> Iterator[None]:
    """Let a host's connection work in the schema, in its transaction; restore the path after."""
    if not schema or connection.dialect.name != Backend.POSTGRESQL:
        yield
        return
    before = connection.scalar(select(func.pg_catalog.current_setting("search_path")))
    make_schema(connection, schema)
    set_path(connection, **path_of(schema))
    require_schema(connection, schema)
    yield
    set_path(connection, str(before))


def script_lines(schema: str) -> str:
    """SQL that creates the schema if it does not exist, and sets the path for a transaction.

    CREATE SCHEMA IF NOT EXISTS would need the right to create a schema even if it exists. The block
    is quoted with apostrophes, because a schema's name could end a dollar-quoted text.
    """
    body = (
        f"BEGIN IF pg_catalog.to_regnamespace({as_text(quoted(schema))}) IS NULL THEN "
        f"CREATE SCHEMA {quoted(schema)}; END IF; END"
    )
    return f"DO {as_text(body)};\n\nSET LOCAL search_path TO {quoted(schema)};"


def as_text(value: str) -> str:
    """The value as a text literal in SQL, for every setting of ``standard_conforming_strings``."""
    return "E'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def transaction_settings(
    options: str, statement_timeout_s: float, schema: str | None
) -> dict[str, str]:
    """The settings of each of the store's transactions on PostgreSQL; the URL's options win."""
    settings = {
        "statement_timeout": str(int(statement_timeout_s * 1000)),
        "timezone": "UTC",
        "extra_float_digits": "1",  # a double is read exactly as it was stored
        # the statements take milliseconds, but the server would compile those with many rows
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


@contextmanager
def closed_after(engine: Engine) -> Iterator[Connection]:
    """A connection that nobody uses afterwards; until it is closed the pool counts it."""
    with engine.connect() as connection:
        try:
            yield connection
        finally:
            connection.invalidate()


@contextmanager
def by_itself(engine: Engine) -> Iterator[Connection]:
    """A PostgreSQL connection that commits each statement alone, and is closed afterwards.

    No search path is set for its statements, so they must name their tables with the schema.
    """
    with closed_after(engine) as connection:
        # on the connection, because an engine's own isolation level would override another engine's
        connection.execution_options(isolation_level="AUTOCOMMIT", **options_of(None))
        yield connection


def require_utf8(connection: Connection) -> None:
    """Refuse encodings other than UTF-8, which would alter or refuse texts of some languages.

    Raises:
        UnsupportedDatabase: The database, or the connection of a host's engine, has another
            encoding.
    """
    if backend_of(connection) is not Backend.POSTGRESQL:
        return
    reported = driver_of(connection).info.parameter_status  # the server sent it at the start
    if not is_utf8(encoding := reported("server_encoding")):
        raise UnsupportedDatabase(
            f"the database's encoding is {encoding}, and texts of any language need UTF8: "
            "create one with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        )
    if not is_utf8(encoding := reported("client_encoding")):
        raise UnsupportedDatabase(
            f"engine: the client encoding of its connections is {encoding}, and texts of any "
            "language need UTF8: give create_engine() client_encoding='utf8'"
        )


def is_direct(connection: Connection) -> bool:
    """Whether this transaction runs in the server process that the connection was made to.

    A pooler in transaction mode gives each transaction another server process. What a session
    keeps, such as a setting or a prepared statement, is then missing, or belongs to another client.
    """
    pid = connection.exec_driver_sql("SELECT pg_catalog.pg_backend_pid()").scalar()
    return bool(pid == driver_of(connection).info.backend_pid)


def plan_for_any(connection: Connection) -> None:
    """Make PostgreSQL use one generic plan for each of this transaction's statements.

    This is for statements that have one good plan: planning them for each execution, as the server
    does if it expects every range to be half a percent of a large table, takes twice as long. A
    statement is planned once for each connection, when psycopg prepares it after five executions.
    See https://www.postgresql.org/docs/current/runtime-config-query.html#GUC-PLAN-CACHE-MODE

    On a host's engine that commits each statement alone it does nothing.
    """
    if backend_of(connection) is Backend.POSTGRESQL and not driver_of(connection).autocommit:
        connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")


def set_up_transaction(connection: Connection) -> None:
    """Set everything that a transaction needs, in one statement and for this transaction only.

    Poolers share the server's connections among clients: the options that a connection was opened
    with may not have reached the server, and a session's settings may be another client's. See
    https://www.pgbouncer.org/features.html#sql-feature-map-for-pooling-modes

    Raises:
        SchemaBehind: The transaction is to write, and the schema does not exist.
        SchemaError: A schema was given, and the connection is in AUTOCOMMIT mode.
        UnsupportedDatabase: The database's encoding is not UTF-8.
    """
    options, driver = connection.get_execution_options(), driver_of(connection)
    schema = schema_of(connection)
    if driver.autocommit:
        if schema:
            raise SchemaError(
                f"schema_name: working in the schema {schema} needs transactions; do not use the "
                "isolation level AUTOCOMMIT"
            )
        return
    own = SETTINGS in options
    if own:
        driver.prepare_threshold = None
    *_, found, pid = connection.exec_driver_sql(_setting(options.get(SETTINGS, ()), schema)).one()
    if own and pid == driver.info.backend_pid:
        driver.prepare_threshold = options[PREPARE]
    require_utf8(connection)
    if schema and found != schema and options.get(BEGIN):
        raise SchemaBehind(
            f"the schema {schema} does not exist, or this user has no USAGE on it: "
            "run lynkr-store upgrade, or have its owner GRANT USAGE"
        )


@lru_cache
def _setting(settings: tuple[tuple[str, str], ...], schema: str | None) -> str:
    """The statement that sets the settings, and returns the schema and the server's process id.

    The values are in its text: with parameters it takes 1.5 times as long.
    """
    values = dict(settings) | path_of(schema)
    sets = [f"pg_catalog.set_config({as_text(n)}, {as_text(v)}, true)" for n, v in values.items()]
    if "search_path" not in values:  # see `path_of`
        path = f"pg_catalog.current_setting('search_path') || ', {TEMPORARY}'"
        sets.append(f"pg_catalog.set_config('search_path', {path}, true)")
    told = ("pg_catalog.current_schema()", "pg_catalog.pg_backend_pid()")
    return f"SELECT {', '.join((*sets, *told))}".replace("%", "%%")  # not a parameter's mark
