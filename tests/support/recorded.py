"""The original module's recorded answers, which are kept beside the project, not in it."""

import importlib.util
import json
import os
import sqlite3
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lynkr_store.db.models import TELEMETRY

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("LYNKR_STORE_TEST_DATA", ROOT.parent / "shared" / "data"))

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the recorded data is not here: set LYNKR_STORE_TEST_DATA"
)

_CORE = """id INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL, session_id TEXT,
timestamp INTEGER NOT NULL, complexity_score REAL, tier TEXT, agentic_type TEXT,
tool_count INTEGER, input_tokens INTEGER, message_count INTEGER, request_type TEXT,
provider TEXT NOT NULL, model TEXT, routing_method TEXT, was_fallback INTEGER DEFAULT 0,
output_tokens INTEGER, latency_ms INTEGER, status_code INTEGER, error_type TEXT, cost_usd REAL,
tool_calls_made INTEGER, retry_count INTEGER DEFAULT 0, circuit_breaker_state TEXT,
quality_score REAL, tokens_per_second REAL, cost_efficiency REAL"""
ADDITIVE = (
    "request_text TEXT",
    "response_text TEXT",
    "base_tier TEXT",
    "escalation_source TEXT",
    "propensity REAL",
    "candidates TEXT",
    "pinned INTEGER DEFAULT 0",
    "switch_reason TEXT",
    "cache_decision TEXT",
    "cache_read_tokens INTEGER",
    "cache_creation_tokens INTEGER",
)
INDEXES = {
    "idx_telemetry_provider": "(provider)",
    "idx_telemetry_tier": "(tier)",
    "idx_telemetry_timestamp": "(timestamp)",
    "idx_telemetry_session_id": "(session_id, timestamp)",
}
OWN_INDEXES = tuple(index.name for index in TELEMETRY.indexes if index.name not in INDEXES)
"""Those of the table that the gateway does not make."""
SAVINGS = (
    "CREATE TABLE savings_events (id INTEGER PRIMARY KEY AUTOINCREMENT, "
    "timestamp INTEGER NOT NULL, category TEXT NOT NULL, tokens_saved INTEGER NOT NULL)"
)
_VARIANTS = {
    "fresh": (2, tuple(INDEXES)),
    "legacy26": (0, tuple(INDEXES)[:3]),
    "legacy27": (1, tuple(INDEXES)),
    "noindex28": (2, ()),
}


def gateway_table(columns: int | tuple[str, ...] = 2, *, core: str = _CORE, tail: str = "") -> str:
    """The gateway's CREATE TABLE, with its first additive columns or those given."""
    added = ADDITIVE[:columns] if isinstance(columns, int) else columns
    return f"CREATE TABLE routing_telemetry ({', '.join((core, *added))}){tail}"


def core_columns() -> str:
    """The 26 columns as they are written in SQL."""
    return _CORE


def gateway_file(
    path: Path,
    columns: int | tuple[str, ...] = 2,
    indexes: tuple[str, ...] = tuple(INDEXES),
    rows: list[dict[str, Any]] | None = None,
    *more: str,
) -> Path:
    """Write a database as the gateway does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    connection.execute(gateway_table(columns))
    for name in indexes:
        connection.execute(f"CREATE INDEX {name} ON routing_telemetry{INDEXES[name]}")
    insert_rows(connection, rows or [])
    for statement in more:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return path


def insert_rows(connection: sqlite3.Connection, rows: list[dict[str, Any]]) -> None:
    """Insert rows as another writer of the file does, into the columns that they name."""
    for row in rows:
        marks = ", ".join("?" for _ in row)
        connection.execute(
            f"INSERT INTO routing_telemetry ({', '.join(row)}) VALUES ({marks})", [*row.values()]
        )


def variant_file(path: Path, variant: str) -> Path:
    """An empty file of one of the shapes that the recorded cases begin with."""
    columns, indexes = _VARIANTS[variant]
    return gateway_file(path, columns, indexes)


@cache
def oracle() -> Any:
    """The module that loads the recorded cases and compares answers with them."""
    spec = importlib.util.spec_from_file_location("oracle", DATA / "original_answers.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases() -> list[dict[str, Any]]:
    """The recorded cases; none where they are not here."""
    path = DATA / "original-answers.jsonl.gz"
    return oracle().load(path) if path.exists() else []


def expected_on_gateway_file() -> list[dict[str, Any]]:
    """The 42 calls on the gateway's own database."""
    path = DATA / "gateway-28185.expected.json"
    return json.loads(path.read_text())["calls"] if path.exists() else []
