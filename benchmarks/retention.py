# ruff: noqa: INP001, T201 - a script
"""What retention costs a process that inserts beside it: half of the rows go, in short steps.

Against one DELETE of the same rows by the bare driver, as the gateway does it. The other process
inserts three rows of 2 KB in each of its transactions, with a busy timeout of 3 seconds, 5 ms
apart, and says how long the longest took.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from lynkr_store import Store, StoreSettings, create_store_engine, migrate

FIRST_MS = 1_750_000_000_000
APART_MS = 100
BUSY_S = 3.0
INSERT = (
    "INSERT INTO routing_telemetry (request_id, session_id, timestamp, tier, provider, latency_ms, "
    "request_text, response_text) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
DELETE = "DELETE FROM routing_telemetry WHERE timestamp < ?"


def results(rows: int = 1_000_000, runs: int = 1) -> list[dict[str, Any]]:
    """One row for each figure of each way: its name, the least, the median, the unit."""
    ways = {"in steps": _in_steps, "one DELETE": _at_once}
    with tempfile.TemporaryDirectory() as directory:
        sample, path = Path(directory, "sample.db"), Path(directory, "telemetry.db")
        _fill(sample, rows)
        figures = {name: [] for name in ways}  # type: dict[str, list[dict[str, float]]]
        for _ in range(runs):
            for name, way in ways.items():
                for leftover in Path(directory).glob("telemetry.db*"):
                    leftover.unlink()
                shutil.copy(sample, path)
                os.sync()  # or the first checkpoint would have the copy written
                figures[name].append(_beside_inserts(way, path, FIRST_MS + rows // 2 * APART_MS))
    return [
        _row(f"retention of {rows // 2:,} of {rows:,}, {name}: {figure}", runs_of, figure)
        for name, runs_of in figures.items()
        for figure in runs_of[0]
    ]


def _in_steps(path: Path, cutoff_ms: int) -> None:
    settings = StoreSettings(url=f"sqlite:///{path}")
    with Store(settings=settings, clock=lambda: cutoff_ms) as store:
        store.cleanup(timedelta(0))


def _at_once(path: Path, cutoff_ms: int) -> None:
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_S)) as connection, connection:
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(DELETE, (cutoff_ms,))


def _beside_inserts(
    way: Callable[[Path, int], None], path: Path, cutoff_ms: int
) -> dict[str, float]:
    with subprocess.Popen(  # noqa: S603 - this file
        [sys.executable, __file__, "--insert", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout  # noqa: S101 - it is a pipe
        other.stdout.readline()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _memory_mib("VmRSS")
        began = time.perf_counter()
        way(path, cutoff_ms)
        seconds = time.perf_counter() - began
        grown = _memory_mib("VmHWM") - before
        told = json.loads(other.communicate()[0])
    return {
        "time (s)": seconds,
        "the other's longest stall (ms)": told["longest_s"] * 1e3,
        "the other's failures (of its tries)": told["failures"],
        "the other's tries (transactions)": told["tries"],
        "memory growth (MiB)": grown,
        "size after (MiB)": path.stat().st_size / 2**20,
    }


def insert(path: str) -> None:
    """Insert until standard input ends; say how long the longest transaction took."""
    done = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    connection.execute("PRAGMA synchronous = NORMAL")
    taken, failures = [], 0
    print("ready", flush=True)
    while not done.wait(0.005):
        began = time.perf_counter()
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(INSERT, _records(len(taken) * 3, 3, FIRST_MS * 2))
            connection.execute("COMMIT")
        except sqlite3.OperationalError:
            failures += 1
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        taken.append(time.perf_counter() - began)
    print(json.dumps({"tries": len(taken), "failures": failures, "longest_s": max(taken)}))


def _fill(path: Path, rows: int) -> None:
    engine = create_store_engine(f"sqlite:///{path}")
    migrate.upgrade(engine)
    engine.dispose()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.executemany(INSERT, _records(0, rows, FIRST_MS))
    with Store(settings=StoreSettings(url=f"sqlite:///{path}")) as store:
        store.maintain()  # a store has folded its rows long before they are old


def _records(first: int, count: int, first_ms: int) -> Iterator[tuple[Any, ...]]:
    """Rows of 2 KB, twelve requests to a session, sessions one after the other."""
    rng = random.Random(first)  # noqa: S311 - a sample, no secret
    letters = "".join(rng.choices("etaoin shrdlu", k=3_000))
    for number in range(first, first + count):
        at = rng.randrange(1_800)
        yield (
            f"req-{number:08}",
            f"session-{number // 12}",
            first_ms + number * APART_MS,
            rng.choice(["SIMPLE", "MEDIUM", "COMPLEX", "REASONING"]),
            rng.choice(["ollama", "openrouter", "bedrock"]),
            rng.random() * 9_000,
            letters[at : at + 1_200],
            letters[at : at + 800],
        )


def _memory_mib(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) / 1024


def _row(name: str, runs: list[dict[str, float]], figure: str) -> dict[str, Any]:
    values = [run[figure] for run in runs]
    name, _, unit = name.rpartition(" (")
    return {
        "name": name,
        "min": min(values),
        "median": statistics.median(values),
        "unit": unit.rstrip(")"),
    }


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--insert", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.insert:
        insert(chosen.insert)
        return
    for row in results(chosen.rows, chosen.runs):
        print(f"{row['name']:80} {row['min']:10,.1f} {row['median']:10,.1f} {row['unit']}")


if __name__ == "__main__":
    main()
