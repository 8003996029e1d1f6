"""Asks the database why rows were refused, if the error alone does not tell.

A row is not at fault for what happens to every row: the database assigns an id twice, or none, or a
right is missing. The catalogue is asked; a message's text is never examined.
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
"""Rights that a role needs to store one record, and to store a batch."""

_LOST_IDS: Final = (
    "the database assigned an id of {name} that a row already has. If this happens again, run "
    "lynkr-store maintain as the table's owner"
)

# A unique index with a column that gets its values from a sequence, or that is our table's id.
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

# Whether the table is ours, and whether a trigger may set a row's columns before it is stored.
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

# Columns that no record may leave out.
_NEEDED: Final = text(
    """
SELECT CAST(CAST(c.oid AS regclass) AS text) AS name, a.attname AS column,
       pg_catalog.quote_ident(CAST(a.attname AS text)) AS quoted
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid
WHERE c.oid = CAST(pg_catalog.to_regclass(CAST(:ours AS text)) AS oid)
  AND a.attnum > 0 AND a.attnotnull AND NOT a.atthasdef AND a.attidentity = ''
  AND NOT a.attisdropped
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
    """Decide what caused the failure of an insert.

    Args:
        connection: In a transaction that can continue, because it is back at a savepoint.
        error: What the insert raised.

    Raises:
        StoreUnavailable: The database is at fault; the message says what is wrong and the remedy.
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
    """The message for a table that accepts rows but assigns them no ids; None if it assigns ids.

    A copy may lack both the identity and NOT NULL. No query would find rows without an id.
    """
    return _problem(connection, Kind.MISSING)


def hindrance(connection: Connection) -> str | None:
    """Why the tables accept no row at all, with the remedy; None if the catalogue shows nothing."""
    there = catalogue.tables(connection, [TELEMETRY.name, LEDGER.name])
    for table in (TELEMETRY, LEDGER):
        if table.name not in there:
            return (
                f"the table {table.name} does not exist: restore it, or run lynkr-store upgrade, "
                "which creates it again, empty"
            )
        columns = catalogue.column_names(connection, table.name)
        if missing := [column.name for column in table.c if column.name not in columns]:
            return (
                f"{table.name} has no column {', '.join(missing)}: run lynkr-store check, which "
                "lists what differs"
            )
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
    """The message for an id that a sequence assigned twice; None if the row repeats a value."""
    if diagnosis.constraint_name is None:  # Citus does not pass it on
        return _set_forward(connection) or _problem(connection, Kind.BEHIND, Kind.EXHAUSTED)
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
            f"a trigger stores rows in {found.name}, whose sequence assigns numbers that already "
            "exist there: set it forward (SELECT setval(…))"
        )
    words = _set_forward(connection) or _problem(connection, Kind.BEHIND, Kind.EXHAUSTED)
    return words or _LOST_IDS.format(name=found.name)


def _set_forward(connection: Connection) -> str | None:
    """Set the telemetry table's sequence forward; the message, if it was behind."""
    if not (names := identities.set_forward(connection, [TELEMETRY])):
        return None
    return (
        f"{', '.join(names)} was behind the ids of {TELEMETRY.name} and was set forward: try again"
    )


def _null(connection: Connection, diagnosis: Any) -> str | None:
    """The message for a NOT NULL column that no record has; None for a column that records have."""
    column = diagnosis.column_name
    if column is None:  # Citus does not pass it on
        return _null_anywhere(connection)
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
        return words or f"the database assigns no id to a row of {found.name}: restore its identity"
    if column in TELEMETRY.c or found.triggers:
        return None
    remedy = f"ALTER TABLE {found.name} ALTER COLUMN {found.column} DROP NOT NULL"
    return _foreign(found.name, found.column, remedy)


def _null_anywhere(connection: Connection) -> str | None:
    """The message for a NOT NULL column that no record has; None if there is none."""
    for needed in connection.execute(_NEEDED, {"ours": TELEMETRY.name}):
        if needed.column not in TELEMETRY.c:
            remedy = f"ALTER TABLE {needed.name} ALTER COLUMN {needed.quoted} DROP NOT NULL"
            return _foreign(needed.name, needed.quoted, remedy)
    return _problem(connection, Kind.MISSING)


def _foreign(table: str, column: str, remedy: str) -> str:
    return f"{table}.{column} is NOT NULL without a default, and no record has a value: {remedy}"


def _lacking_right(connection: Connection, needed: Sequence[tuple[str, str]]) -> str | None:
    """The message for a right that this role lacks; None if it lacks none."""
    for found in _rights(connection, needed):
        if not found.held:
            return (
                f"{found.role} has no right to {found.privilege} on {found.name}: "
                f"run GRANT {found.privilege} ON {found.name} TO {found.role}"
            )
    return _problem(connection, Kind.UNUSABLE)


def _is_secured(connection: Connection) -> bool:
    """Whether row-level security restricts which rows this role may store."""
    return any(found.secured for found in _rights(connection, _TO_INSERT))


def _rights(connection: Connection, needed: Sequence[tuple[str, str]]) -> Sequence[Any]:
    tables, privileges = zip(*needed, strict=True)
    return connection.execute(_HELD, {"tables": list(tables), "privileges": list(privileges)}).all()


def _problem(connection: Connection, *kinds: Kind) -> str | None:
    """The message for a problem of one of these kinds with the telemetry table's ids, if any."""
    found = identities.problems(connection, [TELEMETRY])
    return next((problem.words for problem in found if problem.kind in kinds), None)
