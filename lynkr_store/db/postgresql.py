"""PostgreSQL: everything of the store's in a named schema, by each transaction's ``search_path``.

Statements name tables alone, so that they are the same in every schema and on SQLite; which schema
is meant, the transaction says. With nothing else in the path, tables of the same names elsewhere
are not seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import Connection, Engine, Text, cast, func, select
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.schema import CreateSchema

from lynkr_store.backend import Backend
from lynkr_store.exceptions import SchemaError

_SCHEMA: Final = "lynkr_store_schema"  # the execution option that names it
TEMPORARY: Final = "pg_temp"
"""The schema of a session's temporary tables."""

_NOT_PERMITTED: Final = "42501"


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
