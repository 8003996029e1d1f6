"""Whether anybody else has a file open."""

import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager

import pytest
from sqlalchemy import create_engine

from lynkr_store import Store
from lynkr_store.storage import company, write_lock
from lynkr_store.storage.company import has_company

_USER = (
    "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
    "c.execute('SELECT * FROM sqlite_schema').fetchall(); print('open', flush=True); input()"
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "t.db"


@pytest.fixture
def mine(path):
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (a)")
        yield connection


@contextmanager
def another_process(path):
    with subprocess.Popen(
        [sys.executable, "-c", _USER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"open\n"
        yield
        process.communicate(b"\n")


@pytest.mark.usefixtures("mine")
def test_another_process_is_company_while_it_has_the_file_open(path):
    assert not has_company(path, 1)
    with another_process(path):
        assert has_company(path, 1)
    assert not has_company(path, 1)


def test_another_connection_of_this_process_is_company_even_in_a_transaction_of_ours(path, mine):
    mine.execute("BEGIN IMMEDIATE")
    assert not has_company(path, 1)
    with closing(sqlite3.connect(path)):
        assert has_company(path, 1)
        assert not has_company(path, 2), "one may have several"


def test_asking_takes_no_lock_away(path, mine):
    mine.execute("BEGIN IMMEDIATE")
    assert not has_company(path, 1)
    other = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], timeout=0); "
        "c.execute('BEGIN IMMEDIATE')"
    )
    done = subprocess.run(
        [sys.executable, "-c", other, path], capture_output=True, text=True, check=False
    )
    assert "database is locked" in done.stderr


def test_where_it_cannot_be_told_there_is_company(path, mine, monkeypatch):
    mine.execute("PRAGMA journal_mode = DELETE")
    assert has_company(path, 1), "there is no WAL"
    mine.execute("PRAGMA journal_mode = WAL")
    mine.execute("SELECT * FROM t").fetchall()
    assert not has_company(path, 1)
    assert has_company(path.with_name("gone.db"), 1)
    with monkeypatch.context() as patched:
        patched.setattr(company, "_OPEN", path)
        assert has_company(path, 1), "nothing says what is open"
    with monkeypatch.context() as patched:
        patched.setattr(sys, "platform", "other")
        assert has_company(path, 1)


def test_the_index_of_another_process_alone_is_company(path, mine):
    with another_process(path):
        mine.close()
        assert has_company(path, 1), "we have none to ask about"


@contextmanager
def in_another_process(path, engine):
    del engine
    with another_process(path):
        yield


@contextmanager
def in_this_process(path, engine):
    del engine
    with closing(sqlite3.connect(path)):
        yield


@contextmanager
def by_the_stores_engine(path, engine):
    del path
    with engine.connect():
        yield


@pytest.mark.parametrize("beside", [in_another_process, in_this_process, by_the_stores_engine])
def test_the_lock_is_left_alone_where_somebody_may_wait_for_it(path, monkeypatch, beside):
    pauses = []
    monkeypatch.setattr(write_lock, "pause_s", lambda *_: 0.001)
    monkeypatch.setattr(write_lock.WriteLock, "_pause", lambda *_: pauses.append(1))

    def pauses_of_a_batch():
        pauses.clear()
        store.record(provider="p")
        assert store.flush(10)
        return len(pauses)

    with Store(f"sqlite:///{path}") as store:
        store.maintain()
        assert store.get_stats() is None, "its connection is at rest in the pool"
        assert not pauses_of_a_batch()
        with beside(path, store.engine):
            assert pauses_of_a_batch() == 1


def test_a_hosts_engine_may_have_other_users(path, monkeypatch):
    pauses = []
    monkeypatch.setattr(write_lock, "pause_s", lambda *_: 0.001)
    monkeypatch.setattr(write_lock.WriteLock, "_pause", lambda *_: pauses.append(1))
    engine = create_engine(f"sqlite:///{path}")
    with Store(engine=engine) as store:
        store.record(provider="p")
        assert store.flush(10)
    assert pauses
    engine.dispose()
