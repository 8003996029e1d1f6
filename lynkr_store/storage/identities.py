"""Checks what assigns ids to each table's rows: PostgreSQL's sequences, SQLite's AUTOINCREMENT.

After a restore or a copy a sequence can be behind the existing ids, or missing. The database then
refuses every row, or assigns an id twice, whatever the rows contain.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, NamedTuple, assert_never

from sqlalchemy import (
    BigInteger,
    Boolean,
    Connection,
    Table,
    TableClause,
    case,
    cast,
    column,
    func,
    literal,
    quoted_name,
    select,
    text,
)
from sqlalchemy import table as sql_table

from lynkr_store.backend import Backend
from lynkr_store.db import catalogue
from lynkr_store.db.citus import FIRST_ID_OF_WORKERS, is_distributed
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.models import CHANGES, DIMENSIONS, SAVINGS, TELEMETRY
from lynkr_store.migrate.adoption import is_autoincrement
from lynkr_store.schemas.values import INT64_MAX

WITH_IDS: Final = (TELEMETRY, SAVINGS, DIMENSIONS, CHANGES)
"""The store's tables whose ids the database assigns."""

_OF_SQLITE: Final = (TELEMETRY, SAVINGS, CHANGES)  # tables that must never assign an id again
_MAINTAIN: Final = "lynkr-store maintain"

# Every operand has exactly the type of one of PostgreSQL's own operators. Otherwise PostgreSQL
# could call an operator that another role created.
#
# An identity's sequence depends on its column; a default depends on the sequence that it calls. A
# trigger can assign the id, too: a row trigger BEFORE INSERT.
_CATALOGUE: Final = text(
    """
SELECT given.name AS model,
       CAST(CAST(c.oid AS regclass) AS text) AS name,
       a.attidentity <> '' AS identity,
       a.attnotnull AS not_null,
       d.oid IS NOT NULL
       OR EXISTS (SELECT FROM pg_catalog.pg_trigger t
                  WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND t.tgtype::integer & 7 = 7)
       AS given_otherwise,
       CASE a.atttypid WHEN 'int2'::regtype::oid THEN 32767
                       WHEN 'int4'::regtype::oid THEN 2147483647
                       ELSE 9223372036854775807 END AS greatest_id,
       n.nspname AS schema, q.relname AS sequence, CAST(q.oid AS bigint) AS sequence_id,
       CAST(CAST(q.oid AS regclass) AS text) AS sequence_name,
       s.seqmax AS greatest_number, s.seqincrement AS increment, s.seqcycle AS cycles,
       s.seqcache AS block,
       EXISTS (SELECT FROM pg_catalog.pg_depend o
               WHERE o.classid = 'pg_catalog.pg_class'::regclass::oid AND o.objid = q.oid
               AND o.refclassid = 'pg_catalog.pg_class'::regclass::oid
               AND o.refobjid = c.oid AND o.refobjsubid = a.attnum
               AND o.deptype IN ('a', 'i')) AS owned,
       pg_catalog.has_table_privilege(c.oid, 'SELECT')
       AND pg_catalog.has_schema_privilege(q.relnamespace, 'USAGE')
       AND pg_catalog.has_sequence_privilege(q.oid, 'SELECT') AS readable,
       pg_catalog.has_sequence_privilege(q.oid, 'USAGE, UPDATE') AS usable,
       pg_catalog.has_sequence_privilege(q.oid, 'UPDATE') AS settable,
       pg_catalog.quote_ident(CAST(CURRENT_USER AS text)) AS role
FROM pg_catalog.unnest(CAST(:names AS text[])) AS given(name)
JOIN pg_catalog.pg_class c
  ON c.oid = CAST(pg_catalog.to_regclass(given.name) AS oid) AND c.relkind IN ('r', 'p')
JOIN pg_catalog.pg_attribute a
  ON a.attrelid = c.oid AND a.attname = 'id' AND NOT a.attisdropped
LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
LEFT JOIN LATERAL (
  SELECT k.oid, k.relname, k.relnamespace
  FROM pg_catalog.pg_depend p
  JOIN pg_catalog.pg_class k
    ON k.relkind = 'S'
   AND k.oid = CASE WHEN p.deptype = 'i' THEN p.objid ELSE p.refobjid END
  WHERE p.refclassid = 'pg_catalog.pg_class'::regclass::oid
    AND ((p.deptype = 'i' AND p.classid = 'pg_catalog.pg_class'::regclass::oid
          AND p.refobjid = c.oid AND p.refobjsubid = a.attnum)
      OR (p.classid = 'pg_catalog.pg_attrdef'::regclass::oid AND p.objid = d.oid
          AND p.deptype = 'n'))
  LIMIT 1) AS q ON true
LEFT JOIN pg_catalog.pg_namespace n ON n.oid = q.relnamespace
LEFT JOIN pg_catalog.pg_sequence s ON s.seqrelid = q.oid
"""
)


class Kind(Enum):
    """What can be wrong with the assignment of ids."""

    MISSING = "missing"
    """Nothing assigns ids."""
    UNUSABLE = "unusable"
    """This role may not use the sequence."""
    EXHAUSTED = "exhausted"
    """No id is left."""
    BEHIND = "behind"
    """The sequence assigns ids that already exist."""


class Problem(NamedTuple):
    """A problem, with a message that says what is wrong and the remedy."""

    kind: Kind
    words: str


class _Numbers(NamedTuple):
    """The numbers of a sequence and its table.

    Attributes:
        next: The number that the sequence assigns next.
        newest: The greatest id of the table; 0 if the table is empty.
        last: The greatest number that the sequence can assign and the column can hold.
    """

    next: int
    newest: int
    last: int

    @property
    def behind(self) -> bool:
        return self.next <= self.newest < self.last

    @property
    def exhausted(self) -> bool:
        return self.next > self.last or self.newest >= self.last


def problems(connection: Connection, tables: Sequence[Table] = WITH_IDS) -> list[Problem]:
    """Find what prevents the tables from assigning ids to their rows.

    A sequence that this role may not read is not checked.
    """
    backend = backend_of(connection)
    match backend:
        case Backend.SQLITE:
            found = [_problem_of_sqlite(connection, t) for t in tables if t in _OF_SQLITE]
        case Backend.POSTGRESQL:
            found = [_problem(connection, each) for each in _found(connection, tables)]
        case _:
            assert_never(backend)
    return [problem for problem in found if problem]


def set_forward(connection: Connection, tables: Sequence[Table] = WITH_IDS) -> tuple[str, ...]:
    """PostgreSQL: set each sequence that is behind its table's ids to the greatest id.

    A sequence is only set forward, and only if it belongs to the column and this role may set it.
    The statement itself compares the numbers; a writer that was assigned a number at the same
    moment, and finds its id taken, tries again. A rollback does not undo it.

    Returns:
        The names of the sequences that were set.
    """
    if backend_of(connection) is not Backend.POSTGRESQL:
        return ()
    return tuple(
        found.sequence_name
        for found in _found(connection, tables)
        if _is_ours_to_set(found) and _set(connection, found)
    )


def gives_upto(connection: Connection, row_id: int, table: Table = TELEMETRY) -> bool:
    """Whether the next id that the database assigns is this one or lower.

    False for a sequence that this role may not read.
    """
    backend = backend_of(connection)
    match backend:
        case Backend.SQLITE:
            given = None  # a file that is opened read-only may lack AUTOINCREMENT
            if catalogue.tables(connection, ["sqlite_sequence"]):
                given = connection.exec_driver_sql(
                    "SELECT seq FROM main.sqlite_sequence WHERE name = ?", (table.name,)
                ).scalar()
            return max(given or 0, connection.scalar(select(func.max(table.c.id))) or 0) < row_id
        case Backend.POSTGRESQL:
            return any(
                _numbers(connection, found).next <= row_id
                for found in _found(connection, [table])
                if found.sequence is not None and found.readable and _ascends(found)
            )
        case _:
            assert_never(backend)


def not_in_order(connection: Connection, table: Table = TELEMETRY) -> str | None:
    """What makes later rows get lower ids, and the remedy; None if ids ascend.

    PostgreSQL: a sequence that descends, or that each session takes numbers from in blocks. Then a
    transaction may store a row with a number that an earlier one took.
    """
    if backend_of(connection) is not Backend.POSTGRESQL:
        return None
    for found in _found(connection, [table]):
        if found.sequence is None:
            continue
        by = f"{found.sequence_name}, which assigns {found.name}'s ids,"
        alter = f"run ALTER SEQUENCE {found.sequence_name}"
        if found.increment < 0:
            return f"{by} descends: {alter} INCREMENT BY 1 NO MAXVALUE"
        if found.block > 1:
            return (
                f"{by} gives each session a block of {found.block} numbers: {alter} CACHE 1, then "
                "have every writer connect again"
            )
    return None


def _found(connection: Connection, tables: Sequence[Table]) -> Sequence[Any]:
    return connection.execute(_CATALOGUE, {"names": [table.name for table in tables]}).all()


def _is_ours_to_set(found: Any) -> bool:
    return bool(found.owned and found.readable and found.settable and _ascends(found))


def _ascends(found: Any) -> bool:
    return bool(found.increment > 0 and not found.cycles)


def _sequence(found: Any) -> TableClause:
    return sql_table(
        quoted_name(found.sequence, quote=True),
        column("last_value", BigInteger),
        column("is_called", Boolean),
        schema=quoted_name(found.schema, quote=True),
    )


def _newest(connection: Connection, found: Any) -> Any:
    ids = next(table for table in WITH_IDS if table.name == found.model).c.id
    newest = select(func.max(ids))
    if is_distributed(connection):  # later ones are of other servers' sequences
        newest = newest.where(ids < FIRST_ID_OF_WORKERS)
    return func.coalesce(newest.scalar_subquery(), 0)


def _numbers(connection: Connection, found: Any) -> _Numbers:
    sequence = _sequence(found).c
    asked = select(sequence.last_value, sequence.is_called, _newest(connection, found))
    last, called, newest = connection.execute(asked).one()
    then = last + found.increment if called else last
    return _Numbers(then, newest, min(found.greatest_id, found.greatest_number))


def _set(connection: Connection, found: Any) -> bool:
    """Set the sequence to the greatest id, unless its numbers are greater."""
    # the engine has imported the dialect by now; a store on SQLite never imports it
    from sqlalchemy.dialects.postgresql import OID, REGCLASS  # noqa: PLC0415

    numbers = _numbers(connection, found)
    if not numbers.behind:
        return False
    sequence = _sequence(found)
    own = cast(literal(found.sequence_id, OID), REGCLASS)
    newest = literal(numbers.newest, BigInteger)
    below = literal(numbers.newest - found.increment, BigInteger)
    statement = (
        select(func.pg_catalog.setval(own, newest))
        .select_from(sequence)
        .where(sequence.c.last_value <= case((sequence.c.is_called, below), else_=newest))
    )
    return connection.execute(statement).first() is not None


def _problem(connection: Connection, found: Any) -> Problem | None:
    alter = f"ALTER TABLE {found.name} ALTER COLUMN id"
    if not (found.identity or found.given_otherwise):
        needed = "" if found.not_null else "SET NOT NULL, ALTER COLUMN id "
        return Problem(
            Kind.MISSING,
            f"{found.name}.id has no identity, so rows get no id: run {alter} {needed}"
            f"ADD GENERATED BY DEFAULT AS IDENTITY, then {_MAINTAIN}",
        )
    if found.sequence is None:  # a default or trigger that is not the store's assigns the ids
        return None
    if not (found.identity or found.usable):
        return Problem(
            Kind.UNUSABLE,
            f"{found.role} may not use {found.sequence_name}, which assigns {found.name}'s ids: "
            f"run GRANT USAGE ON SEQUENCE {found.sequence_name} TO {found.role}",
        )
    if not (found.readable and _ascends(found)):
        return None
    return _problem_of_numbers(found, _numbers(connection, found))


def _problem_of_numbers(found: Any, numbers: _Numbers) -> Problem | None:
    if numbers.exhausted:
        return Problem(
            Kind.EXHAUSTED,
            f"{found.sequence_name}, which assigns {found.name}'s ids, has no number left; the "
            f"greatest is {numbers.last}: {_more_numbers(found, numbers)}",
        )
    if numbers.behind:
        remedy = _MAINTAIN if found.owned else _setting(found)
        return Problem(
            Kind.BEHIND,
            f"{found.sequence_name}, which assigns {found.name}'s ids, is behind the existing "
            f"ids: run {remedy}",
        )
    return None


def _more_numbers(found: Any, numbers: _Numbers) -> str:
    steps = []
    if found.greatest_id < INT64_MAX:
        steps.append(f"ALTER TABLE {found.name} ALTER COLUMN id TYPE bigint")
    if found.greatest_number < INT64_MAX:
        steps.append(f"ALTER SEQUENCE {found.sequence_name} AS bigint NO MAXVALUE")
    if steps:
        return "run " + ", then ".join(steps)
    if numbers.newest < numbers.last:
        return f"run {_setting(found)}"
    return f"a row has the id {numbers.newest}; give it a lower id, then set the sequence back"


def _setting(found: Any) -> str:
    name = found.sequence_name.replace("'", "''")
    newest = f"(SELECT coalesce(max(id), 0) + 1 FROM {found.name})"  # noqa: S608 - told, not run
    return f"SELECT setval('{name}', {newest})"


def _problem_of_sqlite(connection: Connection, table: Table) -> Problem | None:
    sql = connection.exec_driver_sql(
        "SELECT sql FROM main.sqlite_schema WHERE type = 'table' AND name = ?", (table.name,)
    ).scalar()
    if sql is None:
        return None
    if not is_autoincrement(sql):
        return Problem(
            Kind.MISSING,
            f"{table.name}.id is not an AUTOINCREMENT key, so SQLite may assign the id of a "
            "deleted row again, and roll-ups would miss the new row: restore the table's "
            "definition",
        )
    given = connection.exec_driver_sql(
        "SELECT seq FROM main.sqlite_sequence WHERE name = ?", (table.name,)
    ).scalar()
    newest = connection.scalar(select(func.max(table.c.id))) or 0
    if max(given or 0, newest) < INT64_MAX:
        return None
    remedy = (
        "a row has the greatest id; give it a lower id and set sqlite_sequence back"
        if newest == INT64_MAX
        else f"sqlite_sequence holds the greatest id; set its seq to {newest}"
    )
    return Problem(Kind.EXHAUSTED, f"{table.name} has no id left: {remedy}")
