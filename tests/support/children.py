"""Programs that tests run as processes of their own, and a server that tests take away.

``python -m tests.support.children NAME OPTIONS`` runs one of `PROGRAMS`; it says what it has to
say in lines of JSON.
"""

import contextlib
import itertools
import json
import os
import queue
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any, Self

import psycopg
from sqlalchemy import Engine, Pool, event, text
from sqlalchemy.engine.default import DefaultDialect

from lynkr_store import Health, Store, StoreSettings, create_store_engine
from lynkr_store.ingest import deliverer, spool
from lynkr_store.ingest.handoff import Handoff
from lynkr_store.ingest.preparer import Preparer
from lynkr_store.ingest.queue import RecordQueue
from lynkr_store.ingest.spooling import SpoolMover
from lynkr_store.storage.sink import DatabaseSink
from tests.support import programs
from tests.support.postgres import PgServer, _runnable, _unprivileged_user

WAIT_S = 60.0
_HUNG_S = 120  # a child that takes longer is ended by its alarm
_POLL_S = 0.02

Say = Callable[..., None]

_guards: dict[int, subprocess.Popen[bytes]] = {}


# -- of the tests ---------------------------------------------------------------------------------


command = partial(programs.command, __name__)
run = partial(programs.run, __name__)


def launch(name: str, options: dict[str, Any]) -> programs.Child:
    """Start one of the programs; leaving its block kills it."""
    return programs.Child(command(name, options))


def adds_up(health: dict[str, Any] | Health) -> bool:
    told = health if isinstance(health, dict) else vars(health)
    places = ("written", "rejected", "dropped", "spooled", "pending")
    return told["submitted"] + told["recovered"] == sum(told[place] for place in places)


def stored(url: str) -> list[str]:
    """Each row's request_id, in the order of the ids."""
    engine = create_store_engine(url)
    try:
        with engine.connect() as connection:
            found = connection.scalars(
                text("SELECT request_id FROM routing_telemetry ORDER BY id")
            ).all()
    finally:
        engine.dispose()
    return list(found)


def family(pid: int) -> list[int]:
    """A process and its children that live, itself first."""
    found = [pid]
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == pid and state != "Z":
                    found.append(int(folder.name))
    return found


def freeze(pid: int) -> list[int]:
    """Stop a process and its children where they are: none answers, and no socket is closed."""
    os.kill(pid, signal.SIGSTOP)  # first, so that it starts no more of them
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)
    processes = family(pid)
    _guards[pid] = _guard(processes)
    for process in processes:
        _signal(process, signal.SIGSTOP)
    return processes


def thaw(pid: int) -> None:
    for process in reversed(family(pid)):
        _signal(process, signal.SIGCONT)
    guard = _guards.pop(pid, None)
    if guard:
        guard.communicate()


def _guard(processes: list[int]) -> subprocess.Popen[bytes]:
    """Lets the processes go on when this one is gone, however it ends: stopped, they never end."""
    script = 'cat; kill -s CONT "$@" 2>&-; true'
    return subprocess.Popen(
        ["/bin/sh", "-c", script, "sh", *map(str, reversed(processes))],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class MortalServer(PgServer):
    """A server that can be killed, started again on what it left, and frozen.

    What it answered as committed survives its processes, though not the machine's end.
    """

    def start(self) -> Self:
        super().start()
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute("ALTER ROLE postgres SET synchronous_commit = on")
        return self

    @property
    def socket(self) -> str:
        """The path of its Unix socket."""
        return f"{self._folder}/.s.PGSQL.{self.port}"

    def kill(self) -> None:
        """End all its processes as ``kill -9`` does."""
        assert self._process
        processes = freeze(self.pid)
        for process in processes:
            _signal(process, signal.SIGKILL)
        thaw(self.pid)
        self._process.wait()
        deadline = time.monotonic() + WAIT_S
        while any(map(_lives, processes)):
            assert time.monotonic() < deadline, "a process of the server does not end"
            time.sleep(_POLL_S)

    def start_again(self) -> None:
        """On the same data; call it in the main thread."""
        user = _unprivileged_user()
        self._launch(_runnable(self._installation.bin, user), user)
        self._await_answer()

    def become_standby(self) -> None:
        """Start again on the same data as a server that waits for a primary's changes."""
        assert self._folder
        self.kill()
        mark = self._folder / "data" / "standby.signal"
        mark.touch()
        mark.chmod(0o644)  # the server's user reads it
        self.start_again()

    def freeze(self) -> None:
        freeze(self.pid)

    def thaw(self) -> None:
        thaw(self.pid)


# -- of the programs ------------------------------------------------------------------------------


def _told(health: Health) -> dict[str, Any]:
    names = ("submitted", "recovered", "written", "rejected", "dropped", "spooled", "pending")
    told = {name: getattr(health, name) for name in names}
    for name in ("rejected_by", "dropped_by", "faults_by"):
        told[name] = dict(getattr(health, name))
    return told


def _hurry(last_retry_s: float) -> None:
    """Let the writer look sooner whether the database is back."""
    deliverer._FIRST_RETRY_S = 0.01
    deliverer._LAST_RETRY_S = last_retry_s


class _Moments:
    """Counts what the writer does, and ends the process at one of its moments."""

    def __init__(self, fatal: int, say: Say) -> None:
        self._fatal = fatal
        self._say = say
        self._numbers = itertools.count(1)

    def __call__(self, label: str) -> None:
        if "probe" in threading.current_thread().name:
            return  # it writes nothing
        if next(self._numbers) == self._fatal:
            self._say(killed=label)
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        for target, names in (
            (Engine, ("begin", "before_cursor_execute", "after_cursor_execute", "commit")),
            (Engine, ("savepoint", "release_savepoint", "rollback")),
            (Pool, ("checkout", "checkin")),
        ):
            for name in names:
                event.listen(target, name, self._listener(name))
        for owner, names in (
            (DefaultDialect, ("do_commit",)),
            (DatabaseSink, ("write",)),
            (RecordQueue, ("take", "release")),
            (Handoff, ("take", "settle")),
            (Preparer, ("_prepared",)),
            (SpoolMover, ("_enter",)),
            (spool.Spool, ("enter", "load", "mark_attempt", "remove", "close")),
            (spool._File, ("insert", "mark", "delete", "shrink")),
        ):
            for name in names:
                self._around(owner, name)

    def _listener(self, name: str) -> Callable[..., None]:
        # the bare form of each event passes its arguments by place
        def listener(*_: Any) -> None:
            self(name)

        return listener

    def _around(self, owner: Any, name: str) -> None:
        method = getattr(owner, name)

        @wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self(f"before {owner.__name__}.{name}")
            answer = method(*args, **kwargs)
            self(f"after {owner.__name__}.{name}")
            return answer

        setattr(owner, name, watched)


class _Away:
    """Takes the database away from this process's store, and gives it back."""

    def __init__(self, how: str, options: dict[str, Any]) -> None:
        self._how = how
        self._options = options
        self._lock: sqlite3.Connection | None = None

    def begin(self) -> None:
        match self._how:
            case "missing":  # a link in the URL's path leads nowhere
                self._link("nowhere")
            case "frozen":
                freeze(self._options["pid"])
            case "locked":
                self._lock = sqlite3.connect(self._options["file"], isolation_level=None)
                self._lock.execute("BEGIN IMMEDIATE")

    def end(self) -> None:
        match self._how:
            case "missing":
                self._link(self._options["target"])
            case "frozen":
                thaw(self._options["pid"])
            case "locked":
                if self._lock:
                    self._lock.close()

    def _link(self, target: str) -> None:
        fresh = Path(f"{self._options['link']}.fresh")
        fresh.unlink(missing_ok=True)  # a child that was killed right here left one
        fresh.symlink_to(target)
        fresh.replace(self._options["link"])


def killed(options: dict[str, Any], say: Say) -> None:
    """Run one story again and again, each time in a process that is killed a moment later.

    Until one survives it. After each, where there is a spool, a process opens it and is done.
    """
    for fatal in itertools.count(options.get("first", 1), options.get("step", 1)):
        report: dict[str, Any] = {"fatal": fatal, "confirmed": 0, "healths": []}
        story = options | {"spool_path": options["spool"] and f"{options['spool']}-{fatal}.db"}
        away = _Away(story["how"], story)
        try:
            status = _in_a_fork(_story, story, fatal, report)
        finally:
            away.end()
        assert status in (0, -signal.SIGKILL), f"moment {fatal}: ended with {status}, {report}"
        if story["spool_path"]:
            assert _in_a_fork(_recovery, story, fatal, report) == 0, f"moment {fatal}: {report}"
        say(**report)
        if status == 0:
            return


def _in_a_fork(body: Callable[..., None], story: Any, fatal: int, report: dict[str, Any]) -> int:
    """Run the body in a child, which has what was imported here; note what it says."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ours)
            signal.alarm(_HUNG_S)
            body(story, fatal, lambda **said: os.write(theirs, f"{json.dumps(said)}\n".encode()))
        except BaseException as error:  # noqa: BLE001 - the parent's loop must not go on in here
            os.write(2, f"moment {fatal}: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as lines:
        for line in lines:
            said = json.loads(line)
            if "health" in said:
                report["healths"].append(said["health"])
            report |= said
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _story(story: dict[str, Any], fatal: int, say: Say) -> None:
    """Rounds of records, the database being there (+) or away (-); each is flushed.

    And waits (=) for the spool to be empty again.
    """
    _hurry(0.05)
    moments, away, numbers = _Moments(fatal, say), _Away(story["how"], story), itertools.count()
    moments.watch()
    if story["rounds"].startswith("-"):
        away.begin()  # before the store looks for it
    store = Store(settings=_settings(story))
    now = ""
    for there in story["rounds"]:
        while there == "=" and store._writer.counters().spooled:
            time.sleep(_POLL_S)
        if there == "=":
            continue
        if there != now:
            (away.end if there == "+" else away.begin)()
        now = there
        for _ in range(story["rows"]):
            number = next(numbers)
            assert store.record(request_id=f"{fatal}-{number}", provider="p", request_text="text")
        assert store.flush(WAIT_S)
        say(confirmed=number + 1, health=_told(store.health()))
    store.close(WAIT_S)
    say(health=_told(store.health()))


def _recovery(story: dict[str, Any], fatal: int, say: Say) -> None:
    _hurry(0.05)
    store = Store(settings=_settings(story))
    # what is recorded now waits behind what the spool has
    assert store.record(request_id=f"{fatal}-after", provider="p")
    assert store.flush(WAIT_S)
    while store._writer.counters().spooled:  # on a slow machine it enters the spool too
        time.sleep(_POLL_S)
    store.close(WAIT_S)
    say(recovery=_told(store.health()))


def _settings(options: dict[str, Any]) -> StoreSettings:
    names = options.keys() & StoreSettings.model_fields.keys()
    return StoreSettings(**{name: options[name] for name in names})


def recorder(options: dict[str, Any], say: Say) -> None:
    """Record at a rate; answer each word with where the records are, and the memory they took."""
    signal.alarm(_HUNG_S * 2)
    _hurry(options["last_retry_s"])
    rate, row_bytes, recorded = options["rate"], options["row_bytes"], 0
    store = Store(settings=_settings(options))

    def record(size: int) -> None:
        nonlocal recorded
        number = f"{recorded:08d}"  # each row has a text of its own, or they would share one
        store.record(request_id=str(recorded), provider="p", request_text=number.ljust(size, "x"))
        recorded += 1

    for _ in range(rate):
        record(row_bytes)
    assert store.flush(WAIT_S)
    words: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(words,), daemon=True).start()
    baseline, began, before = _memory("VmRSS"), time.monotonic(), recorded
    say(ready=True)
    word = ""
    while word != "stop":
        while recorded < before + (time.monotonic() - began) * rate:
            record(row_bytes)
        try:
            word = words.get(timeout=_POLL_S)
        except queue.Empty:
            continue
        if word == "burst":
            before += options["burst_rows"]  # beside what the rate asks for
            for _ in range(options["burst_rows"]):
                record(options["burst_row_bytes"])
        say(recorded=recorded, health=_told(store.health()))
    while (word := words.get()) != "end":
        confirmed = store.flush(WAIT_S)
        if word == "close":
            _drain(store)
            store.close(WAIT_S)
        memory = _memory("VmHWM") - baseline
        say(recorded=recorded, confirmed=confirmed, memory=memory, health=_told(store.health()))


def _drain(store: Store) -> None:
    deadline = time.monotonic() + WAIT_S
    while store.health().spooled and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _listen(words: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        words.put(line.strip())
    for word in ("stop", "end"):  # whoever spoke is gone
        words.put(word)


def replay(options: dict[str, Any], say: Say) -> None:
    """Do what an earlier process left in its spool."""
    _hurry(options["last_retry_s"])
    with Store(settings=_settings(options)) as store:
        # what is recorded now waits behind what the spool has
        store.record(request_id=options["mark"], provider="p")
        confirmed = store.flush(WAIT_S)
    say(confirmed=confirmed, health=_told(store.health()))


def _memory(name: str) -> int:
    """Bytes of this process in memory now (VmRSS), or at most so far (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


PROGRAMS = {program.__name__: program for program in (killed, recorder, replay)}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](
        json.loads(sys.argv[2]), lambda **said: print(json.dumps(said), flush=True)
    )
