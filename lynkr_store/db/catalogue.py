"""Reads the catalogue about the store's tables, and calls no function that another role created.

SQLAlchemy's own reflection compares names in PostgreSQL's catalogue with VARCHAR. PostgreSQL has no
operator for exactly these types, so it would call one that another role created in a schema of the
search path, with this user's rights. Here every name is TEXT, and every function is named with
``pg_catalog``. SQLite has no operators but its own.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, TextClause, bindparam, func, select, text

from lynkr_store.backend import Backend

_Function = Callable[..., None]

_TABLES: Final = text(
    "SELECT relname FROM pg_catalog.pg_class "
    "WHERE relname = ANY (CAST(:names AS TEXT[])) AND relkind IN ('r', 'p', 'v', 'm', 'f') "
    "AND pg_catalog.pg_table_is_visible(oid)"
)
_OF_TABLE: Final = "CAST(pg_catalog.to_regclass(CAST(:table AS TEXT)) AS OID)"
_COLUMNS: Final = text(
    "SELECT attname FROM pg_catalog.pg_attribute "  # noqa: S608 - constants
    f"WHERE attrelid = {_OF_TABLE} AND attnum > 0 AND NOT attisdropped"
)
_INDEXES: Final = text(
    "SELECT relname FROM pg_catalog.pg_index "  # noqa: S608 - constants
    "JOIN pg_catalog.pg_class ON pg_class.oid = indexrelid "
    f"WHERE indrelid = {_OF_TABLE}"
)
_INDEXED_TABLES: Final = text(
    "SELECT pg_class.relname, pg_table.relname FROM pg_catalog.pg_index "
    "JOIN pg_catalog.pg_class ON pg_class.oid = indexrelid "
    "JOIN pg_catalog.pg_class AS pg_table ON pg_table.oid = indrelid "
    "WHERE pg_class.relname = ANY (CAST(:names AS TEXT[])) "
    "AND pg_catalog.pg_table_is_visible(pg_class.oid)"
)
_INVALID_INDEXES: Final = text(
    "SELECT relname FROM pg_catalog.pg_index "
    "JOIN pg_catalog.pg_class ON pg_class.oid = indexrelid "
    "WHERE NOT indisvalid AND relname = ANY (CAST(:names AS TEXT[])) "
    "AND pg_catalog.pg_table_is_visible(pg_class.oid)"
)
_ROWS_KNOWN: Final = text(
    f"SELECT reltuples FROM pg_catalog.pg_class WHERE oid = {_OF_TABLE}"  # noqa: S608 - constants
)
_TRIGGERS: Final = text(
    "SELECT tgname FROM pg_catalog.pg_trigger "  # noqa: S608 - constants
    f"WHERE tgrelid = {_OF_TABLE} AND NOT tgisinternal AND tgenabled <> 'D'::pg_catalog.\"char\""
)
_SCHEMA: Final = text(
    "SELECT coalesce((SELECT nspname FROM pg_catalog.pg_class "  # noqa: S608 - constants
    "JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace "
    f"WHERE pg_class.oid = {_OF_TABLE}), pg_catalog.current_schema())"
)
_FOREIGN_OWNERS: Final = text(
    "WITH RECURSIVE own (role) AS ("
    "SELECT oid FROM pg_catalog.pg_roles WHERE rolname = current_user "
    "UNION SELECT roleid FROM pg_catalog.pg_auth_members JOIN own ON member = role"
    "), trusted AS ("
    "SELECT role FROM own "
    "UNION SELECT oid FROM pg_catalog.pg_roles WHERE rolsuper OR rolname = 'pg_database_owner' "
    "UNION SELECT datdba FROM pg_catalog.pg_database WHERE datname = current_database()"
    "), tables AS ("
    "SELECT relname, relowner, relnamespace FROM pg_catalog.pg_class "
    "WHERE relname = ANY (CAST(:names AS TEXT[])) AND pg_catalog.pg_table_is_visible(oid)"
    ") "
    "SELECT 'table', relname, pg_catalog.pg_get_userbyid(relowner) FROM tables "
    "WHERE relowner NOT IN (SELECT role FROM trusted) "
    "UNION SELECT 'schema', nspname, pg_catalog.pg_get_userbyid(nspowner) FROM tables "
    "JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace "
    "WHERE nspowner NOT IN (SELECT role FROM trusted) "
    "ORDER BY 1 DESC, 2"
)
_CREATE_RIGHT: Final = text(
    "SELECT pg_catalog.quote_ident(CAST(nspname AS TEXT)), "
    "pg_catalog.quote_ident(CAST(current_user AS TEXT)) FROM pg_catalog.pg_namespace "
    "WHERE CAST(nspname AS TEXT) = coalesce(CAST(:schema AS TEXT), "
    "CAST(pg_catalog.current_schema() AS TEXT), 'public') "
    "AND NOT (pg_catalog.has_schema_privilege(oid, 'USAGE') "
    "AND pg_catalog.has_schema_privilege(oid, 'CREATE'))"
)
_GENERATED: Final = (2, 3)  # table_xinfo's "hidden": a virtual or stored generated column
_LISTED: Final = {
    schema: text(
        f"SELECT type, lower(name), rootpage FROM {schema} "  # noqa: S608 - constants
        "WHERE type IN ('table', 'view') AND lower(name) IN :names"
    ).bindparams(bindparam("names", expanding=True))
    for schema in ("main.sqlite_schema", "temp.sqlite_schema")
}
_NAMED: Final = text(
    "SELECT name, tbl_name FROM main.sqlite_schema "
    "WHERE type IN ('index', 'trigger') AND name IN :names"
).bindparams(bindparam("names", expanding=True))
_SET_PATH: Final = text("SELECT pg_catalog.set_config('search_path', CAST(:path AS TEXT), true)")
_PATH: Final = text("SELECT pg_catalog.current_setting('search_path')")


def _is_sqlite(connection: Connection) -> bool:
    return connection.dialect.name == Backend.SQLITE


def has_statistics(connection: Connection, table: str) -> bool:
    """PostgreSQL: whether it has ever gathered statistics of a table."""
    known = connection.execute(_ROWS_KNOWN, {"table": table}).scalar()
    return known is not None and known >= 0


def tables(connection: Connection, names: Collection[str]) -> frozenset[str]:
    """The names of those of these tables and views that exist."""
    if _is_sqlite(connection):
        there = {name for _, name, _ in _listed(connection, names, temporary=True)}
        return frozenset(name for name in names if name.lower() in there)
    return _names(connection, _TABLES, names=list(names))


def not_plain(connection: Connection, names: Collection[str]) -> dict[str, str]:
    """SQLite: what each of these names is, if it is a view or a virtual table; name to kind.

    The definition of a view or virtual table decides how long a read takes and how much memory it
    uses. On PostgreSQL the server limits each statement, so the answer is empty.
    """
    if not _is_sqlite(connection):
        return {}
    found = _listed(connection, names, temporary=False)
    return {
        name: kind if kind != "table" else "virtual table"
        for kind, name, root in found
        if kind != "table" or not root
    }


def _listed(
    connection: Connection, names: Collection[str], *, temporary: bool
) -> Iterator[tuple[str, str, int]]:
    """SQLite: kind, name in lower case and first page of these tables, views and virtual tables.

    This reads SQLite's own list, and evaluates none of their definitions.
    """
    for schema in ("main.sqlite_schema", "temp.sqlite_schema")[: 1 + temporary]:
        given = {"names": [name.lower() for name in names]}
        yield from connection.execute(_LISTED[schema], given)


def column_names(connection: Connection, table: str) -> frozenset[str]:
    """The names of a table's columns."""
    if _is_sqlite(connection):
        return frozenset(name for name, _ in _columns(connection, table))
    return _names(connection, _COLUMNS, table=table)


def generated_columns(connection: Connection, table: str) -> frozenset[str]:
    """SQLite: the names of a table's generated columns, virtual and stored."""
    found = _columns(connection, table)
    return frozenset(name for name, hidden in found if hidden in _GENERATED)


def _columns(connection: Connection, table: str) -> list[tuple[str, int]]:
    """SQLite: the names of a table's columns, and whether they are generated or hidden."""
    listed = func.pragma_table_xinfo(table, "main").table_valued("name", "hidden").c
    return [
        (name, hidden) for name, hidden in connection.execute(select(listed.name, listed.hidden))
    ]


def index_names(connection: Connection, table: str) -> frozenset[str]:
    """The names of all indexes of a table, also of those that the store did not create."""
    if _is_sqlite(connection):  # SQLAlchemy's reflection warns about indexes on expressions
        listed = func.pragma_index_list(table).table_valued("name")
        return frozenset(connection.scalars(select(listed.c.name)))
    return _names(connection, _INDEXES, table=table)


def trigger_names(connection: Connection, table: str) -> frozenset[str]:
    """The names of a table's triggers that are not disabled."""
    if _is_sqlite(connection):
        listed = "SELECT name FROM main.sqlite_schema WHERE type = 'trigger' AND tbl_name = ?"
        return frozenset(connection.exec_driver_sql(listed, (table,)).scalars())
    return _names(connection, _TRIGGERS, table=table)


def indexed_tables(connection: Connection, names: Collection[str]) -> dict[str, str]:
    """The tables of those of these indexes that exist; index name to table name.

    On SQLite also those of triggers, whose names must be unique in the file, too.
    """
    given = {"names": list(names)}
    found = connection.execute(_NAMED if _is_sqlite(connection) else _INDEXED_TABLES, given)
    return {row[0]: row[1] for row in found}


def invalid_indexes(connection: Connection, names: Collection[str]) -> frozenset[str]:
    """PostgreSQL: which of these indexes a concurrent build left unfinished."""
    return _names(connection, _INVALID_INDEXES, names=list(names))


def schema_of(connection: Connection, table: str) -> str | None:
    """The schema of a table, or the one where it would be created; None on SQLite."""
    if _is_sqlite(connection):
        return None
    schema: str | None = connection.scalar(_SCHEMA, {"table": table})
    return schema


def foreign_owners(connection: Connection, names: Collection[str]) -> list[str]:
    """Name roles that own these tables or their schema and that this user has no reason to trust.

    It has to trust itself, the roles that it is a member of, superusers and the database's owner.
    The owner of a table can read and change what is stored, and can create a trigger that runs with
    the rights of the user who stores a row. Only PostgreSQL has owners.

    Returns:
        One line for each of these roles.
    """
    if _is_sqlite(connection):
        return []
    owned: defaultdict[str, list[str]] = defaultdict(list)
    for kind, name, owner in connection.execute(_FOREIGN_OWNERS, {"names": list(names)}):
        owned[owner].append(f"the {kind} {name}")
    return [
        f"the role {owner!r}, of which this user is not a member, owns {', '.join(what)}: it can "
        "read and change what is stored. Ignore this if that role upgrades the schema"
        for owner, what in owned.items()
    ]


def missing_grant(connection: Connection, schema: str | None) -> str | None:
    """The GRANT that this role needs to create tables in a schema; None if it needs none.

    Args:
        connection: To PostgreSQL.
        schema: Its name; None for the first schema of the search path, or ``public`` if the path
            names no existing schema.
    """
    found = connection.execute(_CREATE_RIGHT, {"schema": schema}).first()
    return None if found is None else f"GRANT USAGE, CREATE ON SCHEMA {found[0]} TO {found[1]}"


def _names(connection: Connection, statement: TextClause, **given: Any) -> frozenset[str]:
    return frozenset(connection.scalars(statement, given))


class Sealed(NamedTuple):
    """A transaction whose search path is PostgreSQL's own catalogue alone; see `sealed`.

    Attributes:
        schema: The schema of the table, or the one where it would be created; None on SQLite.
        in_path: Wraps a function so that it runs with the search path from before.
    """

    schema: str | None
    in_path: Callable[[_Function], _Function]


@contextmanager
def sealed(connection: Connection, table: str) -> Iterator[Sealed]:
    """PostgreSQL: remove every schema from the search path, for statements of another library.

    In the body, tables must be named with their schema. After an error the path is not restored,
    because the transaction can only be rolled back.
    """
    if _is_sqlite(connection):
        yield Sealed(None, lambda function: function)
        return

    def in_path(function: _Function) -> _Function:
        @wraps(function)
        def run(*args: Any, **options: Any) -> None:
            with _path(connection, before):
                function(*args, **options)

        return run

    schema = schema_of(connection, table)
    before: str = connection.execute(_PATH).scalar_one()
    with _path(connection, "pg_catalog, pg_temp"):
        yield Sealed(schema, in_path)


@contextmanager
def _path(connection: Connection, names: str) -> Iterator[None]:
    before = connection.execute(_PATH).scalar_one()
    connection.execute(_SET_PATH, {"path": names})
    yield
    connection.execute(_SET_PATH, {"path": before})
