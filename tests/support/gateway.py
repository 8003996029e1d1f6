"""The gateway's words: what each of its versions says to its file, in our own code.

``python -m tests.support.gateway PATH RELEASE`` is a gateway that writes: 50 rows a second until
its input ends, then one line of JSON says how long each of them waited.
"""

import json
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.support.programs import Child
from tests.support.recorded import ADDITIVE, INDEXES, SAVINGS, core_columns

BUSY_S = 3.0
EVERY_S = 0.02

SAVINGS_INDEX = "CREATE INDEX {} idx_savings_timestamp ON savings_events(timestamp)"
PINS = (
    "CREATE TABLE session_pins (session_id TEXT PRIMARY KEY, provider TEXT NOT NULL, model TEXT, "
    "tier TEXT, score REAL, message_count INTEGER, prompt_tokens_est INTEGER, ts INTEGER NOT NULL)"
)
PINS_INDEX = "CREATE INDEX {} idx_session_pins_ts ON session_pins(ts)"
PINS_ADDED = ("has_tool_history INTEGER DEFAULT 0", "cache_state TEXT")


class Release(NamedTuple):
    """What one of the gateway's releases does to its file.

    Attributes:
        created: How many of the later columns its CREATE TABLE has.
        known: How many it knows; those beyond come by ALTER TABLE alone.
        indexes: How many of the indexes it makes.
        savings: Whether it makes ``savings_events``, and ``session_pins`` beside it.
        pins_added: How many columns it adds to ``session_pins``.
    """

    created: int
    known: int
    indexes: int = 4
    savings: bool = False
    pins_added: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that its INSERT names."""
        return (*CORE, *LATER[: self.known])

    def opening(self) -> list[str]:
        """What it says to every file that it opens, in order; a duplicate column is no error."""
        later = ADDITIVE[: self.created]
        said = [
            "PRAGMA journal_mode = WAL",
            "PRAGMA synchronous = NORMAL",
            f"CREATE TABLE IF NOT EXISTS routing_telemetry ({', '.join((core_columns(), *later))})",
            *(f"ALTER TABLE routing_telemetry ADD COLUMN {a}" for a in ADDITIVE[: self.known]),
            *(
                f"CREATE INDEX IF NOT EXISTS {name} ON routing_telemetry{INDEXES[name]}"
                for name in [*INDEXES][: self.indexes]
            ),
        ]
        if self.savings:
            said += [_if_not_exists(SAVINGS), SAVINGS_INDEX.format("IF NOT EXISTS")]
            said += [_if_not_exists(PINS), PINS_INDEX.format("IF NOT EXISTS")]
            added = PINS_ADDED[: self.pins_added]
            said += [f"ALTER TABLE session_pins ADD COLUMN {column}" for column in added]
        return said

    def insert(self) -> str:
        """Its INSERT, with named parameters."""
        marks = ", ".join(f"@{name}" for name in self.columns)
        return f"INSERT INTO routing_telemetry ({', '.join(self.columns)}) VALUES ({marks})"

    def record(self, request_id: str) -> dict[str, Any]:
        """What it binds; every number of its language is a double."""
        values = _RECORD | {"request_id": request_id}
        return {name: values[name] for name in self.columns}


def _if_not_exists(create: str) -> str:
    return create.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS")


RELEASES = {
    "8.0.1": Release(created=0, known=0, indexes=3),
    "9.0.2": Release(created=0, known=0),
    "9.4.6": Release(created=2, known=2),
    "9.7.3": Release(created=8, known=8, savings=True, pins_added=1),
    "9.10.0, 35 columns": Release(created=8, known=9, savings=True, pins_added=2),
    "9.14.1": Release(created=8, known=11, savings=True, pins_added=2),
}

CORE = tuple(column.split()[0] for column in core_columns().split(","))[1:]
"""The 25 columns that every release writes; the key is the database's."""

LATER = tuple(column.split()[0] for column in ADDITIVE)
"""The names of the columns that came later, in the order in which they came."""

_RECORD: dict[str, Any] = {
    "session_id": "session-1",
    "timestamp": 1_750_000_000_000.0,
    "complexity_score": 41.5,
    "tier": "COMPLEX",
    "agentic_type": None,
    "tool_count": 3.0,
    "input_tokens": 1_200.0,
    "message_count": 7.0,
    "request_type": "chat",
    "provider": "gateway",
    "model": "gateway/model",
    "routing_method": "tier_config+cost_optimized",
    "was_fallback": 0.0,
    "output_tokens": 345.0,
    "latency_ms": 812.25,
    "status_code": 200.0,
    "error_type": 500.0,  # in a column of texts it becomes '500.0'
    "cost_usd": 0.012345,
    "tool_calls_made": None,
    "retry_count": 0.0,
    "circuit_breaker_state": "CLOSED",
    "quality_score": 65.0,
    "tokens_per_second": 424.7,
    "cost_efficiency": None,
    "request_text": "q" * 2_000,
    "response_text": "a" * 2_000,
    "base_tier": "MEDIUM",
    "escalation_source": "risk",
    "propensity": 1.0,
    "candidates": '[{"provider":"gateway","model":"gateway/model"}]',
    "pinned": 1.0,
    "switch_reason": "score_drift",
    "cache_decision": '{"decision":"hold","reason":"same_model"}',
    "cache_read_tokens": 900.0,
    "cache_creation_tokens": None,
}
STORED = _RECORD | {"error_type": "500.0"}
"""What a row of the gateway's reads, apart from its ``request_id``."""


def connect(path: Path | str) -> sqlite3.Connection:
    """Connect as it does: each statement its own transaction, 3 seconds for a lock."""
    return sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)


def open_as(release: Release, path: Path | str) -> sqlite3.Connection:
    """Open a file as a release does, with everything that it says first."""
    connection = connect(path)
    for statement in release.opening():
        say(connection, statement)
    return connection


def say(connection: sqlite3.Connection, statement: str) -> None:
    """Run a statement of an opening; a column that is there already is what its ALTER wanted."""
    try:
        connection.execute(statement)
    except sqlite3.OperationalError as error:
        if not (statement.startswith("ALTER") and "duplicate column name" in str(error)):
            raise


def write(path: str, release: Release) -> list[tuple[float, float, str | None]]:
    """Write rows as requests come in, and go on after an error, until the input ends.

    Tables and indexes stay as they are: it opened the file some time ago.
    """
    connection = connect(path)
    for pragma in release.opening()[:2]:
        connection.execute(pragma)
    tries: list[tuple[float, float, str | None]] = []
    stop = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=listen, daemon=True).start()
    insert, record = release.insert(), release.record("")
    due = time.time()
    while not stop.is_set():
        began, error = time.time(), None
        try:
            connection.execute(insert, record | {"request_id": f"gateway-{len(tries)}"})
        except sqlite3.Error as refused:
            error = str(refused)
        tries.append((began, time.time() - began, error))
        if len(tries) == 1:
            print("ready", flush=True)
        due = max(due + EVERY_S, time.time())
        time.sleep(max(0.0, due - time.time()))
    connection.close()
    return tries


class Try(NamedTuple):
    """One of its rows.

    Attributes:
        began: When, in seconds since the epoch.
        took_s: How long it waited.
        error: Why the row is lost, if it is.
    """

    began: float
    took_s: float
    error: str | None

    @property
    def ended(self) -> float:
        """When it was stored or lost."""
        return self.began + self.took_s


class Gateway:
    """A gateway that writes to a file, in a process of its own."""

    def __init__(self, path: Path, release: str) -> None:
        program = [sys.executable, "-W", "error", "-m", __name__, str(path), release]
        self._child = Child(program)

    def __enter__(self) -> Self:
        """Wait until it has written its first row."""
        assert self._child.line() == "ready"
        return self

    def __exit__(self, *exc: object) -> None:
        self._child.__exit__(*exc)

    def end(self) -> list[Try]:
        """Its rows, until now."""
        return [Try(*told) for told in json.loads(self._child.end()[-1])]


if __name__ == "__main__":
    print(json.dumps(write(sys.argv[1], RELEASES[sys.argv[2]])), flush=True)
