"""The copy of an SQLite file that is made before an upgrade."""

import contextlib
import itertools
import os
import pwd
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, inspect, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from lynkr_store import (
    AdoptionRefused,
    BadArgument,
    SchemaAhead,
    Store,
    StoreUnavailable,
    create_store_engine,
    upgrade,
)
from lynkr_store.cli import commands
from lynkr_store.migrate import revisions
from lynkr_store.testing import RecordFactory
from tests.conftest import POSTGRES
from tests.support.recorded import ROOT, gateway_file, insert_rows

pytestmark = pytest.mark.sample(2)

NAME = re.compile(r"telemetry\.db\.before-\d{4}-\d{8}T\d{6}\.\d{6}Z\.bak")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "telemetry.db"


def made_by(kind, path):
    """A database with three rows that must be upgraded: an older one of ours, or a gateway's."""
    if kind == "gateway's":
        gateway_file(path, rows=[RecordFactory(provider=f"p{n}") for n in range(3)])
        return
    upgrade(f"sqlite:///{path}", "0003")
    with closing(sqlite3.connect(path)) as connection, connection:
        insert_rows(connection, [RecordFactory(provider=f"p{n}") for n in range(3)])


@pytest.fixture(params=["gateway's", "ours"])
def old(request, path):
    made_by(request.param, path)
    return path


def contents(path):
    """The schema and every row; a file that is nobody's is looked at in a copy."""
    with tempfile.TemporaryDirectory() as folder:
        for end in ("", "-wal", "-journal"):
            beside = path.with_name(path.name + end)
            if beside.exists():
                shutil.copy(beside, Path(folder) / f"copy{end}")
        with closing(sqlite3.connect(Path(folder) / "copy")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            schema = connection.execute(
                "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name"
            ).fetchall()
            tables = [name for kind, name, *_ in schema if kind == "table"]
            return schema, {
                table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables
            }


def copies(path):
    return sorted(path.parent.glob(f"{path.name}.*.bak*"))


def providers(path):
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT provider FROM routing_telemetry ORDER BY id")
        return [provider for (provider,) in rows]


def is_at_head(path):
    engine = create_store_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        found = revisions.current(connection)
    engine.dispose()
    return found == revisions.head()


# -- what the copy is ------------------------------------------------------------------------------


def test_the_copy_has_the_old_schema_and_every_row(old):
    before = contents(old)
    copy = upgrade(f"sqlite:///{old}", backup=True)
    assert copies(old) == [copy]
    assert copy.parent == old.parent
    assert NAME.fullmatch(copy.name)
    assert f"before-{revisions.head()}" in copy.name
    assert contents(copy) == before
    assert is_at_head(old)
    assert len(before[1]["routing_telemetry"]) == 3
    assert providers(old) == providers(copy)


@contextmanager
def as_host(path):
    engine = create_engine(f"sqlite:///{path}")
    yield engine
    engine.dispose()


@contextmanager
def as_own(path):
    engine = create_store_engine(f"sqlite:///{path}")
    yield engine
    engine.dispose()


@contextmanager
def as_async(path):
    yield create_async_engine(f"sqlite+aiosqlite:///{path}")


@contextmanager
def as_url(path):
    yield make_url(f"sqlite:///{path}")


@contextmanager
def as_relative(path):
    with contextlib.chdir(path.parent):
        yield f"sqlite:///{path.name}"


TARGETS = [as_host, as_own, as_async, as_url, as_relative]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_whatever_names_the_file_it_is_copied(old, target):
    before = contents(old)
    with target(old) as named:
        copy = upgrade(named, backup=True)
    assert contents(old.parent / copy) == before
    assert is_at_head(old)


@pytest.mark.parametrize("form", ["absolute", "relative"])
def test_a_file_that_is_named_by_a_uri_is_copied(old, form):
    before, beside = contents(old), {p.name for p in old.parent.iterdir()}
    with contextlib.chdir(old.parent):
        name = old if form == "absolute" else old.name
        copy = upgrade(f"sqlite:///file:{name}?uri=true", backup=True)
        assert contents(copy.absolute()) == before
    assert {p.name for p in old.parent.iterdir()} - beside == {copy.name}
    assert is_at_head(old)


def test_what_is_in_the_wal_alone_is_in_the_copy(old):
    with closing(sqlite3.connect(old)) as writer:
        writer.execute("PRAGMA journal_mode = wal")
        writer.execute("PRAGMA wal_autocheckpoint = 0")
        insert_rows(writer, [RecordFactory(provider="in the wal")])
        writer.commit()
        with closing(sqlite3.connect(f"file:{old}?immutable=1", uri=True)) as without_wal:
            said = without_wal.execute("SELECT provider FROM routing_telemetry").fetchall()
        assert ("in the wal",) not in said
        before = contents(old)
        copy = upgrade(f"sqlite:///{old}", backup=True)
        assert not copy.with_name(copy.name + "-wal").exists()
        assert contents(copy) == before
        assert providers(copy)[-1] == "in the wal"
        writer.execute(
            "INSERT INTO routing_telemetry (request_id, timestamp, provider) "
            "VALUES ('later', 1, 'later')"
        )
        writer.commit()
    assert providers(old)[-2:] == ["in the wal", "later"]
    assert "later" not in providers(copy)


@pytest.mark.parametrize("mode", ["delete", "truncate", "persist"])
def test_a_file_with_a_rollback_journal_is_copied(path, mode):
    gateway_file(path, rows=[RecordFactory(provider="p")])
    with closing(sqlite3.connect(path)) as writer:
        writer.execute(f"PRAGMA journal_mode = {mode}")
        writer.execute("BEGIN IMMEDIATE")
        insert_rows(writer, [RecordFactory(provider="rolled back")])
        writer.rollback()
        before = contents(path)
        copy = upgrade(f"sqlite:///{path}", backup=True)
    assert contents(copy) == before
    assert providers(copy) == ["p"]
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_its_owner_alone_may_read_the_copy(old, mask):
    old.chmod(0o666)
    modes = []

    def look(*_):
        modes.extend(stat.S_IMODE(copy.stat().st_mode) for copy in copies(old))

    engine = create_store_engine(f"sqlite:///{old}")
    event.listen(engine, "begin", look)  # also when the upgrade has begun
    before = os.umask(mask)
    try:
        copy = upgrade(engine, backup=True)
    finally:
        os.umask(before)
        engine.dispose()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert modes and set(modes) == {0o600}
    assert stat.S_IMODE(old.stat().st_mode) == 0o666


def test_nobody_else_may_read_it_while_it_is_made(old, monkeypatch):
    """The texts are there from the first page on."""
    seen = []
    connect = sqlite3.connect

    def looking(database, *arguments, **options):
        seen.extend((p.suffix, stat.S_IMODE(p.stat().st_mode)) for p in copies(old))
        return connect(database, *arguments, **options)

    monkeypatch.setattr("lynkr_store.migrate.backup.sqlite3.connect", looking)
    upgrade(f"sqlite:///{old}", backup=True)
    assert (".partial", 0o600) in seen
    assert {mode for _, mode in seen} == {0o600}


def test_the_copy_can_be_upgraded_itself(old):
    copy = upgrade(f"sqlite:///{old}", backup=True)
    rows = providers(copy)
    again = upgrade(f"sqlite:///{copy}", backup=True)
    assert again.parent == copy.parent and again != copy
    assert is_at_head(copy)
    assert not is_at_head(again)
    assert providers(copy) == providers(again) == rows
    with Store(f"sqlite:///{copy}") as store:
        assert len(store.query()) == 3


def test_every_upgrade_makes_a_copy_of_its_own(path):
    made_by("ours", path)
    made = [upgrade(f"sqlite:///{path}", r, backup=True) for r in ("0004", "0005", "head")]
    assert copies(path) == sorted(made)
    assert len({*made}) == 3


def test_the_command_makes_it_and_says_where(old):
    done = subprocess.run(
        [sys.executable, "-m", "lynkr_store", "upgrade", "--backup", "--url", f"sqlite:///{old}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [copy] = copies(old)
    assert f"copied to {copy}\n" in done.stdout
    assert providers(copy) == providers(old)
    assert is_at_head(old)


# -- where none is made ----------------------------------------------------------------------------


def test_no_copy_is_made_unasked(old):
    assert upgrade(f"sqlite:///{old}") is None
    assert copies(old) == []


@pytest.mark.parametrize("kind", ["absent", "of no bytes", "without a table"])
def test_nothing_is_copied_where_nothing_is(path, kind):
    if kind == "of no bytes":
        path.touch()
    elif kind == "without a table":
        create_store_engine(f"sqlite:///{path}").connect().close()
    assert upgrade(f"sqlite:///{path}", backup=True) is None
    assert copies(path) == []
    assert is_at_head(path)


@pytest.mark.parametrize(
    ("stands", "asked"), [("head", "head"), ("0003", "0003"), ("0003", "0002")]
)
def test_nothing_is_copied_where_nothing_is_to_be_changed(path, stands, asked):
    url = f"sqlite:///{path}"
    upgrade(url, stands)
    before = contents(path)
    assert upgrade(url, asked, backup=True) is None
    assert copies(path) == []
    assert contents(path) == before


def test_a_newer_releases_file_is_not_copied(path):
    upgrade(f"sqlite:///{path}")
    for rolling in (1, 0):
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE lynkr_store_alembic_version SET version_num = '9998'")
            connection.execute("DELETE FROM lynkr_store_revisions WHERE revision = '9998'")
            note = "INSERT INTO lynkr_store_revisions VALUES ('9998', ?, ?, '9.9')"
            connection.execute(note, (rolling, revisions.head()))
        if rolling:
            assert upgrade(f"sqlite:///{path}", backup=True) is None
        else:
            with pytest.raises(SchemaAhead):
                upgrade(f"sqlite:///{path}", backup=True)
    assert copies(path) == []


def test_a_wrong_revision_copies_nothing(old):
    before = contents(old)
    with pytest.raises(BadArgument, match="revision"):
        upgrade(f"sqlite:///{old}", "nonsense", backup=True)
    assert contents(old) == before
    assert copies(old) == []


def test_a_file_that_is_refused_stays_as_it_is(path):
    gateway_file(path, 2, (), None, "CREATE UNIQUE INDEX theirs ON routing_telemetry (request_id)")
    before = path.read_bytes()
    with pytest.raises(AdoptionRefused):
        upgrade(f"sqlite:///{path}", backup=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("stands", [None, "0003", "head"])
@pytest.mark.parametrize("backend", ["sqlite-memory", *POSTGRES])
def test_a_backup_of_what_is_no_file_is_refused_and_nothing_is_upgraded(new_url, backend, stands):
    engine = create_store_engine(new_url(backend))
    if stands:
        upgrade(engine, stands)
    with pytest.raises(BadArgument, match="backup"):
        upgrade(engine, backup=True)
    with engine.connect() as connection:
        found = revisions.current(connection)
        assert found == (revisions.head() if stands == "head" else stands)
        assert stands or inspect(connection).get_table_names() == []
    engine.dispose()


def test_the_command_refuses_it_as_wrong_use(postgres_url, monkeypatch, capsys):
    command = ["lynkr-store", "upgrade", "--backup", "--url", postgres_url]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == commands.Exit.WRONG_USE
    assert "backup" in capsys.readouterr().err


# -- where it fails --------------------------------------------------------------------------------

# Everything is imported before the limits come, which are the whole process's.
CHILD = """
import os, resource, signal, sys
from pathlib import Path
from lynkr_store import StoreUnavailable, upgrade
import lynkr_store.migrate.scripts  # the user below may not read where Alembic lies
path, limit, user = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
if user:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
try:
    upgrade(f"sqlite:///{path}", backup=True)
except StoreUnavailable as error:
    print(error)
    sys.exit(3)
"""


def fails_in_a_child(path, *, limit=0, user=0):
    """Upgrade where no copy can be made; return what it said."""
    arguments = [str(path), str(limit), str(user)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    return done.stdout


def state_of(folder):
    """Every file there, with its bytes and its mode."""
    return {p.name: (p.read_bytes(), p.stat().st_mode) for p in folder.iterdir()}


def test_without_room_nothing_is_left_and_nothing_was_changed(old):
    with closing(sqlite3.connect(old)) as connection, connection:
        rows = [RecordFactory(request_text="t" * 60_000) for _ in range(10)]
        insert_rows(connection, rows)
    before = state_of(old.parent)
    assert old.stat().st_size > 2**19
    said = fails_in_a_child(old, limit=2**18)
    assert said.startswith("backup: ")
    assert "nothing was changed" in said
    assert state_of(old.parent) == before
    assert upgrade(f"sqlite:///{old}", backup=True), "later there is room"
    assert is_at_head(old)


def test_where_no_file_may_be_made_nothing_was_changed(old):
    """As root, by another user, whom a folder's mode keeps off."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = Path(shutil.copy(old, folder))
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = delete")  # a WAL would be made there too
        path.chmod(0o666)
        folder.chmod(0o555)
        before = state_of(folder)
        user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else 0
        said = fails_in_a_child(path, user=user)
        assert "Permission denied" in said
        assert said.startswith("backup: ")
        assert state_of(folder) == before
        folder.chmod(0o755)


def test_a_name_that_gets_too_long_is_reported_and_nothing_was_changed(tmp_path):
    path = tmp_path / ("t" * 240 + ".db")
    made_by("gateway's", path)
    before = state_of(tmp_path)
    with pytest.raises(StoreUnavailable, match=r"backup: .*nothing was changed"):
        upgrade(f"sqlite:///{path}", backup=True)
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("step", ["backup", "fsync", "rename"])
def test_a_failure_in_any_step_leaves_no_copy_and_changes_nothing(old, monkeypatch, step):
    class Failing(sqlite3.Connection):
        def backup(self, target, **options):
            super().backup(target, **options)
            raise sqlite3.OperationalError("database or disk is full")

    @contextmanager
    def failing(path):
        with closing(sqlite3.connect(path, factory=Failing)) as source:
            yield source

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    if step == "backup":
        monkeypatch.setattr("lynkr_store.migrate.backup._read_only", failing)
    elif step == "fsync":
        monkeypatch.setattr("lynkr_store.migrate.backup.os.fsync", fail)
    else:
        monkeypatch.setattr("lynkr_store.migrate.backup.Path.rename", fail)
    before = state_of(old.parent)
    with pytest.raises(StoreUnavailable, match=r"backup: .*nothing was changed"):
        upgrade(f"sqlite:///{old}", backup=True)
    assert state_of(old.parent) == before
    assert not is_at_head(old)


def test_when_the_upgrade_fails_afterwards_the_file_is_as_it_was_and_no_copy_is_unsound(
    old, monkeypatch
):
    def fail(*args):
        raise RuntimeError("half-way")

    before = contents(old)
    monkeypatch.setattr("lynkr_store.migrate.operations.create_indexes", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        upgrade(f"sqlite:///{old}", backup=True)
    assert contents(old) == before
    for copy in copies(old):
        assert contents(copy) == before


# -- beside others ---------------------------------------------------------------------------------

MIB = 2**20


class Writer(threading.Thread):
    """A gateway that writes, each row in a transaction, and notes how long the longest took."""

    def __init__(self, path):
        super().__init__()
        self._path = path
        self._ended = threading.Event()
        self.written = []
        self.longest_s = 0.0

    def run(self):
        with closing(sqlite3.connect(self._path, isolation_level=None, timeout=3)) as connection:
            for number in itertools.count():
                if self._ended.is_set():
                    return
                began = time.monotonic()
                connection.execute(
                    "INSERT INTO routing_telemetry (request_id, timestamp, provider) "
                    "VALUES (?, 1, 'beside')",
                    (f"beside-{number}",),
                )
                self.longest_s = max(self.longest_s, time.monotonic() - began)
                self.written.append(f"beside-{number}")
                time.sleep(0.001)

    def __enter__(self):
        self.start()
        while not self.written:
            assert self.is_alive(), "it did not begin"
            time.sleep(0.001)
        return self

    def __exit__(self, *exc):
        self._ended.set()
        self.join()


@pytest.mark.parametrize("kind", ["gateway's", "ours"])
def test_a_writer_keeps_writing_meanwhile_and_never_waits_long(path, kind):
    made_by(kind, path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = wal")  # as the gateway has it
        row = RecordFactory(provider="before", request_text="t" * 60_000)
        insert_rows(connection, [row] * 1_000)
    assert path.stat().st_size > 50 * MIB
    with Writer(path) as writer:
        began = len(writer.written)
        copy = upgrade(f"sqlite:///{path}", backup=True)
        during = len(writer.written) - began
    assert writer.longest_s < 1
    assert during > 3
    names = "SELECT request_id FROM routing_telemetry WHERE provider = 'beside' ORDER BY id"
    with closing(sqlite3.connect(path)) as connection:
        stored = [name for (name,) in connection.execute(names)]
    assert stored == writer.written, "every row that was written is in the file"
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        count = "SELECT count(*) FROM routing_telemetry WHERE provider = 'before'"
        assert connection.execute(count).fetchone() == (1_000,)
        copied = [name for (name,) in connection.execute(names)]
    assert copied == stored[: len(copied)], "as it was at one moment"
    assert is_at_head(path)
    assert not is_at_head(copy)


def test_a_copy_does_not_wait_for_the_write_lock(path):
    made_by("gateway's", path)
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as writer:
        writer.execute("PRAGMA journal_mode = wal")
        writer.execute("BEGIN IMMEDIATE")
        insert_rows(writer, [RecordFactory(provider="not yet committed")])

        def commit_when_there_is_a_copy():
            while not [p for p in copies(path) if p.suffix == ".bak"]:
                time.sleep(0.001)
            writer.execute("COMMIT")

        waiting = threading.Thread(target=commit_when_there_is_a_copy, daemon=True)
        waiting.start()
        copy = upgrade(f"sqlite:///{path}", backup=True)
        waiting.join()
    assert providers(copy) == ["p0", "p1", "p2"]
    assert providers(path) == ["p0", "p1", "p2", "not yet committed"]
    assert is_at_head(path)
