"""All that a database holds, as lines that two moments can be compared by: ours, or theirs.

A line has what the catalogue says of an object, and the number by which the database knows it: one
that was dropped and made again is another.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any, Final

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from lynkr_store import Base
from lynkr_store.backend import VERSION_TABLE
from lynkr_store.db import triggers

OURS: Final = {*Base.metadata.tables, VERSION_TABLE, "lynkr_store_adoption", triggers.FUNCTION}

_USERS: Final = "n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'"
# Every object with its namespace and the relation it belongs to: an index and an identity's
# sequence belong to their table.
_RELATIONS: Final = f"""
WITH relation AS (
  SELECT c.*, n.nspname, coalesce(
    (SELECT indrelid FROM pg_index WHERE indexrelid = c.oid),
    (SELECT refobjid FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
      AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') AND c.relkind = 'S'),
    c.oid) AS belongs_to
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {_USERS}
), named AS (
  SELECT r.*, b.relname AS owner FROM relation r JOIN pg_class b ON b.oid = r.belongs_to
)
"""
_OBJECTS: Final = {
    "relation": f"""{_RELATIONS}
      SELECT nspname, owner, relname, relkind, oid, relfilenode, relowner::regrole, relacl,
        relpersistence, relrowsecurity, relforcerowsecurity, reloptions, relreplident,
        obj_description(oid, 'pg_class'),
        CASE WHEN relkind IN ('v', 'm') THEN pg_get_viewdef(oid)
          WHEN relkind = 'i' THEN pg_get_indexdef(oid) END
      FROM named""",
    "column": f"""{_RELATIONS}
      SELECT nspname, owner, relname, attnum, attname, attisdropped, attnotnull, attidentity,
        attgenerated, attacl, attcollation::regcollation, col_description(r.oid, attnum),
        CASE WHEN NOT attisdropped THEN format_type(atttypid, atttypmod) END,
        pg_get_expr(adbin, adrelid)
      FROM named r JOIN pg_attribute a ON attrelid = r.oid
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
      WHERE attnum > 0""",
    "constraint": f"""{_RELATIONS}
      SELECT nspname, owner, conname, c.oid, convalidated, pg_get_constraintdef(c.oid)
      FROM named r JOIN pg_constraint c ON conrelid = r.oid""",
    "trigger": f"""{_RELATIONS}
      SELECT nspname, owner, tgname, t.oid, tgenabled, pg_get_triggerdef(t.oid)
      FROM named r JOIN pg_trigger t ON tgrelid = r.oid WHERE NOT tgisinternal""",
    "rule": f"""{_RELATIONS}
      SELECT nspname, owner, rulename, w.oid, ev_enabled, pg_get_ruledef(w.oid)
      FROM named r JOIN pg_rewrite w ON ev_class = r.oid""",
    "policy": f"""{_RELATIONS}
      SELECT nspname, owner, polname, p.oid, polcmd, polroles::regrole[],
        pg_get_expr(polqual, polrelid)
      FROM named r JOIN pg_policy p ON polrelid = r.oid""",
    "sequence": f"""{_RELATIONS}
      SELECT nspname, owner, relname, s.*, pg_sequence_last_value(r.oid)
      FROM named r JOIN pg_sequence s ON seqrelid = r.oid""",
    "type": f"""
      SELECT n.nspname, coalesce(r.relname, of.relname, t.typname), t.typname, t.oid, t.typtype,
        t.typowner::regrole, t.typacl, t.typdefault, t.typnotnull, t.typbasetype::regtype,
        (SELECT array_agg(enumlabel ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid),
        (SELECT array_agg(pg_get_constraintdef(oid)) FROM pg_constraint WHERE contypid = t.oid)
      FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
        LEFT JOIN pg_class r ON r.oid = t.typrelid
        LEFT JOIN pg_type e ON e.oid = t.typelem LEFT JOIN pg_class of ON of.oid = e.typrelid
      WHERE {_USERS}""",
    "function": f"""
      SELECT n.nspname, proname, p.oid, proowner::regrole, proacl, pg_get_functiondef(p.oid)
      FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE {_USERS}""",
    "schema": f"""
      SELECT n.nspname, NULL, n.oid, nspowner::regrole, nspacl FROM pg_namespace n
      WHERE {_USERS}""",
    "default rights": """
      SELECT nspname, NULL, defaclobjtype, defaclrole::regrole, defaclacl
      FROM pg_default_acl LEFT JOIN pg_namespace n ON n.oid = defaclnamespace""",
    "database": """
      SELECT NULL, NULL, datacl, (SELECT array_agg(setconfig::text) FROM pg_db_role_setting
        WHERE setdatabase = d.oid)
      FROM pg_database d WHERE datname = current_database()""",
}
_TABLES: Final = f"""
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'm') AND {_USERS}"""


def ours(url: str, schema: str | None = None) -> list[str]:
    """What is the store's, in that schema or, without one, in ``public``."""
    return _lines(url, schema, of_ours=True)


def theirs(url: str, schema: str | None = None) -> list[str]:
    """What is anybody else's."""
    return _lines(url, schema, of_ours=False)


def _lines(url: str, schema: str | None, *, of_ours: bool) -> list[str]:
    if make_url(url).get_backend_name() == "sqlite":
        return sorted(line for table, line in _of_sqlite(url) if (table in OURS) is of_ours)

    def is_ours(namespace: str | None, relation: str | None) -> bool:
        if schema:
            return namespace == schema
        return namespace == "public" and relation in OURS

    return sorted(
        repr((kind, namespace, *said))
        for kind, namespace, relation, *said in _of_postgresql(url)
        if is_ours(namespace, relation) is of_ours
    )


def _of_postgresql(url: str) -> Iterator[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        for kind, statement in _OBJECTS.items():
            for row in connection.execute(statement):
                yield kind, *row
        for namespace, table in connection.execute(_TABLES).fetchall():
            rows = sql.SQL("SELECT t.ctid, t.xmin, to_jsonb(t)::text FROM {} t").format(
                sql.Identifier(namespace, table)
            )
            for row in connection.execute(rows):
                yield "row", namespace, table, table, *row


def _of_sqlite(url: str) -> Iterator[tuple[str, str]]:
    """Each line with its table; counters of AUTOINCREMENT go with the table that they count."""
    path = make_url(url).database
    assert path
    with closing(sqlite3.connect(path)) as connection:
        for name in ("application_id", "user_version", "encoding", "page_size", "auto_vacuum"):
            yield "", repr((name, connection.execute(f"PRAGMA {name}").fetchone()))
        schema = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema")
        for kind, name, table, text in schema.fetchall():
            if name == "sqlite_sequence":
                continue
            yield table, repr((kind, name, text))
            if kind == "table":
                for row in connection.execute(f'SELECT * FROM "{name}"'):
                    yield table, repr(("row", name, row))
        with_counters = "SELECT 1 FROM sqlite_schema WHERE name = 'sqlite_sequence'"
        if connection.execute(with_counters).fetchone():
            for table, number in connection.execute("SELECT name, seq FROM sqlite_sequence"):
                yield table, repr(("counter", table, number))
