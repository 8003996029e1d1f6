# ruff: noqa: INP001, PLR2004, S608, T201 - a script; its numbers and names are the sample's own
"""What a page of a list costs, against the original's own statement through the bare driver.

Ours is `RoutingRepository.query`, from the filter to the finished rows, caches off. The baseline is
`sqlite3` or psycopg alone: the original's statement on the gateway's table, indexes and page size,
fetched and no more; where the original has no such filter, its statement with one more condition.
Rows are about 2.1 KB: 1,200 + 800 characters of text; twelve requests to a session. Each list is
read once unmeasured, then several times, ours and the baseline in turn.
"""

import argparse
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy.orm import Session

sys.path.insert(0, str(Path(__file__).parents[1]))

from lynkr_store import RoutingFilter, RoutingRepository, create_store_engine, maintenance, migrate
from lynkr_store.models import TELEMETRY
from tests.support.postgres import PgServer, available_servers
from tests.support.recorded import INDEXES, gateway_table

FIRST_MS = 1_750_000_000_000
STEP_MS = 2_600  # 1,000,000 rows are 30 days
LIMIT = 100
FILTERS: list[dict[str, Any]] = [
    *({"provider": name} for name in ("ollama", "azure", "seldom", "former", "absent")),
    *({"tier": name} for name in ("SIMPLE", "REASONING", "SELDOM", "FORMER", "absent")),
    *({"model": name} for name in ("ollama/0", "azure/7", "seldom", "absent")),
    *({"session_id": name} for name in ("session-70", "absent")),
    {"has_error": True},
    {"provider": "ollama", "has_error": True},
    {"provider": ["ollama", "azure", "seldom"]},
    {},
]


def requests(count: int) -> Iterator[dict[str, Any]]:
    """Rows of both schemas, the same each time, with common, seldom and former values."""
    rng = random.Random(5)  # noqa: S311 - a sample, no secret
    letters = "".join(rng.choices("etaoin shrdlu", k=4_000))
    for number in range(count):
        seldom = number * 50 // count != (number + 1) * 50 // count  # 50 rows in all
        former = number < count * 0.3
        provider = rng.choices(["ollama", "openrouter", "bedrock", "azure"], [60, 30, 9, 1])[0]
        tier = rng.choices(["SIMPLE", "MEDIUM", "COMPLEX", "REASONING"], [50, 30, 18, 2])[0]
        if former and rng.random() < 0.05:
            provider, tier = "former", "FORMER"
        start = rng.randrange(2_000)
        yield {
            "request_id": f"req-{number:08}",
            "session_id": f"session-{number // 12}",
            "timestamp": FIRST_MS + number * STEP_MS,
            "complexity_score": rng.random(),
            "tier": "SELDOM" if seldom else tier,
            "tool_count": rng.randrange(8),
            "input_tokens": rng.randrange(8_000),
            "message_count": rng.randrange(40),
            "request_type": "chat",
            "provider": "seldom" if seldom else provider,
            "model": "seldom" if seldom else f"{provider}/{rng.randrange(8)}",
            "routing_method": "tier_config",
            "was_fallback": 0,
            "output_tokens": rng.randrange(1_000),
            "latency_ms": rng.randrange(9_000),
            "status_code": 200,
            "error_type": "overloaded" if rng.random() < 0.02 else None,
            "cost_usd": rng.random() / 100,
            "retry_count": 0,
            "quality_score": rng.random() * 100,
            "request_text": letters[start : start + 1_200],
            "response_text": letters[start : start + 800],
        }


COLUMNS = list(next(requests(1)))


def statement(asked: dict[str, Any], mark: str) -> tuple[str, list[Any]]:
    """The original's own words for a filter."""
    terms, values = ["1=1"], []
    for name, value in asked.items():
        if name == "has_error":
            terms.append("error_type IS NOT NULL")
        else:
            several = [value] if isinstance(value, str) else value
            terms.append(f"{name} IN ({', '.join([mark] * len(several))})")
            values += several
    where = " AND ".join(terms)
    return (
        f"SELECT * FROM routing_telemetry WHERE {where} ORDER BY timestamp DESC LIMIT {LIMIT}",
        values,
    )


def timed(runs: int, *read: Callable[[], object]) -> list[list[float]]:
    """Milliseconds of each, in turn."""
    taken: list[list[float]] = [[] for _ in read]
    for number in range(runs + 1):
        for one, times in zip(read, taken, strict=True):
            began = time.perf_counter()
            one()
            if number:
                times.append((time.perf_counter() - began) * 1_000)
    return taken


def compared(
    backend: str, count: int, runs: int, url: str, bare: Callable[[str, list[Any]], object]
) -> Iterator[dict[str, Any]]:
    """One result row for each filter."""
    engine = create_store_engine(url)
    mark = "?" if backend == "sqlite" else "%s"
    with Session(engine) as session:
        repository = RoutingRepository(session)
        for asked in FILTERS:
            criteria = RoutingFilter(**asked)
            sql, values = statement(asked, mark)
            theirs, ours, brief = timed(
                runs,
                lambda sql=sql, values=values: bare(sql, values),  # type: ignore[misc]
                lambda criteria=criteria: repository.query(criteria),  # type: ignore[misc]
                lambda criteria=criteria: repository.query(criteria, include_text=False),  # type: ignore[misc]
            )
            yield {
                "name": f"list {asked or 'of all'}",
                "backend": backend,
                "rows": count,
                "baseline_ms": (min(theirs), statistics.median(theirs)),
                "ours_ms": (min(ours), statistics.median(ours)),
                "without_texts_ms": (min(brief), statistics.median(brief)),
                "ratio": min(theirs) / min(ours),
            }
    engine.dispose()


def on_sqlite(count: int, runs: int, folder: Path) -> list[dict[str, Any]]:
    """The gateway's file, and one of ours with the same rows."""
    marks = ", ".join("?" * len(COLUMNS))
    insert = f"INSERT INTO routing_telemetry ({', '.join(COLUMNS)}) VALUES ({marks})"
    original = sqlite3.connect(folder / "gateway.db", isolation_level=None)
    original.execute("PRAGMA journal_mode = WAL")
    original.execute(gateway_table())
    engine = create_store_engine(url := f"sqlite:///{folder}/ours.db")
    migrate.upgrade(engine)
    own = sqlite3.connect(folder / "ours.db", isolation_level=None)
    for name in [index.name for index in TELEMETRY.indexes]:
        own.execute(f"DROP INDEX {name}")
    for connection in (original, own):
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        connection.executemany(insert, (tuple(row.values()) for row in requests(count)))
        connection.execute("COMMIT")
    own.close()
    for name, columns in INDEXES.items():
        original.execute(f"CREATE INDEX {name} ON routing_telemetry{columns}")
    maintenance.build_missing_indexes(engine)
    engine.dispose()
    original.row_factory = sqlite3.Row
    bare = lambda sql, values: original.execute(sql, values).fetchall()  # noqa: E731
    results = list(compared("sqlite", count, runs, url, bare))
    original.close()
    return results


def on_postgresql(count: int, runs: int, server: PgServer) -> list[dict[str, Any]]:
    """One database with the gateway's table and one of ours."""
    url = server.create_database("ours")
    engine = create_store_engine(url)
    migrate.upgrade(engine)
    original = psycopg.connect(server.create_database("gateway"), autocommit=True)
    own = psycopg.connect(url, autocommit=True)
    kinds = "TEXT NOT NULL", "BIGINT NOT NULL", "TEXT", "BIGINT", "DOUBLE PRECISION"
    table = gateway_table().replace("INTEGER PRIMARY KEY AUTOINCREMENT", "BIGSERIAL PRIMARY KEY")
    table = table.replace("INTEGER", kinds[3]).replace("REAL", kinds[4])
    original.execute(table)
    for name in [index.name for index in TELEMETRY.indexes]:
        own.execute(f"DROP INDEX {name}")
    for connection in (original, own):
        with (
            connection.cursor() as cursor,
            cursor.copy(f"COPY routing_telemetry ({', '.join(COLUMNS)}) FROM STDIN") as copy,
        ):
            for row in requests(count):
                copy.write_row(tuple(row.values()))
    for name, columns in INDEXES.items():
        original.execute(f"CREATE INDEX {name} ON routing_telemetry{columns}")
    maintenance.build_missing_indexes(engine)
    engine.dispose()
    for connection in (original, own):
        connection.execute("ANALYZE")
    own.close()
    bare = lambda sql, values: original.execute(sql, values).fetchall()  # noqa: E731
    results = list(compared(server.name, count, runs, url, bare))
    original.close()
    return results


def results(count: int, runs: int) -> Iterator[dict[str, Any]]:
    """One row for each filter and backend."""
    with tempfile.TemporaryDirectory() as folder:
        yield from on_sqlite(count, runs, Path(folder))
    for installation in available_servers()[-1:]:
        with PgServer(installation) as server:
            yield from on_postgresql(count, runs, server)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=7)
    chosen = parser.parse_args()
    for row in results(chosen.rows, chosen.runs):
        times = (row[key] for key in ("baseline_ms", "ours_ms", "without_texts_ms"))
        shown = " | ".join(f"{least:8.2f} ({median:8.2f})" for least, median in times)
        print(f"{row['backend']:11} {row['name']:55} {shown} | {row['ratio']:7.1f} ×", flush=True)


if __name__ == "__main__":
    main()
