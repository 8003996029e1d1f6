"""Triggers that record changes of rows, so that their roll-ups can be recomputed.

Revision `0010` creates them with the statements here, so these statements never change: other
triggers need their own revision and names. If any program runs UPDATE or DELETE on
``routing_telemetry``, they insert the affected quarters of an hour into ``routing_changes``, and
maintenance recomputes the roll-ups of these quarters. INSERT has no trigger: new rows are found by
their ids.

A trigger that fails would break another program's statement. So no stored value makes one fail, a
role needs no right on ``routing_changes``, and nothing in another role's schema is called.
"""

# ruff: noqa: S608 - every name is a constant
from collections.abc import Iterator
from typing import Final, assert_never

from lynkr_store.backend import Backend
from lynkr_store.schemas.units import INSTANT_MAX_MS, INSTANT_MIN_MS

NAMES: Final = {
    Backend.SQLITE: (
        "lynkr_store_note_delete",
        "lynkr_store_note_move",
        "lynkr_store_note_update",
    ),
    Backend.POSTGRESQL: (
        "lynkr_store_note_delete",
        "lynkr_store_note_truncate",
        "lynkr_store_note_update",
    ),
}
"""The triggers' names."""

FUNCTION: Final = "lynkr_store_note_change"
"""PostgreSQL: the function that the triggers call."""

_TABLE: Final = "routing_telemetry"
_QUARTER_MS: Final = 900_000
_READ: Final = (  # the columns that roll-ups depend on; the triggers ignore a change of a text
    "id",
    "timestamp",
    "provider",
    "model",
    "tier",
    "request_type",
    "error_type",
    "was_fallback",
    "latency_ms",
    "quality_score",
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_creation_tokens",
    "tokens_per_second",
    "cost_usd",
)


def creating(backend: Backend) -> Iterator[str]:
    """Statements that create the triggers if they do not exist."""
    match backend:
        case Backend.SQLITE:
            yield from _sqlite()
        case Backend.POSTGRESQL:
            yield _postgresql()
        case _:
            assert_never(backend)


def dropping(backend: Backend, *, distributed: bool = False) -> Iterator[str]:
    """Statements that drop the triggers if they exist, and their function.

    Args:
        backend: The backend.
        distributed: Citus manages the table, so it has no triggers, and none can be dropped.
    """
    match backend:
        case Backend.SQLITE:
            yield from (f"DROP TRIGGER IF EXISTS {name}" for name in NAMES[backend])
        case Backend.POSTGRESQL:
            names = () if distributed else NAMES[backend]
            yield from (f"DROP TRIGGER IF EXISTS {name} ON {_TABLE}" for name in names)
            yield f"DROP FUNCTION IF EXISTS {FUNCTION}()"
        case _:
            assert_never(backend)


def _in_domain(instant: str) -> str:
    """Whether roll-ups include the instant; SQLite orders texts and blobs after every number."""
    return f"{instant} >= {INSTANT_MIN_MS} AND {instant} < {INSTANT_MAX_MS}"


def _sqlite() -> Iterator[str]:
    """Row triggers: SQLite has no others. A quarter is entered once until it is recomputed.

    A condition in WHEN costs a third of the same condition in the body.
    """
    old, new = (f"CAST({row}.timestamp AS INTEGER)" for row in ("OLD", "NEW"))  # of a fraction too
    old_start, new_start = (f"{at} - {at} % {_QUARTER_MS}" for at in (old, new))
    noted = "EXISTS (SELECT 1 FROM routing_changes WHERE start ="
    yield (
        f"CREATE TRIGGER IF NOT EXISTS lynkr_store_note_delete AFTER DELETE ON {_TABLE} "
        f"WHEN {_in_domain('OLD.timestamp')} BEGIN "
        f"UPDATE routing_changes SET newest = {old} WHERE start = {old_start} "
        f"AND (newest IS NULL OR newest < {old}); "
        f"INSERT INTO routing_changes (start, newest) SELECT {old_start}, {old} "
        f"WHERE NOT {noted} {old_start}); END"
    )
    for name, columns, row, start in (
        ("move", ("timestamp",), "NEW", new_start),
        ("update", _READ, "OLD", old_start),
    ):
        yield (
            f"CREATE TRIGGER IF NOT EXISTS lynkr_store_note_{name} "
            f"AFTER UPDATE OF {', '.join(columns)} ON {_TABLE} "
            f"WHEN {_in_domain(f'{row}.timestamp')} AND NOT {noted} {start}) "
            f"BEGIN INSERT INTO routing_changes (start) VALUES ({start}); END"
        )


def _postgresql() -> str:
    """One block that finds the schema of the table itself, so that a script can contain it too.

    Statement triggers: a statement that changes many rows enters each quarter once. They only
    append, so no writer waits for another writer, or for maintenance that removes entries. The
    function runs with its owner's rights (SECURITY DEFINER), because a role that may change rows
    need not have a right on the entries; no other role may use it in a trigger. If the table of
    entries was dropped, it does nothing. Citus has no triggers on a distributed table.
    """
    old, new = (", ".join(f"{row}.{name}" for name in _READ) for row in ("o", "n"))
    start = f"{_QUARTER_MS} * {_QUARTER_MS}"
    # quote_ident and quote_literal, because a name may contain what ends a quoted body
    body = f"""
DECLARE
  place text := pg_catalog.quote_ident(schema_name);
  creates text := 'CREATE OR REPLACE TRIGGER lynkr_store_note_';
  distributed boolean := false;
  runs text := ' FOR EACH STATEMENT EXECUTE FUNCTION ' || place || '.{FUNCTION}()';
  body text := '
BEGIN
  IF pg_catalog.to_regclass(' || pg_catalog.quote_literal(place || '.routing_changes') || ') IS NULL
  THEN
    RETURN NULL;
  END IF;
  IF TG_OP = ''UPDATE'' THEN
    INSERT INTO ' || place || '.routing_changes (start)
    SELECT DISTINCT v.at / {start}
    FROM old_rows o FULL JOIN new_rows n ON n.id = o.id
    CROSS JOIN LATERAL (VALUES (o.timestamp), (n.timestamp)) v (at)
    WHERE ({old})
      IS DISTINCT FROM ({new})
      AND {_in_domain("v.at")};
  ELSIF TG_OP = ''DELETE'' THEN
    INSERT INTO ' || place || '.routing_changes (start, newest)
    SELECT o.timestamp / {start}, pg_catalog.max(o.timestamp)
    FROM old_rows o WHERE {_in_domain("o.timestamp")}
    GROUP BY o.timestamp / {start};
  ELSIF pg_catalog.to_regclass(' || pg_catalog.quote_literal(place || '.routing_rollups')
    || ') IS NOT NULL THEN
    INSERT INTO ' || place || '.routing_changes (start, newest)
    SELECT DISTINCT r.start, r.start + {_QUARTER_MS - 1}
    FROM ' || place || '.routing_rollups r WHERE r.span_ms = {_QUARTER_MS};
  END IF;
  RETURN NULL;
END';
BEGIN
  IF pg_catalog.to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL THEN
    EXECUTE 'SELECT pg_catalog.count(*) > 0 FROM pg_catalog.pg_dist_partition '
      || 'WHERE NOT (partmethod = ''n'' AND repmodel = ''s'' AND colocationid = 0) '
      || 'AND CAST(logicalrelid AS oid) = CAST(CAST('
      || pg_catalog.quote_literal(place || '.{_TABLE}') || ' AS regclass) AS oid)' INTO distributed;
  END IF;
  IF distributed THEN
    RAISE WARNING 'Citus runs no triggers on this table: changes are found by maintenance alone';
    RETURN;
  END IF;
  EXECUTE 'CREATE OR REPLACE FUNCTION ' || place || '.{FUNCTION}() '
    || 'RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS '
    || pg_catalog.quote_literal(body);
  EXECUTE 'REVOKE ALL ON FUNCTION ' || place || '.{FUNCTION}() FROM PUBLIC';
  EXECUTE creates || 'update AFTER UPDATE ON ' || place || '.{_TABLE} '
    || 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows' || runs;
  EXECUTE creates || 'delete AFTER DELETE ON ' || place || '.{_TABLE} '
    || 'REFERENCING OLD TABLE AS old_rows' || runs;
  EXECUTE creates || 'truncate AFTER TRUNCATE ON ' || place || '.{_TABLE}' || runs;
EXCEPTION WHEN feature_not_supported THEN
  RAISE WARNING 'this database takes no triggers: changes are found by maintenance alone';
END"""
    schema = f"""
  schema_name text := (SELECT n.nspname FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid = CAST(pg_catalog.to_regclass('{_TABLE}') AS oid));"""
    return f"DO $lynkr_store${body.replace('DECLARE', 'DECLARE' + schema, 1)}$lynkr_store$"
