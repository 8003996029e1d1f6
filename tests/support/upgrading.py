"""Programs that upgrade a database beside each other, and are killed at it.

``python -m tests.support.upgrading NAME OPTIONS`` runs one of `PROGRAMS`; it says what it has to
say in lines of JSON. What the commands that it runs print goes to standard error.
"""

import itertools
import json
import os
import random
import re
import runpy
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import alembic.autogenerate
import alembic.command  # noqa: F401 - here, and not in each process that is killed
import psycopg
from psycopg import sql
from sqlalchemy import Engine, Pool, event, make_url
from sqlalchemy.engine.default import DefaultDialect

from lynkr_store import Store, StoreSettings, create_store_engine
from lynkr_store.backend import VERSION_TABLE
from lynkr_store.maintenance.indexes import build_missing_indexes
from lynkr_store.migrate import revisions
from lynkr_store.migrate.comparison import drift, missing_indexes
from lynkr_store.migrate.upgrade import upgrade
from tests.support import programs
from tests.support.recorded import ROOT

WAYS = ("alembic", "command", "code", "store")
_HUNG_S = 120  # a child that takes longer is ended by its alarm
_LABEL = 100  # characters of a statement that name a moment

Say = Callable[..., None]


# -- of the tests ---------------------------------------------------------------------------------


command = partial(programs.command, __name__)
run = partial(programs.run, __name__)


def launch(name: str, **options: Any) -> programs.Child:
    """Start one of the programs; leaving its block kills it."""
    return programs.Child(command(name, options))


def snapshot(url: str) -> list[str]:
    """The whole schema and every row, as lines; nothing for a file that is not there.

    A file is looked at in a copy: opening it would mend what a killed process left.
    """
    target = make_url(url)
    if target.get_backend_name() == "sqlite":
        assert target.database
        return _of_file(Path(target.database))
    return _of_postgresql(url)


def _of_file(path: Path) -> list[str]:
    if not path.exists():
        return []
    with tempfile.TemporaryDirectory() as folder:
        for end in ("", "-wal", "-journal"):
            beside = path.with_name(path.name + end)
            if beside.exists():
                shutil.copy(beside, folder)
        with closing(sqlite3.connect(Path(folder) / path.name)) as connection:
            schema = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema")
            said = schema.fetchall()
            for table in sorted(name for kind, name, *_ in said if kind == "table"):
                rows = connection.execute(f"SELECT * FROM {table}").fetchall()
                if table == "lynkr_store_adoption":
                    rows = [row[:1] for row in rows]  # without the time
                said += [(table, *row) for row in rows]
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    return sorted(map(repr, said))


_CATALOGUE = """
SELECT 'column', table_name, column_name, concat_ws(' ', ordinal_position, data_type, is_nullable,
    column_default, is_identity, collation_name)
  FROM information_schema.columns WHERE table_schema = 'public'
UNION ALL
SELECT 'constraint', conname, pg_get_constraintdef(oid), contype::text
  FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL
SELECT 'index', relname, pg_get_indexdef(indexrelid), indisvalid::text
  FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
 WHERE relnamespace = 'public'::regnamespace
"""


def _of_postgresql(url: str) -> list[str]:
    with psycopg.connect(url) as connection:
        said: list[Any] = connection.execute(_CATALOGUE).fetchall()
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        for (table,) in sorted(tables):
            rows = sql.SQL("SELECT to_jsonb(t)::text FROM {} t").format(sql.Identifier(table))
            said += [(table, *row) for row in connection.execute(rows)]
    return sorted(map(repr, said))


def layout(url: str) -> dict[str, int]:
    """What is fixed with an SQLite file's first page."""
    path = make_url(url).database
    assert path
    with closing(sqlite3.connect(path)) as connection:
        return {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_size", "auto_vacuum")
        }


# -- ways to upgrade ------------------------------------------------------------------------------


def _by_alembic(url: str) -> None:
    ini = str(ROOT / "alembic.ini")
    _as_main("alembic", "-c", ini, "-x", f"url={url}", "upgrade", "head")


def _by_command(url: str) -> None:
    _as_main("lynkr_store", "upgrade", "--url", url)


def _as_main(module: str, *arguments: str) -> None:
    """As ``python -m`` does, in this process, which has been prepared to be watched."""
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, f"{module} ended with {ended.code}"  # noqa: PT017


def _by_code(url: str) -> None:
    with _engine(url) as engine:
        upgrade(engine)


def _by_store(url: str) -> None:
    with Store(settings=StoreSettings(url=url, upgrade_on_open=True)) as store:
        store.query(limit=1)


@contextmanager
def _engine(url: str) -> Iterator[Engine]:
    engine = create_store_engine(url)
    try:
        yield engine
    finally:
        engine.dispose()


_WAY = dict(zip(WAYS, (_by_alembic, _by_command, _by_code, _by_store), strict=True))


# -- of the programs ------------------------------------------------------------------------------


class _Watch:
    """Sees what this process asks of databases.

    Args:
        say: Is told when it begins to wait for its turn (``trying``), and when it is ``paused``.
        pause_at: The part of a statement before which it waits for a word, once; or ``COMMIT``.

    Attributes:
        applied: The revisions that it committed, in order.
    """

    def __init__(self, say: Say, pause_at: str | None = None) -> None:
        self.applied: list[str] = []
        self._say = say
        self._pause_at = pause_at
        self._tried = False
        self._own = threading.local()
        event.listen(Engine, "before_cursor_execute", self._before)
        event.listen(Engine, "after_cursor_execute", self._after)
        for name in ("do_commit", "do_rollback"):
            self._around(name)

    def _before(self, *arguments: Any) -> None:
        statement = arguments[2]
        if not self._tried and re.search("BEGIN IMMEDIATE|pg_try_advisory_xact_lock", statement):
            self._tried = True
            self._say(trying=True)
        self._pause(statement)

    def _pause(self, statement: str) -> None:
        if self._pause_at and self._pause_at in statement:
            self._pause_at = None
            self._say(paused=statement)
            sys.stdin.readline()

    def _after(self, *arguments: Any) -> None:
        statement = arguments[2]
        if VERSION_TABLE in statement and statement.startswith(("INSERT", "UPDATE")):
            # the first text is the new revision, for an UPDATE's condition comes later
            revision = re.search("'([0-9a-z]+)'", statement)
            assert revision, statement
            self._pending().append(revision[1])

    def _pending(self) -> list[str]:
        if not hasattr(self._own, "pending"):
            self._own.pending = []
        pending: list[str] = self._own.pending
        return pending

    def _around(self, name: str) -> None:
        method = getattr(DefaultDialect, name)

        @wraps(method)
        def watched(*arguments: Any) -> None:
            if name == "do_commit" and self._pending():
                self._pause("COMMIT")
            try:
                method(*arguments)
                if name == "do_commit":
                    self.applied += self._pending()
            finally:
                self._pending().clear()

        setattr(DefaultDialect, name, watched)


def upgrader(options: dict[str, Any], say: Say) -> None:
    """Upgrade when told to, as one of `WAYS` does."""
    signal.alarm(_HUNG_S)
    watch = _Watch(say, options.get("pause_at"))
    say(ready=True)
    sys.stdin.readline()
    _WAY[options["way"]](options["url"])
    say(applied=watch.applied)


def maintainer(options: dict[str, Any], say: Say) -> None:
    """Build missing indexes when told to."""
    signal.alarm(_HUNG_S)
    say(ready=True)
    sys.stdin.readline()
    with _engine(options["url"]) as engine:
        say(built=build_missing_indexes(engine).names)


def pack(options: dict[str, Any], say: Say) -> None:
    """Upgrade in as many processes as there are ways, which start at the same moment."""
    gate, keeper = os.pipe()

    def body(say: Say, way: str) -> None:
        watch = _Watch(say)
        os.close(keeper)
        os.read(gate, 1)  # until the last of the others has closed it
        _WAY[way](options["url"])
        say(way=way, applied=watch.applied)

    children = [_fork(lambda way=way: body(say, way)) for way in options["ways"]]
    os.close(keeper)
    say(statuses=[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])


def _fork(body: Callable[[], None]) -> int:
    """Run the body in a child, which has what was imported here."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.alarm(_HUNG_S)
        body()
    except BaseException as error:  # noqa: BLE001 - the parent's loop must not go on in here
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


# -- killed at every moment -----------------------------------------------------------------------


class _Moments:
    """Counts what this process asks of databases, and ends it at one of these moments."""

    def __init__(self, fatal: int, say: Say) -> None:
        self.labels: list[str] = []
        self._fatal = fatal
        self._say = say
        self._depth = 0  # within a statement of SQLAlchemy's, or a commit

    def __call__(self, label: str) -> None:
        self.labels.append(" ".join(label.split())[:_LABEL])
        if len(self.labels) == self._fatal:
            self._say(killed=self.labels[-1])
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        event.listen(Engine, "before_cursor_execute", self._before)
        event.listen(Engine, "after_cursor_execute", self._after)
        event.listen(Pool, "connect", self._connected)
        for name in ("do_commit", "do_rollback", "do_close"):
            self._around(name)

    def _before(self, *arguments: Any) -> None:
        self(f"before {arguments[2]}")
        self._depth += 1

    def _after(self, *arguments: Any) -> None:
        self._depth -= 1
        self(f"after {arguments[2]}")

    def _connected(self, connection: Any, *_: Any) -> None:
        self("connected")
        if isinstance(connection, sqlite3.Connection):
            connection.set_trace_callback(self._traced)  # the PRAGMAs that come first go past us

    def _traced(self, statement: str) -> None:
        if not self._depth:
            self(f"before {statement}")

    def _around(self, name: str) -> None:
        method = getattr(DefaultDialect, name)
        word = {"do_commit": "COMMIT", "do_rollback": "ROLLBACK", "do_close": "closing"}[name]

        @wraps(method)
        def watched(*arguments: Any) -> None:
            self(f"before {word}")
            self._depth += 1
            try:
                method(*arguments)
            finally:
                self._depth -= 1
            self(f"after {word}")

        setattr(DefaultDialect, name, watched)


_READS = re.compile(r"(before|after) (SELECT|PRAGMA (main|temp)\.|SHOW|select|show)")


def _chosen(labels: list[str], step: int) -> list[int]:
    """Numbers of the moments that far apart, of those that change something.

    Those around the first COMMITs always.
    """
    numbered = [*enumerate(labels, 1)]
    changing = [number for number, label in numbered if not _READS.match(label)]
    commits = [number for number, label in numbered if label.endswith(" COMMIT")]
    return sorted({*changing[::step], *commits[:4]})


class _Place:
    """A database that is brought back to where it was, again and again.

    The file is another each time. No connection stays open, for this process forks.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._numbers = itertools.count()
        self.url = ""

    def reset(self) -> None:
        self.url = self._options["url"]
        target = make_url(self.url)
        if target.get_backend_name() != "sqlite":
            with psycopg.connect(self.url, autocommit=True) as connection:
                connection.execute("DROP SCHEMA public CASCADE")
                connection.execute("CREATE SCHEMA public")
                connection.execute(self._options["script"])
            return
        path = Path(f"{target.database}-{next(self._numbers)}")
        self.url = f"sqlite:///{path}"
        if self._options.get("template"):
            shutil.copy(self._options["template"], path)


def _upgrade(engine: Engine) -> None:
    upgrade(engine)


_BODY: dict[str, Callable[[Engine], object]] = {
    "upgrade": _upgrade,
    "indexes": build_missing_indexes,
}


def killed(options: dict[str, Any], say: Say) -> None:
    """Do the work once and count its moments; then again and again, killed at each of them.

    After each death: how the database stands, and how after the work was done again.
    """
    place, body = _Place(options), _BODY[options["body"]]
    place.reset()
    old = snapshot(place.url)
    said = _in_a_fork(lambda say: _work(place.url, body, 0, say))
    assert said["status"] == 0, said
    new = snapshot(place.url)
    say(moments=said["labels"], old=old, new=new, layout=_layout(place.url))
    for fatal in _chosen(said["labels"], options["step"]):
        place.reset()
        said = _in_a_fork(lambda say, fatal=fatal: _work(place.url, body, fatal, say))
        say(fatal=fatal, **said, **_afterwards(place.url, body, old, new))


def killed_anytime(options: dict[str, Any], say: Say) -> None:
    """Do the work again and again, killed from outside after a time of its own."""
    place, body = _Place(options), _BODY[options["body"]]
    place.reset()
    old = snapshot(place.url)
    began = time.monotonic()
    assert _in_a_fork(lambda say: _work(place.url, body, 0, say))["status"] == 0
    lasted_s = time.monotonic() - began
    new = snapshot(place.url)
    say(old=old, new=new, layout=_layout(place.url))
    chance = random.Random(options["seed"])
    for _ in range(options["deaths"]):
        place.reset()
        pid = _fork(lambda: _work(place.url, body, 0, lambda **_: None))
        time.sleep(chance.uniform(0, lasted_s))
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        say(status=status, **_afterwards(place.url, body, old, new))


def _work(url: str, body: Callable[[Engine], object], fatal: int, say: Say) -> None:
    moments = _Moments(fatal, say)
    moments.watch()
    with _engine(url) as engine:
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _spill)
        body(engine)
    say(labels=moments.labels)


def _spill(connection: Any, *_: Any) -> None:
    """Have what is changed reach the disk before its COMMIT, as a long transaction's pages do."""
    connection.execute("PRAGMA cache_size = 1")


def _afterwards(
    url: str, body: Callable[[Engine], object], old: list[str], new: list[str]
) -> dict[str, Any]:
    left = _left(url)
    between = snapshot(url)
    said = _in_a_fork(lambda say: _again(url, body, say))
    after = snapshot(url)
    return {
        "left": left,
        "between": _named(between, old, new),
        "again": said,
        "after": _named(after, old, new),
        "layout": _layout(url),
    }


def _left(url: str) -> list[str]:
    """What a killed process left beside an SQLite file."""
    path = make_url(url).database if url.startswith("sqlite") else None
    ends = ("-wal", "-journal")
    files = [Path(f"{path}{end}") for end in ends]
    return [
        end for end, file in zip(ends, files, strict=True) if file.exists() and file.stat().st_size
    ]


def _again(url: str, body: Callable[[Engine], object], say: Say) -> None:
    with _engine(url) as engine:
        body(engine)
        with engine.connect() as connection:
            say(
                revision=revisions.current(connection),
                drift=drift(connection),
                missing=missing_indexes(connection),
            )


def _layout(url: str) -> dict[str, int]:
    return layout(url) if url.startswith("sqlite") else {}


def _named(found: list[str], old: list[str], new: list[str]) -> Any:
    """Which of the two it is, or else in what it differs from the first."""
    if found == old:
        return "old"
    if found == new:
        return "new"
    return {"gone": _without(old, found), "come": _without(found, old)}


def _without(these: Iterable[str], those: list[str]) -> list[str]:
    return [line for line in these if line not in those]


def _in_a_fork(body: Callable[[Say], None]) -> dict[str, Any]:
    """Run the body in a child; what it says, and its end."""
    ours, theirs = os.pipe()

    def say(**said: Any) -> None:
        os.write(theirs, f"{json.dumps(said)}\n".encode())

    pid = _fork(lambda: body(say))
    os.close(theirs)
    report: dict[str, Any] = {}
    with os.fdopen(ours) as lines:
        for line in lines:
            report |= json.loads(line)
    return report | {"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}


PROGRAMS = {
    program.__name__: program for program in (upgrader, maintainer, pack, killed, killed_anytime)
}


def _main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)

    def say(**said: Any) -> None:
        os.write(out, f"{json.dumps(said)}\n".encode())  # whole, also beside others' lines

    PROGRAMS[sys.argv[1]](json.loads(sys.argv[2]), say)


if __name__ == "__main__":
    _main()
