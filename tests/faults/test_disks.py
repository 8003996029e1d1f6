"""Disks that fill up, go read-only, lose a file or damage it: records wait, and none is lost."""

import contextlib
import errno
import functools
import json
import logging
import os
import pwd
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sqlalchemy import event, text

from lynkr_store import Store, StoreSettings, create_store_engine, writing
from lynkr_store.db.models import INDEXES
from lynkr_store.migrate.upgrade import upgrade
from tests.conftest import EXTERNAL, POSTGRES
from tests.support.postgres import PgServer, available_servers
from tests.support.stores import adds_up, eventually

pytestmark = pytest.mark.sample(3)

MIB = 2**20


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr("lynkr_store.ingest.deliverer._FIRST_RETRY_S", 0.01)
    monkeypatch.setattr("lynkr_store.ingest.deliverer._LAST_RETRY_S", 0.1)
    monkeypatch.setattr("lynkr_store.ingest.spooling.SPOOL_AGAIN_S", 0.05)


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "lynkr_store"]


def record(store, prefix, count=100, size=4_000):
    """Records that together need some hundred KB, however well they are compressed."""
    recorded = [f"{prefix}-{n}" for n in range(count)]
    for name in recorded:
        said = random.randbytes(size // 2).hex()
        assert store.record(provider="p", request_id=name, request_text=said)
    return recorded


def names(engine):
    with engine.connect() as connection:
        return list(
            connection.scalars(text("SELECT request_id FROM routing_telemetry ORDER BY id"))
        )


def names_in(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        query = "SELECT request_id FROM routing_telemetry ORDER BY id"
        return [name for (name,) in connection.execute(query)]


def check_that_they_wait(store, count, *, kind="StoreUnavailable", faults=3):
    before = store.health().faults_by.get(kind, 0)
    eventually(lambda: store.health().faults_by.get(kind, 0) >= before + faults)
    health = store.health()
    assert adds_up(health)
    assert health.pending == count
    assert (health.rejected, health.dropped, health.spooled) == (0, 0, 0)
    return health


def check_that_all_was_written(store):
    assert store.flush(60)
    health = store.health()
    assert adds_up(health)
    assert health.written == health.submitted
    assert health.pending == 0


# -- a full disk -------------------------------------------------------------------------------


@functools.cache
def _can_mount():
    folder = tempfile.mkdtemp()
    try:
        mounted = _mount(folder, "size=1m")
        if mounted:
            _unmount(folder)
    finally:
        Path(folder).rmdir()
    return mounted


def _mount(folder, options):
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        return False
    command = [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _unmount(folder):
    command = [shutil.which("umount"), str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        subprocess.run([*command, "-l"], check=True)


@contextlib.contextmanager
def small_disk(folder, size=4 * MIB, **options):
    if not _can_mount():
        pytest.skip("no small disk can be mounted; a limit on files' sizes stands for it")
    folder.mkdir(exist_ok=True)
    given = "".join(f",{name}={value}" for name, value in options.items())
    assert _mount(folder, f"size={size}{given}")
    try:
        yield folder
    finally:
        _unmount(folder)


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def fill(folder):
    """Leave not a byte free; return the file that takes them all."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (64 * 1024, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    assert os.statvfs(folder).f_bavail == 0
    return filler


@pytest.mark.parametrize("found", ["at the COMMIT", "in the INSERT"])
def test_a_full_disk_under_sqlite_is_waited_for(disk, caplog, found):
    caplog.set_level(logging.INFO, "lynkr_store")
    with Store(f"sqlite:///{disk}/telemetry.db") as store:
        if found == "in the INSERT":  # pages that the cache cannot hold are written at once

            @event.listens_for(store.engine, "connect")
            def on_connect(connection, record):
                connection.execute("PRAGMA cache_size = 10").close()

        expected = record(store, "before", 10)
        assert store.flush(30)
        for number in range(2):
            caplog.clear()
            filler = fill(disk)
            expected += record(store, f"full {number}")
            health = check_that_they_wait(store, 100)
            assert health.last_error == (
                "StoreUnavailable: the database failed: (sqlite3.OperationalError) "
                "database or disk is full"
            ) or health.last_error.endswith("database or disk is full")
            [line] = said(caplog)
            assert line.startswith("records wait to be written: StoreUnavailable")
            filler.unlink()
            check_that_all_was_written(store)
            eventually(lambda: said(caplog)[-1] == "records are written again")
    assert names_in(disk / "telemetry.db") == expected


def test_a_disk_that_is_full_before_the_database_is_made_is_waited_for(disk, caplog):
    filler = fill(disk)
    with Store(f"sqlite:///{disk}/telemetry.db") as store:
        expected = record(store, "r")
        check_that_they_wait(store, 100)
        lines = said(caplog)
        assert len(lines) == len(set(lines)) <= 2
        filler.unlink()
        check_that_all_was_written(store)
    assert names_in(disk / "telemetry.db") == expected


_LIMITED = """
import json, resource, signal, sys, time
from lynkr_store import Store
from lynkr_store.ingest import deliverer

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
deliverer._FIRST_RETRY_S, deliverer._LAST_RETRY_S = 0.01, 0.1
path, away = sys.argv[1], []
with Store(f"sqlite:///{path}") as store:
    def record(prefix):
        for n in range(100):
            assert store.record(provider="p", request_id=f"{prefix}-{n}", request_text="x" * 4000)
    record("before")
    assert store.flush(60)
    for round in range(2):
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, unlimited[1]))
        before = store.health().faults_by.get("StoreUnavailable", 0)
        record(f"limited {round}")
        deadline = time.monotonic() + 60
        while store.health().faults_by.get("StoreUnavailable", 0) < before + 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        health = store.health()
        away.append([health.pending, health.rejected, health.dropped])
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert store.flush(60)
    health = store.health()
    assert health.submitted == health.written == 300
    assert health.pending == health.rejected == health.dropped == health.spooled == 0
print(json.dumps(away))
"""


@pytest.mark.slow
def test_a_limit_on_the_sizes_of_files_is_waited_for(tmp_path):
    path = tmp_path / "telemetry.db"
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", _LIMITED, str(path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == [[100, 0, 0]] * 2
    assert names_in(path) == [
        f"{prefix}-{n}" for prefix in ("before", "limited 0", "limited 1") for n in range(100)
    ]


@pytest.mark.slow
@pytest.mark.skipif(bool(EXTERNAL), reason="needs a disk of the server's own")
@pytest.mark.parametrize("installation", available_servers(), ids=lambda i: i.name)
def test_a_full_disk_under_postgresql_is_waited_for(installation, caplog):
    caplog.set_level(logging.INFO, "lynkr_store")
    owner = pwd.getpwnam("nobody")
    above = Path(tempfile.mkdtemp(prefix="disk", dir="/tmp"))
    above.chmod(0o755)
    try:
        with (
            small_disk(
                above / "d", 12 * MIB, uid=owner.pw_uid, gid=owner.pw_gid, mode="0700"
            ) as disk,
            PgServer(installation) as server,
        ):
            url = server.create_database("small")
            engine = create_store_engine(url)
            upgrade(engine)
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql(f"CREATE TABLESPACE small LOCATION '{disk}'")
            with engine.begin() as connection:
                for table in ("routing_telemetry", "ingest_batches"):
                    connection.exec_driver_sql(f"ALTER TABLE {table} SET TABLESPACE small")
                for index in INDEXES:
                    connection.exec_driver_sql(f"ALTER INDEX {index.name} SET TABLESPACE small")
            with Store(url) as store:
                expected = record(store, "before", 10)
                assert store.flush(30)
                for number in range(2):
                    caplog.clear()
                    filler = fill(disk)
                    expected += record(store, f"full {number}", 300)
                    health = check_that_they_wait(store, 300)
                    assert "could not extend file" in health.last_error
                    lines = said(caplog)
                    assert len(lines) == len(set(lines)) <= 3, "one line a fault, not one a try"
                    filler.unlink()
                    check_that_all_was_written(store)
            assert names(engine) == expected
            engine.dispose()
    finally:
        shutil.rmtree(above, ignore_errors=True)


@contextlib.contextmanager
def table_away(url):
    """The table has another name meanwhile."""
    engine = create_store_engine(url)

    def rename(old, new):
        with writing(engine).begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {old} RENAME TO {new}")

    rename("routing_telemetry", "elsewhere")
    yield
    rename("elsewhere", "routing_telemetry")
    engine.dispose()


@pytest.mark.parametrize("opened_before", [True, False])
def test_records_stay_in_memory_while_the_spools_disk_is_full(
    disk, tmp_path, caplog, opened_before
):
    path = tmp_path / "telemetry.db"
    url = f"sqlite:///{path}"
    spool = disk / "spool.db"
    filler = None if opened_before else fill(disk)
    with Store(settings=StoreSettings(url=url, spool_path=spool, spool_after_s=0)) as store:
        expected = record(store, "before", 10)
        assert store.flush(30)
        filler = filler or fill(disk)
        caplog.clear()
        with table_away(url):
            expected += record(store, "away", 100)
            health = check_that_they_wait(store, 100, kind="SpoolError")
            assert "SpoolError" in health.faults_by
            lines = said(caplog)
            assert len(lines) == len(set(lines)) <= 4, "one line a fault, not one a try"
            assert any("SpoolError" in line for line in lines)
        check_that_all_was_written(store)
        with table_away(url):
            filler.unlink()
            expected += record(store, "room", 100)
            assert store.flush(60), "the spool has room again"
            health = store.health()
            assert adds_up(health)
            assert health.spooled == 100
        eventually(lambda: store.health().spooled == 0)
        check_that_all_was_written(store)
    assert names_in(path) == expected


# -- read-only ---------------------------------------------------------------------------------

_READ_ONLY = """
import json, os, pathlib, pwd, sqlite3, stat, sys, time
from lynkr_store import Store, StoreSettings
from lynkr_store.ingest import deliverer

deliverer._FIRST_RETRY_S, deliverer._LAST_RETRY_S = 0.01, 0.1
folder, what, when = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
path = folder / "telemetry.db"
with Store(f"sqlite:///{path}") as first:  # also: all that is loaded late is loaded
    first.record(provider="p", request_id="before")
    assert first.flush(60)
    first.health()
if os.geteuid() == 0:
    nobody = pwd.getpwnam("nobody")
    for place in (folder, *folder.iterdir()):
        os.chown(place, nobody.pw_uid, nobody.pw_gid)
    os.setgroups([])
    os.setgid(nobody.pw_gid)
    os.setuid(nobody.pw_uid)

def protect():
    for place in folder.iterdir():
        place.chmod(0o444)
    if what == "folder":
        folder.chmod(0o555)

def free():
    folder.chmod(0o755)
    for place in folder.iterdir():
        place.chmod(0o644)

if when == "before":
    protect()
with Store(settings=StoreSettings(url=f"sqlite:///{path}")) as store:
    if when == "during":
        assert store.get_stats() is not None
        store.engine.dispose()
        protect()
    for n in range(50):
        assert store.record(provider="p", request_id=str(n))
    deadline = time.monotonic() + 60
    while store.health().faults_by.get("StoreUnavailable", 0) < 3:
        assert time.monotonic() < deadline, store.health()
        time.sleep(0.01)
    health = store.health()
    away = [health.pending, health.rejected, health.dropped, health.last_error]
    free()
    assert store.flush(60), ("not written when the file is writable again", store.health())
    health = store.health()
    assert health.submitted == health.written == 50
    assert health.pending == health.rejected == health.dropped == health.spooled == 0
print(json.dumps(away))
"""


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_read_only_file_is_waited_for(what, when):
    folder = Path(tempfile.mkdtemp(prefix="lynkr", dir="/tmp"))
    folder.chmod(0o755)
    try:
        child = subprocess.run(
            [sys.executable, "-W", "error", "-c", _READ_ONLY, str(folder), what, when],
            check=False,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert child.returncode == 0, child.stderr
        pending, rejected, dropped, error = json.loads(child.stdout)
        print(f"\n{error}")
        assert (pending, rejected, dropped) == (50, 0, 0)
        assert names_in(folder / "telemetry.db") == ["before", *map(str, range(50))]
        assert child.stderr.count("records wait to be written") <= 2
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.skipif(bool(EXTERNAL), reason="ends the store's connections as superuser")
@pytest.mark.parametrize("backend", POSTGRES)
@pytest.mark.parametrize("pooled", [True, False])
def test_a_read_only_postgresql_is_waited_for(backend, new_url, caplog, pooled):
    """As when a server becomes a standby, and is promoted again."""
    url = new_url(backend, at_head=True)
    engine = create_store_engine(url)
    database = engine.url.database

    def execute(statement):
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(statement)

    with Store(url) as store:
        expected = record(store, "before", 10)
        assert store.flush(30)
        execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
        if pooled:
            with engine.connect() as connection:
                connection.exec_driver_sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    f"WHERE datname = '{database}' AND pid <> pg_backend_pid()"
                )
        else:
            store._database.of_writer.dispose()
        expected += record(store, "read-only")
        health = check_that_they_wait(store, 100)
        assert "read-only transaction" in health.last_error
        lines = said(caplog)
        assert len(lines) == len(set(lines)) <= 2
        execute(f"ALTER DATABASE {database} RESET default_transaction_read_only")
        check_that_all_was_written(store)
    assert names(engine) == expected
    engine.dispose()


# -- a file that goes away ---------------------------------------------------------------------


def remove(path):
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


def replace(path):
    """Put another database of this release's at the path."""
    other = path.with_name("other.db")
    with Store(f"sqlite:///{other}") as store:
        assert store.record(provider="p", request_id="another's")
        assert store.flush(30)
    remove(path)
    other.rename(path)


@pytest.mark.parametrize("what", ["deleted", "replaced", "renamed"])
def test_records_go_to_the_file_that_the_path_names(tmp_path, what):
    path = tmp_path / "telemetry.db"
    with Store(f"sqlite:///{path}") as store:
        record(store, "before", 10)
        assert store.flush(30)
        if what == "deleted":
            remove(path)
        elif what == "replaced":
            replace(path)
        else:
            (tmp_path / "moved").mkdir()
            for place in tmp_path.glob("telemetry.db*"):
                place.rename(tmp_path / "moved" / place.name)
        for number in range(3):
            record(store, f"after {number}", 10)
            assert store.flush(30)
        assert adds_up(store.health())
        assert store.health().written == 40
        assert store.get_provider_stats("p").total == 30 if what != "replaced" else True
    expected = [f"after {number}-{n}" for number in range(3) for n in range(10)]
    assert names_in(path) == ["another's"] * (what == "replaced") + expected
    if what == "renamed":
        assert names_in(tmp_path / "moved" / "telemetry.db") == [f"before-{n}" for n in range(10)]


MOMENTS = ("begin", "before_cursor_execute", "after_cursor_execute", "commit")


class AtMoment:
    """Does something at the n-th event of the writer's thread on an engine."""

    def __init__(self, engine, number, act):
        self.left = number
        self.act = act
        self.done = None
        for name in MOMENTS:
            event.listen(engine, name, functools.partial(self._count, name))

    def _count(self, name, *args):
        self.left -= 1
        if self.left == 0:
            statement = args[2].split("(")[0] if "cursor" in name else ""
            self.done = f"{name} {statement}".strip()
            self.act()


@pytest.mark.slow
@pytest.mark.parametrize("act", [remove, replace], ids=["deleted", "replaced"])
def test_no_moment_at_which_the_file_goes_away_loses_a_record(tmp_path, act):
    """Deleted or replaced at each event of writing a batch, from the BEGIN to the COMMIT."""
    moments, number = [], 0
    while not moments or moments[-1] is not None:
        number += 1
        path = tmp_path / str(number) / "telemetry.db"
        with Store(f"sqlite:///{path}") as store:
            record(store, "before", 3, 100)
            assert store.flush(30)
            hook = AtMoment(store.engine, number, functools.partial(act, path))
            expected = record(store, "after", 3, 100)
            assert store.flush(30)
            moments.append(hook.done)
            if hook.done is None:
                break
            expected += record(store, "later", 3, 100)
            assert store.flush(30)
            health = store.health()
            assert adds_up(health)
            assert (health.written, health.rejected) == (9, 0)
        found = names_in(path)
        assert found == ["another's"] * (act is replace) + expected, f"at {hook.done}"
    print(f"\n{len(moments) - 1} moments: {moments[:-1]}")
    assert len(moments) > 5


# -- a damaged file ----------------------------------------------------------------------------


def pages_damaged(path):
    """All pages but the first are noise."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        size = connection.execute("PRAGMA page_size").fetchone()[0]
    content = path.read_bytes()
    path.write_bytes(content[:size] + random.Random(1).randbytes(len(content) - size))


def header_damaged(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.write(b"no database, but a letter to you")


def cut_short(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.truncate(10_000)


@pytest.mark.parametrize("damage", [pages_damaged, header_damaged, cut_short])
@pytest.mark.parametrize("when", ["before it is opened", "while it is in use"])
def test_a_damaged_file_is_waited_for_and_costs_no_record(tmp_path, caplog, damage, when):
    path = tmp_path / "telemetry.db"
    with Store(f"sqlite:///{path}") as store:
        record(store, "sound", 200, 200)
        assert store.flush(30)
    sound = path.read_bytes()
    caplog.clear()
    if when == "before it is opened":
        damage(path)
    with Store(f"sqlite:///{path}") as store:
        if when == "while it is in use":
            assert store.get_stats() is not None
            store.engine.dispose()
            damage(path)
        record(store, "after", 50, 200)
        health = check_that_they_wait(store, 50)
        print(f"\n{health.last_error}")
        lines = said(caplog)
        assert len(lines) == len(set(lines)) <= 2
        path.with_name("telemetry.db.restored").write_bytes(sound)
        remove(path)
        path.with_name("telemetry.db.restored").rename(path)
        check_that_all_was_written(store)
    assert names_in(path) == [f"sound-{n}" for n in range(200)] + [f"after-{n}" for n in range(50)]


def test_no_space_is_what_the_fixture_makes(disk):
    filler = fill(disk)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number says which
        (disk / "more").write_bytes(b"x" * 10_000)
    assert caught.value.errno == errno.ENOSPC
    filler.unlink()
