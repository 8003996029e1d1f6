"""Releases of two ages on one database: the older goes on, or says why it cannot.

No earlier release can be installed here. The release before a revision is played by the tables as
they were then, each statement naming its columns; the release to come, by a program of its own
with revisions of its own (`tests.migrations.newer`).
"""

import asyncio
import sqlite3
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from datetime import timedelta
from io import StringIO
from itertools import count
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.config import main as alembic_main
from sqlalchemy import Engine, MetaData, event, insert, inspect, make_url, select, text
from sqlalchemy.exc import DBAPIError

from lynkr_store import (
    AsyncStore,
    RoutingFilter,
    SchemaAhead,
    SchemaBehind,
    Store,
    StoreSettings,
    Window,
    __version__,
    create_store_engine,
    writing,
)
from lynkr_store.cli import commands
from lynkr_store.db.models import NOTES, TELEMETRY, Base
from lynkr_store.migrate import revisions, scripts
from lynkr_store.migrate.comparison import comparing
from lynkr_store.migrate.upgrade import downgrade, upgrade, write_script
from tests.migrations.newer.release import (
    ADDITIVE,
    ADDITIVE_AGAIN,
    RELEASE,
    RENAMING,
    NewerRelease,
)
from tests.support.recorded import ROOT
from tests.support.snapshot import schema_of
from tests.support.stores import Asynchronous, adds_up, eventually, looked

pytestmark = pytest.mark.sample(4)

LINE = list(scripts.script_directory().walk_revisions())[::-1]
HEAD = LINE[-1].revision
BEFORE_HEAD = LINE[-2].revision
NOTED = {
    s.revision: [int(s.module.rolling), s.down_revision, __version__]
    for s in LINE
    if s.revision >= "0007"
}
STEPS = [(step.down_revision, step.revision) for step in LINE[1:] if step.module.rolling]
# from there on no revision stops a release
OLDEST = [LINE[0], *(step for step in LINE if not step.module.rolling)][-1].revision

AHEAD = f"is newer than this release (head {HEAD}): install "
THE_NEWER = f"{AHEAD}lynkr-store {RELEASE} or newer"
A_NEWER = f"{AHEAD}a newer lynkr-store"

NOW = 1_750_000_000_000
PACE_S = 0.003
HELD_OPEN_S = 0.1
ALL_TIME = Window(since=0)


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    with NewerRelease(tmp_path_factory.mktemp("newer")) as newer:
        yield newer


@pytest.fixture
def _quick_retries(monkeypatch):
    monkeypatch.setattr("lynkr_store.ingest.deliverer._FIRST_RETRY_S", 0.01)
    monkeypatch.setattr("lynkr_store.ingest.deliverer._LAST_RETRY_S", 0.1)


@pytest.fixture(params=["sync", "async"])
def open_store(request, url):
    """Open stores of one kind on the database; asynchronous ones speak as the others do."""
    with asyncio.Runner() as runner:
        opened = []

        def open_(**options):
            opened.append(opened_store(request.param, url, runner, **options))
            return opened[-1]

        yield open_
        for store in opened:
            store.close(0)


def opened_store(kind, url, runner, **options):
    settings = StoreSettings(url=url, cache_ttl_s=0, flush_interval_s=0.05, **options)
    if kind == "sync":
        return Store(settings=settings)
    return Asynchronous(AsyncStore(settings=settings), runner)


# They live on: a thread in which an asynchronous store ran is taken apart, when it ends, by a call
# that Python 3.11 makes between two lines of the main thread, and under coverage such a call can
# go on for ever.
_THREADS = ThreadPoolExecutor(8)


class Beside:
    """Runs bodies again and again beside the test, a thread for each, and sees how they get on."""

    def __init__(self, *bodies):
        self._bodies = bodies
        self._stop = threading.Event()
        self.begun = [0] * len(bodies)
        self.done = [0] * len(bodies)

    def __enter__(self):
        self._futures = [_THREADS.submit(self._run, n) for n in range(len(self._bodies))]
        return self

    def __exit__(self, kind, error, trace):
        self._stop.set()
        wait(self._futures)
        if kind is None:
            self._raise()

    def _run(self, n):
        while not self._stop.is_set():
            self.begun[n] += 1
            self._bodies[n]()
            self.done[n] += 1
            self._stop.wait(PACE_S)

    def _raise(self):
        for future in self._futures:
            if future.done():
                future.result()

    def get_on(self, times, who=None):
        """Wait until each, or these, ended that often again."""
        who = range(len(self._bodies)) if who is None else who
        goals = {n: self.done[n] + times for n in who}
        self.wait_for(lambda: all(self.done[n] >= goal for n, goal in goals.items()))

    def stand(self, who):
        """Wait until each of these has begun what it cannot end now."""
        self.wait_for(lambda: all(self.begun[n] > self.done[n] for n in who))

    def wait_for(self, holds):
        def holds_or_raises():
            self._raise()
            return holds()

        eventually(holds_or_raises)


def waiting_for_locks(engine):
    """PostgreSQL: how many sessions of this database wait for a lock."""
    with engine.connect() as connection:
        return connection.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        )


def execute(engine, *statements):
    with writing(engine).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def run_script(url, script):
    target = make_url(url)
    if target.get_backend_name() == "sqlite":
        with closing(sqlite3.connect(target.database)) as connection:
            connection.executescript(script)
        return
    engine = create_store_engine(url)
    with engine.connect() as connection:
        connection.connection.driver_connection.execute(script)
    engine.dispose()


def revision_of(engine):
    with engine.connect() as connection:
        return revisions.current(connection)


def notes_of(engine):
    with engine.connect() as connection:
        if not inspect(connection).has_table(NOTES.name):
            return None
        return {revision: rest for revision, *rest in map(tuple, connection.execute(select(NOTES)))}


def names_of(engine):
    with engine.connect() as connection:
        return list(connection.scalars(select(TELEMETRY.c.request_id).order_by(TELEMETRY.c.id)))


def everything_of(engine):
    """The schema, where it stands, and the notes."""
    return schema_of(engine), revision_of(engine), notes_of(engine)


# -- the release before ---------------------------------------------------------------------------


class EarlierRelease:
    """A release that knows the tables as they are now, and will go on knowing them so.

    Attributes:
        written: By table, what each committed INSERT was given.
    """

    def __init__(self, url):
        self._engine = create_store_engine(url)
        metadata = MetaData()
        there = inspect(self._engine).get_table_names()
        known = [name for name in Base.metadata.tables if name in there and name != NOTES.name]
        with comparing():  # an index on an expression is nothing that it reads
            metadata.reflect(self._engine, only=known)
        self._tables = metadata.sorted_tables
        self._reads = count()
        self.written = {table.name: [] for table in self._tables}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._engine.dispose()

    def writer(self, name):
        """A body that writes one row into each table, in one transaction."""
        numbers = count()

        def write():
            number = next(numbers)
            rows = [(t, _values(t, f"{name}-{number}", number)) for t in self._tables]
            with writing(self._engine).begin() as connection:
                for table, values in rows:
                    connection.execute(insert(table), values)
            for table, values in rows:
                self.written[table.name].append(values)

        return write

    def read(self):
        """Read all tables, and miss nothing that was there before; hold some results open."""
        held_s = HELD_OPEN_S if next(self._reads) % 3 == 0 else 0
        before = {name: len(rows) for name, rows in self.written.items()}
        with self._engine.connect() as connection:
            connection.execution_options(stream_results=True)
            for table in self._tables:
                key = _key(table)
                result = connection.execute(select(*table.c))
                seen = result.fetchmany(3)
                time.sleep(held_s / len(self._tables))
                seen += result.fetchall()
                expected = {row[key] for row in self.written[table.name][: before[table.name]]}
                assert expected <= {row._mapping[key] for row in seen}

    def check_that_all_is_there(self):
        """Each committed row, every value, and nothing else; new columns have their default."""
        for table in self._tables:
            key, written = _key(table), self.written[table.name]
            assert len(written) > 30, "it did not get far"
            now = MetaData()
            with comparing():
                now.reflect(self._engine, only=[table.name])
            with self._engine.connect() as connection:
                rows = connection.execute(select(now.tables[table.name])).mappings().all()
            stored = {row[key]: row for row in rows}
            assert len(stored) == len(rows) == len(written)
            for values in written:
                row = stored[values[key]]
                assert {name: row[name] for name in values} == values
                for column in now.tables[table.name].c:
                    if column.name not in table.c:
                        default = column.server_default
                        expected = None if default is None else int(default.arg.text)
                        assert row[column.name] == expected


KEYS = {
    "routing_telemetry": "request_id",
    "savings_events": "category",
    "ingest_batches": "batch_id",
    "routing_dimensions": "provider",
    "routing_rollups": "start",
    "routing_changes": "start",
    "lynkr_store_progress": "name",
}


def _key(table):
    return KEYS[table.name]


def _values(table, name, number):
    """A value for each column that the database does not number by itself."""
    kinds = {int: number % 2, float: number + 0.5, str: name}
    values = {c.name: kinds[c.type.python_type] for c in table.c if c.name != "id"}
    own = {"timestamp": NOW + number, "start": int.from_bytes(name.encode())}
    return values | {column: value for column, value in own.items() if column in values}


def get_on_for_a_while(workers):
    """Long enough for a driver to prepare its statements, and for a result to be held open."""
    *writers, _ = range(len(workers.done))
    workers.get_on(8, writers)
    workers.get_on(3)


def upgrade_beside(url, revision, workers, observer):
    """Upgrade, with a look at the workers in the moment before the commit.

    Returns:
        Whether the upgrade had locked readers out, on PostgreSQL.
    """
    locked_out = []

    def look(_):
        if not locked_out:  # the first commit is the migration's
            locked_out.append(look_at(workers, observer))

    upgrading = create_store_engine(url)
    event.listen(upgrading, "commit", look)
    try:
        upgrade(upgrading, revision)
    finally:
        upgrading.dispose()
    [locked] = locked_out
    return locked


def look_at(workers, observer):
    *writers, reader = range(len(workers.done))
    if observer.dialect.name == "sqlite":  # readers go on, writers wait for the file's lock
        workers.get_on(2, [reader])  # one began after the other ended
        workers.stand(writers)
        return False
    with observer.connect() as connection:
        modes = set(
            connection.scalars(
                text(
                    "SELECT mode FROM pg_locks WHERE granted "
                    "AND relation = to_regclass('routing_telemetry')"
                )
            )
        )
    locked = "AccessExclusiveLock" in modes
    if locked:  # all wait, and none is refused
        workers.wait_for(lambda: waiting_for_locks(observer) == len(workers.done))
    elif "ShareRowExclusiveLock" in modes:  # of a trigger: readers go on, writers wait
        workers.get_on(2, [reader])
        workers.wait_for(lambda: waiting_for_locks(observer) == len(writers))
    else:
        workers.get_on(2)
    return locked


def documented_lock(revision):
    """Whether the notes for those who migrate say that the revision locks the table."""
    lines = (ROOT / "migrations" / "NOTES.md").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"| `{revision}` ")]
    return "ACCESS EXCLUSIVE" in line


@pytest.mark.sample(4)
@pytest.mark.parametrize(("before", "revision"), STEPS)
def test_the_release_before_reads_and_writes_while_a_rolling_revision_is_applied(
    empty_url, empty_engine, before, revision
):
    upgrade(empty_engine, before)
    with EarlierRelease(empty_url) as earlier:
        with Beside(earlier.writer("a"), earlier.writer("b"), earlier.read) as workers:
            get_on_for_a_while(workers)
            locked = upgrade_beside(empty_url, revision, workers, empty_engine)
            get_on_for_a_while(workers)
        assert revision_of(empty_engine) == revision
        earlier.check_that_all_is_there()
    if empty_engine.dialect.name == "postgresql":
        assert locked == documented_lock(revision)
    upgrade(empty_engine)
    with Store(empty_url) as store:
        read = {row.request_id for row in store.iter_records()}
    assert read == {row["request_id"] for row in earlier.written["routing_telemetry"]}


def test_the_oldest_release_reads_and_writes_while_all_that_came_since_is_applied(
    empty_url, empty_engine
):
    upgrade(empty_engine, OLDEST)
    with EarlierRelease(empty_url) as earlier:
        with Beside(earlier.writer("a"), earlier.writer("b"), earlier.read) as workers:
            get_on_for_a_while(workers)
            upgrade_beside(empty_url, "head", workers, empty_engine)
            get_on_for_a_while(workers)
        assert revision_of(empty_engine) == HEAD
        earlier.check_that_all_is_there()


def test_a_revision_that_is_not_rolling_stops_the_release_before(url, engine, newer):
    newer.upgrade(url, ADDITIVE)
    stopped = Counter()

    def until_stopped(name, body):
        def run():
            try:
                body()
            except DBAPIError as error:
                if "finish_reason" not in str(error.orig):
                    raise
                stopped[name] += 1

        return run

    with EarlierRelease(url) as earlier:
        bodies = {"write": earlier.writer("a"), "read": earlier.read}
        with Beside(*(until_stopped(*item) for item in bodies.items())) as workers:
            workers.get_on(4)
            assert not stopped
            newer.upgrade(url, RENAMING)
            workers.wait_for(lambda: all(stopped[name] for name in bodies))


# -- this release as the older one: what is rolling -----------------------------------------------


class Gateway:
    """Records and reads by one store, as a gateway does all the time."""

    def __init__(self, name, store):
        self._numbers = count()
        self._name = name
        self.store = store
        self.names = []

    def record(self):
        for _ in range(3):
            name = f"{self._name}-{next(self._numbers)}"
            assert self.store.record(
                request_id=name, provider="p", tier="SIMPLE", latency_ms=5.0, finish_reason="stop"
            )
            self.names.append(name)

    def read(self):
        health = self.store.health()
        assert adds_up(health)
        stats = self.store.get_stats(ALL_TIME)
        assert (stats.total_requests if stats else 0) >= health.written
        rows = self.store.query(RoutingFilter(provider="p", tier="SIMPLE"), limit=20)
        assert len(rows) >= min(20, health.written)
        one = self.store.get_provider_stats("p", ALL_TIME)
        assert (one.total if one else 0) >= health.written
        accuracy = self.store.get_routing_accuracy(ALL_TIME)
        assert (accuracy.total_requests if accuracy else 0) >= health.written

    def record_and_read(self):
        self.record()
        self.read()

    def check_that_nothing_was_lost(self):
        assert self.store.flush(60)
        health = self.store.health()
        assert adds_up(health)
        assert health.submitted == health.written == len(self.names)
        assert not health.faults_by, "no batch was tried twice"
        assert health.last_error is None


def test_stores_keep_working_while_a_newer_release_adds_to_the_schema(url, engine, newer):
    with asyncio.Runner() as runner, ExitStack() as stack:
        gateways = [Gateway(kind, opened_store(kind, url, runner)) for kind in ("sync", "async")]
        for gateway in gateways:
            stack.enter_context(gateway.store)
        synchronous, asynchronous = gateways
        bodies = (synchronous.record, synchronous.read, asynchronous.record_and_read)
        with Beside(*bodies) as workers:
            workers.get_on(6)
            with newer.upgrading(url, ADDITIVE):
                workers.get_on(5, [0])  # to record is to queue
                if engine.dialect.name == "sqlite":
                    workers.get_on(2, [1])
                else:
                    workers.wait_for(lambda: waiting_for_locks(engine) >= 2)
            assert revision_of(engine) == ADDITIVE
            workers.get_on(6)
        for gateway in gateways:
            gateway.check_that_nothing_was_lost()
        expected = {name for gateway in gateways for name in gateway.names}
        for gateway in gateways:
            assert {row.request_id for row in gateway.store.iter_records()} == expected
            assert looked(gateway.store).revision == ADDITIVE
            assert gateway.store.health().head == HEAD
    stored = names_of(engine)
    assert len(stored) == len(expected)
    with engine.connect() as connection:
        added = connection.execute(
            text("SELECT DISTINCT region, priority FROM routing_telemetry")
        ).all()
    assert added == [(None, 7)]


@pytest.mark.parametrize(
    ("open_store", "opened"),
    [("sync", "before"), ("async", "before"), ("sync", "afterwards"), ("async", "to upgrade")],
    indirect=["open_store"],
)
def test_everything_works_on_a_schema_that_a_newer_release_added_to(
    open_store, url, engine, newer, opened
):
    options = {"retention_days": 60}
    if opened == "before":
        store = open_store(**options)
        assert store.query() == []
    newer.upgrade(url, ADDITIVE)
    if opened != "before":
        store = open_store(upgrade_on_open=opened == "to upgrade", **options)
    now = time.time_ns() // 1_000_000
    ages = [timedelta(days=days) for days in (0, 1, 40, 41, 70, 71, 72)]
    for number, age in enumerate(ages):
        assert store.record(
            request_id=f"r{number}",
            provider="p",
            tier="SIMPLE",
            latency_ms=10 * number,
            timestamp=now - age // timedelta(milliseconds=1),
            attributes={"n": number},
        )
    assert store.flush(30)
    execute(
        engine,
        "INSERT INTO routing_telemetry (request_id, provider, timestamp, region, priority) "
        f"VALUES ('newer', 'q', {now}, 'north', 1)",
        "INSERT INTO provider_prices VALUES ('p', 1, 0.5)",
        "DROP INDEX idx_telemetry_tier",
    )
    assert store.add_many([{"provider": "q", "request_id": "many"}]) == 1

    everything = {f"r{number}" for number in range(len(ages))} | {"newer", "many"}
    assert {row.request_id for row in store.iter_records(page_rows=2)} == everything
    [first] = store.query(RoutingFilter(request_id="r1"))
    assert (first.attributes, first.latency_ms) == ('{"n":1}', 10)
    page = store.query(limit=4, include_text=False)
    assert len(store.query(limit=100, before=page[-1].cursor)) == len(everything) - 4
    assert store.get_stats(ALL_TIME).requests_by_provider == {"p": len(ages), "q": 2}
    assert store.get_provider_stats("p", ALL_TIME).avg_latency == 30
    assert store.get_routing_accuracy(ALL_TIME).total_requests == len(everything)

    report = store.maintain()
    assert report.indexes_built == ("idx_telemetry_tier",)
    assert report.rows_deleted == 3
    assert store.cleanup(timedelta(days=30)) == 2
    assert set(names_of(engine)) == {"r0", "r1", "newer", "many"}

    health = looked(store)
    assert (health.revision, health.head, health.reachable) == (ADDITIVE, HEAD, True), health
    assert adds_up(health)
    assert (health.written, health.pending) == (len(ages), 0)
    assert (health.faults_by, health.last_error) == ({}, None)
    with engine.connect() as connection:
        row = connection.execute(
            text("SELECT region, priority FROM routing_telemetry WHERE request_id = 'newer'")
        ).one()
        assert row == ("north", 1)
        assert connection.execute(text("SELECT * FROM provider_prices")).all() == [("p", 1, 0.5)]
    indexes = {index["name"] for index in inspect(engine).get_indexes("provider_prices")}
    assert indexes == {"ix_provider_prices_provider"}


def test_a_read_only_store_reads_a_schema_that_a_newer_release_added_to(url, newer):
    with Store(url) as store:
        store.record(provider="p", finish_reason="stop")
        assert store.flush(30)
    newer.upgrade(url, ADDITIVE)
    with Store(url, read_only=True) as store:
        assert store.missing_columns == ()
        assert [row.finish_reason for row in store.query()] == ["stop"]
        assert store.get_stats(ALL_TIME).total_requests == 1


def command(monkeypatch, capsys, *arguments):
    """The exit code of ``lynkr-store``, and all it printed."""
    monkeypatch.setattr(sys, "argv", ["lynkr-store", *arguments])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    said = capsys.readouterr()
    return ended.value.code or 0, said.out + said.err


def alembic(capsys, url, *arguments):
    """The exit code of ``alembic`` in a checkout, and all it printed."""
    code = 0

    def show(_, words, *values):  # its own writes to what was standard output at its import
        print(str(words) % values if values else words)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Config, "print_stdout", show)
            alembic_main(["-c", str(ROOT / "alembic.ini"), "-x", f"url={url}", *arguments])
    except SystemExit as ended:
        code = ended.code
    except Exception as error:  # noqa: BLE001 - a program would end with a traceback
        return 1, str(error)
    said = capsys.readouterr()
    return code, said.out + said.err


def test_an_upgrade_by_the_older_release_changes_nothing(url, engine, newer, monkeypatch, capsys):
    newer.upgrade(url, ADDITIVE)
    before = everything_of(engine)
    is_file = engine.dialect.name == "sqlite"
    assert upgrade(engine) is None
    assert upgrade(url, HEAD, backup=is_file) is None
    assert upgrade(engine, "0003") is None
    code, said = command(monkeypatch, capsys, "upgrade", "--url", url)
    assert (code, said) == (0, f"at revision {ADDITIVE}\n")
    if is_file:
        code, said = command(monkeypatch, capsys, "upgrade", "head", "--backup", "--url", url)
        no_copy = "no copy: there was nothing to change"
        assert (code, said) == (0, f"{no_copy}\nat revision {ADDITIVE}\n")
    code, said = alembic(capsys, url, "upgrade", "head")
    assert (code, said) == (0, f"{LEFT_ALONE}\n")
    assert everything_of(engine) == before
    if is_file:
        beside = {
            path.name.partition("-")[0] for path in Path(engine.url.database).parent.iterdir()
        }
        assert beside == {"telemetry.db"}, "no copy was made"


LEFT_ALONE = (
    f"the schema's revision {ADDITIVE} belongs to a newer release; this release (head {HEAD}) can "
    "work with it and does not change it"
)
ALEMBIC = [
    ["upgrade", "heads"],
    ["upgrade", "+1"],
    ["upgrade", "+0"],
    ["upgrade", "0003"],
    ["upgrade", ADDITIVE],
    ["stamp", "head"],
    ["stamp", "heads"],
    ["stamp", "--purge", "head"],
    ["current"],
    ["current", "--verbose"],
    ["current", "--check-heads"],
    ["check"],
    ["history", "--indicate-current"],
    ["history", "-r", "base:head"],
]
NO_DATABASE = ["heads"], ["branches"], ["show", "head"], ["history"]


@pytest.mark.slow
def test_every_command_of_alembic_leaves_a_schema_that_a_newer_release_added_to_alone(
    url, engine, newer, capsys
):
    for arguments in (*ALEMBIC, *NO_DATABASE):
        code, said = alembic(capsys, url, *arguments)
        assert LEFT_ALONE not in said
        if arguments[0] != "upgrade":  # at head each of them goes well
            assert code == 0, (arguments, said)
    newer.upgrade(url, ADDITIVE)
    before = everything_of(engine)
    for arguments in ALEMBIC:
        code, said = alembic(capsys, url, *arguments)
        if "-r" not in arguments:
            assert LEFT_ALONE in said, arguments
        assert code == 0, (arguments, said)
        assert everything_of(engine) == before
    for arguments in NO_DATABASE:
        assert alembic(capsys, url, *arguments)[0] == 0
    assert "No new upgrade operations" in alembic(capsys, url, "check")[1]
    newer.upgrade(url, RENAMING)
    for arguments in ALEMBIC:
        code, said = alembic(capsys, url, *arguments)
        if "-r" not in arguments:
            assert code != 0 and f"lynkr-store {RELEASE} or newer" in said, arguments


@pytest.mark.parametrize("revision", ["heads", "+1", "0003", ADDITIVE])
def test_the_command_and_code_leave_it_alone_by_whatever_name(
    url, engine, newer, monkeypatch, capsys, revision
):
    newer.upgrade(url, ADDITIVE)
    before = everything_of(engine)
    code, said = command(monkeypatch, capsys, "upgrade", revision, "--url", url)
    assert (code, said) == (0, f"at revision {ADDITIVE}\n")
    assert upgrade(url, revision, backup=engine.dialect.name == "sqlite") is None
    assert everything_of(engine) == before


def test_the_older_release_takes_nothing_back_of_a_newer_schema(
    url, engine, newer, monkeypatch, capsys
):
    newer.upgrade(url, ADDITIVE)
    before = everything_of(engine)
    remedy = "downgrade it with the release that made it"
    for revision in (BEFORE_HEAD, HEAD, "base"):
        with pytest.raises(SchemaAhead, match=f"revision {ADDITIVE} is newer .*{remedy}"):
            downgrade(engine, revision, drop_data=True)
    code, said = command(monkeypatch, capsys, "downgrade", BEFORE_HEAD, "--url", url)
    assert code == 1 and remedy in said
    code, said = alembic(capsys, url, "downgrade", "-1")
    assert code != 0 and ADDITIVE in said
    assert everything_of(engine) == before


def test_an_older_replica_that_starts_while_a_newer_one_upgrades_waits_and_then_works(
    empty_url, empty_engine, newer
):
    upgrade(empty_engine, BEFORE_HEAD)
    tried = threading.Event()

    def notice(*arguments):
        if "pg_try_advisory_xact_lock" in arguments[2] or arguments[2] == "BEGIN IMMEDIATE":
            tried.set()

    def start():
        settings = StoreSettings(url=empty_url, upgrade_on_open=True)
        with Store(settings=settings) as store:
            assert store.query() == []
            store.record(provider="p", request_id="older")
            assert store.flush(30)
            return store.health()

    event.listen(Engine, "before_cursor_execute", notice)
    try:
        with ThreadPoolExecutor(1) as pool:
            with newer.upgrading(empty_url, ADDITIVE):
                replica: Future = pool.submit(start)
                assert tried.wait(30)
                assert not replica.done()
            health = replica.result(60)
    finally:
        event.remove(Engine, "before_cursor_execute", notice)
    assert (health.written, health.faults_by) == (1, {})
    assert names_of(empty_engine) == ["older"]
    assert revision_of(empty_engine) == ADDITIVE


def test_an_older_upgrade_that_waited_for_a_newer_one_leaves_it_as_it_is(
    empty_url, empty_engine, newer
):
    upgrade(empty_engine, BEFORE_HEAD)
    with ThreadPoolExecutor(1) as pool:
        with newer.upgrading(empty_url, ADDITIVE):
            older = pool.submit(upgrade, empty_url)
        older.result(60)
    assert revision_of(empty_engine) == ADDITIVE
    assert notes_of(empty_engine)[ADDITIVE] == [1, HEAD, RELEASE]


# -- what is not rolling --------------------------------------------------------------------------

READS = {
    "query": lambda store: store.query(),
    "iter_records": lambda store: list(store.iter_records()),
    "get_stats": lambda store: store.get_stats(),
    "get_provider_stats": lambda store: store.get_provider_stats("p"),
    "get_routing_accuracy": lambda store: store.get_routing_accuracy(),
    "add_many": lambda store: store.add_many([{"provider": "p"}]),
    "cleanup": lambda store: store.cleanup(timedelta(0)),
    "maintain": lambda store: store.maintain(),
}


# what is not rolling may be the last revision, or lie below one that is
PAIRS = [("sync", RENAMING), ("async", ADDITIVE_AGAIN)]


def record(store, prefix, number=20):
    names = [f"{prefix}-{n}" for n in range(number)]
    for name in names:
        assert store.record(provider="p", request_id=name, finish_reason="stop")
    return names


@pytest.mark.usefixtures("_quick_retries")
def test_records_that_a_newer_release_s_rule_refuses_wait_and_are_not_rejected(
    open_store, url, engine
):
    store = open_store()
    expected = record(store, "before")
    assert store.flush(30)
    with engine.begin() as connection:  # as a revision that makes a column compulsory would
        connection.execute(
            text("CREATE UNIQUE INDEX rule ON routing_telemetry (provider) WHERE id > 1000000")
        )
        connection.execute(text("UPDATE lynkr_store_alembic_version SET version_num = '9998'"))
        note = {"revision": "9998", "rolling": 0, "after": HEAD, "release": RELEASE}
        connection.execute(NOTES.insert().values(note))
        connection.execute(
            TELEMETRY.insert().values(
                id=1_000_001, request_id="theirs", timestamp=1_750_000_000_000, provider="p"
            )
        )
        if not url.startswith("sqlite"):
            move = text("ALTER TABLE routing_telemetry ALTER id RESTART WITH 1000002")
            connection.execute(move)
    expected += record(store, "refused")
    assert not store.flush(0.5)
    health = looked(store)
    assert (health.rejected, health.pending) == (0, 20)
    assert health.faults_by["SchemaAhead"] > 0
    with engine.begin() as connection:
        connection.execute(text("DROP INDEX rule"))
        back = text(f"UPDATE lynkr_store_alembic_version SET version_num = '{HEAD}'")
        connection.execute(back)
    assert store.flush(30)
    assert sorted(names_of(engine)) == sorted([*expected, "theirs"])
    assert adds_up(looked(store))


@pytest.mark.usefixtures("_quick_retries")
@pytest.mark.parametrize(("open_store", "to"), PAIRS, indirect=["open_store"])
def test_records_wait_until_the_newer_release_takes_back_what_is_in_their_way(
    open_store, url, engine, newer, to
):
    store = open_store(batch_max_rows=7)
    expected = record(store, "before")
    assert store.flush(30)
    newer.upgrade(url, to)
    waiting = record(store, "during")
    words = f"SchemaAhead: the schema's revision {to} {THE_NEWER}"
    eventually(lambda: store.health().last_error == words)
    assert not store.flush(0.1)
    health = looked(store)
    assert adds_up(health)
    assert (health.written, health.pending) == (len(expected), len(waiting))
    assert (health.rejected, health.dropped) == (0, 0)
    assert (health.revision, health.head) == (to, HEAD)
    for read in READS.values():
        with pytest.raises(SchemaAhead, match=f"lynkr-store {RELEASE} or newer"):
            read(store)
    newer.downgrade(url, ADDITIVE)
    assert store.flush(60)
    expected += waiting + record(store, "after")
    newer.downgrade(url, HEAD)
    expected += record(store, "at last")
    assert store.flush(60)
    assert names_of(engine) == expected
    assert len(store.query(RoutingFilter(provider="p"), limit=200)) == len(expected)
    health = store.health()
    assert adds_up(health)
    assert health.submitted == health.written == len(expected)


@pytest.mark.usefixtures("_quick_retries")
@pytest.mark.parametrize("open_store", ["async"], indirect=True)
def test_what_waits_when_the_older_store_closes_is_counted(open_store, url, engine, newer):
    store = open_store()
    expected = record(store, "before")
    assert store.flush(30)
    newer.upgrade(url, RENAMING)
    lost = record(store, "lost")
    eventually(lambda: store.health().faults_by.get("SchemaAhead", 0) >= 2)
    store.close(0.2)
    health = store.health()
    assert adds_up(health)
    assert (health.written, health.dropped, health.pending) == (len(expected), len(lost), 0)
    assert names_of(engine) == expected


@pytest.mark.usefixtures("_quick_retries")
@pytest.mark.parametrize("open_store", ["sync"], indirect=True)
def test_records_wait_in_the_spool_and_the_next_process_writes_them(
    open_store, url, engine, newer, tmp_path
):
    options = {"spool_path": tmp_path / "spool.db", "spool_after_s": 0}
    store = open_store(**options)
    expected = record(store, "before")
    assert store.flush(30)
    newer.upgrade(url, ADDITIVE_AGAIN)
    expected += record(store, "during")
    eventually(lambda: store.health().spooled == 20)
    store.close(5)
    assert adds_up(store.health())
    assert store.health().spooled == 20
    newer.downgrade(url, ADDITIVE)
    store = open_store(**options)
    eventually(lambda: store.health().written == 20)
    assert adds_up(store.health())
    assert (store.health().recovered, store.health().spooled) == (20, 0)
    assert names_of(engine) == expected


@pytest.mark.parametrize(("open_store", "to"), PAIRS, indirect=["open_store"])
def test_a_store_that_is_opened_again_names_the_release_to_install(open_store, url, newer, to):
    newer.upgrade(url, to)
    for options in ({}, {"upgrade_on_open": True}):
        store = open_store(**options)
        for read in READS.values():
            with pytest.raises(SchemaAhead) as said:
                read(store)
            assert str(said.value) == f"the schema's revision {to} {THE_NEWER}"
    newer.downgrade(url, ADDITIVE)
    for read in READS.values():
        read(store)


def test_reads_of_a_running_store_name_the_release_to_install(open_store, url, newer):
    store = open_store()
    assert store.query() == []
    newer.upgrade(url, RENAMING)
    with pytest.raises(SchemaAhead, match=f"{RELEASE} or newer"):
        store.query()


def test_a_read_only_store_names_the_release_to_install(url, newer):
    with Store(url) as store:
        store.record(provider="p", finish_reason="stop")
        assert store.flush(30)
    newer.upgrade(url, RENAMING)
    with Store(url, read_only=True) as store, pytest.raises(SchemaAhead, match=RELEASE):
        store.query()


def test_the_older_release_neither_upgrades_nor_downgrades_what_it_cannot_work_with(
    url, engine, newer, monkeypatch, capsys
):
    newer.upgrade(url, ADDITIVE_AGAIN)
    before = everything_of(engine)
    words = f"the schema's revision {ADDITIVE_AGAIN} {THE_NEWER}"
    for body in (
        lambda: upgrade(engine),
        lambda: upgrade(url, backup=engine.dialect.name == "sqlite"),
        lambda: downgrade(engine, HEAD),
        lambda: downgrade(engine, "base", drop_data=True),
    ):
        with pytest.raises(SchemaAhead) as said:
            body()
        assert str(said.value) == words
    for arguments in (
        ["upgrade"],
        ["downgrade", "base", "--drop-data"],
        ["cleanup", "--older-than", "1d"],
        ["maintain"],
    ):
        code, said = command(monkeypatch, capsys, *arguments, "--url", url)
        assert code == 1 and words in said
    assert everything_of(engine) == before


# -- what is not noted ----------------------------------------------------------------------------


def check_that_it_is_refused(url, engine):
    words = f"the schema's revision {ADDITIVE} {A_NEWER}"
    with opened_store("sync", url, None) as store:
        with pytest.raises(SchemaAhead) as said:
            store.query()
        assert str(said.value) == words
        waiting = record(store, "r")
        eventually(lambda: store.health().last_error == f"SchemaAhead: {words}")
        assert store.health().pending == len(waiting)
        store.close(0)
    for body in (upgrade, lambda engine: downgrade(engine, HEAD)):
        with pytest.raises(SchemaAhead) as said:
            body(engine)
        assert str(said.value) == words


def check_that_it_is_accepted(url):
    with Store(url) as store:
        assert store.query() == []


def test_a_revision_of_a_release_that_writes_no_notes_is_refused(url, engine, newer):
    newer.upgrade(url, ADDITIVE, notes=False)
    assert notes_of(engine).keys() == NOTED.keys()
    check_that_it_is_refused(url, engine)
    newer.downgrade(url, HEAD)
    newer.upgrade(url, ADDITIVE)
    check_that_it_is_accepted(url)


def test_a_revision_that_was_only_stamped_is_refused(url, engine, newer):
    newer.stamp(url, ADDITIVE)
    check_that_it_is_refused(url, engine)
    newer.stamp(url, HEAD)
    check_that_it_is_accepted(url)


def test_a_revision_whose_note_was_lost_is_refused(url, engine, newer):
    newer.upgrade(url, ADDITIVE)
    check_that_it_is_accepted(url)
    execute(engine, f"DELETE FROM {NOTES.name}")
    check_that_it_is_refused(url, engine)
    execute(engine, f"DROP TABLE {NOTES.name}")
    check_that_it_is_refused(url, engine)


def test_a_noted_revision_above_one_without_a_note_is_refused(url, newer):
    newer.upgrade(url, RENAMING, notes=False)
    newer.upgrade(url, ADDITIVE_AGAIN)
    with Store(url) as store, pytest.raises(SchemaAhead):
        store.get_stats()


# -- what is behind -------------------------------------------------------------------------------


def test_a_schema_that_is_behind_names_the_command(empty_url, empty_engine, monkeypatch, capsys):
    for at, stands in ((None, "has no revision"), (BEFORE_HEAD, f"is at revision {BEFORE_HEAD}")):
        if at:
            upgrade(empty_engine, at)
        words = f"the schema {stands}, this release needs {HEAD}: run lynkr-store upgrade"
        with asyncio.Runner() as runner:
            for kind in ("sync", "async"):
                store = opened_store(kind, empty_url, runner, upgrade_on_open=False)
                for read in READS.values():
                    with pytest.raises(SchemaBehind) as said:
                        read(store)
                    assert str(said.value) == words
                store.close()
        code, said = command(monkeypatch, capsys, "maintain", "--url", empty_url)
        assert code == 1 and words in said
    code, said = command(monkeypatch, capsys, "upgrade", "--url", empty_url)
    assert (code, said) == (0, f"at revision {HEAD}\n")
    assert command(monkeypatch, capsys, "maintain", "--url", empty_url)[0] == 0


# -- what `check` says ----------------------------------------------------------------------------


def test_check_of_a_schema_that_a_newer_release_added_to_sends_nobody_to_upgrade_it(
    url, newer, monkeypatch, capsys
):
    newer.upgrade(url, ADDITIVE)
    _, said = command(monkeypatch, capsys, "check", "--url", url)
    assert ADDITIVE in said and HEAD in said
    assert "run lynkr-store upgrade" not in said


def test_check_of_a_schema_that_is_ahead_says_no_and_names_the_release(
    url, newer, monkeypatch, capsys
):
    newer.upgrade(url, RENAMING)
    code, said = command(monkeypatch, capsys, "check", "--url", url)
    assert code == 1
    assert RENAMING in said and HEAD in said
    assert f"lynkr-store {RELEASE} or newer" in said


# -- the notes ------------------------------------------------------------------------------------


def test_an_upgrade_from_nothing_notes_every_revision_since_there_are_notes(empty_engine):
    for step in LINE:
        upgrade(empty_engine, step.revision)
        there = {r: list(note) for r, note in NOTED.items() if r <= step.revision}
        assert notes_of(empty_engine) == (there or None)
    assert set(NOTED) == {step.revision for step in LINE if step.revision >= "0007"}
    downgrade(empty_engine, "base")
    upgrade(empty_engine)
    assert notes_of(empty_engine) == {r: list(note) for r, note in NOTED.items()}


def test_no_note_is_left_below_the_revision_that_creates_their_table(empty_engine):
    for to in ("0006", "0001", "base"):
        upgrade(empty_engine)
        downgrade(empty_engine, to)
        assert notes_of(empty_engine) is None


def test_notes_go_with_their_revisions(url, engine, newer):
    own = {r: list(note) for r, note in NOTED.items()}
    theirs = {
        ADDITIVE: [1, HEAD, RELEASE],
        RENAMING: [0, ADDITIVE, RELEASE],
        ADDITIVE_AGAIN: [1, RENAMING, RELEASE],
    }
    newer.upgrade(url, ADDITIVE_AGAIN)
    assert notes_of(engine) == own | theirs
    for taken, to in ((ADDITIVE_AGAIN, RENAMING), (RENAMING, ADDITIVE), (ADDITIVE, HEAD)):
        newer.downgrade(url, to)
        del theirs[taken]
        assert notes_of(engine) == own | theirs
    assert downgrade(engine, BEFORE_HEAD) is None
    assert revision_of(engine) == BEFORE_HEAD


def test_a_note_names_the_release_that_applied_the_revision_last(url, engine, newer):
    newer.downgrade(url, BEFORE_HEAD)
    newer.upgrade(url, ADDITIVE)
    assert notes_of(engine)[HEAD] == [*NOTED[HEAD][:-1], RELEASE]
    newer.downgrade(url, HEAD)
    downgrade(engine, BEFORE_HEAD)
    upgrade(engine)
    assert notes_of(engine)[HEAD] == list(NOTED[HEAD])


def test_a_newer_release_that_makes_the_database_notes_itself(empty_url, empty_engine, newer):
    newer.upgrade(empty_url, ADDITIVE)
    noted = notes_of(empty_engine)
    assert set(noted) == {*NOTED, ADDITIVE}
    assert {release for *_, release in noted.values()} == {RELEASE}
    with Store(empty_url) as store:
        assert store.query() == []


def test_a_script_writes_the_notes(empty_url, empty_engine):
    script = StringIO()
    write_script(empty_url, "head", script)
    assert script.getvalue().count(f"INSERT INTO {NOTES.name}") == len(NOTED)
    with empty_engine.connect():
        pass  # makes the directory of a file
    run_script(empty_url, script.getvalue())
    assert notes_of(empty_engine) == {r: list(note) for r, note in NOTED.items()}
    with Store(empty_url) as store:
        assert store.query() == []


def test_a_newer_releases_script_leaves_the_same_notes_as_its_upgrade(url, engine, newer):
    with Store(url) as store:
        expected = record(store, "before")
        assert store.flush(30)
    run_script(url, newer.script(url, f"{HEAD}:{ADDITIVE}"))
    noted = notes_of(engine)
    assert noted[ADDITIVE] == [1, HEAD, RELEASE]
    with Store(url) as store:
        expected += record(store, "after")
        assert store.flush(30)
        assert len(store.query()) == len(expected)
    run_script(url, newer.script(url, f"{ADDITIVE}:{ADDITIVE_AGAIN}"))
    with Store(url) as store, pytest.raises(SchemaAhead, match=f"{RELEASE} or newer"):
        store.query()
    run_script(url, newer.script(url, f"{ADDITIVE_AGAIN}:{ADDITIVE}", down=True))
    assert notes_of(engine) == noted
    with Store(url) as store:
        assert len(store.query()) == len(expected)
    assert names_of(engine) == expected


def test_a_database_from_before_the_notes_is_upgraded_with_its_rows(empty_url, empty_engine):
    upgrade(empty_engine, "0006")
    with EarlierRelease(empty_url) as earlier:
        write = earlier.writer("before")
        for _ in range(40):
            write()
        upgrade(empty_engine)
        assert notes_of(empty_engine) == {r: list(note) for r, note in NOTED.items()}
        earlier.check_that_all_is_there()
    with Store(empty_url) as store:
        assert len(store.query()) == 40
