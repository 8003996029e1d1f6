"""Asks the database whose fault it was that rows were refused, where the error alone cannot tell.

What a database does to every row is not the row's fault: an id that it gives twice, or not at all,
a right that is missing. Asked of the catalogue, never of a message's text.
"""

from collections.abc import Sequence
from typing import Any, Final, assert_never

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from lynkr_store.backend import Backend
from lynkr_store.db import catalogue
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.errors import Fault, fault_of, is_full, is_null_refused
from lynkr_store.db.models import LEDGER, TELEMETRY
from lynkr_store.exceptions import StoreUnavailable, raise_alone
from lynkr_store.storage import identities
from lynkr_store.storage.identities import Kind

_REPEATED: Final = "23505"
_NULL: Final = "23502"
_TOO_LARGE: Final = ("22003", "2200H")
_NOT_PERMITTED: Final = "42501"

_TO_INSERT: Final = ((TELEMETRY.name, "INSERT"),)
_TO_WRITE: Final = (*_TO_INSERT, *((LEDGER.name, r) for r in ("INSERT", "SELECT", "UPDATE")))
"""Rights that a role needs for one record, and for a batch of them."""

_LOST_IDS: Final = (
    "the database gave out an id of {name} that is there already. If it does so again, run "
    "lynkr-store maintain as the table's owner"
)

# A unique index in which a column takes its values from a sequence, or is the id of ours.
_GIVEN_TWICE: Final = text(
    """
SELECT CAST(CAST(i.indrelid AS regclass) AS text) AS name,
       coalesce(CAST(pg_catalog.pg_partition_root(i.indrelid) AS oid), i.indrelid)
         = CAST(pg_catalog.to_regclass(CAST(:ours AS text)) AS oid) AS ours
FROM pg_catalog.pg_index i
JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid
JOIN pg_catalog.pg_namespace n ON n.oid = x.relnamespace
JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
WHERE n.nspname = CAST(:schema AS name) AND x.relname = CAST(:constraint AS name)
  AND (a.attidentity <> ''
    OR (a.attname = 'id'
        AND coalesce(CAST(pg_catalog.pg_partition_root(i.indrelid) AS oid), i.indrelid)
            = CAST(pg_catalog.to_regclass(CAST(:ours AS text)) AS oid))
    OR EXISTS (SELECT FROM pg_catalog.pg_attrdef d
               JOIN pg_catalog.pg_depend p
                 ON p.objid = d.oid AND p.classid = 'pg_catalog.pg_attrdef'::regclass::oid
               JOIN pg_catalog.pg_class s ON s.oid = p.refobjid AND s.relkind = 'S'
               WHERE d.adrelid = a.attrelid AND d.adnum = a.attnum))
"""
)

# Whether a table is ours, and a trigger may set a row's columns before it is stored.
_REFUSING: Final = text(
    """
SELECT coalesce(CAST(pg_catalog.pg_partition_root(c.oid) AS oid), c.oid)
         = CAST(pg_catalog.to_regclass(CAST(:ours AS text)) AS oid) AS ours,
       CAST(CAST(c.oid AS regclass) AS text) AS name,
       pg_catalog.quote_ident(:column) AS column,
       EXISTS (SELECT FROM pg_catalog.pg_trigger t
               WHERE t.tgrelid = c.oid AND NOT t.tgisinternal
               AND t.tgtype::integer & 7 = 7) AS triggers
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = CAST(:schema AS name) AND c.relname = CAST(:table AS name)
"""
)

_HELD: Final = text(
    """
SELECT pg_catalog.quote_ident(CAST(CURRENT_USER AS text)) AS role,
       CAST(CAST(c.oid AS regclass) AS text) AS name, given.privilege,
       pg_catalog.has_any_column_privilege(c.oid, given.privilege) AS held,
       pg_catalog.row_security_active(c.oid) AS secured
FROM ROWS FROM (pg_catalog.unnest(CAST(:tables AS text[])),
                pg_catalog.unnest(CAST(:privileges AS text[]))) AS given(name, privilege)
JOIN pg_catalog.pg_class c ON c.oid = CAST(pg_catalog.to_regclass(given.name) AS oid)
"""
)


def whose(connection: Connection, error: Exception) -> Fault:
    """Say whose fault it is that rows could not be inserted.

    Args:
        connection: In a transaction that can go on: it is back at a savepoint.
        error: What an insert raised.

    Raises:
        StoreUnavailable: It is the database's, which says what it is and the remedy.
    """
    fault = fault_of(error)
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return fault
    backend = backend_of(connection)
    match backend:
        case Backend.SQLITE:
            words = _ask_sqlite(connection, error)
        case Backend.POSTGRESQL:
            fault, words = _ask_postgresql(connection, error, fault)
        case _:
            assert_never(backend)
    if words:
        raise_alone(StoreUnavailable(words))
    return fault


def without_ids(connection: Connection) -> str | None:
    """Words for a table that gives its rows no ids, and may take them all the same.

    A copy may lack the identity and NOT NULL, too. Nothing would find the rows that it takes.
    """
    return _problem(connection, Kind.MISSING)


def hindrance(connection: Connection) -> str | None:
    """Why the tables take no row at all and what to do, as far as the catalogue tells."""
    there = catalogue.tables(connection, [TELEMETRY.name, LEDGER.name])
    for table in (TELEMETRY, LEDGER):
        if table.name not in there:
            return (
                f"the table {table.name} is not there: restore it, or run lynkr-store upgrade, "
                "which makes it again, empty"
            )
        columns = catalogue.column_names(connection, table.name)
        if missing := [column.name for column in table.c if column.name not in columns]:
            return f"{table.name} lacks {', '.join(missing)}: lynkr-store check says what differs"
    if backend_of(connection) is Backend.POSTGRESQL and (
        words := _lacking_right(connection, _TO_WRITE)
    ):
        return words
    return _problem(connection, *Kind)


def _ask_sqlite(connection: Connection, error: DBAPIError) -> str | None:
    if is_full(error):  # the disk, or the ids
        return _problem(connection, Kind.EXHAUSTED)
    if is_null_refused(error):
        columns = connection.exec_driver_sql(f"PRAGMA main.table_info({TELEMETRY.name})").mappings()
        for column in columns:
            needed = column["notnull"] and column["dflt_value"] is None and not column["pk"]
            if needed and column["name"] not in TELEMETRY.c:
                return _foreign(TELEMETRY.name, column["name"], "make it nullable")
    return None


def _ask_postgresql(
    connection: Connection, error: DBAPIError, fault: Fault
) -> tuple[Fault, str | None]:
    driver: Any = error.driver_exception
    state, diagnosis = driver.sqlstate, driver.diag
    if state == _REPEATED:
        return fault, _given_twice(connection, diagnosis)
    if state == _NULL:
        return fault, _null(connection, diagnosis)
    if state in _TOO_LARGE:
        return fault, _problem(connection, Kind.EXHAUSTED)
    if state == _NOT_PERMITTED:
        words = _lacking_right(connection, _TO_INSERT)
        forbidden = not words and _is_secured(connection)
        return Fault.ROW if forbidden else fault, words
    return fault, None


def _given_twice(connection: Connection, diagnosis: Any) -> str | None:
    """Words for an id that a sequence gave twice; None where the row names what is there."""
    found = connection.execute(
        _GIVEN_TWICE,
        {
            "ours": TELEMETRY.name,
            "schema": diagnosis.schema_name,
            "constraint": diagnosis.constraint_name,
        },
    ).first()
    if found is None:
        return None
    if not found.ours:
        return (
            f"a trigger stores in {found.name}, whose sequence gives numbers that are there "
            "already: set it forward (SELECT setval(…))"
        )
    if set_ := identities.set_forward(connection, [TELEMETRY]):
        return (
            f"{', '.join(set_)} was behind the ids of {found.name}, and was set forward: try again"
        )
    words = _problem(connection, Kind.BEHIND, Kind.EXHAUSTED)
    return words or _LOST_IDS.format(name=found.name)


def _null(connection: Connection, diagnosis: Any) -> str | None:
    """Words for a column that no record names and must not be NULL; None for one that some do."""
    column = diagnosis.column_name
    found = connection.execute(
        _REFUSING,
        {
            "ours": TELEMETRY.name,
            "schema": diagnosis.schema_name,
            "table": diagnosis.table_name,
            "column": column,
        },
    ).first()
    if found is None or not found.ours:
        return None
    if column == TELEMETRY.c.id.name:
        words = _problem(connection, Kind.MISSING)
        return words or f"the database gives no id to a row of {found.name}: restore its identity"
    if column in TELEMETRY.c or found.triggers:
        return None
    remedy = f"ALTER TABLE {found.name} ALTER COLUMN {found.column} DROP NOT NULL"
    return _foreign(found.name, found.column, remedy)


def _foreign(table: str, column: str, remedy: str) -> str:
    return f"{table}.{column} is NOT NULL without a default, and no record has it: {remedy}"


def _lacking_right(connection: Connection, needed: Sequence[tuple[str, str]]) -> str | None:
    """Words for a right that this role lacks."""
    for found in _rights(connection, needed):
        if not found.held:
            return (
                f"{found.role} has no right to {found.privilege} on {found.name}: "
                f"run GRANT {found.privilege} ON {found.name} TO {found.role}"
            )
    return _problem(connection, Kind.UNUSABLE)


def _is_secured(connection: Connection) -> bool:
    """Whether policies of row-level security say which rows this role may store."""
    return any(found.secured for found in _rights(connection, _TO_INSERT))


def _rights(connection: Connection, needed: Sequence[tuple[str, str]]) -> Sequence[Any]:
    tables, privileges = zip(*needed, strict=True)
    return connection.execute(_HELD, {"tables": list(tables), "privileges": list(privileges)}).all()


def _problem(connection: Connection, *kinds: Kind) -> str | None:
    """Words for what is wrong with the ids of the records' table, if it is of one of the kinds."""
    found = identities.problems(connection, [TELEMETRY])
    return next((problem.words for problem in found if problem.kind in kinds), None)
