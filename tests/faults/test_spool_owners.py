"""A spool holds prompts: each file is its user's alone, and another user's is never used."""

import itertools
import logging
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from lynkr_store import AsyncStore, BadArgument, Store, StoreSettings, create_store_engine
from lynkr_store.exceptions import SpoolError
from lynkr_store.ingest import spool as spool_module
from lynkr_store.ingest.spool import Spool, SpoolForeign
from lynkr_store.process import files as files_module
from tests.support.stores import adds_up, eventually

NOBODY = 65_534
MARK = "Wp5Prompt"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs to act as another user")


@pytest.fixture
def folder():
    """A directory as /tmp is: everybody may make files there, and remove their own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o1777)
        yield Path(name)


@pytest.fixture
def path(folder):
    return folder / "spool.db"


@pytest.fixture(params=["O_PATH", "lstat"])
def way(request, monkeypatch):
    """How a file is looked at: as on Linux, and as elsewhere."""
    if request.param == "lstat":
        monkeypatch.setattr(files_module, "_PATH_ONLY", None)


@pytest.fixture
def make(path):
    made = []

    def make(at=path, *, opened=True):
        spool = Spool(at, 2**26)
        made.append(spool)
        if opened:
            spool.open()
        return spool

    yield make
    for spool in made:
        spool.close()


def rows(name, count=3):
    return [
        {"request_id": f"{name}-{n}", "provider": "p", "timestamp": 1, "request_text": MARK}
        for n in range(count)
    ]


def filled(path, name="left"):
    """What a process that is gone left at the path."""
    spool = Spool(path, 2**26)
    spool.open()
    spool.enter(name, rows(name), None)
    spool.close()
    journal(path).unlink(missing_ok=True)


def journal(path, end="-journal"):
    return path.with_name(f"{path.name}{end}")


def give_away(path):
    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def as_nobody(*command):
    return subprocess.run(
        command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=False
    )


def modes(folder):
    return {
        place.name: oct(stat.S_IMODE(place.lstat().st_mode))
        for place in folder.iterdir()
        if place.is_file()
    }


def content(folder):
    return {place.name: place.read_bytes() for place in folder.iterdir() if place.is_file()}


def refused(make, path, match):
    """Each way in says the same, and touches nothing."""
    before = content(path.parent), modes(path.parent)
    spool = make(opened=False)
    for attempt in (spool.open, lambda: spool.enter("a", rows("a"), None)):
        with pytest.raises(SpoolForeign, match=match) as told:
            attempt()
        assert f"spool_path: {path}" in str(told.value)
    assert spool.first() is None
    assert (spool.found_rows, spool.set_aside) == (0, [])
    spool.close()
    assert (content(path.parent), modes(path.parent)) == before


# -- one's own ---------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("mode", [0o644, 0o666, 0o640, 0o606, 0o660])
@pytest.mark.parametrize("full", [True, False])
def test_a_file_of_ours_is_shut_before_anything_is_written(make, path, folder, mode, full):
    if full:
        filled(path)
    else:
        path.touch()
    journal(path).touch()
    path.chmod(mode)
    journal(path).chmod(mode)
    spool = make()
    assert modes(folder) == {"spool.db": "0o600", "spool.db-journal": "0o600"}
    spool.enter("a", rows("a"), None)
    assert modes(folder) == {"spool.db": "0o600", "spool.db-journal": "0o600"}
    for place in folder.iterdir():
        assert as_nobody("/bin/cat", place).returncode != 0
    assert spool.found_rows == (3 if full else 0)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_directory_that_is_made_is_its_owners_alone(make, folder, umask):
    before = os.umask(umask)
    try:
        make(folder / "deep" / "spools" / "spool.db").enter("a", rows("a"), None)
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "deep" / "spools").stat().st_mode) == 0o700


def test_where_no_file_can_be_made_without_a_descriptor_it_is_private_too(
    make, path, folder, monkeypatch
):
    def mknod(*_):
        raise PermissionError

    monkeypatch.setattr(os, "mknod", mknod)
    before = os.umask(0)
    try:
        make().enter("a", rows("a"), None)
    finally:
        os.umask(before)
    assert modes(folder) == {"spool.db": "0o600", "spool.db-journal": "0o600"}


def test_where_modes_cannot_be_changed_the_file_is_refused(make, path, monkeypatch):
    path.touch(0o644)
    monkeypatch.setattr(Path, "chmod", lambda *_, **__: None)
    refused(make, path, "lets others read it")


# -- what is no file of ours -------------------------------------------------------------------


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("target", ["missing", "empty", "spool"])
def test_a_link_is_refused_and_what_it_leads_to_is_left_alone(make, path, folder, target):
    there = folder / "there" / "other.db"
    there.parent.mkdir(mode=0o700)
    if target == "empty":
        there.touch()
    elif target == "spool":
        filled(there)
    before = content(there.parent)
    path.symlink_to(there)
    refused(make, path, "symbolic link: give the path of the file itself")
    assert content(there.parent) == before


@pytest.mark.usefixtures("way")
def test_a_hard_link_is_refused(make, path, folder):
    other = folder / "other"
    other.write_bytes(b"")
    path.hardlink_to(other)
    refused(make, path, "hard link")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", ["directory", "fifo", "socket"])
def test_what_is_no_file_is_refused_at_once(make, path, kind):
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)  # who opens it waits
        case _:
            os.mknod(path, 0o600 | stat.S_IFSOCK)
    refused(make, path, "no regular file: remove it, or give another path")


@needs_root
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("mode", [0o666, 0o600])
@pytest.mark.parametrize("full", [True, False])
def test_another_users_file_is_refused(make, path, mode, full):
    if full:
        filled(path)
    else:
        path.touch()
    path.chmod(mode)
    give_away(path)
    refused(make, path, f"belongs to another user .uid {NOBODY}.: remove it, or give another path")


@needs_root
@pytest.mark.parametrize("end", ["-journal", "-wal", "-shm"])
@pytest.mark.parametrize("kind", ["theirs", "link"])
def test_a_journal_that_is_not_ours_is_refused(make, path, folder, end, kind):
    filled(path)
    beside = journal(path, end)
    if kind == "theirs":
        beside.touch(0o666)
        give_away(beside)
    else:
        beside.symlink_to(folder / "elsewhere")
    refused(make, path, "belongs to another user" if kind == "theirs" else "symbolic link")


def test_a_journal_that_another_process_ends_with_its_transaction_is_made_again(
    make, path, monkeypatch
):
    make_private, ends = files_module.make_private, 3

    def ended(made):
        nonlocal ends
        made_it = make_private(made)
        if made == journal(path) and ends:
            ends -= 1
            made.unlink()
        return made_it

    monkeypatch.setattr(spool_module, "make_private", ended)
    spool = make()
    assert not ends
    assert spool.enter("batch", rows("r"), None).file.path == path, "no other name was taken"


@needs_root
def test_another_users_hot_journal_is_not_played_back_into_our_file(make, path):
    """Its pages are rows that the other user wrote, say."""
    filled(path, "planted")
    with closing(sqlite3.connect(path)) as connection:
        connection.isolation_level = None
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE batches SET batch_id = 'other', payload = zeroblob(100000)")
        hot = journal(path).read_bytes()
        assert hot[:8] == bytes.fromhex("d9d505f920a163d7"), "a journal's first bytes"
    path.unlink()
    filled(path, "ours")
    journal(path).write_bytes(hot)
    journal(path).chmod(0o666)
    give_away(journal(path))
    refused(make, path, "belongs to another user")
    journal(path).unlink()
    assert make().first().batch_id == "ours"


def test_a_directory_in_which_everybody_can_replace_files_is_refused(make, path, folder):
    folder.chmod(0o777)
    with pytest.raises(SpoolError, match=r"any user can replace files in .* or run chmod o-w"):
        make()
    assert list(folder.iterdir()) == []
    folder.chmod(0o1777)
    make().enter("a", rows("a"), None)


def test_a_file_that_is_replaced_while_it_is_opened_is_refused(make, path, folder, monkeypatch):
    other = folder / "other.db"
    filled(other)
    connect = sqlite3.connect

    def replacing(*args, **kwargs):
        other.replace(path)
        return connect(*args, **kwargs)

    monkeypatch.setattr(sqlite3, "connect", replacing)
    with pytest.raises(SpoolForeign, match="replaced while it was opened"):
        make()


LOCKED = """
    import sqlite3, sys
    connection = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        print(error)
    else:
        print("free")
"""


def lock_of(path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOCKED), path],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.usefixtures("way")
def test_looking_at_a_file_takes_no_lock_away_that_this_process_has_on_it(make, path):
    """Any ordinary descriptor would, when it is closed."""
    with closing(sqlite3.connect(path, isolation_level=None)) as host:
        host.execute("CREATE TABLE theirs (a)")
        host.execute("BEGIN IMMEDIATE")
        spool = make(opened=False)
        with pytest.raises(SpoolForeign, match="another program's database"):
            spool.open()
        assert lock_of(path) == "database is locked"
        host.execute("COMMIT")
        assert lock_of(path) == "free"


@pytest.mark.usefixtures("way")
def test_a_second_spool_leaves_the_first_its_lock(make, path):
    first = make()
    first.enter("a", rows("a"), None)
    assert make()._own.path == journal(path, ".2")
    assert lock_of(path) == "database is locked"
    assert first.load(first.first()) == rows("a")


# -- siblings ----------------------------------------------------------------------------------


@contextmanager
def unusable(path, kind):
    if kind in ("theirs", "theirs alone"):
        filled(path, "planted")
        path.chmod(0o666 if kind == "theirs" else 0o600)
        give_away(path)
    elif kind == "link":
        filled(path.with_name("elsewhere"), "planted")
        path.symlink_to("elsewhere")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE theirs (a)")
    before = content(path.parent).get(path.name)
    yield
    assert content(path.parent).get(path.name) == before, "it was not touched"


KINDS = ["theirs", "theirs alone", "link", "directory", "fifo", "another program's"]


@needs_root
@pytest.mark.parametrize("kind", KINDS)
def test_a_sibling_that_is_not_ours_is_passed_over_and_the_others_are_not(make, path, kind):
    with unusable(journal(path, ".5"), kind):
        filled(journal(path, ".7"), "ours")
        spool = make()
        assert [entry.batch_id for entry in spool._entries] == ["ours"]
        assert spool.found_rows == 3
        [said] = spool.passed_over
        assert "spool.db.5" in str(said)
        spool.open()
        assert len(spool.passed_over) == 1, "said once"


@needs_root
@pytest.mark.parametrize("kind", KINDS)
def test_a_process_whose_path_is_taken_goes_to_the_next_name_that_is_free(make, path, kind):
    make()
    with unusable(journal(path, ".2"), kind):
        second = make()
        second.enter("a", rows("a"), None)
        assert second._own.path == journal(path, ".3")
        assert second.first().batch_id == "a"


# -- a store -----------------------------------------------------------------------------------


@pytest.fixture
def open_(url, path):
    opened = []

    def open_(**options):
        settings = StoreSettings(url=url, spool_path=path, spool_after_s=0.0, **options)
        opened.append(Store(settings=settings))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


@needs_root
def test_rows_that_another_user_planted_are_not_stored_and_an_operator_learns_of_it(
    open_, path, caplog
):
    filled(journal(path, ".7"), "planted")
    journal(path, ".7").chmod(0o666)
    give_away(journal(path, ".7"))
    with caplog.at_level(logging.WARNING, "lynkr_store"):
        store = open_()
        assert store.record(provider="p", request_id="ours")
        assert store.flush(30)
        eventually(lambda: store.health().faults_by.get("SpoolForeign") == 1)
        store.close()
    health = store.health()
    assert adds_up(health)
    assert (health.recovered, health.written) == (0, 1)
    [line] = [line for line in caplog.messages if "spool.db.7" in line]
    assert "not used" in line
    assert f"uid {NOBODY}" in line
    assert MARK not in caplog.text


@needs_root
def test_a_store_whose_spool_is_anothers_works_on_and_says_so(open_, path, engine, caplog):
    path.touch(0o666)
    give_away(path)
    with caplog.at_level(logging.WARNING, "lynkr_store"):
        store = open_()
        assert store.record(provider="p", request_text=MARK)
        assert store.flush(30)
        health = store.health()
    assert (health.written, health.pending, health.spooled) == (1, 0, 0)
    assert health.faults_by["SpoolForeign"] >= 1
    assert "belongs to another user" in health.last_error
    assert sum("belongs to another user" in line for line in caplog.messages) == 1
    assert path.read_bytes() == b""


UNPRIVILEGED = """
    import os, sys
    from pathlib import Path
    from lynkr_store.exceptions import SpoolError
    from lynkr_store.ingest.spool import Spool

    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
    spool = Spool(Path(sys.argv[1]), 2**20)
    try:
        spool.open()
    except SpoolError as error:
        print(error)
    else:
        print(spool._own.path, oct(spool._own.path.stat().st_mode & 0o777))
"""


@needs_root
def test_an_unprivileged_user_refuses_roots_file(path):
    filled(path)
    path.chmod(0o666)

    def said():
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(UNPRIVILEGED), path, str(NOBODY)],
            env={k: v for k, v in os.environ.items() if not k.startswith("COV")},  # it is root's
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    assert "belongs to another user (uid 0)" in said()
    path.unlink()
    assert said() == f"{path} 0o600\n"


# -- the database's own files ------------------------------------------------------------------


def clashing(folder):
    """Ways to name a file of the database's: spool_path, and what is made before."""
    database = folder / "telemetry.db"
    link, hard = folder / "link", folder / "hard"
    yield "itself", database, None
    yield "not yet there", folder / "new.db", None
    for end in ("-wal", "-shm", "-journal"):
        yield end, journal(database, end), None
    yield "link", link, lambda: link.symlink_to(database)
    yield "link to its WAL", link, lambda: link.symlink_to(journal(database, "-wal"))
    yield "hard link", hard, lambda: hard.hardlink_to(database)
    yield "dots", folder / "x" / ".." / "telemetry.db", (folder / "x").mkdir
    yield (
        "its directory's link",
        folder / "l" / "telemetry.db",
        lambda: (folder / "l").symlink_to(folder),
    )
    yield "sibling", folder / "telemetry", None


@pytest.mark.sample(5)
@pytest.mark.parametrize("number", range(11))
@pytest.mark.parametrize("kind", ["sync", "async", "host", "uri"])
def test_a_spool_in_the_databases_own_file_is_refused(tmp_path, number, kind):
    how, path, prepare = next(itertools.islice(clashing(tmp_path), number, None))
    name = {"not yet there": "new.db", "sibling": "telemetry.2"}.get(how, "telemetry.db")
    url = f"sqlite:///{tmp_path / name}"
    if kind == "uri":
        url = f"sqlite:///file:{tmp_path / name}?uri=true"
    if how != "not yet there":
        Store(url).maintain()
    if prepare:
        prepare()
    settings = StoreSettings(url=url, spool_path=path)
    engine = create_store_engine(url)
    options = {"host": {"engine": engine}}.get(kind, {})
    store = AsyncStore if kind == "async" else Store
    with pytest.raises(BadArgument, match=r"spool_path: .* is the database's file"):
        store(settings=settings, **options)
    engine.dispose()


def test_a_spool_in_the_databases_directory_is_fine(tmp_path):
    url = f"sqlite:///{tmp_path / 'telemetry.db'}"
    for name in ("telemetry.db.2", "telemetry.spool", "telemetry.db-spool"):
        with Store(settings=StoreSettings(url=url, spool_path=tmp_path / name)) as store:
            assert store.record(provider="p")
            assert store.flush(30)
