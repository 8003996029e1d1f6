"""Which connections a fork closes, who waits for it, and that an engine follows its file."""

import asyncio
import gc
import os
import sqlite3
import threading
import weakref
from pathlib import Path

import pytest
from sqlalchemy import Pool, create_engine, event, text
from sqlalchemy.orm import Session

from lynkr_store import (
    AsyncStore,
    RoutingRepository,
    Store,
    StoreSettings,
    create_store_engine,
    writing,
)
from lynkr_store.db import forking
from lynkr_store.db.forking import keep_out_of_children
from lynkr_store.exceptions import StoreUnavailable
from lynkr_store.migrate import backup
from lynkr_store.migrate.backup import back_up
from lynkr_store.storage import write_lock
from lynkr_store.storage.read_only import create_reading_engine
from tests.support.stores import Asynchronous, eventually

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    pytest.mark.sample(2),
]

WAIT_S = 60


def forked(body):
    """What a child says in one line, and how it ends."""
    said, to_say = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(said)
        try:
            os.write(to_say, str(body()).encode())
        except BaseException as error:  # noqa: BLE001 - for the parent to see
            os.write(to_say, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(to_say)
    with os.fdopen(said) as file:
        words = file.read()
    os.waitpid(pid, 0)
    return words


def counted(engine):
    with engine.connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM routing_telemetry"))


def open_files(path):
    return sum(
        str(entry.resolve()).startswith(str(path)) for entry in Path("/proc/self/fd").iterdir()
    )


@pytest.fixture
def file(new_url):
    return new_url("sqlite-file", at_head=True)


@pytest.fixture(params=["own", "host", "options"])
def engine_of(request):
    """Make an engine of the store's, a host's, or one with options of its own."""
    made = []

    def make(url):
        engine = create_store_engine(url) if request.param == "own" else create_engine(url)
        made.append(engine)
        if request.param == "options":
            engine = engine.execution_options(own="option")
        keep_out_of_children(engine)
        keep_out_of_children(engine)  # harmless
        return engine

    yield make
    for engine in made:
        engine.dispose()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux lists open files")
def test_no_connection_is_open_in_the_child_nor_in_the_parent_at_a_fork(file, engine_of):
    engine = engine_of(file)
    counted(engine)
    path = engine.url.database
    assert open_files(path)
    assert forked(lambda: open_files(path)) == "0"
    assert open_files(path) == 0
    assert counted(engine) == 0
    assert forked(lambda: counted(engine)) == "0"


class _SlowToClose(sqlite3.Connection):
    """Its close begins, as that of a big file which is moved out of its WAL, and goes on."""

    began, told = threading.Event(), threading.Event()

    def close(self):
        if threading.current_thread() is not threading.main_thread() and not self.began.is_set():
            self.began.set()
            self.told.wait(WAIT_S)
        super().close()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux lists open files")
@pytest.mark.parametrize("detached", [False, True])
def test_a_fork_waits_for_a_connection_that_is_being_closed(file, detached, monkeypatch):
    """By another thread: of a store that is closed, a pool that is disposed."""
    monkeypatch.setattr(_SlowToClose, "began", threading.Event())
    monkeypatch.setattr(_SlowToClose, "told", threading.Event())
    engine = create_engine(file, connect_args={"factory": _SlowToClose, "cached_statements": 0})
    keep_out_of_children(engine)
    path = engine.url.database
    connection = engine.connect()
    assert connection.scalar(text("SELECT count(*) FROM routing_telemetry")) == 0
    if detached:
        connection.detach()
        closer = threading.Thread(target=connection.close)
    else:
        connection.close()
        closer = threading.Thread(target=engine.dispose)
    closer.start()
    _SlowToClose.began.wait(WAIT_S)
    threading.Timer(0.3, _SlowToClose.told.set).start()
    assert forked(lambda: open_files(path)) == "0"
    closer.join(WAIT_S)
    engine.dispose()
    assert counted(engine) == 0
    engine.dispose()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux lists open files")
@pytest.mark.parametrize("how", ["copy", "read-only"])
def test_a_fork_waits_for_what_opens_a_file_for_itself(file, how):
    engine = create_store_engine(file)
    path = Path(engine.url.database)
    began, told = threading.Event(), threading.Event()

    def on_connect(connection, _):
        file_opened = connection.execute("PRAGMA database_list").fetchone()[2] == str(path)
        if file_opened and not began.is_set():
            began.set()
            told.wait(WAIT_S)

    def work():
        if how == "copy":
            back_up(engine, "test")
        else:
            create_reading_engine(path).dispose()

    backup.opened_file(engine)
    event.listen(Pool, "connect", on_connect)
    try:
        worker = threading.Thread(target=work)
        worker.start()
        assert began.wait(WAIT_S)
        threading.Timer(0.3, told.set).start()
        assert forked(lambda: open_files(path)) == "0"
        worker.join(WAIT_S)
    finally:
        event.remove(Pool, "connect", on_connect)
    engine.dispose()


def test_a_fork_waits_for_a_connection_in_use(file, engine_of):
    engine = engine_of(file)
    taken, told = threading.Event(), threading.Event()

    def use():
        with engine.connect() as connection:
            taken.set()
            told.wait(WAIT_S)
            connection.scalar(text("SELECT count(*) FROM routing_telemetry"))

    user = threading.Thread(target=use)
    user.start()
    taken.wait(WAIT_S)
    timer = threading.Timer(0.2, told.set)
    timer.start()
    assert forked(lambda: counted(engine)) == "0"
    user.join()


def test_a_file_that_is_in_use_all_the_time_is_refused_in_the_child(file, engine_of, monkeypatch):
    monkeypatch.setattr("lynkr_store.db.forking.FORK_WAIT_S", 0.1)
    engine = engine_of(file)
    with engine.connect() as connection:  # by the thread that forks: it waits for nothing
        connection.scalar(text("SELECT 1"))
        words = forked(lambda: counted(engine))
        assert words.startswith("StoreUnavailable: "), words
        assert engine.url.database in words
        assert "forked" in words
        # nor by another engine of the same process
        again = forked(lambda: counted(create_store_engine(file)))
        assert again.startswith("StoreUnavailable"), again
    assert forked(lambda: counted(engine)) == "0"  # it was given back
    assert counted(engine) == 0


def test_a_grandchild_is_refused_what_its_parent_is(file):
    engine = create_store_engine(file)
    with engine.connect() as connection:
        connection.scalar(text("SELECT 1"))
        assert forked(lambda: forked(lambda: counted(engine))).startswith("StoreUnavailable")
    engine.dispose()


def test_a_connection_that_was_detached_counts_as_open(file, monkeypatch):
    monkeypatch.setattr("lynkr_store.db.forking.FORK_WAIT_S", 0.1)
    engine = create_store_engine(file)
    connection = engine.connect()
    connection.detach()
    assert forked(lambda: counted(engine)).startswith("StoreUnavailable")
    connection.close()
    assert forked(lambda: counted(engine)) == "0"
    engine.dispose()


def test_a_connection_that_cannot_be_made_holds_up_no_fork(tmp_path, monkeypatch):
    monkeypatch.setattr("lynkr_store.db.forking.FORK_WAIT_S", WAIT_S)
    (tmp_path / "link").symlink_to(tmp_path / "missing" / "a.db")
    engine = create_store_engine(f"sqlite:///{tmp_path}/link")
    kept = []
    for _ in range(2):
        with pytest.raises(Exception, match="unable to open") as raised:
            engine.connect()
        kept.append(raised)  # its traceback keeps what was to be made
    timer = threading.Timer(WAIT_S / 2, os.abort)
    timer.start()
    assert forked(lambda: "in time") == "in time"
    timer.cancel()
    engine.dispose()


def test_a_connection_that_is_checked_out_meanwhile_counts_as_in_use(file):
    engine = create_store_engine(file)
    guard = forking._guards[engine.dialect]

    class Record:
        info = {forking._FILE: guard._identity()}  # noqa: RUF012 - it does not change

    record = Record()
    checkout = threading.Thread(target=lambda: guard._on_checkout(None, record, None))

    class Slow(weakref.WeakKeyDictionary):
        def get(self, key, default=None):
            found = super().get(key, default)
            checkout.start()
            checkout.join(0.3)
            return found

    guard._making[record] = threading.get_ident()
    guard._using = Slow()
    try:
        assert guard._user(record) is not None
    finally:
        checkout.join()
        guard._reset()
    engine.dispose()


@pytest.mark.slow
def test_threads_that_read_all_the_time_and_forks_all_the_time(file, monkeypatch):
    monkeypatch.setattr("lynkr_store.db.forking.FORK_WAIT_S", WAIT_S)  # readers may be slow
    engine, over, failures = create_store_engine(file), threading.Event(), []

    def read():
        while not over.is_set():
            try:
                counted(engine)
            except BaseException as error:  # noqa: BLE001 - told in the main thread
                failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    words = {forked(lambda: counted(engine)) for _ in range(20)}
    over.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert words == {"0"}
    engine.dispose()


def test_a_listener_that_a_host_added_later_makes_the_connection(file):
    engine = create_engine(file)
    keep_out_of_children(engine)
    asked = []

    @event.listens_for(engine, "do_connect")
    def connect(dialect, record, arguments, options):
        asked.append(1)
        return dialect.loaded_dbapi.connect(*arguments, **options)

    assert counted(engine) == 0
    assert asked == [1]
    engine.dispose()


def test_a_memory_database_stays_the_parents(open_memory):
    store = open_memory
    store.record(provider="p")
    assert store.flush(WAIT_S)
    words = forked(lambda: len(store.query()))
    assert words == "0"
    assert len(store.query()) == 1


@pytest.fixture
def open_memory():
    with Store("sqlite://", settings=StoreSettings(flush_interval_s=0.01)) as store:
        yield store


# -- the file ----------------------------------------------------------------------------------


def remove(path):
    for end in ("", "-wal", "-shm"):
        Path(path + end).unlink(missing_ok=True)


def replace(path):
    """As a restore does: another file of the same shape, with a row of its own."""
    other = create_store_engine(f"sqlite:///{path}.new")
    with Store(engine=other, settings=StoreSettings(upgrade_on_open=True)) as store:
        store.add_many([{"provider": "p", "request_id": "restored"}])
    other.dispose()
    remove(path)
    for end in ("", "-wal", "-shm"):
        if Path(f"{path}.new{end}").exists():
            Path(f"{path}.new{end}").rename(path + end)


def names(path):
    engine = create_store_engine(f"sqlite:///{path}")
    with Session(engine) as session:
        found = [row.request_id for row in RoutingRepository(session).query()]
    engine.dispose()
    return sorted(found)


LOST = [remove, replace]


@pytest.mark.parametrize("lose", LOST)
def test_every_way_in_checks_which_file_it_is(open_file_store, lose):
    """Rows that are added, reads and maintenance go to the file that is there now."""
    store, path = open_file_store
    store.add_many([{"provider": "p", "request_id": "before"}])
    assert [row.request_id for row in store.query()] == ["before"]
    restored = ["restored"] * (lose is replace)
    lose(path)
    assert store.add_many([{"provider": "p", "request_id": "added"}]) == 1
    assert sorted(row.request_id for row in store.query()) == sorted(["added", *restored])
    assert names(path) == sorted(["added", *restored])
    lose(path)
    assert [row.request_id for row in store.query()] == restored
    assert [row.request_id for row in store.iter_records()] == restored
    lose(path)
    store.maintain()
    assert store.health().rollup_lag in (0, None)
    assert names(path) == restored
    lose(path)
    store.cleanup()
    assert names(path) == restored
    lose(path)
    assert (store.get_provider_stats("p") is None) == (not restored)
    lose(path)
    store.record(provider="p", request_id="written")
    assert store.flush(WAIT_S)
    assert names(path) == sorted(["written", *restored])


@pytest.fixture(params=["sync", "async"])
def open_file_store(request, tmp_path):
    path = f"{tmp_path}/telemetry.db"
    settings = StoreSettings(url=f"sqlite:///{path}", flush_interval_s=0.01, cache_ttl_s=0)
    if request.param == "sync":
        with Store(settings=settings) as store:
            yield store, path
        return
    with asyncio.Runner() as runner:
        store = Asynchronous(AsyncStore(settings=settings), runner)
        yield store, path
        store.close()


@pytest.mark.parametrize("lose", LOST)
@pytest.mark.parametrize("moment", ["begin", "before_cursor_execute", "commit"])
def test_rows_that_went_into_a_lost_file_are_not_called_added(tmp_path, lose, moment):
    path = f"{tmp_path}/telemetry.db"
    with Store(f"sqlite:///{path}") as store:
        store.query()
        event.listen(store.engine, moment, lambda *_: lose(path), once=True)
        with pytest.raises(StoreUnavailable, match=f"{path}: .* removed"):
            store.add_many([{"provider": "p", "request_id": "lost"}])
        assert store.add_many([{"provider": "p", "request_id": "again"}]) == 1
    assert names(path) == sorted(["again"] + ["restored"] * (lose is replace))


@pytest.mark.parametrize("lose", LOST)
def test_a_session_of_the_hosts_follows_the_file(tmp_path, lose):
    path = f"{tmp_path}/telemetry.db"
    with Store(f"sqlite:///{path}") as store:
        store.add_many([{"provider": "p", "request_id": "before"}])
        lose(path)
        store.maintain()  # which makes the tables
        with Session(writing(store.engine)) as session, session.begin():
            RoutingRepository(session).add_many([{"provider": "p", "request_id": "added"}])
    assert names(path) == sorted(["added"] + ["restored"] * (lose is replace))


def test_a_store_opened_read_only_does_not_read_another_file(tmp_path):
    path = f"{tmp_path}/telemetry.db"
    with Store(f"sqlite:///{path}") as store:
        store.add_many([{"provider": "p"}])
    with Store(f"sqlite:///{path}", read_only=True) as store:
        assert len(store.query()) == 1
        replace(path)
        with pytest.raises(StoreUnavailable, match="open the store again"):
            store.query()


# -- a pool of one -----------------------------------------------------------------------------


def test_a_checkpoint_and_a_batch_share_a_pool_of_one(file, monkeypatch):
    """Each takes the lock first and the connection then: the other order held both up for 30 s."""
    engine = create_engine(file, pool_size=1, max_overflow=0, pool_timeout=20)
    monkeypatch.setattr("lynkr_store.storage.write_lock._LONG_WAL_PAGES", 0)
    plain, passes, batch_waits = write_lock.checkpoint, [], threading.Event()

    def checkpoint(connection):
        passes.append(1)
        if len(passes) == 3:  # the last one beside the batches
            store.record(provider="p")
            started.set()
            batch_waits.wait(0.5)
        return plain(connection)

    started = threading.Event()
    monkeypatch.setattr(write_lock, "checkpoint", checkpoint)
    with Store(engine=engine, settings=StoreSettings(flush_interval_s=0.01)) as store:
        store.query()
        upkeep = threading.Thread(target=store._database.checkpoint)
        upkeep.start()
        assert started.wait(WAIT_S)
        assert store.flush(10)
        upkeep.join(10)
        assert not upkeep.is_alive()
    engine.dispose()


@pytest.mark.slow
def test_a_connection_that_the_collector_takes_is_closed_before_the_fork(tmp_path):
    """The collector forgets an object before it frees it, and may let another thread go on."""
    engine = create_store_engine(f"sqlite:///{tmp_path}/t.db")
    guard, first = forking._guards[engine.dialect], id(engine.pool)
    used, over, drivers = threading.Event(), threading.Event(), []

    class Slow:
        """What the collector takes long for, before the connection's turn."""

        def __del__(self):
            if threading.current_thread() is thread:  # it has the lock, as the test needs it
                guard._changed.release()
                over.wait(60)
                guard._changed.acquire()

    def use():
        connection = engine.connect()
        drivers.append(connection.connection.dbapi_connection)
        connection.info["slow"] = Slow()
        used.set()
        eventually(lambda: id(engine.pool) != first)
        with guard._changed:
            connection.close()
            del connection
            gc.collect()

    thread = threading.Thread(target=use)
    thread.start()
    used.wait(60)
    guard.before_fork()
    try:
        assert guard._at_rest
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            drivers[0].total_changes  # noqa: B018 - it is asked for the error
    finally:
        over.set()
        guard.after_fork_in_parent()
        thread.join(60)
        engine.dispose()
