"""What becomes of the records when the process forks, ends, or is told to end."""

import random
import signal
import textwrap
import time
from collections import Counter

import pytest
from sqlalchemy import text

from lynkr_store import create_store_engine
from tests.conftest import POSTGRES

pytestmark = pytest.mark.sample(3)


def stored(url):
    """How often each request is stored; the file is sound."""
    engine = create_store_engine(url)
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "sqlite":
                assert connection.execute(text("PRAGMA integrity_check")).scalars().all() == ["ok"]
            ids = connection.execute(
                text("SELECT request_id FROM routing_telemetry ORDER BY id")
            ).scalars()
            return Counter(ids)
    finally:
        engine.dispose()


def once(**counts):
    """Each of these names' requests, stored once."""
    return Counter(f"{name}-{n}" for name, count in counts.items() for n in range(count))


def at_head(url):
    from lynkr_store.migrate.upgrade import upgrade  # noqa: PLC0415

    engine = create_store_engine(url)
    upgrade(engine)
    engine.dispose()
    return url


@pytest.fixture(params=["sqlite-file", *POSTGRES[-1:]])
def backend(request):
    """A backend that more than one process can open; one PostgreSQL will do."""
    return request.param


@pytest.fixture
def url(backend, new_url):
    """A database at head."""
    return new_url(backend, at_head=True)


KINDS = ["sync", "async", "host"]


# -- 1. forks ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_a_child_starts_with_nothing_and_the_parent_keeps_its_own(program, url, kind, warm):
    lines = program(
        """
        kind, url, warm = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
        store = opened(kind, url)
        server = "sqlite" not in url

        def backend():
            if not server:
                return os.getpid()
            with (store._database.engine).connect() as connection:
                return connection.execute(text("SELECT pg_backend_pid()")).scalar_one()

        def lives(pid):  # the probe may have it, and backend() then gives another's
            if not server:
                return True
            of = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
            with store._database.engine.connect() as connection:
                return connection.execute(of, {"pid": pid}).scalar_one() == 1

        if warm:
            record(store, "warm", 10)
            assert store.flush(60)
            store.get_stats()
        record(store, "before", 50)
        assert checked(store).pending == 50
        own = backend()
        locked, fork = threading.Event(), threading.Event()

        def hold():  # another thread has every lock there is at the fork
            with (store._writer._handoff.lock, store._database._lock, store._probe._lock,
                  store._cache._lock):
                locked.set()
                fork.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        locked.wait()
        pid = os.fork()
        if not pid:
            h = checked(store)
            assert (h.submitted, h.pending, h.written, h.dropped, h.rejected) == (0,) * 5, h
            record(store, "child", 20)
            assert store.flush(60)
            assert store.get_stats() is not None
            h = checked(store)
            assert (h.submitted, h.written, h.pending) == (20, 20, 0), h
            assert backend() != own
            record(store, "unflushed", 5)
            say("child", backend())
            sys.exit(7)
        fork.set()
        holder.join()
        record(store, "after", 30)
        assert reaped(pid) == 7
        assert lives(own), "the connection is still there"
        assert store.get_stats() is not None or not warm
        assert store.flush(60)
        h = checked(store)
        assert (h.submitted, h.written, h.pending) == (80 + 10 * warm,) * 2 + (0,), h
        store.close()
        checked(store)
        say("parent", own)
        """,
        kind,
        url,
        warm,
    )
    assert [line.split()[0] for line in lines] == ["child", "parent"]
    assert len({line.split()[1] for line in lines}) == 2
    assert stored(url) == once(warm=10 * warm, before=50, child=20, unflushed=5, after=30)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_child_flushed_survives_the_parents_close_and_a_kill(program, url, kind):
    program(
        """
        store = opened(*sys.argv[1:3])
        record(store, "parent", 10)
        assert store.flush(60)
        store.get_stats()
        (told, tell), (heard, answer) = os.pipe(), os.pipe()
        pid = os.fork()
        if not pid:
            record(store, "child", 10)
            assert store.flush(60)
            os.write(answer, b"1")
            os.read(told, 1)
            record(store, "child", 10, first=10)
            assert store.flush(60)
            checked(store)
            os.kill(os.getpid(), signal.SIGKILL)
        os.read(heard, 1)
        checked(store)
        store.close()
        if sys.argv[1] == "host":
            store.engine.dispose()
        os.write(tell, b"1")
        assert reaped(pid) == -signal.SIGKILL
        """,
        kind,
        url,
    )
    assert stored(url) == once(parent=10, child=20)


ENDS = ["close and _exit", "sys.exit", "killed after a flush"]

LOOP = """
    kind, url, forks, spool = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    options = {"flush_interval_s": 0.001, "batch_max_rows": 20}
    if spool:  # what waits for the file long enough goes there, and is not written then
        options |= {"spool_path": spool, "spool_after_s": 60}
    store = opened(kind, url, **options)
    stop, counts = threading.Event(), [0, 0]

    def write(name):
        while not stop.is_set():
            record(store, f"parent{name}", 1, first=counts[name])
            counts[name] += 1
            time.sleep(0.002)  # no more than is written meanwhile

    recorders = [threading.Thread(target=write, args=(name,), daemon=True) for name in range(2)]
    for recorder in recorders:
        recorder.start()
    while not counts[1]:
        time.sleep(0.001)
    children = []
    for number in range(forks):
        pid = os.fork()
        if not pid:
            h = store.health()
            assert h.submitted == 0
            record(store, f"child{number}", 20)
            if number % 3 == 0:
                store.close(60)
                h = checked(store)
                assert (h.written, h.dropped) == (20, 0), h
                os._exit(0)
            elif number % 3 == 1:
                sys.exit(0)
            assert store.flush(60)
            assert checked(store).written == 20
            os.kill(os.getpid(), signal.SIGKILL)
        children.append(pid)
        if len(children) == 4:
            assert reaped(children.pop(0)) in (0, -signal.SIGKILL)
    for pid in children:
        assert reaped(pid) in (0, -signal.SIGKILL)
    stop.set()
    for recorder in recorders:
        recorder.join()
    assert store.flush(60)
    h = checked(store)
    assert h.submitted == h.written == sum(counts), (h, counts)
    store.close()
    checked(store)
    say(*counts)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spool", [False, True], ids=["", "spool"])
def test_forks_in_a_loop_while_two_threads_record(program, url, kind, spool, tmp_path):
    forks = 30
    [line] = program(LOOP, kind, url, forks, tmp_path / "spool.db" if spool else "")
    first, second = map(int, line.split())
    print(f"{forks} forks, {first + second} rows of the parent's")
    children = {f"child{n}": 20 for n in range(forks)}
    assert stored(url) == once(parent0=first, parent1=second, **children)


MOMENT = """
    from sqlalchemy import event

    kind, url, warm = sys.argv[1], sys.argv[2], sys.argv[3] == "warm"

    def trial(moment):
        store = opened(kind, url, flush_interval_s=0.001)
        if warm:
            record(store, f"warm{moment}", 1)
            assert store.flush(60)
        there, forked, count = threading.Event(), threading.Event(), 0

        def on(*_, **__):
            nonlocal count
            count += 1
            if count == moment:
                there.set()
                # SQLite's fork waits for the batch; PostgreSQL's happens here
                if "sqlite" not in url:
                    forked.wait(60)

        engine = store._database.of_writer
        for name in ("begin", "before_cursor_execute", "after_cursor_execute", "savepoint",
                     "release_savepoint", "commit"):
            event.listen(engine, name, on)

        def counted(method):
            def call(*arguments, **options):
                on()
                return method(*arguments, **options)

            return call

        if not warm:  # within the engine's first connection
            for name in ("_get_server_version_info", "get_default_isolation_level", "initialize"):
                setattr(engine.dialect, name, counted(getattr(engine.dialect, name)))
        record(store, f"before{moment}", 10)
        store.flush(0)
        while not there.wait(0.01) and checked(store).pending:
            pass
        if not there.is_set():
            store.close()
            sys.exit(42)
        pid = os.fork()
        if not pid:
            record(store, f"child{moment}", 5)
            assert store.flush(60)
            assert checked(store).submitted == 5
            sys.exit(0)
        forked.set()
        record(store, f"after{moment}", 10)
        assert reaped(pid) == 0
        assert store.flush(60)
        h = checked(store)
        assert h.submitted == h.written == 20 + warm, h
        store.close()
        sys.exit(0)

    for moment in range(1, 100):
        pid = os.fork()
        if not pid:
            trial(moment)
        if (status := reaped(pid)) == 42:
            break
        assert status == 0, (moment, status)
    say(moment)
"""


# The fork is made by the thread that writes, in a hook: it waits for none of its own locks. On
# PostgreSQL an engine's first connection sets the dialect up, and others wait for that; so a fork
# in the middle of it can only be made here, and leaves the child with half a dialect.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "start", "kind"),
    [
        ("sqlite-file", "cold", "sync"),
        *((b, "warm", kind) for b in ("sqlite-file", POSTGRES[-1]) for kind in ("sync", "host")),
    ],
)
def test_forks_at_every_moment_of_a_batch(program, new_url, kind, backend, start):
    url = new_url(backend, at_head=True)
    [none] = program(MOMENT, kind, url, start, timeout=600)
    names = {"warm": int(start == "warm"), "before": 10, "child": 5, "after": 10}
    moments = range(1, int(none))
    expected = once(**{f"{name}{n}": count for n in moments for name, count in names.items()})
    # in the last one the batch was over before that moment
    expected += once(**{f"{name}{none}": names[name] for name in ("warm", "before")})
    assert stored(url) == expected
    print(f"{len(moments)} moments of a fork")
    assert len(moments) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_child_of_a_closed_store_has_a_closed_store(program, url, kind):
    program(
        """
        store = opened(*sys.argv[1:3])
        record(store, "parent", 5)
        store.close()
        pid = os.fork()
        if not pid:
            assert store.record(provider="p", request_id="late") is False
            h = checked(store)
            assert (h.submitted, dict(h.dropped_by), h.pending) == (1, {"closed": 1}, 0), h
            assert store.flush(0)
            store.close()
            sys.exit(0)
        assert reaped(pid) == 0
        h = checked(store)
        assert (h.submitted, h.written) == (5, 5), h
        """,
        kind,
        url,
        noise=r"records lost, by cause: {'closed': 1}\n",
    )
    assert stored(url) == once(parent=5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SimpleProcess", "grandchildren"])
def test_children_of_children_are_processes_of_their_own(program, url, how):
    program(
        """
        store = opened("sync", sys.argv[1])
        record(store, "g0", 3)
        for generation in range(1, 4):
            pid = os.fork()
            if pid:
                status = reaped(pid)
                assert checked(store).submitted == 3
                sys.exit(status)
            record(store, f"g{generation}", 3)
        assert store.flush(60)
        assert checked(store).written == 3
        """
        if how == "grandchildren"
        else """
        store = opened("sync", sys.argv[1])
        record(store, "g0", 3)
        for generation in range(1, 4):
            pid = os.fork()
            if not pid:
                record(store, f"g{generation}", 3)
                sys.exit(0)
            assert reaped(pid) == 0
        """,
        url,
    )
    assert stored(url) == once(g0=3, g1=3, g2=3, g3=3)


# -- 2. pools and workers ----------------------------------------------------------------------


POOL = r"""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    def begin(url, options, begun=None):
        global store, number
        number = itertools.count()
        store = opened("sync", url, **options)
        if begun is not None:
            begun.release()

    def work(_):
        name = f"{os.getpid()}-{next(number)}"
        assert store.record(provider="p", request_id=name)
        return name

    def terminate_later(workers):
        for worker in workers:
            again = threading.Timer(10, worker.terminate)
            again.daemon = True
            again.start()

    def worker(url, name):  # ends without close()
        begin(url, {})
        record(store, name, 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("tasks", [None, 5], ids=["", "maxtasksperchild"])
def test_a_pool_that_is_closed_and_joined_loses_nothing(program, url, method, tasks):
    lines = program(
        textwrap.dedent(POOL)
        + textwrap.dedent("""
        if __name__ == "__main__":
            url, method, tasks = sys.argv[1:]
            context = multiprocessing.get_context(method)
            pool = context.Pool(2, begin, (url, {}), eval(tasks))
            for name in pool.map(work, range(40), chunksize=1):
                say(name)
            pool.close()
            pool.join()
        """),
        url,
        method,
        tasks,
    )
    assert len(lines) == 40
    if tasks:
        assert len({line.split("-")[0] for line in lines}) >= 8, "workers were replaced"
    assert stored(url) == Counter(lines)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_that_is_terminated_loses_nothing_with_handle_sigterm(program, url, method):
    lines = program(
        textwrap.dedent(POOL)
        + textwrap.dedent("""
        if __name__ == "__main__":
            url, method = sys.argv[1:]
            context = multiprocessing.get_context(method)
            begun = context.Semaphore(0)
            with context.Pool(2, begin, (url, {"handle_sigterm": True}, begun)) as pool:
                for name in pool.map(work, range(40), chunksize=1):
                    say(name)
                for _ in range(2):
                    begun.acquire()
                # terminate() wakes a worker that waits for another one's lock. If the signal comes
                # at that moment, Python handles it after the wait, which a second signal ends
                terminate_later(multiprocessing.active_children())
        """),
        url,
        method,
    )
    assert len(lines) == 40
    assert stored(url) == Counter(lines)


@pytest.mark.slow
def test_a_process_pool_executor_that_recycles_its_workers_loses_nothing(program, url):
    lines = program(
        textwrap.dedent(POOL)
        + textwrap.dedent("""
        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(
                2, mp_context=context, initializer=begin, initargs=(sys.argv[1], {}),
                max_tasks_per_child=4,
            ) as executor:
                for n in range(16):
                    say(executor.submit(work, n).result())
        """),
        url,
    )
    assert len(lines) == 16
    assert len({line.split("-")[0] for line in lines}) >= 4, "workers were replaced"
    assert stored(url) == Counter(lines)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_process_that_ends_without_close_loses_nothing(program, url, method):
    program(
        textwrap.dedent(POOL)
        + textwrap.dedent("""
        if __name__ == "__main__":
            url, method = sys.argv[1:]
            context = multiprocessing.get_context(method)
            for name in ("a", "b"):
                process = context.Process(target=worker, args=(url, name))
                process.start()
                process.join()
                assert process.exitcode == 0
        """),
        url,
        method,
    )
    assert stored(url) == once(a=10, b=10)


def test_a_process_with_its_parents_store_loses_nothing(program, url):
    program(
        textwrap.dedent(POOL)
        + textwrap.dedent("""
        def child(name):
            record(store, name, 10)

        begin(sys.argv[1], {})
        record(store, "parent", 10)
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=child, args=(f"c{n}",)) for n in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        assert checked(store).pending == 10
        """),
        url,
    )
    assert stored(url) == once(parent=10, c0=10, c1=10, c2=10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_master_that_forks_and_recycles_workers_loses_nothing(program, url, kind, tmp_path):
    log = tmp_path / "log"
    log.touch()
    lines = program(
        """
        kind, url, path = sys.argv[1:]
        store = opened(kind, url, handle_sigterm=True, flush_interval_s=0.05)
        store.get_stats()  # preloaded, and warmed up
        log = os.open(path, os.O_WRONLY | os.O_APPEND)

        def work(requests):
            for n in itertools.count():
                if n == requests:
                    sys.exit(0)
                name = f"{os.getpid()}-{n}"
                assert store.record(provider="p", request_id=name)
                os.write(log, f"{name}\\n".encode())
                time.sleep(0.001)

        def fork(requests):
            pid = os.fork()
            if not pid:
                work(requests)
            return pid

        for _ in range(3):  # recycled after so many requests
            assert [reaped(pid) for pid in [fork(30), fork(40)]] == [0, 0]
        workers = [fork(10**9) for _ in range(3)]
        for pid in workers:  # at work when the master stops
            while f"{pid}-20" not in Path(path).read_text():
                time.sleep(0.01)
            os.kill(pid, signal.SIGTERM)
        say(*(reaped(pid) for pid in workers))
        h = checked(store)
        assert h.submitted == 0
        store.close()
        """,
        kind,
        url,
        log,
    )
    assert lines == ["-15 -15 -15"]
    logged = Counter(log.read_text().split())
    rows = stored(url)
    assert set(rows.values()) == {1}
    assert logged.keys() <= rows.keys()
    assert len(rows) - len(logged) <= 3, "one of each worker that the signal met"


# -- 3. ends -----------------------------------------------------------------------------------


@pytest.mark.sample(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("end", "status", "noise"),
    [
        ("pass", 0, ""),
        pytest.param("sys.exit(3)", 3, "", marks=pytest.mark.slow),  # as an exception does
        ("raise RuntimeError('uncaught')", 1, ".*RuntimeError: uncaught\n"),
        ("threading.Thread(target=record, args=(store, 'late', 5)).start()", 0, ""),
        # as a kill does
        pytest.param("assert store.flush(60); os._exit(4)", 4, "", marks=pytest.mark.slow),
        ("assert store.flush(60); os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
    ],
    ids=["end", "sys.exit", "exception", "thread", "_exit", "kill"],
)
def test_the_end_of_the_interpreter_writes_what_is_there(program, url, kind, end, status, noise):
    code = """
        store = opened(*sys.argv[1:3])
        record(store, "r", 50)
        checked(store)
    """
    program(
        textwrap.dedent(code) + textwrap.dedent(end) + "\n", kind, url, expect=status, noise=noise
    )
    assert stored(url) == once(r=50, late=5 * ("late" in end))


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cycle", [False, True], ids=["", "cycle"])
def test_a_store_that_is_forgotten_writes_what_is_there(program, url, kind, cycle):
    program(
        """
        gc.disable()
        store = opened(*sys.argv[1:3])
        account = store._writer.counters
        record(store, "r", 50)
        if sys.argv[3] == "True":
            store.self = store
        del store
        gc.collect()
        a = account()
        assert (a.submitted, a.written, a.pending) == (50, 50, 0), a
        os._exit(0)
        """,
        kind,
        url,
        cycle,
    )
    assert stored(url) == once(r=50)


@pytest.mark.slow
def test_a_store_that_is_forgotten_in_its_own_thread_writes_what_is_there(program, url):
    program(
        """
        last = []

        def redact(text):  # runs in the writer's thread, which now has the last reference
            last.clear()
            return text

        store = opened("sync", sys.argv[1], redact=redact)
        account = store._writer.counters
        record(store, "r", 50)
        assert store.record(provider="p", request_id="r-50", request_text="t")
        record(store, "r", 5, first=51)
        store._writer._handoff.hurry_to = 1
        last.append(store)
        del store
        account.__self__._ring()
        deadline = time.monotonic() + 60
        while account().written < 56:
            assert time.monotonic() < deadline, account()
            time.sleep(0.01)
        a = account()
        assert (a.submitted, a.written, a.pending) == (56, 56, 0), a
        """,
        url,
    )
    assert stored(url) == once(r=56)


# -- 4. SIGTERM --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sigterm_writes_everything_and_then_the_hosts_handler_runs(program, url, kind):
    lines = program(
        """
        def host(number, frame):
            h = checked(store)
            say("host", number, h.written, h.pending)
            assert store.record(provider="p", request_id="late-0")  # of a request in progress
            sys.exit(9)

        signal.signal(signal.SIGTERM, host)
        store = opened(*sys.argv[1:3], handle_sigterm=True)
        record(store, "r", 50)
        os.kill(os.getpid(), signal.SIGTERM)
        say("never")
        """,
        kind,
        url,
        expect=9,
    )
    assert lines == ["host 15 50 0"]
    assert stored(url) == once(r=50, late=1)


@pytest.mark.parametrize("kind", KINDS)
def test_after_sigterm_records_are_written_at_once_while_the_host_goes_on(program, url, kind):
    lines = program(
        """
        signal.signal(signal.SIGTERM, lambda *_: say("host"))
        store = opened(*sys.argv[1:3], handle_sigterm=True)  # it writes once an hour
        record(store, "r", 50)
        os.kill(os.getpid(), signal.SIGTERM)
        record(store, "late", 3)
        deadline = time.monotonic() + 60
        while checked(store).pending and time.monotonic() < deadline:
            time.sleep(0.01)
        say(checked(store).written)
        os._exit(0)
        """,
        kind,
        url,
    )
    assert lines == ["host", "53"]
    assert stored(url) == once(r=50, late=3)


def test_sigterm_spools_what_cannot_be_written_before_the_hosts_handler_runs(program, tmp_path):
    url = at_head(f"sqlite:///{tmp_path}/telemetry.db")
    lines = program(
        """
        import sqlite3

        def host(number, frame):
            h = checked(store)
            say(h.written, h.spooled, h.pending, round(time.monotonic() - told) < 6)
            os._exit(0)

        url, spool = sys.argv[1:3]
        signal.signal(signal.SIGTERM, host)
        store = opened("sync", url, handle_sigterm=True, spool_path=spool)
        store.query()
        other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        record(store, "r", 50)
        told = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        """,
        url,
        tmp_path / "spool.db",
        noise=".*",
    )
    assert lines == ["0 50 0 True"]


@pytest.mark.parametrize("has_spool", [False, True])
def test_sigterm_does_not_wait_for_a_database_that_is_away(program, tmp_path, has_spool):
    """The handler may have interrupted an event loop, whose requests in progress go on."""
    lines = program(
        """
        signal.signal(signal.SIGTERM, lambda *_: None)
        url, spool, keys = sys.argv[1], sys.argv[2], ("spooled", "pending", "dropped")
        options = {"spool_path": spool} if spool else {}
        store = opened("sync", url, handle_sigterm=True, connect_timeout_s=1, **options)
        record(store, "r", 50)
        while not checked(store).faults_by:
            store.flush(0.1)  # else it writes once an hour
        told = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        say(time.monotonic() - told < 1.5)
        record(store, "late", 3)
        store.flush(30 if spool else 1)
        say(*(getattr(checked(store), key) for key in keys))
        os._exit(0)
        """,
        "postgresql://nobody@127.0.0.1:1/none",
        tmp_path / "spool.db" if has_spool else "",
        noise=".*",
    )
    assert lines == ["True", "53 0 0" if has_spool else "0 53 0"]


@pytest.mark.slow
def test_sigterm_writes_to_a_database_that_is_back(program, tmp_path):
    """The batch failed before, and its next try would be seconds away."""
    url = at_head(f"sqlite:///{tmp_path}/telemetry.db")
    program(
        """
        import sqlite3

        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        store = opened("sync", sys.argv[1], handle_sigterm=True)
        store.query()
        other = sqlite3.connect(sys.argv[1].removeprefix("sqlite:///"), isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        record(store, "r", 50)
        while sum(checked(store).faults_by.values()) < 2:
            store.flush(0.1)  # else it writes once an hour
        other.execute("ROLLBACK")
        os.kill(os.getpid(), signal.SIGTERM)
        """,
        url,
        noise=".*",
    )
    assert stored(url) == once(r=50)


@pytest.mark.parametrize("kind", KINDS)
def test_sigterm_closes_and_then_the_process_dies_of_it(program, url, kind):
    program(
        """
        store = opened(*sys.argv[1:3], handle_sigterm=True)
        record(store, "r", 50)
        os.kill(os.getpid(), signal.SIGTERM)
        say("never")
        """,
        kind,
        url,
        expect=-signal.SIGTERM,
    )
    assert stored(url) == once(r=50)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_where_sigterm_is_ignored_the_store_is_closed_and_the_process_lives(program, url, kind):
    lines = program(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        store = opened(*sys.argv[1:3], handle_sigterm=True)
        record(store, "r", 50)
        os.kill(os.getpid(), signal.SIGTERM)
        assert store.record(provider="p", request_id="late") is False
        h = checked(store)
        say(h.submitted, h.written, dict(h.dropped_by))
        os.kill(os.getpid(), signal.SIGTERM)
        store.close()
        """,
        kind,
        url,
        noise=r"records lost, by cause: {'closed': 1}\n",
    )
    assert lines == ["51 50 {'closed': 1}"]
    assert stored(url) == once(r=50)


def test_without_handle_sigterm_the_signal_is_the_hosts(program, url):
    program(
        """
        store = opened("sync", sys.argv[1])
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        record(store, "r", 50)
        assert store.flush(60)
        os.kill(os.getpid(), signal.SIGTERM)
        """,
        url,
        expect=-signal.SIGTERM,
    )
    assert stored(url) == once(r=50)


@pytest.mark.slow
def test_a_hosts_handler_that_comes_later_may_call_the_stores(program, url):
    lines = program(
        """
        store = opened("sync", sys.argv[1], handle_sigterm=True)
        previous = signal.getsignal(signal.SIGTERM)

        def host(number, frame):
            record(store, "late", 5)  # the store is still open
            previous(number, frame)

        signal.signal(signal.SIGTERM, host)
        record(store, "r", 50)
        os.kill(os.getpid(), signal.SIGTERM)
        say("never")
        """,
        url,
        expect=-signal.SIGTERM,
    )
    assert lines == []
    assert stored(url) == once(r=50, late=5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_checks_the_store_at_its_start_keeps_its_only_record(program, url, kind):
    """A request is in progress when SIGTERM comes, and the server ends by the signal itself."""
    program(
        """
        store = opened(*sys.argv[1:3], handle_sigterm=True)
        if pid := os.fork():
            assert reaped(pid) == -signal.SIGTERM
            store.close()
            sys.exit()
        told = []
        signal.signal(signal.SIGTERM, lambda *_: told.append(True))
        store.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert told
        record(store, "r", 1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        """,
        kind,
        url,
    )
    assert stored(url) == once(r=1)


@pytest.mark.slow
def test_records_after_sigterm_wait_no_longer_than_is_said(program, new_url):
    url = new_url("sqlite-file", at_head=True)
    lines = program(
        """
        import sqlite3

        store = opened("sync", sys.argv[1], handle_sigterm=True)
        signal.signal(signal.SIGTERM, lambda *_: None)
        store.check()
        other = sqlite3.connect(sys.argv[1].removeprefix("sqlite:///"), isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        store._sigterm._end(True)
        began = time.monotonic()
        record(store, "r", 100)
        say(time.monotonic() - began < 20)
        say(checked(store).pending)
        other.rollback()
        store.close(30)
        """,
        url,
    )
    assert lines == ["True", "100"]
    assert stored(url) == once(r=100)


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["none", "first", "second"])
def test_sigterm_closes_two_stores(program, backend, new_url, closed):
    urls = [new_url(backend, at_head=True) for _ in range(2)]
    program(
        """
        urls, closed = sys.argv[1:3], sys.argv[3]
        first, second = (opened("sync", url, handle_sigterm=True) for url in urls)
        record(first, "a", 50)
        record(second, "b", 50)
        if closed == "first":
            first.close()
        if closed == "second":
            second.close()
        os.kill(os.getpid(), signal.SIGTERM)
        """,
        *urls,
        closed,
        expect=-signal.SIGTERM,
    )
    assert stored(urls[0]) == once(a=50)
    assert stored(urls[1]) == once(b=50)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_off_the_main_thread_the_remedy_is_named(program, url, kind):
    lines = program(
        """
        from lynkr_store import BadArgument

        def start():
            try:
                opened(*sys.argv[1:3], handle_sigterm=True)
            except BadArgument as error:
                say(error)

        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        """,
        kind,
        url,
    )
    assert lines == ["handle_sigterm: open the store in the main thread, where signals are handled"]


@pytest.mark.parametrize("order", ["before", "after"])
def test_sigterm_in_a_loop_runs_the_hosts_callback(program, url, order):
    lines = program(
        """
        async def main(url, order):
            loop, stop = asyncio.get_running_loop(), asyncio.Event()
            if order == "before":
                loop.add_signal_handler(signal.SIGTERM, stop.set)
            settings = StoreSettings(url=url, handle_sigterm=True, flush_interval_s=3600)
            store = AsyncStore(settings=settings)
            if order == "after":  # it takes the place of the store's, and closes by itself
                loop.add_signal_handler(signal.SIGTERM, stop.set)
            for n in range(50):
                assert store.record(provider="p", request_id=f"r-{n}")
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(stop.wait(), 60)
            h = await store.health()
            say("called", h.written)
            await store.close(60)
            h = await store.health()
            assert h.submitted == h.written == 50, h

        asyncio.run(main(*sys.argv[1:]))
        """,
        url,
        order,
    )
    assert lines == ["called 50" if order == "before" else "called 0"]
    assert stored(url) == once(r=50)


RANDOM_MOMENTS = """
    what, url = sys.argv[1:]
    count = 0

    def open_store():
        global store
        url = f"sqlite:///{path}"
        store = opened("sync", url, handle_sigterm=True, queue_max_bytes=2**20)

    def host(number, frame):
        if what == "open":
            say(path, 0)
            os._exit(0)
        deadline = time.monotonic() + 30
        while (h := checked(store)).pending and time.monotonic() < deadline:
            time.sleep(0.01)  # the wait for one more try has a limit that a busy machine may meet
        assert h.pending == 0, h
        say(count, h.written, h.dropped)
        os._exit(0)

    signal.signal(signal.SIGTERM, host)
    store = opened("sync", url, handle_sigterm=True, flush_interval_s=0.002, batch_max_rows=50)
    say("ready")
    while True:
        if store.record(provider="p", request_id=f"r-{count}"):
            count += 1
        if what == "flush":
            store.flush(60)
        elif what == "health":
            checked(store)
        elif what == "close" and count == 500:
            say("closing")
            store.close(60)
            signal.pause()
        elif count % 100 == 0:
            time.sleep(0.002)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["record", "flush", "health", "close"])
def test_sigterm_at_random_moments_loses_nothing(program, new_url, backend, what):
    told = []
    for seed in range(10):
        url = new_url(backend, at_head=True)
        with program.start(RANDOM_MOMENTS, what, url) as child:
            try:
                assert child.stdout.readline() == "ready\n"
                if what == "close":
                    assert child.stdout.readline() == "closing\n"
                time.sleep(random.Random(seed).random() * (0.03 if what == "close" else 0.3))
                child.send_signal(signal.SIGTERM)
                out, errors = child.communicate(timeout=60)
            finally:
                child.kill()
        assert (child.returncode, errors) == (0, "")
        count, written, dropped = map(int, out.split())
        assert dropped == 0
        rows = stored(url)
        assert rows in (once(r=count), once(r=count + 1)), "the signal may meet a record's call"
        assert written == len(rows)
        told.append(count)
    print(f"SIGTERM after {told} records")


ENUMERATED = """
    import shutil
    import lynkr_store
    import lynkr_store.store.sync

    what, folder, stride = sys.argv[1], sys.argv[2], int(sys.argv[3])
    ours = (os.path.dirname(lynkr_store.__file__), threading.__file__)

    def recorded(times=1):
        for _ in range(times):
            count.append(store.record(provider="p", request_id=f"r-{len(count)}"))

    def refused(times):
        for _ in range(times):
            assert not store.record(provider="p", request_text="x" * 2**21)

    def act():
        match what:
            case "open":
                open_store()
            case "record":
                recorded(3)
            case "refused":
                refused(5)
            case "flush":
                assert store.flush(60)
            case "health":
                store.health()
            case "close":
                store.close(60)

    def open_store():
        global store
        url = f"sqlite:///{path}"
        store = opened("sync", url, handle_sigterm=True, queue_max_bytes=2**20)

    def host(number, frame):
        if what == "open":
            say(path, 0)
            os._exit(0)
        h = checked(store)
        assert h.pending == 0, h
        assert set(h.dropped_by) <= {"queue_full", "closed"}, (moment, h)
        say(path, sum(count))
        os._exit(0)

    def trial(moment, path):
        global count
        signal.alarm(60)
        signal.signal(signal.SIGTERM, host)
        count, seen = [], 0
        if what != "open":
            open_store()
        if what not in ("open", "record"):  # the first record starts the threads
            recorded(5)
        if what == "refused":
            refused(998)  # the thousandth has them counted

        def trace(frame, event, argument):
            nonlocal seen
            if not frame.f_code.co_filename.startswith(ours):
                return None
            seen += 1
            if seen == moment:
                sys.settrace(None)
                signal.raise_signal(signal.SIGTERM)
            return trace

        sys.settrace(trace)
        act()
        sys.settrace(None)
        store.close(60)
        os._exit(42)

    moment = 1
    for number in itertools.count():
        path = os.path.join(folder, f"{number}.db")
        shutil.copyfile(os.path.join(folder, "template.db"), path)
        pid = os.fork()
        if not pid:
            trial(moment, path)
        status = reaped(pid)
        if status == 42:
            break
        assert status == 0, (moment, status)
        moment += stride
    say("moments", number)
"""


@pytest.mark.slow
def test_sigterm_while_the_main_thread_opens_the_database_loses_nothing(program, new_url):
    url = new_url("sqlite-file")
    lines = program(
        """
        from lynkr_store.migrate import revisions
        from lynkr_store.migrate import upgrade as migrate

        def host(number, frame):
            h = checked(store)
            say(h.submitted, h.written, dict(h.dropped_by))
            os._exit(0)

        def look(connection):
            revisions.require_head = real
            record(store, "r", 50)
            signal.raise_signal(signal.SIGTERM)

        real, revisions.require_head = revisions.require_head, look
        signal.signal(signal.SIGTERM, host)
        store = opened("sync", sys.argv[1], handle_sigterm=True)
        store.get_stats()
        """,
        url,
    )
    assert lines == ["50 50 {}"]
    assert stored(url) == once(r=50)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "stride"),
    [("open", 2), ("record", 1), ("refused", 2), ("flush", 1), ("health", 2), ("close", 2)],
)
def test_sigterm_at_any_line_loses_nothing(program, tmp_path, what, stride):
    at_head(f"sqlite:///{tmp_path}/template.db")
    logged = r"(records lost, by cause: {'queue_full': \d+}\n)*" if what == "refused" else ""
    *lines, last = program(
        ENUMERATED, what, tmp_path, stride, "no watch", timeout=600, noise=logged
    )
    for line in lines:
        path, count = line.rsplit(" ", 1)
        rows = stored(f"sqlite:///{path}")
        assert rows in (once(r=int(count)), once(r=int(count) + 1)), line
    print(f"{what}: SIGTERM at {last}")
    assert int(last.split()[1]) > 10


def test_the_exit_of_an_interpreter_whose_finalizers_fail_loses_nothing(program, url):
    """Which CPython's do where another thread makes one meanwhile: a connection's, say."""
    program(
        """
        import weakref

        store = opened("sync", sys.argv[1])
        record(store, "r", 100)
        weakref.finalize._select_for_exit = None  # called once per exit
        """,
        url,
        noise=".*Exception ignored in atexit callback.*",
    )
    assert stored(url) == once(r=100)


def test_a_second_ctrl_c_in_close_loses_nothing(program, tmp_path):
    url = f"sqlite:///{tmp_path}/telemetry.db"
    lines = program(
        """
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
        store = opened("sync", sys.argv[1])
        record(store, "r", 100)
        flush = store._writer.flush

        def interrupted(timeout_s):
            store._writer.flush = flush
            signal.raise_signal(signal.SIGINT)

        store._writer.flush = interrupted
        try:
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                store.close()
        except KeyboardInterrupt:
            say("interrupted")
        """,
        url,
    )
    assert lines == ["interrupted"]
    assert stored(url) == once(r=100)


# -- 5. the loop -------------------------------------------------------------------------------


FROZEN = """
    import sqlite3
    import subprocess

    path, what = sys.argv[1:]

    async def main():
        ticks, longest = 0, 0.0

        async def tick():
            nonlocal ticks, longest
            last = time.monotonic()
            while True:
                await asyncio.sleep(0.01)
                now = time.monotonic()
                ticks, longest, last = ticks + 1, max(longest, now - last), now

        settings = StoreSettings(url=f"sqlite:///{path}", flush_interval_s=0.01, batch_max_rows=10)
        store = AsyncStore(settings=settings)
        store.record(provider="p", request_id="r-0")
        assert await store.flush(60)
        await store.get_stats()
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN EXCLUSIVE")
        ticker = asyncio.create_task(tick())
        for n in range(1, 100):
            assert store.record(provider="p", request_id=f"r-{n}")
        began = time.monotonic()
        if what == "flush":
            assert await store.flush(2) is False
        elif what == "close":
            await store.close(1)
        elif what == "health":
            for _ in range(200):  # each takes less than a tick
                checked_(await store.health())
        elif what == "record":
            for n in range(100, 5_000):
                store.record(provider="p", request_id=f"dropped-{n}")
                if n % 100 == 0:
                    await asyncio.sleep(0)
            await asyncio.sleep(0.1)  # they took less than a tick
        took = time.monotonic() - began
        ticker.cancel()
        h = checked_(await store.health())
        say(what, ticks, round(longest, 3), round(took, 3), h.written, h.pending,
            dict(h.dropped_by))
        assert ticks >= took / 0.01 / 10, (ticks, took)
        assert longest < 1.0, longest
        other.rollback()
        other.close()
        await store.close(60)
        h = checked_(await store.health())
        assert h.pending == 0, h
        say(h.written, h.dropped)

    def checked_(h):
        assert h.submitted == h.written + h.rejected + h.dropped + h.spooled + h.pending, h
        return h

    asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["record", "flush", "close", "health"])
def test_a_loop_is_never_blocked_by_a_locked_file(program, tmp_path, what):
    path = tmp_path / "telemetry.db"
    at_head(f"sqlite:///{path}")
    lost = r"records lost, by cause: .*'deadline': \d+.*\n" if what == "close" else ""
    seen, last = program(FROZEN, path, what, noise=lost)
    print(seen)
    written, dropped = map(int, last.split())
    rows = stored(f"sqlite:///{path}")
    assert set(rows.values()) == {1}
    if what == "close":  # what was given up may have been stored by its last try
        assert dropped == 99
        assert len(rows) <= 11
    else:
        assert dropped == 0
        assert len(rows) == written
