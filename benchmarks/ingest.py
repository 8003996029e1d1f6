# ruff: noqa: INP001, PLR2004, T201 - a script; its numbers are the sample's own
"""What recording costs: the call, and the way to the disk against the bare drivers.

Everything is measured in one run, the store and its baseline in turn, and given as a ratio of
each pair's times. The baseline is the driver alone: the same tuples, in the same schema, in the
same batches of 1,000, each in a transaction of its own: `sqlite3`'s ``executemany``, and COPY of
psycopg. Rows are about 2.1 KB: 1,200 + 800 characters of text; twelve requests to a session.
"""

import argparse
import os
import platform
import random
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import make_url

sys.path.insert(0, str(Path(__file__).parents[1]))

from lynkr_store import Store, StoreSettings, create_store_engine, migrate
from lynkr_store.ingest import Row, TextPolicy, row_of
from lynkr_store.models import TELEMETRY
from tests.support.postgres import PgServer, available_servers

BATCH = 1_000
COLUMNS = [column.name for column in TELEMETRY.c if column.name != "id"]
NO_BOUND = {"queue_max_rows": 10**6, "queue_max_bytes": 4 * 2**30}


def requests(count: int) -> list[dict[str, Any]]:
    """Records of 28 fields, the same each time."""
    rng = random.Random(11)  # noqa: S311 - a sample, no secret
    letters = "".join(rng.choices("etaoin shrdlu", k=4_000))
    return [
        {
            "request_id": f"req-{number:08}",
            "session_id": f"session-{number // 12}",
            "timestamp": 1_750_000_000_000 + number * 40,
            "complexity_score": rng.random(),
            "tier": rng.choice(["SIMPLE", "MEDIUM", "COMPLEX", "REASONING"]),
            "agentic_type": "none",
            "tool_count": rng.randrange(8),
            "input_tokens": rng.randrange(8_000),
            "message_count": rng.randrange(40),
            "request_type": rng.choice(["chat", "code", "tool_result"]),
            "provider": rng.choice(["ollama", "openrouter", "bedrock"]),
            "model": rng.choice(["qwen2.5-coder:7b", "gpt-4o-mini", "claude-sonnet-4-5"]),
            "routing_method": "tier_config",
            "was_fallback": rng.random() < 0.03,
            "output_tokens": rng.randrange(1_000),
            "latency_ms": rng.random() * 9_000,
            "status_code": 200,
            "error_type": None,
            "cost_usd": rng.random() / 100,
            "tool_calls_made": rng.randrange(3),
            "retry_count": 0,
            "circuit_breaker_state": "closed",
            "quality_score": rng.random() * 100,
            "tokens_per_second": rng.random() * 90,
            "cost_efficiency": None,
            "request_text": letters[(start := rng.randrange(2_000)) : start + 1_200],
            "response_text": letters[start : start + 800],
            "attributes": {"region": "eu", "attempt": number % 3, "tags": ["a", "b"]},
        }
        for number in range(count)
    ]


def tuples(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What the store makes of the records, ready for a driver."""
    rows: list[Row] = [row_of(dict(record), 0, TextPolicy())[0] for record in records]
    flags = {"was_fallback", "pinned"}
    return [
        tuple(int(row[name]) if name in flags else row[name] for name in COLUMNS) for row in rows
    ]


def call_cost(records: list[dict[str, Any]], folder: Path) -> Iterator[str]:
    """Microseconds of CPU a call on one thread, and the percentiles of 8 threads' calls."""
    for name, options in (("writer running", {}), ("writer idle", {"flush_interval_s": 3_600})):
        url = f"sqlite:///{folder}/call-{len(name)}.db"
        more = {"batch_max_rows": 10**6} if options else {}
        with Store(settings=StoreSettings(url=url, **NO_BOUND, **options, **more)) as store:
            store.record(provider="first")
            store.flush(30)
            means = []
            for at in range(0, len(records), 5_000):
                began = time.thread_time()
                for record in records[at : at + 5_000]:
                    store.record(**record)
                means.append((time.thread_time() - began) / len(records[at : at + 5_000]) * 1e6)
                store.flush(60)
        yield (
            f"record(), 1 thread, {name}: mean {statistics.mean(means):.1f} µs of CPU "
            f"(of 5,000 calls: min {min(means):.1f}, median {statistics.median(means):.1f})"
        )
    with Store(settings=StoreSettings(url=f"sqlite:///{folder}/eight.db", **NO_BOUND)) as store:
        taken: list[int] = []

        def caller(part: list[dict[str, Any]]) -> None:
            now, mine = time.perf_counter_ns, []
            for record in part:
                began = now()
                store.record(**record)
                mine.append(now() - began)
            taken.extend(mine)

        threads = [threading.Thread(target=caller, args=(records[n::8],)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store.flush(120)
        assert store.health().written == len(records)  # noqa: S101 - else it measured nothing
    at = sorted(taken)
    p50, p99, p999 = (at[int(len(at) * p)] / 1_000 for p in (0.5, 0.99, 0.999))
    yield f"record(), 8 threads, writer running: p50 {p50:.1f}, p99 {p99:.1f}, p99.9 {p999:.1f} µs"


def by_store(url: str, records: list[dict[str, Any]]) -> float:
    """Seconds from the first record() to the end of the last flush()."""
    with Store(settings=StoreSettings(url=url, batch_max_rows=BATCH, **NO_BOUND)) as store:
        store.record(provider="first")  # opens
        store.flush(30)
        began = time.perf_counter()
        for record in records:
            store.record(**record)
        assert store.flush(300)  # noqa: S101 - else it measured nothing
        return time.perf_counter() - began


def by_executemany(url: str, rows: list[tuple[Any, ...]]) -> float:
    """Seconds of the bare driver."""
    connection = sqlite3.connect(str(make_url(url).database), isolation_level=None)
    connection.execute("PRAGMA synchronous = NORMAL")
    places = ", ".join("?" * len(COLUMNS))
    statement = f"INSERT INTO routing_telemetry ({', '.join(COLUMNS)}) VALUES ({places})"  # noqa: S608
    began = time.perf_counter()
    for at in range(0, len(rows), BATCH):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(statement, rows[at : at + BATCH])
        connection.execute("COMMIT")
    seconds = time.perf_counter() - began
    connection.close()
    return seconds


def by_copy(url: str, rows: list[tuple[Any, ...]]) -> float:
    """Seconds of COPY over psycopg alone."""
    with psycopg.connect(url, autocommit=True) as connection:
        began = time.perf_counter()
        for at in range(0, len(rows), BATCH):
            with (
                connection.transaction(),
                connection.cursor() as cursor,
                cursor.copy(f"COPY routing_telemetry ({', '.join(COLUMNS)}) FROM STDIN") as copy,
            ):
                for row in rows[at : at + BATCH]:
                    copy.write_row(row)
        return time.perf_counter() - began


def paired(
    name: str,
    runs: int,
    fresh: Callable[[], str],
    ours: tuple[list[dict[str, Any]], list[tuple[Any, ...]]],
    bare: Callable[[str, list[tuple[Any, ...]]], float],
) -> str:
    """The store and the baseline in turn, on an empty schema each."""
    records, rows = ours
    mine, theirs = [], []
    for _ in range(runs):
        mine.append(by_store(fresh(), records))
        theirs.append(bare(fresh(), rows))
    ratios = [t / m for m, t in zip(mine, theirs, strict=True)]
    return (
        f"drained rows/s against {name}: {statistics.median(ratios):.2f} × "
        f"(min {min(ratios):.2f}, max {max(ratios):.2f}; "
        f"{len(records) / statistics.median(mine):,.0f} and "
        f"{len(records) / statistics.median(theirs):,.0f} rows/s)"
    )


@contextmanager
def servers() -> Iterator[list[tuple[str, Callable[[], str]]]]:
    """Makers of empty databases at head, by backend."""
    running: list[PgServer] = []
    numbers = iter(range(1_000_000))
    with tempfile.TemporaryDirectory() as folder:

        def upgraded(url: str) -> str:
            engine = create_store_engine(url)
            migrate.upgrade(engine)
            engine.dispose()
            return url

        makers: list[tuple[str, Callable[[], str]]] = [
            ("sqlite", lambda: upgraded(f"sqlite:///{folder}/{next(numbers)}.db"))
        ]
        for installation in available_servers():
            server = PgServer(installation).start()
            running.append(server)
            makers.append(
                (
                    installation.name,
                    lambda server=server: upgraded(server.create_database(f"b{next(numbers)}")),  # type: ignore[misc]
                )
            )
        try:
            yield makers
        finally:
            for server in running:
                server.stop()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--runs", type=int, default=5)
    chosen = parser.parse_args()
    records = requests(chosen.rows)
    rows = tuples(records)
    print(
        f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}, {chosen.rows:,} rows, {chosen.runs} pairs"
    )
    with tempfile.TemporaryDirectory() as folder:
        for line in call_cost(records, Path(folder)):
            print(line, flush=True)
    with servers() as makers:
        for backend, fresh in makers:
            bare = by_executemany if backend == "sqlite" else by_copy
            name = "sqlite3.executemany" if backend == "sqlite" else f"psycopg COPY, {backend}"
            print(paired(name, chosen.runs, fresh, (records, rows), bare), flush=True)


if __name__ == "__main__":
    main()
