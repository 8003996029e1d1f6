"""Several upgrade one database at once: one does the work, the others wait, and no one for ever."""

import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import psycopg
import pytest
from sqlalchemy import create_engine, event, make_url, text

from lynkr_store import AdoptionRefused, UpgradeTimeout, create_store_engine
from lynkr_store.db.models import INDEXES
from lynkr_store.maintenance.indexes import build_missing_indexes
from lynkr_store.migrate import comparison, revisions
from lynkr_store.migrate import upgrade as migrate
from lynkr_store.migrate.lock import ADVISORY_LOCK, exclusively
from tests.conftest import ON_DISK, POSTGRES
from tests.support.recorded import OWN_INDEXES, ROOT, gateway_file, insert_rows
from tests.support.stores import eventually
from tests.support.upgrading import WAYS, launch, run, snapshot

pytestmark = pytest.mark.sample(5)

REVISIONS = sorted(path.name[:4] for path in (ROOT / "migrations" / "versions").glob("0*.py"))
ROWS = [
    {"request_id": f"r{n}", "timestamp": 1_750_000_000_000 + n, "provider": "p"} for n in range(50)
]
TEN = [way for way in WAYS for _ in range(3)][:10]
TELEMETRYS = {i.name for i in INDEXES if i.table.name == "routing_telemetry"}
WAIT_S = 30.0
FREED_S = 30.0  # within which those who wait are done when the one at work was killed
SLACK_S = 15.0  # of a busy machine; an upgrade waits for 60 s by itself
BUSY_S = 3.0  # for which SQLite's driver waits in one try
HELD_UP_S = 2.0  # for which another's INSERT may wait: a lock's timeout, and what it takes itself

each_backend = pytest.mark.parametrize("backend", ON_DISK)


# -- what the tests share -------------------------------------------------------------------------


def connected(url):
    return psycopg.connect(url, autocommit=True)


def path_of(url):
    return make_url(url).database


@contextmanager
def engine_of(url):
    engine = create_store_engine(url)
    yield engine
    engine.dispose()


def fill(url):
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(path_of(url))) as connection, connection:
            insert_rows(connection, ROWS)
        return
    with connected(url) as connection, connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO routing_telemetry (request_id, timestamp, provider) "
            "VALUES (%(request_id)s, %(timestamp)s, %(provider)s)",
            ROWS,
        )


def at_0003(url):
    """Half-way up, with rows."""
    with engine_of(url) as engine:
        migrate.upgrade(engine, "0003")
    fill(url)
    return url


def without_indexes(url):
    """At head, with rows; what an upgrade of a table with rows leaves to `maintain()`."""
    with engine_of(url) as engine:
        migrate.upgrade(engine)
    fill(url)
    with connected(url) as connection:
        for index in INDEXES:
            if index.table.name == "routing_telemetry":
                connection.execute(f"DROP INDEX {index.name}")
    return url


def rows(url):
    with engine_of(url) as engine, engine.connect() as connection:
        return connection.execute(
            text("SELECT id, request_id, timestamp, provider FROM routing_telemetry ORDER BY id")
        ).all()


def check_head(url):
    with engine_of(url) as engine, engine.connect() as connection:
        assert revisions.current(connection) == revisions.head()
        assert comparison.drift(connection) == []
        assert {*comparison.missing_indexes(connection)} <= {
            *OWN_INDEXES
        }  # those of a table with rows


def turns_taken(connection):
    """Backends that have the turn to migrate this database."""
    taken = connection.execute(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND database = "
        "(SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return [pid for (pid,) in taken]


def active(connection, statement):
    """Other backends of this database that are at such a statement."""
    found = connection.execute(
        "SELECT pid, wait_event_type FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND state = 'active' AND query LIKE %s",
        [statement],
    )
    return dict(found.fetchall())


def waiting(connection, statement="%"):
    """Those of them that wait for a lock, or for who holds one."""
    return [pid for pid, waits_for in active(connection, statement).items() if waits_for == "Lock"]


def until_somebody_waits(connection, how_many=1):
    """For a lock; or for so long that whoever waits does it without one."""
    deadline = time.monotonic() + 1.0
    eventually(lambda: len(waiting(connection)) >= how_many or time.monotonic() > deadline)


STARTS = [
    ("sqlite-file", "nothing"),
    ("sqlite-file", "a gateway's file"),
    *((backend, start) for backend in POSTGRES for start in ("nothing", "0003")),
]
each_start = pytest.mark.parametrize(
    ("backend", "start"), STARTS, ids=[" from ".join(each) for each in STARTS]
)


@pytest.fixture
def begun(new_url, tmp_path):
    """Make a database that stands somewhere; its URL, and the revisions that are to come."""

    def make(backend, start):
        if start == "a gateway's file":
            path = gateway_file(tmp_path / "gateway" / "telemetry.db", 0, rows=ROWS)
            return f"sqlite:///{path}", REVISIONS
        url = new_url(backend)
        if start == "0003":
            return at_0003(url), REVISIONS[3:]
        return url, REVISIONS

    return make


# -- many at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "start"),
    # ten commands, from each start, are among the slow ones
    [each for each in STARTS if each[0] in ("sqlite-file", POSTGRES[-1])],
)
def test_ten_processes_at_once_apply_each_revision_once(begun, backend, start):
    url, to_come = begun(backend, start)
    before = [] if start == "nothing" else rows(url)
    *said, ended = run("pack", {"url": url, "ways": TEN}, 120)
    assert ended["statuses"] == [0] * 10
    applied = [revision for one in said for revision in one.get("applied", [])]
    assert sum("applied" in one for one in said) == 10
    assert Counter(applied) == Counter(to_come), "each once, whoever did it"
    check_head(url)
    assert rows(url) == before


def upgraded_by_commands(url, ways):
    with ExitStack() as stack:
        programs = [stack.enter_context(launch("upgrader", url=url, way=way)) for way in ways]
        for program in programs:
            program.heard_of("ready")
        for program in programs:
            program.tell()
        return Counter(revision for program in programs for revision in program.heard_of("applied"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", [ON_DISK[0], POSTGRES[-1]])
def test_commands_and_code_at_once_apply_each_revision_once(new_url, backend):
    url = new_url(backend)
    assert upgraded_by_commands(url, WAYS) == Counter(REVISIONS)
    check_head(url)


@pytest.mark.slow
@each_start
def test_ten_commands_at_once_apply_each_revision_once(begun, backend, start):
    url, to_come = begun(backend, start)
    before = [] if start == "nothing" else rows(url)
    assert upgraded_by_commands(url, TEN) == Counter(to_come)
    check_head(url)
    assert rows(url) == before


# -- whoever is at work may die -------------------------------------------------------------------


@pytest.mark.slow
@each_backend
@pytest.mark.parametrize(
    "moment",
    ["CREATE TABLE savings_events", pytest.param("COMMIT", marks=pytest.mark.slow)],
)
def test_killing_the_migrating_process_frees_the_waiting_ones(new_url, backend, moment):
    url = at_0003(new_url(backend))
    before = rows(url)
    with launch("upgrader", url=url, way="code", pause_at=moment) as at_work:
        at_work.tell()
        at_work.heard_of("paused")
        with launch("pack", url=url, ways=["alembic", "command", "code"]) as others:
            for _ in range(3):
                others.heard_of("trying")
            at_work.kill()
            killed = time.monotonic()
            assert others.heard_of("statuses") == [0, 0, 0]
            assert time.monotonic() - killed < FREED_S
    check_head(url)
    assert rows(url) == before


@pytest.mark.slow
def test_killing_one_that_waits_for_a_table_frees_the_others(postgres_url):
    at_0003(postgres_url)
    with connected(postgres_url) as looking, reading(postgres_url) as reader:
        with launch("upgrader", url=postgres_url, way="code") as at_work:
            at_work.tell()
            eventually(lambda: waiting(looking, "ALTER TABLE%"))
            at_work.kill()
        with launch("pack", url=postgres_url, ways=["alembic", "command", "code"]) as others:
            for _ in range(3):
                others.heard_of("trying")
            reader.rollback()
            freed = time.monotonic()
            assert others.heard_of("statuses") == [0, 0, 0]
            assert time.monotonic() - freed < FREED_S
    check_head(postgres_url)


SLOW_COMMIT = """
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    WHILE NOT pg_try_advisory_xact_lock_shared(1) LOOP
        PERFORM pg_sleep(0.01);
    END LOOP;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER wait AFTER UPDATE ON lynkr_store_alembic_version
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait();
"""


@pytest.mark.slow
def test_an_upgrade_meets_the_commit_of_one_that_was_killed_in_it(postgres_url):
    """The server goes on with a COMMIT whose client is gone, and its turn is gone with it."""
    at_0003(postgres_url)
    with (
        connected(postgres_url) as looking,
        launch("upgrader", url=postgres_url, way="code") as killed,
        launch("upgrader", url=postgres_url, way="code") as after,
    ):
        looking.execute("SELECT pg_advisory_lock(1)")
        looking.execute(SLOW_COMMIT)
        after.heard_of("ready")
        killed.tell()
        eventually(lambda: active(looking, "COMMIT"))
        killed.kill()
        after.tell()
        after.heard_of("trying")
        until_somebody_waits(looking)
        looking.execute("SELECT pg_advisory_unlock(1)")
        assert after.heard_of("applied") == [], "it found the work done"
    check_head(postgres_url)


@pytest.mark.slow
def test_an_upgrade_whose_session_was_terminated_and_the_next_one_both_succeed(postgres_url):
    """An administrator ends idle sessions, or a network forgets them."""
    at_0003(postgres_url)
    with (
        connected(postgres_url) as looking,
        launch("upgrader", url=postgres_url, way="code", pause_at="COMMIT") as one,
        launch("upgrader", url=postgres_url, way="code") as other,
    ):
        other.heard_of("ready")
        one.tell()
        one.heard_of("paused")
        looking.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND state = 'idle'"
        )
        other.tell()
        other.heard_of("trying")
        until_somebody_waits(looking)
        one.tell()
        assert one.heard_of("applied") == REVISIONS[3:]
        assert other.heard_of("applied") == []
    check_head(postgres_url)


# -- a wait has an end ----------------------------------------------------------------------------


@contextmanager
def reading(url):
    """A transaction that has read the table: ALTER TABLE waits for its end."""
    with psycopg.connect(url) as reader:
        reader.execute("SELECT count(*) FROM routing_telemetry")
        yield reader


@contextmanager
def migrating(url):
    """A session that has the turn to migrate."""
    with connected(url) as holder:
        holder.execute("SELECT pg_advisory_lock(%s)", [ADVISORY_LOCK])
        yield holder


@contextmanager
def writing(url):
    """Another writer of the file, in the middle of a transaction."""
    with closing(sqlite3.connect(path_of(url), isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        yield writer


@contextmanager
def reading_in_rollback_mode(url):
    """A reader of a gateway's file that is not in WAL mode, where a COMMIT waits for readers."""
    with closing(sqlite3.connect(path_of(url), isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM routing_telemetry").fetchall()
        yield reader


LOCKED = "another connection holds the file's write lock"
USED = "another session uses the store's tables"
RUNNING = "another migration of this database is running"
OBSTACLES = [
    ("sqlite-file", "0003", writing, LOCKED),
    ("sqlite-file", "a gateway's file", reading_in_rollback_mode, LOCKED),
    *((backend, "0003", reading, USED) for backend in POSTGRES),
    *((backend, "0003", migrating, RUNNING) for backend in POSTGRES),
]
each_obstacle = pytest.mark.parametrize(
    ("backend", "start", "obstacle", "said"),
    OBSTACLES,
    ids=[f"{backend} {obstacle.__name__}" for backend, _, obstacle, _ in OBSTACLES],
)


@pytest.mark.slow
@each_obstacle
def test_a_wait_has_an_end_and_nothing_was_changed(begun, backend, start, obstacle, said):
    url, _ = begun(backend, start)
    with obstacle(url) as holder, engine_of(url) as engine:
        before = snapshot(url)
        began = time.monotonic()
        with pytest.raises(UpgradeTimeout, match="nothing was changed") as raised:
            migrate.upgrade(engine, wait_s=0.5)
        assert time.monotonic() - began < 0.5 + BUSY_S + SLACK_S
        assert said in str(raised.value)
        if obstacle is migrating:
            assert f"pid is {holder.info.backend_pid})" in str(raised.value)
        assert snapshot(url) == before
        holder.close()
        migrate.upgrade(engine, wait_s=WAIT_S)
    check_head(url)
    assert len(rows(url)) == len(ROWS)


@each_obstacle
@pytest.mark.parametrize("way", [pytest.param("code", marks=pytest.mark.slow), "alembic"])
def test_an_upgrade_that_waits_succeeds_when_the_way_is_free(
    begun, backend, start, obstacle, said, way
):
    url, to_come = begun(backend, start)
    with obstacle(url) as holder, launch("upgrader", url=url, way=way) as upgrader:
        upgrader.tell()
        upgrader.heard_of("trying")
        if obstacle is reading:
            tried = set()
            with connected(url) as looking:
                # each try is a session's of its own
                eventually(lambda: tried.update(waiting(looking, "ALTER%")) or len(tried) >= 2)
        holder.close()
        assert upgrader.heard_of("applied") == to_come
    check_head(url)


def test_the_holder_that_is_named_is_one_of_this_database(new_url, server_of):
    """Each database of a server has a lock of this key, and all of them stand in one list."""
    url, *others = (new_url(POSTGRES[-1]) for _ in range(7))
    with ExitStack() as stack:
        for other in others:
            stack.enter_context(migrating(other))
        holder = stack.enter_context(migrating(url))
        engine = stack.enter_context(engine_of(url))
        with pytest.raises(UpgradeTimeout, match=f"pid is {holder.info.backend_pid}\\)"):
            migrate.upgrade(engine, wait_s=0)


@pytest.mark.slow
def test_writers_are_hardly_delayed_while_an_upgrade_is_retried(postgres_url):
    at_0003(postgres_url)
    held_up, over = [], threading.Event()

    def insert():
        with connected(postgres_url) as writer:
            while not over.is_set():
                began = time.monotonic()
                writer.execute(
                    "INSERT INTO routing_telemetry (request_id, timestamp, provider) "
                    "VALUES ('w', 1, 'p')"
                )
                held_up.append(time.monotonic() - began)

    tries = []
    with reading(postgres_url), engine_of(postgres_url) as engine, ThreadPoolExecutor() as threads:
        event.listen(
            engine,
            "before_cursor_execute",
            lambda *given: tries.append(given[2]) if given[2].startswith("ALTER") else None,
        )
        writer = threads.submit(insert)
        try:
            with pytest.raises(UpgradeTimeout):
                migrate.upgrade(engine, wait_s=2.0)
        finally:
            over.set()
        writer.result()
    assert len(tries) >= 2
    assert len(held_up) > 2 * len(tries), "they got in between"
    assert max(held_up) < HELD_UP_S


# -- nothing is left behind -----------------------------------------------------------------------


@pytest.fixture
def host(postgres_url):
    """A host's engine with one connection, which has settings of its own."""
    engine = create_engine(
        make_url(postgres_url).set(drivername="postgresql+psycopg"),
        pool_size=1,
        max_overflow=0,
        pool_timeout=5,
        connect_args={"options": "-c lock_timeout=1234 -c statement_timeout=56789"},
    )
    yield engine
    engine.dispose()


def settings(engine):
    with engine.connect() as connection:
        names = ("lock_timeout", "statement_timeout", "idle_session_timeout", "search_path")
        return [connection.scalar(text(f"SHOW {name}")) for name in names]


def fail(connection):
    connection.exec_driver_sql("CREATE TABLE half (id INTEGER)")
    raise RuntimeError("half-way")


ENDS = {
    "done": (migrate.upgrade, None),
    "nothing to do": (lambda engine: [migrate.upgrade(engine)] * 2, None),
    "refused": (migrate.upgrade, AdoptionRefused),
    "failed": (lambda engine: exclusively(engine, fail), RuntimeError),
    "timed out": (lambda engine: migrate.upgrade(engine, wait_s=0), UpgradeTimeout),
}


@pytest.mark.parametrize(("ends", "error"), ENDS.values(), ids=ENDS)
def test_a_hosts_pool_of_one_connection_is_enough_and_is_left_as_it_was(
    host, postgres_url, ends, error
):
    at_0003(postgres_url)
    before = settings(host)
    with connected(postgres_url) as looking:
        if error is AdoptionRefused:
            looking.execute("CREATE TABLE ingest_batches (id INTEGER)")
        with ExitStack() as stack:
            if error is UpgradeTimeout:
                stack.enter_context(reading(postgres_url))
            if error:
                stack.enter_context(pytest.raises(error))
            ends(host)
        eventually(lambda: not turns_taken(looking))
        assert host.pool.checkedout() == 0
        assert settings(host) == before
        others = (
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid()"
        )
        eventually(lambda: len(looking.execute(others).fetchall()) == 1)  # the pool's own
    if error:
        assert "half" not in str(snapshot(postgres_url))


LEVELS = [
    ("sqlite-file", None),
    ("sqlite-file", "AUTOCOMMIT"),
    *((b, level) for b in POSTGRES for level in (None, "AUTOCOMMIT", "SERIALIZABLE")),
]


@pytest.mark.parametrize(("backend", "level"), LEVELS)
def test_a_refused_upgrade_changes_nothing_whatever_a_hosts_engine_is_set_to(
    new_url, backend, level
):
    url = at_0003(new_url(backend))
    target = make_url(url)
    if backend != "sqlite-file":
        target = target.set(drivername="postgresql+psycopg")
    host = create_engine(target, **({"isolation_level": level} if level else {}))
    with host.connect() as connection, connection.begin():
        connection.exec_driver_sql("CREATE TABLE ingest_batches (id INTEGER)")
    before = snapshot(url)
    with pytest.raises(AdoptionRefused):
        migrate.upgrade(host)
    assert snapshot(url) == before
    with host.connect() as connection, connection.begin():
        connection.exec_driver_sql("DROP TABLE ingest_batches")
    migrate.upgrade(host)
    host.dispose()
    check_head(url)


# -- threads --------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("databases", [1, 2])
def test_threads_of_one_process_migrate_databases_at_once(new_url, backend, databases):
    urls = [new_url(backend) for _ in range(databases)]
    together = threading.Barrier(4)

    def upgrade(number):
        with engine_of(urls[number % databases]) as engine:
            together.wait()
            migrate.upgrade(engine)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(upgrade, range(4))) == [None] * 4
    for url in urls:
        check_head(url)


@each_backend
def test_threads_that_share_an_engine_upgrade_its_database_at_once(new_url, backend):
    url = new_url(backend)
    together = threading.Barrier(4)
    with engine_of(url) as engine, ThreadPoolExecutor(4) as threads:

        def upgrade(_):
            together.wait()
            migrate.upgrade(engine)

        assert list(threads.map(upgrade, range(4))) == [None] * 4
        assert engine.pool.checkedout() == 0
    check_head(url)


# -- beside maintenance ---------------------------------------------------------------------------


@pytest.mark.slow
def test_indexes_are_built_while_upgraders_wait_for_the_lock(postgres_url):
    """CREATE INDEX CONCURRENTLY waits for every snapshot, so they must wait without one."""
    without_indexes(postgres_url)
    with ExitStack() as stack:
        holder = stack.enter_context(migrating(postgres_url))
        others = stack.enter_context(
            launch("pack", url=postgres_url, ways=["alembic", "command", "code"])
        )
        for _ in range(3):
            others.heard_of("trying")
        with engine_of(postgres_url) as engine, ThreadPoolExecutor(1) as threads:
            built = threads.submit(build_missing_indexes, engine).result(WAIT_S).names
            assert set(built) == TELEMETRYS
        holder.close()
        assert others.heard_of("statuses") == [0, 0, 0]
    check_head(postgres_url)


def test_two_builds_of_indexes_at_once_both_succeed(postgres_url):
    """Two replicas whose schedules run ``maintain`` in the same minute."""
    without_indexes(postgres_url)
    with psycopg.connect(postgres_url) as writer, connected(postgres_url) as looking:
        writer.execute("UPDATE routing_telemetry SET model = 'm'")
        with (
            ThreadPoolExecutor(2) as threads,
            engine_of(postgres_url) as one,
            engine_of(postgres_url) as other,
        ):
            builds = [threads.submit(build_missing_indexes, one)]
            eventually(lambda: waiting(looking, "CREATE INDEX%"))  # until the writer ends
            builds.append(threads.submit(build_missing_indexes, other))
            until_somebody_waits(looking, how_many=2)
            writer.commit()
            built = [index for build in builds for index in build.result(WAIT_S).names]
    assert set(built) == TELEMETRYS
    check_head(postgres_url)
    assert "'false'" not in str([line for line in snapshot(postgres_url) if "'index'" in line])


@pytest.mark.slow
def test_a_build_of_indexes_and_a_later_releases_upgrade_both_succeed(postgres_url):
    """The build waits for the upgrade's transaction, which wants the table that the build has."""
    without_indexes(postgres_url)
    begun, building = threading.Event(), threading.Event()

    def later_release(connection):
        with connected(postgres_url) as looking:
            begun.set()
            # in the middle of a statement when the build begins to wait for who has a snapshot
            connection.exec_driver_sql("DECLARE c CURSOR FOR SELECT * FROM routing_telemetry")
            connection.exec_driver_sql("FETCH 1 FROM c")
            if not building.is_set():
                eventually(lambda: waiting(looking, "CREATE INDEX%"))
                building.set()
            connection.exec_driver_sql("CLOSE c")
            connection.exec_driver_sql("ALTER TABLE routing_telemetry ADD COLUMN later TEXT")

    with (
        ThreadPoolExecutor(1) as threads,
        engine_of(postgres_url) as one,
        engine_of(postgres_url) as other,
    ):
        upgrade = threads.submit(exclusively, other, later_release, WAIT_S)
        assert begun.wait(WAIT_S)
        assert len(build_missing_indexes(one).names) == len(TELEMETRYS)
        upgrade.result(WAIT_S)
    check_head(postgres_url)
