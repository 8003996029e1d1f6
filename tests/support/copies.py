"""Databases that tests copy, and what must be equal of two of them.

``python -m tests.support.copies SOURCE TARGET STAGE COUNT`` copies, and kills itself in the COUNTth
step of a stage: ``rows``, ``savings``, ``folding``, ``verifying``, or ``commit``, within the
transaction that would say how far the copy has come.
"""

import os
import random
import signal
import sys

from sqlalchemy import insert

from lynkr_store import (
    RoutingFilter,
    Store,
    StoreSettings,
    Window,
    copy,
    create_store_engine,
    writing,
)
from lynkr_store.db.models import SAVINGS
from lynkr_store.storage import progress

DAY_MS = 86_400_000
START = 1_767_225_600_000
"""2026-01-01T00:00Z in epoch milliseconds."""
ALL = Window(since=START - 400 * DAY_MS, until=START + 400 * DAY_MS)


def records(count, *, first=0, seed=7):
    """Records of three days, with texts of several alphabets, and values that are missing."""
    rng = random.Random(seed + first)
    for number in range(first, first + count):
        failed = rng.random() < 0.1
        yield {
            "request_id": f"r-{number}",
            "session_id": f"s-{number % 17}",
            "timestamp": START + number * 3 * DAY_MS // 3_000,
            "provider": rng.choice(["ollama", "bedrock", "azure-openai"]),
            "model": rng.choice(["a", "b", None]),
            "tier": rng.choice(["SIMPLE", "COMPLEX", None]),
            "latency_ms": None if failed else rng.choice([120, 79.5, rng.random() * 1e4]),
            "cost_usd": None if failed else rng.choice([0.0, rng.random(), -0.25]),
            "input_tokens": rng.randrange(10**6),
            "output_tokens": rng.choice([None, 0, 17]),
            "quality_score": rng.choice([None, rng.random() * 100]),
            "was_fallback": rng.choice([True, False]),
            "error_type": "overloaded" if failed else None,
            "request_text": rng.choice(
                ["Ω≈ç√", "a\u2028b\u0085c", "\U0001f600", "plain\r\n\t", ""]
            ),
            "attributes": {"n": number, "deep": [1, {"a": None}]},
        }


def filled(url, count, *, first=0, savings=0):
    """Add records to a database at head, and savings events; return its URL."""
    with Store(settings=StoreSettings(url=url)) as store:
        store.add_many(records(count, first=first))
    if savings:
        event = {"timestamp": START, "category": "cache", "tokens_saved": 5}
        change(url, insert(SAVINGS), [event] * savings)
    return url


def change(url, statement, values=None):
    """Execute one statement on a database."""
    engine = create_store_engine(url)
    with writing(engine).begin() as connection:
        connection.execute(statement, values)
    engine.dispose()


def all_rows(url):
    """Every row as a caller reads it, by ascending id."""
    with Store(url, read_only=True) as store:
        return sorted(store.iter_records(), key=lambda row: row.id)


def answers(url):
    """What a store answers about all rows, without where it has read it."""
    with Store(settings=StoreSettings(url=url, cache_ttl_s=0), clock=lambda: START) as store:
        found = [store.get_stats(ALL), store.get_routing_accuracy(ALL)]
        found += [store.get_provider_stats(name, ALL) for name in ("ollama", "bedrock")]
        found.append(store.query(RoutingFilter(has_error=True), ALL, limit=50))
    return found


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def main(source, target, stage, count):
    seen = 0

    def at(step):
        nonlocal seen
        seen += step == stage
        if seen == int(count):
            _kill()

    if stage == "commit":
        write = progress.write

        def written(connection, name, value):
            write(connection, name, value)
            at("commit")

        progress.write = written
    copy(source, target, on_progress=lambda step: at(step.stage))


if __name__ == "__main__":
    main(*sys.argv[1:])
