"""Sixteen processes write and read; beside them folding, retention, an upgrade, a tail reader."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from itertools import takewhile

import pytest
from sqlalchemy import select

from lynkr_store import Store, StoreSettings, StoreUnavailable, Window, create_store_engine
from lynkr_store.db.models import TELEMETRY
from tests.conftest import POSTGRES
from tests.migrations.newer.release import ADDITIVE, NewerRelease
from tests.support.recorded import ROOT

pytestmark = pytest.mark.slow

PROCESSES = 16
SECONDS = 60
OLD_EVERY = 10
AGE = timedelta(days=30)

PROGRAM = """
import json, sys, time
from lynkr_store import Store, StoreSettings, StoreUnavailable, Window

url, number, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
DAY_MS = 86_400_000
store = Store(settings=StoreSettings(url=url, flush_interval_s=0.05, maintenance_interval_s=5))
recorded, added, errors = 0, [], []

def record(kind, n):
    age = 40 * DAY_MS if n % 10 == 0 else 0
    return {
        "request_id": f"{number}-{kind}-{n}",
        "provider": ("ollama", "bedrock")[n % 2],
        "tier": "SIMPLE",
        "timestamp": time.time_ns() // 1_000_000 - age,
        "input_tokens": n,
    }

store.check()
print("ready", flush=True)
sys.stdin.readline()
end = time.monotonic() + seconds
while time.monotonic() < end:
    for _ in range(20):
        assert store.record(record("r", recorded))
        recorded += 1
    try:
        several = [record("a", len(added) + n) for n in range(3)]
        assert store.add_many(several) == 3
        added += [one["request_id"] for one in several]
        store.get_stats()
        store.get_provider_stats("ollama")
        store.query(limit=20)
    except StoreUnavailable as error:
        errors.append(str(error))
    time.sleep(0.02)
assert store.flush(120)
health = store.health()
store.close(30)
print(json.dumps({
    "recorded": recorded, "added": len(added), "errors": errors, "written": health.written,
    "places": [health.submitted, health.rejected, health.dropped, health.pending, health.spooled],
    "faults": dict(health.faults_by),
}), flush=True)
"""


class Worker:
    def __init__(self, url, number):
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, url, str(number), str(SECONDS)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.number = number

    def ready(self):
        assert self._process.stdout.readline() == "ready\n"

    def go(self):
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    @property
    def works(self):
        return self._process.poll() is None

    def told(self):
        said, _ = self._process.communicate(timeout=300)
        assert self._process.returncode == 0
        return json.loads(said)

    def kill(self):
        self._process.kill()
        self._process.communicate()


def _request_ids(url):
    engine = create_store_engine(url)
    with engine.connect() as connection:
        left = connection.scalars(
            select(TELEMETRY.c.request_id).where(TELEMETRY.c.provider != "end")
        ).all()
    engine.dispose()
    return left


@contextmanager
def may_be_locked(backend):
    """SQLite's one lock may be taken for three seconds; the caller is told, and tries again."""
    try:
        yield
    except StoreUnavailable as error:
        if backend != "sqlite-file" or "database is locked" not in str(error):
            raise


@pytest.mark.parametrize("backend", ["sqlite-file", POSTGRES[-1]])
def test_sixteen_processes_lose_and_double_nothing(new_url, backend, tmp_path):
    url = new_url(backend, at_head=True)
    workers = [Worker(url, number) for number in range(PROCESSES)]
    followed = []
    store = Store(settings=StoreSettings(url=url, cache_ttl_s=0, maintenance_interval_s=3_600))
    rows = store.follow(after=0, poll_s=0.05, include_text=False)
    reader = threading.Thread(
        target=lambda: followed.extend(takewhile(lambda row: row.provider != "end", rows))
    )
    deleted = 0
    try:
        reader.start()
        for worker in workers:
            worker.ready()
        for worker in workers:
            worker.go()
        with NewerRelease(tmp_path) as newer:
            began, upgraded = time.monotonic(), False
            while any(worker.works for worker in workers):
                with may_be_locked(backend):
                    store.maintain(budget_s=2)
                    deleted += store.cleanup(AGE, trust_clock=True)
                if not upgraded and time.monotonic() - began > SECONDS / 3:
                    newer.upgrade(url, ADDITIVE)
                    upgraded = True
                time.sleep(0.5)
        told = [worker.told() for worker in workers]
        store.record(provider="end")
        assert store.flush(60)
        reader.join(120)
        assert not reader.is_alive()
        deleted += store.cleanup(AGE, trust_clock=True)
        store.maintain(budget_s=30)
        everything = store.get_stats(Window(since=time.time_ns() // 1_000_000 - 90 * 86_400_000))
    finally:
        for worker in workers:
            worker.kill()
        store.close()
    assert upgraded
    for each in told:
        assert each["places"] == [each["recorded"], 0, 0, 0, 0]
        assert each["written"] == each["recorded"]
        assert backend == "sqlite-file" or not each["errors"]
        assert all("database is locked" in words for words in each["errors"])
    expected = {
        f"{worker.number}-{kind}-{n}": n % OLD_EVERY == 0
        for worker, each in zip(workers, told, strict=True)
        for kind, count in (("r", each["recorded"]), ("a", each["added"]))
        for n in range(count)
    }
    recent = {request_id for request_id, is_old in expected.items() if not is_old}
    left = _request_ids(url)
    assert [name for name, count in Counter(left).items() if count > 1] == []
    assert set(left) == recent
    old = len(expected) - len(recent)
    # a cleanup that a locked file ended does not say how much it deleted
    assert deleted == old or (backend == "sqlite-file" and deleted < old)
    assert everything.total_requests == len(expected) + 1
    names = [row.request_id for row in followed]
    assert [row.id for row in followed] == sorted(row.id for row in followed)
    assert len(names) == len(set(names))
    assert recent <= set(names) <= expected.keys()
