"""A gateway writes to its file of a million rows, and waits for nobody while it is adopted."""

import os
import sqlite3
import subprocess
import sys
import time
import zlib
from contextlib import closing
from typing import NamedTuple

import pytest
from sqlalchemy import event

from lynkr_store import DowngradeRefused, StoreSettings, create_store_engine
from lynkr_store.maintenance import indexes, retention
from lynkr_store.migrate import revisions
from lynkr_store.migrate.comparison import drift, missing_indexes
from lynkr_store.migrate.upgrade import downgrade, upgrade
from lynkr_store.storage.database import Database
from tests.support.gateway import BUSY_S, Gateway, connect
from tests.support.recorded import INDEXES, OWN_INDEXES, gateway_table

pytestmark = pytest.mark.slow

ROWS = 1_000_000
FIRST_MS = 1_750_000_000_000
PRESENT = ("idx_telemetry_provider", "idx_telemetry_timestamp")
MISSING = {*INDEXES, *OWN_INDEXES} - {*PRESENT}
HOLD_S = 1.0
"""The longest that any write of ours may keep a gateway waiting, which waits for 3 s."""

FILL = """
WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?)
INSERT INTO routing_telemetry (
    request_id, session_id, timestamp, complexity_score, tier, tool_count, input_tokens,
    message_count, request_type, provider, model, routing_method, was_fallback, output_tokens,
    latency_ms, status_code, error_type, cost_usd, retry_count, quality_score, request_text,
    response_text
)
SELECT
    printf('%08x-0000-4000-8000-%012x', n * 2654435761 % 4294967296, n),
    printf('session-%x', n * 2654435761 % 4294967296 % 50000),
    1750000000000 + n,
    n % 1000 / 10.0,
    CASE n % 4 WHEN 0 THEN 'SIMPLE' WHEN 1 THEN 'MEDIUM' WHEN 2 THEN 'COMPLEX' END,
    n % 9, n % 4096, n % 50, 'chat',
    CASE n % 3 WHEN 0 THEN 'ollama' WHEN 1 THEN 'openrouter' ELSE 'bedrock' END,
    'model-' || n % 7, 'tier_config', n % 2, n % 997, n % 5000 / 4.0, 200,
    CASE WHEN n % 100 = 0 THEN 500.0 END,
    n % 100 / 10000.0, 0, n % 101,
    printf('%.*c', 100 + n % 61, 'q'), printf('%.*c', 150 + n % 97, 'a')
FROM numbers
"""

DROP_FROM_CACHE = """
import os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
os.fsync(descriptor)
os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
"""


class Span(NamedTuple):
    """From when to when something was done, in seconds since the epoch."""

    began: float
    ended: float

    def of(self, tries):
        """Those of the gateway's rows that came in its time."""
        return [row for row in tries if row.ended >= self.began and row.began <= self.ended]


def most(times):
    """What 98 of 100 of them do not exceed."""
    return sorted(times)[-1 - max(1, len(times) // 50)]


class Holds:
    """How long each transaction of an engine had the file's write lock."""

    def __init__(self, engine):
        self.taken = []
        self._began = None
        event.listen(engine, "after_cursor_execute", self._begin)
        for name in ("do_commit", "do_rollback"):
            setattr(engine.dialect, name, self._ending(getattr(engine.dialect, name)))

    def _begin(self, _connection, _cursor, statement, *_):
        if statement == "BEGIN IMMEDIATE":
            self._began = time.monotonic()

    def _ending(self, end):
        def timed(connection):
            end(connection)
            if self._began is not None:
                self.taken.append(time.monotonic() - self._began)
                self._began = None

        return timed

    def take(self):
        taken, self.taken = self.taken, []
        return taken


class Digest:
    """A checksum of rows in their order."""

    def __init__(self):
        self._sum = 0

    def step(self, *values):
        self._sum = zlib.crc32(repr(values).encode(), self._sum)

    def finalize(self):
        return self._sum


@pytest.fixture
def path(tmp_path):
    yield tmp_path / "telemetry.db"
    for file in tmp_path.iterdir():  # some hundred MB, and pytest keeps its last folders
        file.unlink()


@pytest.fixture
def engine(path):
    engine = create_store_engine(f"sqlite:///{path}")
    yield engine
    engine.dispose()


def fill(path, rows):
    """A file of the release 9.4.6, with two of its indexes; one row has some 500 bytes."""
    with closing(connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(gateway_table(2))
        connection.execute(FILL, (rows,))
        for name in PRESENT:
            connection.execute(f"CREATE INDEX {name} ON routing_telemetry{INDEXES[name]}")
        connection.execute("PRAGMA journal_mode = WAL")
    with path.open("rb") as file:
        os.fsync(file)  # or the first who waits for the disk waits for all of it


def drop_from_cache(path):
    """Have the disk asked for every page; by another process, whose descriptor is its own.

    To close one of ours would end the locks that SQLite has on the file in this process.
    """
    subprocess.run([sys.executable, "-c", DROP_FROM_CACHE, path], check=True)


def columns_of(path):
    with closing(connect(path)) as connection:
        table = connection.execute("PRAGMA table_info(routing_telemetry)").fetchall()
    return ", ".join(name for _, name, *_ in table)


def digest(path, columns, rows):
    """A checksum of the values that were there before the gateway went on."""
    with closing(connect(path)) as connection:
        connection.create_aggregate("digest", -1, Digest)
        old = f"SELECT {columns} FROM routing_telemetry WHERE id <= {rows} ORDER BY id"
        return connection.execute(f"SELECT digest({columns}) FROM ({old})").fetchone()


def during(action, *args, **options):
    """The time that an action took, and its answer."""
    began = time.time()
    answer = action(*args, **options)
    return Span(began, time.time()), answer


def longest(tries):
    return max((row.took_s for row in tries), default=0.0)


def lost(tries):
    return [row for row in tries if row.error]


def check_stored(path, rows, tries):
    """Each of the gateway's rows is there that it does not know as lost, and the file is sound."""
    with closing(sqlite3.connect(path)) as connection:
        names = connection.execute(
            "SELECT request_id FROM routing_telemetry WHERE id > ? ORDER BY id", (rows,)
        )
        kept = [f"gateway-{number}" for number, row in enumerate(tries) if not row.error]
        assert [name for (name,) in names] == kept
        assert connection.execute("PRAGMA quick_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_a_gateway_keeps_writing_while_its_file_of_a_million_rows_is_adopted(path, engine, cold):
    fill(path, ROWS)
    columns = columns_of(path)
    before = digest(path, columns, ROWS)
    size = path.stat().st_size
    holds = Holds(engine)
    with Gateway(path, "9.4.6") as gateway:
        if cold:
            drop_from_cache(path)
        time.sleep(0.5)
        adoption, _ = during(upgrade, engine)
        held_by_adoption = holds.take()
        time.sleep(0.5)
        if cold:
            drop_from_cache(path)
        builds, built = during(indexes.build_missing_indexes, engine)
        held_by_builds = holds.take()
        time.sleep(0.5)
        tries = gateway.end()
    until_builds = [row for row in tries if row.ended < builds.began]
    print(
        f"\n{'cold' if cold else 'warm'}, {ROWS:,} rows, {size / 1e6:.0f} MB: adopted in "
        f"{adoption.ended - adoption.began:.3f} s, write lock held for {max(held_by_adoption):.3f}"
        f" s, the gateway's longest wait {longest(adoption.of(tries)):.3f} s; indexes: write lock "
        f"held for {', '.join(f'{held:.2f}' for held in held_by_builds)} s, the gateway's longest "
        f"wait {longest(builds.of(tries)):.2f} s, {len(lost(tries))} of its rows lost"
    )
    assert len(until_builds) > 25, "it wrote before, meanwhile and afterwards"
    assert lost(until_builds) == []
    assert longest(until_builds) < HOLD_S
    assert max(held_by_adoption) < HOLD_S
    # SQLite builds an index in one piece: how long that takes is said above, and not judged
    assert {*built.names} == MISSING
    assert all(row.took_s >= BUSY_S * 0.9 for row in lost(tries)), "lost for another reason"
    check_stored(path, ROWS, tries)
    assert digest(path, columns, ROWS) == before, "a value has changed"
    with engine.connect() as connection:
        assert revisions.current(connection) == revisions.head()
        assert drift(connection) == []
        assert missing_indexes(connection) == []


def test_a_gateway_keeps_writing_while_old_rows_are_deleted(path, engine):
    rows = ROWS // 5
    fill(path, rows)
    upgrade(engine)
    indexes.build_missing_indexes(engine)
    holds = Holds(engine)
    with Gateway(path, "9.4.6") as gateway:
        now_ms = FIRST_MS + rows // 2  # the gateway's own rows are of the first moment
        database = Database(StoreSettings(), engine)
        deletion, deleted = during(retention.delete_older, database, now_ms)
        held = holds.take()
        tries = gateway.end()
    print(
        f"\n{deleted:,} rows deleted in {deletion.ended - deletion.began:.1f} s, write lock held "
        f"for {max(held):.3f} s at most, the gateway's longest wait {longest(tries):.3f} s"
    )
    assert deleted >= rows // 2 - 1
    assert lost(tries) == []
    # of hundreds of steps some may meet a moment at which the machine's disk stands still
    assert most([row.took_s for row in tries]) < HOLD_S
    assert most(held) < HOLD_S


@pytest.mark.parametrize("below", ["0001", "base"])
def test_a_gateway_keeps_writing_while_a_downgrade_below_its_columns_is_refused(
    path, engine, below
):
    rows = ROWS // 5
    fill(path, rows)
    columns = columns_of(path)
    before = digest(path, columns, rows)
    upgrade(engine)
    all_columns = columns_of(path)
    holds = Holds(engine)
    with Gateway(path, "9.4.6") as gateway:
        with pytest.raises(DowngradeRefused, match="adopted at revision 0002"):
            downgrade(engine, below, drop_data=True)
        held = holds.take()
        time.sleep(0.1)
        tries = gateway.end()
    print(
        f"\nrefused after {max(held):.3f} s with the write lock; the gateway's longest wait "
        f"{longest(tries):.3f} s, {len(lost(tries))} of its rows lost"
    )
    with engine.connect() as connection:
        assert revisions.current(connection) == revisions.head()
    assert columns_of(path) == all_columns
    assert digest(path, columns, rows) == before
    check_stored(path, rows, tries)
    assert lost(tries) == []
    assert longest(tries) < HOLD_S
    assert max(held) < HOLD_S
