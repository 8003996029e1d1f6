"""What each transaction of the store is told on PostgreSQL: settings, and the schema of its tables.

Statements name tables alone, so that they are the same in every schema and on SQLite; the
transaction's ``search_path`` names the schema. With nothing else in the path, tables of the same
names elsewhere are not seen.
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
SETTINGS: Final = "lynkr_store_settings"  # what holds in each transaction on PostgreSQL
PREPARE: Final = "lynkr_store_prepare"  # after how many times a statement is prepared there
PREPARE_AFTER: Final = 5  # psycopg's own default
# PostgreSQL over a network: a machine that vanished without a word is noticed after a minute; the
# system alone would take two hours. Without effect on a Unix socket.
NETWORK: Final = {
    "keepalives_idle": 30,  # s
    "keepalives_interval": 10,  # s
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # ms
}


def options_of(schema: str | None) -> dict[str, str | None]:
    """The execution options of an engine that works in the schema."""
    return {_SCHEMA: schema}


def path_of(schema: str | None) -> dict[str, str]:
    """The settings of a transaction that works in the schema.

    Temporary tables come last: unless the path names their schema, PostgreSQL looks there first,
    and a session that a pool or pooler hands round may have one of the same name.
    """
    return {"search_path": f"{quoted(schema)}, {TEMPORARY}"} if schema else {}


def schema_of(of: Engine | Connection) -> str | None:
    """The schema that an engine or connection of the store's was given."""
    schema: str | None = of.get_execution_options().get(_SCHEMA)
    return schema


def set_path(connection: Connection, search_path: str) -> None:
    """Set the path for the rest of the transaction.

    Not by SET, in whose text a driver would look for parameters.
    """
    connection.execute(select(func.pg_catalog.set_config("search_path", search_path, True)))  # noqa: FBT003


def require_schema(connection: Connection, schema: str | None) -> None:
    """Make sure that what a transaction creates will be in the schema.

    Raises:
        SchemaError: It would be elsewhere, nowhere, or gone with the session.
    """
    found = connection.scalar(select(func.pg_catalog.current_schema()))
    if not schema and (found is None or str(found).startswith(TEMPORARY)):
        user = cast(func.current_user(), Text())
        role = connection.scalar(select(func.pg_catalog.quote_ident(user)))
        raise SchemaError(
            "nothing was changed, for this user may use no schema of its path: have the schema's "
            f"owner run GRANT USAGE, CREATE ON SCHEMA public TO {role}, or name another schema "
            "(LYNKR_STORE_SCHEMA)"
        )
    if schema and found != schema:
        raise SchemaError(
            f"nothing was changed: this transaction is not in the schema {schema}. Give a "
            f"connection in a transaction, of a user who has USAGE of the schema"
        )


def quoted(schema: str) -> str:
    """The name as an identifier, whatever is in it."""
    return '"' + schema.replace('"', '""') + '"'


def make_schema(connection: Connection, schema: str | None) -> None:
    """Create the schema, if one is named that is not there.

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
        if getattr(error.driver_exception, "sqlstate", None) != _NOT_PERMITTED:
            raise
        raise SchemaError(
            f"the schema {schema} is not there, and this user may not create it: have the "
            f"database's owner run CREATE SCHEMA {quoted(schema)} AUTHORIZATION {quoted(str(user))}"
        ) from None


@contextmanager
def within(connection: Connection, schema: str | None) -> Iterator[None]:
    """A host's connection, in its transaction, works in the schema; afterwards where it did."""
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
    """SQL that creates the schema, if it is not there, and works in it for a transaction.

    CREATE SCHEMA IF NOT EXISTS would want the right to create one also where it is there. The block
    is a text in quotes: between dollar signs the schema's name could end it.
    """
    body = (
        f"BEGIN IF pg_catalog.to_regnamespace({as_text(quoted(schema))}) IS NULL THEN "
        f"CREATE SCHEMA {quoted(schema)}; END IF; END"
    )
    return f"DO {as_text(body)};\n\nSET LOCAL search_path TO {quoted(schema)};"


def as_text(value: str) -> str:
    """The value as a text in SQL, whatever is in it and ``standard_conforming_strings`` is."""
    return "E'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def transaction_settings(
    options: str, statement_timeout_s: float, schema: str | None
) -> dict[str, str]:
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


def set_up_transaction(connection: Connection) -> None:
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
    own = SETTINGS in options
    if own:
        driver.prepare_threshold = None
    *_, found, pid = connection.exec_driver_sql(_setting(options.get(SETTINGS, ()), schema)).one()
    if own and pid == driver.info.backend_pid:
        driver.prepare_threshold = options[PREPARE]
    require_utf8(connection)
    if schema and found != schema and options.get(BEGIN):
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
