"""Recognise a telemetry.db that the gateway made, and record what it contained.

The gateway's table grew from 26 to 37 columns. The gateway adds columns one by one, outside a
transaction, so a file can have any subset of the later ones. The text of its CREATE statements
differs between versions, so tables are compared by what SQLite reports about them.
"""

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, assert_never

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    MetaData,
    Table,
    Text,
    column,
    insert,
    select,
)
from sqlalchemy import table as sql_table

from lynkr_store.backend import VERSION_TABLE, Backend
from lynkr_store.db import catalogue
from lynkr_store.exceptions import AdoptionRefused, DowngradeRefused


class _Shape(NamedTuple):
    """A column as ``PRAGMA table_xinfo`` reports it."""

    type: str
    not_null: bool = False
    default: str | None = None
    key: int = 0


_KEY: Final = _Shape("INTEGER", key=1)
_TEXT: Final = _Shape("TEXT")
_INTEGER: Final = _Shape("INTEGER")
_REAL: Final = _Shape("REAL")
_FLAG: Final = _Shape("INTEGER", default="0")
_NEEDED_TEXT: Final = _Shape("TEXT", not_null=True)
_NEEDED_INTEGER: Final = _Shape("INTEGER", not_null=True)

_TELEMETRY: Final = "routing_telemetry"
_SAVINGS: Final = "savings_events"
_PINS: Final = "session_pins"  # only the gateway has this table
_OF_THE_GATEWAY: Final = ("0002", "0003", "0004")
_LATEST_ROWS: Final = 1_000

_CORE: Final[Mapping[str, _Shape]] = {
    "id": _KEY,
    "request_id": _NEEDED_TEXT,
    "session_id": _TEXT,
    "timestamp": _NEEDED_INTEGER,
    "complexity_score": _REAL,
    "tier": _TEXT,
    "agentic_type": _TEXT,
    "tool_count": _INTEGER,
    "input_tokens": _INTEGER,
    "message_count": _INTEGER,
    "request_type": _TEXT,
    "provider": _NEEDED_TEXT,
    "model": _TEXT,
    "routing_method": _TEXT,
    "was_fallback": _FLAG,
    "output_tokens": _INTEGER,
    "latency_ms": _INTEGER,
    "status_code": _INTEGER,
    "error_type": _TEXT,
    "cost_usd": _REAL,
    "tool_calls_made": _INTEGER,
    "retry_count": _FLAG,
    "circuit_breaker_state": _TEXT,
    "quality_score": _REAL,
    "tokens_per_second": _REAL,
    "cost_efficiency": _REAL,
}
# Columns that revisions after the baseline add, by revision. Those of 0005 belong to the store; a
# file that already has one of them must have it in this shape.
_ADDED: Final[Mapping[str, Mapping[str, _Shape]]] = {
    "0002": {"request_text": _TEXT, "response_text": _TEXT},
    "0003": {
        "base_tier": _TEXT,
        "escalation_source": _TEXT,
        "propensity": _REAL,
        "candidates": _TEXT,
        "pinned": _FLAG,
        "switch_reason": _TEXT,
        "cache_decision": _TEXT,
        "cache_read_tokens": _INTEGER,
        "cache_creation_tokens": _INTEGER,
    },
    "0005": {
        "trace_id": _TEXT,
        "attempt_index": _INTEGER,
        "requested_model": _TEXT,
        "ttft_ms": _REAL,
        "stream": _INTEGER,
        "cache_tokens_included": _INTEGER,
        "reasoning_tokens": _INTEGER,
        "finish_reason": _TEXT,
        "attributes": _TEXT,
    },
}
_SAVINGS_COLUMNS: Final[Mapping[str, _Shape]] = {
    "id": _KEY,
    "timestamp": _NEEDED_INTEGER,
    "category": _NEEDED_TEXT,
    "tokens_saved": _NEEDED_INTEGER,
}
_INDEXES: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "idx_telemetry_provider": (_TELEMETRY, ("provider",)),
    "idx_telemetry_tier": (_TELEMETRY, ("tier",)),
    "idx_telemetry_timestamp": (_TELEMETRY, ("timestamp",)),
    "idx_telemetry_session_id": (_TELEMETRY, ("session_id", "timestamp")),
    "idx_savings_timestamp": (_SAVINGS, ("timestamp",)),
}
_INDEX_PREFIXES: Final = ("idx_telemetry_", "idx_savings_timestamp")

# Comments, and quoted names and texts: everything that is not a word of SQL.
_NOT_WORDS: Final = re.compile(
    # An unclosed one extends to the end of the text, so that matching stays linear in its length.
    r"--[^\n]*|/\*.*?(?:\*/|\Z)|'[^']*(?:'|\Z)|\"[^\"]*(?:\"|\Z)|`[^`]*(?:`|\Z)|\[[^\]]*(?:\]|\Z)",
    re.DOTALL,
)
_GENERATED: Final = (2, 3)  # table_xinfo's "hidden": a virtual or stored generated column

ADOPTION_TABLE: Final = "lynkr_store_adoption"

_ADOPTION: Final = Table(
    ADOPTION_TABLE,
    MetaData(),
    Column("revision", Text, nullable=False),
    Column("adopted_at", BigInteger, nullable=False),
)


class Found(NamedTuple):
    """A database that the gateway made.

    Attributes:
        floor: A downgrade below this revision would destroy objects that the gateway made.
    """

    floor: str


def examine(connection: Connection) -> Found | None:
    """Find out who made the tables of an unversioned database, without changing anything.

    Returns:
        What the gateway made, or None if the store's tables can be created.

    Raises:
        AdoptionRefused: An object has one of the store's names, and the gateway did not make it.
    """
    backend = Backend(connection.dialect.name)
    match backend:
        case Backend.SQLITE:
            return _examine_sqlite(connection)
        case Backend.POSTGRESQL:
            _examine_postgresql(connection)
            return None
        case _:
            assert_never(backend)


def note_adoption(connection: Connection, found: Found, now_ms: int) -> None:
    """Record what the database contained; downgrades stop there. The first record is kept."""
    _ADOPTION.create(connection, checkfirst=True)
    if adopted_revision(connection) is None:
        note = insert(_ADOPTION).values(revision=found.floor, adopted_at=now_ms)
        connection.execute(note)


def adopted_revision(connection: Connection) -> str | None:
    """Return the revision whose objects existed at adoption; None if it was not adopted."""
    if not catalogue.tables(connection, [_ADOPTION.name]):
        return None
    return connection.scalar(select(_ADOPTION.c.revision))


def refuse_below_adopted(connection: Connection, revision: str) -> None:
    """Refuse to undo a revision whose objects the gateway had made before the adoption.

    Raises:
        DowngradeRefused: The gateway had made them.
    """
    floor = adopted_revision(connection)
    if floor is not None and revision <= floor:
        raise DowngradeRefused(
            f"this database was adopted at revision {floor}; a downgrade below it would destroy "
            f"what the gateway made. Nothing was changed: downgrade to {floor} instead"
        )


def refuse_while_the_gateway_writes(connection: Connection, revision: str) -> None:
    """Refuse to drop columns of an adopted database that the gateway's INSERT may name.

    A gateway that is updated after the adoption finds the columns and writes them from then on;
    without one of them every INSERT of it would fail. Two signs tell that it does: its table of
    pins, which it creates since it has the columns of 0003, and values in the latest rows.

    Raises:
        DowngradeRefused: The gateway seems to write the columns.
    """
    columns = _ADDED.get(revision, {})
    if adopted_revision(connection) is None or revision not in _OF_THE_GATEWAY:
        return
    table = sql_table(_TELEMETRY, column("id"), *(column(name) for name in columns))
    latest = select(table).order_by(table.c.id.desc()).limit(_LATEST_ROWS)
    wrote = any(
        row[name] not in (None, 0)
        for row in connection.execute(latest).mappings()
        for name in columns
    )
    if wrote or (revision != "0002" and catalogue.tables(connection, [_PINS])):
        raise DowngradeRefused(
            f"this database was adopted, and the gateway seems to write columns that revision "
            f"{revision} added; without them its INSERT would fail. Nothing was changed: stop the "
            "gateway, then run lynkr-store downgrade --drop-data, or alembic -x drop-data=yes "
            "downgrade …"
        )


def _examine_postgresql(connection: Connection) -> None:
    """Refuse any table or index of these names: the gateway never makes them on PostgreSQL."""
    for table in sorted(catalogue.tables(connection, (_TELEMETRY, _SAVINGS))):
        raise AdoptionRefused(
            f"{table} exists without {VERSION_TABLE}, and the gateway only makes SQLite files"
        )
    for index, table in catalogue.indexed_tables(connection, _INDEXES).items():
        raise AdoptionRefused(f"the index {index} is on the table {table}")


def _examine_sqlite(connection: Connection) -> Found | None:
    tables, indexes = _named_like_ours(connection)
    if _TELEMETRY not in tables:
        if _SAVINGS in tables:
            raise AdoptionRefused(f"{_SAVINGS} exists without {_TELEMETRY}")
        return None
    known = {**_CORE, **{name: shape for added in _ADDED.values() for name, shape in added.items()}}
    columns = _check_columns(connection, _TELEMETRY, _CORE, known)
    _check_table(connection, _TELEMETRY, tables[_TELEMETRY])
    if _SAVINGS in tables:
        _check_columns(connection, _SAVINGS, _SAVINGS_COLUMNS, _SAVINGS_COLUMNS)
        _check_table(connection, _SAVINGS, tables[_SAVINGS])
    for name in indexes & _INDEXES.keys():
        _check_index(connection, name, *_INDEXES[name])

    there = {revision for revision, added in _ADDED.items() if columns & added.keys()}
    if _SAVINGS in tables:
        there.add("0004")
    return Found(floor=max(there, default="0001"))


def _named_like_ours(connection: Connection) -> tuple[dict[str, str], set[str]]:
    """Return the gateway's tables, with their SQL, and indexes; refuse others of these names."""
    tables: dict[str, str] = {}
    indexes: set[str] = set()
    for kind, name, table, sql in connection.exec_driver_sql(
        "SELECT type, name, tbl_name, sql FROM main.sqlite_schema WHERE type <> 'trigger'"
    ):
        if name.lower() in (_TELEMETRY, _SAVINGS):
            if kind != "table":
                raise AdoptionRefused(f"{name} is not a table but a {kind}")
            if name != name.lower():
                raise AdoptionRefused(f"the table {name} is spelled differently")
            tables[name] = sql
        elif kind == "index" and name.startswith(_INDEX_PREFIXES):
            if table != (_SAVINGS if name.startswith(_INDEX_PREFIXES[1]) else _TELEMETRY):
                raise AdoptionRefused(f"the index {name} is on the table {table}")
            indexes.add(name)
    return tables, indexes


def _check_columns(
    connection: Connection, table: str, needed: Mapping[str, _Shape], known: Mapping[str, _Shape]
) -> frozenset[str]:
    """Compare the columns with the gateway's; return the names of the columns found."""
    there = {
        column["name"]: column
        for column in connection.exec_driver_sql(f"PRAGMA main.table_xinfo({table})").mappings()
    }
    spelled = {name.lower(): name for name in there}
    for name in needed:
        if name not in there:
            found = f"is spelled {spelled[name]}" if name in spelled else "is missing"
            raise AdoptionRefused(f"{table}.{name} {found}")
    for name, info in there.items():
        _check_column(f"{table}.{name}", info, known.get(name), known.get(name.lower()))
    return frozenset(there)


def _check_table(connection: Connection, table: str, sql: str) -> None:
    """Compare what concerns the whole table, not one column."""
    # Not by PRAGMA table_list: it resolves every view of the file, and with views of views the
    # time doubles with each level.
    virtual = catalogue.not_plain(connection, [table])
    behind = re.findall(r"\w+", _NOT_WORDS.sub(" ", sql).rpartition(")")[2].upper())
    if virtual or {"STRICT", "WITHOUT"} & {*behind}:
        raise AdoptionRefused(f"{table} is virtual, STRICT or WITHOUT ROWID")
    words = _words(sql)
    if not is_autoincrement(sql):
        raise AdoptionRefused(f"{table}.id is not an AUTOINCREMENT key")
    for word in ("CHECK", "COLLATE"):
        if word in words:
            raise AdoptionRefused(f"{table} has a {word}, and the gateway's table has none")
    if connection.exec_driver_sql(f"PRAGMA main.foreign_key_list({table})").first():
        raise AdoptionRefused(f"{table} has a foreign key")
    for index in connection.exec_driver_sql(f"PRAGMA main.index_list({table})").mappings():
        if index["unique"]:
            raise AdoptionRefused(f"{table} has a unique index, {index['name']}")


def is_autoincrement(sql: str) -> bool:
    """Tell whether a table's CREATE statement says that no id is ever reused."""
    return "AUTOINCREMENT" in _words(sql)


def _words(sql: str) -> set[str]:
    return set(re.findall(r"\w+", _NOT_WORDS.sub(" ", sql).upper()))


def _check_column(
    name: str,
    column: Any,
    shape: _Shape | None,
    other_case: _Shape | None,
) -> None:
    if column["hidden"] in _GENERATED:
        raise AdoptionRefused(f"{name} is a generated column")
    found = _Shape(
        column["type"].upper(), bool(column["notnull"]), column["dflt_value"], column["pk"]
    )
    if shape is None:
        if other_case is not None:
            raise AdoptionRefused(f"{name} is spelled differently from the gateway's")
        if found.not_null and found.default is None:
            raise AdoptionRefused(f"{name} is NOT NULL without a default, and not the gateway's")
        if found.key:
            raise AdoptionRefused(f"{name} is part of the primary key")
        return
    if shape.key:
        found = found._replace(not_null=False)  # an INTEGER PRIMARY KEY may be declared either way
    for what, is_, should in zip(("type", "NOT NULL", "default", "key"), found, shape, strict=True):
        if is_ != should:
            raise AdoptionRefused(f"{name}: its {what} is {is_!r} and should be {should!r}")


def _check_index(connection: Connection, name: str, table: str, indexed: tuple[str, ...]) -> None:
    listed = connection.exec_driver_sql(f"PRAGMA main.index_list({table})").mappings()
    partial = any(index["name"] == name and index["partial"] for index in listed)
    parts = connection.exec_driver_sql(f"PRAGMA main.index_xinfo({name})").mappings()
    keys = [(part["name"], part["desc"], part["coll"]) for part in parts if part["key"]]
    if partial or keys != [(column, 0, "BINARY") for column in indexed]:
        raise AdoptionRefused(f"the index {name} is not on exactly ({', '.join(indexed)})")
