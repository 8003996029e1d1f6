"""A store with a spool: damaged files, shared paths, full ones, and the database away."""

import itertools
import logging
import os
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from lynkr_store import Store, StoreSettings, create_store_engine
from lynkr_store.ingest.spool import Spool
from lynkr_store.migrate.upgrade import upgrade
from tests.conftest import POSTGRES
from tests.support.programs import Child

NOBODY = 65_534
BYTES = 2_000
"""Of text in each row."""


@pytest.fixture(params=["sqlite-file", *POSTGRES[-1:]])
def database(request, new_url):
    """A database at head whose writers can be shut out."""
    return Database(new_url(request.param, at_head=True))


class Database:
    def __init__(self, url):
        self.url = url
        self._engine = create_store_engine(url)
        self.sqlite = self._engine.dialect.name == "sqlite"

    @contextmanager
    def away(self):
        """No batch is stored within; the writer's tries fail at once or after the busy timeout."""
        if self.sqlite:
            with closing(sqlite3.connect(self._engine.url.database)) as other:
                other.isolation_level = None
                other.execute("BEGIN EXCLUSIVE")
                yield
                other.execute("ROLLBACK")
        else:
            url = self._engine.url
            name = f'"{url.database}"'
            other = create_store_engine(url.set(database="postgres"))
            with other.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT")
                connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
                connection.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        f" WHERE datname = '{url.database}'"
                    )
                )
                try:
                    yield
                finally:
                    connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
            other.dispose()

    def rows(self):
        with self._engine.connect() as connection:
            found = connection.execute(
                text("SELECT request_id FROM routing_telemetry ORDER BY id")
            ).scalars()
            ids = list(found)
        self._engine.dispose()
        return ids


@pytest.fixture
def path(tmp_path):
    return tmp_path / "spool.db"


@pytest.fixture
def open_store(database, path):
    opened = []

    def open_(**options):
        options = {
            "spool_path": path,
            "spool_after_s": 0.0,
            "batch_max_rows": 10,
            "flush_interval_s": 0.01,
        } | options
        store = Store(settings=StoreSettings(url=database.url, **options))
        opened.append(store)
        return store

    yield open_
    for store in opened:
        store.close(60)


def record(store, name, count, first=0):
    return [
        store.record(provider="p", request_id=f"{name}-{n}", request_text="x" * BYTES)
        for n in range(first, first + count)
    ]


def ids(name, count):
    return [f"{name}-{n}" for n in range(count)]


def checked(store):
    h = store.health()
    places = h.written + h.rejected + h.dropped + h.spooled + h.pending
    assert h.submitted + h.recovered == places, h
    return h


def eventually(store, holds, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not holds(checked(store)):
        assert time.monotonic() < deadline, checked(store)
        time.sleep(0.01)
    return checked(store)


def left_in(path, tmp_path):
    """Rows that wait in files of that path."""
    spool = Spool(path, 2**30)
    spool.open()
    found = spool.found_rows
    spool.close()
    return found


def filled(path, batches=5, rows=3):
    """What a process that is gone left: batches as the writer makes them."""
    from lynkr_store.ingest.validation import TextPolicy, row_of  # noqa: PLC0415

    spool = Spool(path, 2**30)
    spool.open()
    numbers = itertools.count()
    for batch in range(batches):
        made = [
            row_of(
                {"provider": "p", "request_id": f"left-{next(numbers)}"},
                1_750_000_000_000,
                TextPolicy(),
            )[0]
            for _ in range(rows)
        ]
        spool.enter(f"{batch:032x}", made, None)
    spool.close()


# -- damage ------------------------------------------------------------------------------------


def garbage(content):
    return b"\xde\xad\xbe\xef" * 5_000


def truncated(content):
    return content[: len(content) // 2]


def schema(content):
    place = content.index(b"CREATE TABLE batches")
    return content[:place] + b"\xff" * 30 + content[place + 30 :]


@pytest.mark.parametrize("damage", [garbage, truncated, schema])
def test_a_store_with_a_damaged_spool_works_on(
    open_store, database, path, tmp_path, damage, caplog
):
    filled(path)
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, "lynkr_store"):
        store = open_store()
        assert all(record(store, "r", 50))
        assert store.flush(60)
        with database.away():
            assert all(record(store, "s", 50))
            eventually(store, lambda h: h.spooled == 50)
            assert store.flush(60)
        h = eventually(store, lambda h: h.written == 100)
        store.close(60)
    assert (h.submitted, h.recovered, h.pending, h.spooled, h.dropped) == (100, 0, 0, 0, 0)
    assert database.rows() == ids("r", 50) + ids("s", 50)
    said = [line for line in caplog.messages if "set aside" in line]
    assert len(said) == 1, "one line"
    [aside] = path.parent.glob("spool.db.damaged-*[0-9]")
    assert str(aside) in said[0]
    assert aside.read_bytes() == damaged
    assert left_in(path, tmp_path) == 0


def test_one_damaged_batch_costs_its_rows_alone(open_store, database, path, caplog):
    filled(path)
    content = bytearray(path.read_bytes())
    place = content.index(b'"left-4"')
    content[place + 1] = ord("k")
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "lynkr_store"):
        store = open_store()
        h = eventually(store, lambda h: h.written == 12)
        assert all(record(store, "new", 5))
        assert store.flush(60)
        store.close(60)
    assert (h.recovered, h.spooled, dict(h.dropped_by)) == (15, 0, {"spool_damaged": 3})
    left = [name for n, name in enumerate(ids("left", 15)) if n // 3 != 1]
    assert database.rows() == left + ids("new", 5)
    assert sum("set aside" in line for line in caplog.messages) == 1
    assert len(list(path.parent.glob("spool.db.damaged-*[0-9]"))) == 1


@pytest.mark.parametrize("row_count", [-1, 1, 5, "x"])
def test_a_wrong_number_of_rows_makes_no_counter_wrong(open_store, database, path, row_count):
    filled(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE batches SET row_count = ? WHERE seq = 2", (row_count,))
    store = open_store()
    h = eventually(store, lambda h: h.recovered and not h.spooled)
    lost = row_count if row_count in (1, 5) else 1
    assert (h.recovered, h.written, h.pending) == (12 + lost, 12, 0)
    assert dict(h.dropped_by) == {"spool_damaged": lost}
    assert database.rows() == [name for n, name in enumerate(ids("left", 15)) if n // 3 != 1]
    store.close()
    assert checked(open_store()).recovered == 0, "across restarts"


def test_what_an_earlier_process_left_is_stored_without_being_asked(open_store, database, path):
    filled(path)
    store = open_store()
    h = eventually(store, lambda h: h.written == 15)
    assert (h.submitted, h.recovered, h.spooled) == (0, 15, 0)
    assert database.rows() == ids("left", 15)
    store.close()
    again = open_store()
    assert all(record(again, "new", 5))
    assert again.flush(60)
    assert checked(again).recovered == 0


def test_another_programs_database_is_left_alone_and_the_store_works_on(
    open_store, database, path, caplog
):
    with closing(sqlite3.connect(path)) as theirs:
        theirs.execute("CREATE TABLE theirs (a)")
    before = path.read_bytes()
    store = open_store()
    assert all(record(store, "r", 50))
    assert store.flush(60)
    h = checked(store)
    assert (h.written, h.spooled, h.pending) == (50, 0, 0)
    store.close()
    assert database.rows() == ids("r", 50)
    assert path.read_bytes() == before
    assert sum("another program's database" in line for line in caplog.messages) == 1


# -- outages -----------------------------------------------------------------------------------


def test_order_is_kept_through_an_outage(open_store, database, path, tmp_path):
    store = open_store(queue_max_rows=1_000)
    assert all(record(store, "r", 100))
    assert store.flush(60)
    with database.away():
        for first in range(100, 400, 50):
            assert all(record(store, "r", 50, first=first))
        h = eventually(store, lambda h: h.spooled == 300)
        assert store.flush(60), "what is in the spool is safe"
        assert (h.written, h.pending) == (100, 0)
    assert all(record(store, "r", 100, first=400))
    h = eventually(store, lambda h: h.written == 500)
    assert (h.submitted, h.spooled, h.pending, h.dropped) == (500, 0, 0, 0)
    assert database.rows() == ids("r", 500)
    store.close()
    assert left_in(path, tmp_path) == 0


def test_several_outages_in_a_row_lose_nothing(open_store, database, path, tmp_path):
    store, numbers = open_store(), itertools.count()
    for _ in range(3):
        with database.away():
            assert all(record(store, "r", 20, first=20 * next(numbers)))
            eventually(store, lambda h: h.spooled > 0)
            checked(store)
        assert all(record(store, "r", 20, first=20 * next(numbers)))
        checked(store)
    h = eventually(store, lambda h: h.written == 120)
    assert (h.submitted, h.spooled, h.dropped) == (120, 0, 0)
    assert database.rows() == ids("r", 120)


def test_what_a_close_could_not_write_is_the_next_stores(open_store, database, path):
    with database.away():
        store = open_store(spool_after_s=3600.0)
        assert all(record(store, "r", 95))
        store.close(2)
        h = checked(store)
        assert (h.submitted, h.spooled, h.pending, h.dropped) == (95, 95, 0, 0)
    again = open_store()
    h = eventually(again, lambda h: h.written == 95)
    assert (h.submitted, h.recovered, h.spooled) == (0, 95, 0)
    assert database.rows() == ids("r", 95)


SHARING = """
    import sys, time
    from lynkr_store import Store, StoreSettings

    url, path, name = sys.argv[1:]
    settings = StoreSettings(
        url=url, spool_path=path, spool_after_s=0, batch_max_rows=10, flush_interval_s=0.01
    )

    def checked():
        h = store.health()
        places = h.written + h.rejected + h.dropped + h.spooled + h.pending
        assert h.submitted + h.recovered == places, h
        return h

    def until(holds):
        deadline = time.monotonic() + 60
        while not holds(checked()):
            assert time.monotonic() < deadline, checked()
            time.sleep(0.01)

    store = Store(settings=settings)
    for n in range(100):
        assert store.record(provider="p", request_id=f"{name}-{n}")
    until(lambda h: h.spooled == 100)
    print("spooled", store._writer._handoff.spool._own.path, flush=True)
    how = sys.stdin.readline().strip()
    if how == "close":
        store.close(60)
        h = checked()
        print(h.submitted, h.recovered, h.written, h.spooled, h.dropped, flush=True)
    else:
        until(lambda h: h.written == 100 + h.recovered)
        print("written", flush=True)
        sys.stdin.readline()
"""


@contextmanager
def sharing(database, path, *names):
    """Processes with one spool path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LYNKR_", "COV_"))}
    program = [sys.executable, "-W", "error", "-c", textwrap.dedent(SHARING), database.url, path]
    with ExitStack() as stack:
        yield [stack.enter_context(Child([*program, name], environment)) for name in names]


def said(child):
    return child.line().split()


@pytest.mark.slow
def test_two_processes_share_a_path_through_an_outage(database, path, tmp_path):
    with sharing(database, path, "a", "b") as children:
        with database.away():
            files = {said(child)[1] for child in children}
        # one that looks for what others left may hold a name just when another would take it
        assert len(files) == 2, "each has a file of its own"
        assert files <= {str(path), f"{path}.2", f"{path}.3"}
        for child in children:
            child.tell("wait")
        assert [said(child) for child in children] == [["written"], ["written"]]
        for child in children:
            child.tell("go")
        assert [child.end() for child in children] == [[], []]
    rows = database.rows()
    assert Counter(rows) == Counter(ids("a", 100) + ids("b", 100))
    for name in "ab":
        assert [row for row in rows if row[0] == name] == ids(name, 100)
    assert left_in(path, tmp_path) == 0


@pytest.mark.slow
def test_one_of_two_processes_is_killed_in_an_outage(open_store, database, path, tmp_path):
    with sharing(database, path, "killed", "alive") as (killed, alive):
        with database.away():
            said(killed), said(alive)
            killed.kill()
            alive.tell("wait")
        assert said(alive) == ["written"]
        store = open_store()  # takes the file that nobody holds, and not the other
        h = eventually(store, lambda h: h.written == 100)
        assert (h.submitted, h.recovered, h.spooled, h.dropped) == (0, 100, 0, 0)
        alive.tell("go")
        assert alive.end() == []
    assert Counter(database.rows()) == Counter(ids("killed", 100) + ids("alive", 100))


@pytest.mark.slow
def test_one_of_two_processes_closes_in_an_outage(open_store, database, path, tmp_path):
    with sharing(database, path, "gone", "alive") as (gone, alive):
        with database.away():
            said(gone), said(alive)
            gone.tell("close")
            submitted, recovered, written, spooled, dropped = map(int, said(gone))
            assert (submitted, recovered, written, dropped) == (100, 0, 0, 0)
            assert spooled == 100
            assert gone.end() == []
            alive.tell("wait")
        assert said(alive) == ["written"]
        alive.tell("go")
        assert alive.end() == []
    store = open_store()
    eventually(store, lambda h: h.spooled == 0 and h.written == h.recovered > 0)
    store.close()
    assert Counter(database.rows()) == Counter(ids("gone", 100) + ids("alive", 100))
    assert left_in(path, tmp_path) == 0


# -- no room -----------------------------------------------------------------------------------


def test_a_full_spool_leaves_the_rest_in_memory(open_store, database, path, tmp_path, caplog):
    store = open_store(queue_max_rows=200, spool_max_bytes=200_000)
    with database.away():
        accepted = refused = 0
        full = False  # the spool; what is then refused finds the queue full too
        while True:
            if sum(record(store, "r", 1, first=accepted)):
                accepted += 1
                continue
            refused += 1
            if full:
                break
            full = "SpoolError" in store.health().faults_by
            time.sleep(0.02)  # the queue is given time to move on
        h = checked(store)
        assert 0 < h.spooled < 200, "about 70 rows"
        assert path.stat().st_size <= 200_000
        assert accepted >= h.spooled + 200, "nothing was lost until the queue was full"
        assert dict(h.dropped_by) == {"queue_full": refused}
        assert h.spooled + h.pending == accepted
        eventually(store, lambda _: any("spool is full" in line for line in caplog.messages))
        assert sum("spool is full" in line for line in caplog.messages) == 1, "once an outage"
    h = eventually(store, lambda h: h.written == accepted)
    assert (h.submitted, h.spooled, h.pending) == (accepted + refused, 0, 0)
    rows = database.rows()
    assert Counter(rows) == Counter(dict.fromkeys(rows, 1)) and len(rows) == accepted
    assert rows == sorted(rows, key=lambda name: int(name[2:])), "in order"
    store.close()
    assert left_in(path, tmp_path) == 0


def test_without_room_nothing_is_dropped_while_the_queue_has_some(open_store, database, path):
    store = open_store(queue_max_rows=1_000, spool_max_bytes=32_768)
    with database.away():
        assert all(record(store, "r", 500))
        h = checked(store)
        assert (h.dropped, h.spooled + h.pending) == (0, 500)
    h = eventually(store, lambda h: h.written == 500)
    assert (h.dropped, h.spooled, h.pending) == (0, 0, 0)
    assert database.rows() == ids("r", 500)


def test_a_place_where_no_spool_can_be_is_reported_once_and_writing_continues(
    open_store, database, tmp_path, caplog
):
    (tmp_path / "file").write_text("no directory")
    store = open_store(spool_path=tmp_path / "file" / "spool.db")
    assert all(record(store, "r", 50))
    assert store.flush(60)
    assert sum("spool_path" in line for line in caplog.messages) == 1
    caplog.clear()
    with database.away():
        assert all(record(store, "s", 50))
        eventually(store, lambda h: h.faults_by.get("SpoolError", 0) > 2)
        h = checked(store)
        assert (h.written, h.spooled, h.pending, h.dropped) == (50, 0, 50, 0)
    h = eventually(store, lambda h: h.written == 100)
    assert h.dropped == 0
    assert database.rows() == ids("r", 50) + ids("s", 50)
    assert sum("spool_path" in line for line in caplog.messages) == 1, "once in an outage"


READ_ONLY = """
    import os, sys
    from pathlib import Path
    from lynkr_store import Store, StoreSettings

    folder, user = Path(sys.argv[1]), int(sys.argv[2])
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    store = Store(settings=StoreSettings(
        url=f"sqlite:///{folder}/data/telemetry.db", spool_path=folder / "spools" / "spool.db",
        spool_after_s=0,
    ))
    for n in range(50):
        assert store.record(provider="p", request_id=f"r-{n}")
    assert store.flush(60)
    h = store.health()
    assert h.submitted == h.written == 50, h
    assert h.faults_by == {"SpoolError": 1}, h
    store.close()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_a_read_only_directory_is_reported_once_and_writing_continues():
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        for path, mode in ((folder, 0o755), (folder / "spools", 0o555), (folder / "data", 0o777)):
            path.mkdir(exist_ok=True)
            path.chmod(mode)
        engine = create_store_engine(f"sqlite:///{folder}/data/telemetry.db")
        upgrade(engine)
        engine.dispose()
        for path in (folder / "data").iterdir():
            path.chmod(0o666)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(READ_ONLY), name, str(NOBODY)],
            env={k: v for k, v in os.environ.items() if not k.startswith("COV")},  # it is root's
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        line, again = done.stderr.splitlines()
        assert "spool_path" in line and "Permission denied" in line
        assert again == "records are written again"
        with closing(sqlite3.connect(folder / "data" / "telemetry.db")) as connection:
            found = connection.execute("SELECT request_id FROM routing_telemetry ORDER BY id")
            assert [row[0] for row in found] == ids("r", 50)
