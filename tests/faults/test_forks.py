"""Forks while the library's own threads use the database: at each statement, and two at once.

The story of each case: the process forks, the child records, the parent ends, a third process opens
and closes the file, and the child records again, while a gateway writes on all the time. What a
`flush()` confirmed must be in the file in the end. An SQLite connection that a child inherits loses
it: SQLite believes that it holds locks which the system did not give to the child.
"""

import pytest

PROGRAM = """
    import shutil
    import sqlite3
    import traceback
    from collections import Counter

    from sqlalchemy import event
    from lynkr_store import Window
    from lynkr_store.db import forking
    from lynkr_store.db.engines import create_store_async_engine
    from lynkr_store.process.lifecycle import Forkable, on_fork
    from tests.support.stores import eventually

    WAIT_S = 60
    NOW = time.time_ns() // 10**6
    OLD = NOW - 5 * 86_400_000

    begun, over = threading.Event(), threading.Event()  # of a fork

    class Moments(Forkable):
        '''The first part that is told before a fork, and the last in the parent.'''

        def before_fork(self):
            begun.set()

        def after_fork_in_parent(self):
            over.set()

    moments = Moments()
    on_fork(moments)

    class Statements:
        '''Counts what other threads than the main one say to SQLite, and stops at one.'''

        def __init__(self, fatal, until):
            self.fatal, self.until, self.seen = fatal, until, 0
            self.armed, self.reached = False, threading.Event()
            self.lock = threading.Lock()

        def __call__(self, statement):
            if not self.armed or threading.current_thread() is threading.main_thread():
                return
            with self.lock:
                self.seen += 1
                now = self.seen == self.fatal
            if now:
                self.reached.set()
                self.until.wait(WAIT_S)

        def watch(self, engine, of_loop=False):
            @event.listens_for(engine, "connect")
            def trace(connection, _):
                driver = connection.driver_connection if of_loop else connection
                (driver._conn if of_loop else driver).set_trace_callback(self)

    def maintain(store):
        store.maintain()

    def checkpoint(store):
        store._database.checkpoint()

    def probe(store):
        store._probe._run()

    def read(store):
        store.get_stats(Window(since=0))
        store.query(limit=10)
        sum(1 for _ in store.iter_records(page_rows=50))

    def add_many(store):
        store.add_many([{"provider": "p", "request_id": "added"}])

    def batch(store):
        record(store, "batch", 30)
        assert store.flush(WAIT_S)

    def read_async(store):
        async def ask():
            async with AsyncStore(settings=store.settings) as other:
                statements.watch(other._database.engine)
                await other.query(limit=10)
                await other.get_stats(Window(since=0))
        asyncio.run(ask())

    def read_host(store):
        quiet = StoreSettings(maintenance_interval_s=3600)
        async def ask():
            host = create_store_async_engine(store.settings.url)
            statements.watch(host.sync_engine, of_loop=True)
            async with AsyncStore(engine=host, settings=quiet) as other:
                await other.query(limit=10)
                await other.get_stats(Window(since=0))
            await host.dispose()
        asyncio.run(ask())

    def scenario(path, work, fatal, busy, report, go):
        '''The parent of the story; returns the number of statements, if it came to none.'''
        global statements
        statements = Statements(fatal, over if busy else begun)
        begun.clear()
        over.clear()
        if busy:
            forking.FORK_WAIT_S = 0.3
        options = {"flush_interval_s": 3600, "retention_days": 2, "maintenance_interval_s": 3600}
        store = Store(settings=StoreSettings(url=f"sqlite:///{path}", **options))
        statements.watch(store.engine)
        for n in range(60):
            store.record(provider="p", request_id=f"old-{n}", timestamp=OLD)
        record(store, "parent", 60)
        assert store.flush(WAIT_S)
        statements.armed = True
        failures = []

        def body():
            try:
                work(store)
            except BaseException as error:
                failures.append(traceback.format_exc())

        worker = threading.Thread(target=body)
        worker.start()
        while worker.is_alive() and not statements.reached.is_set():
            statements.reached.wait(0.005)
        if not statements.reached.is_set():
            worker.join()
            assert not failures, failures
            store.close()
            os.write(report, f"end {statements.seen}\\n".encode())
            os._exit(0)
        began = time.monotonic()
        if not os.fork():
            child(store, busy, report, go)
        took = time.monotonic() - began
        statements.armed = False
        worker.join(WAIT_S)
        assert not worker.is_alive() and not failures, failures
        assert took < 4.5, took
        record(store, "later", 20)
        assert store.flush(WAIT_S)
        checked(store)
        store.close()
        os._exit(0)

    def child(store, busy, report, go):
        signal.alarm(WAIT_S)
        confirmed = []
        for name in ("child", "orphan"):
            record(store, name, 20)
            if store.flush(0.5 if busy else WAIT_S):
                confirmed.append(name)
            checked(store)
            if busy:
                eventually(lambda: "forked while" in (checked(store).last_error or ""))
                assert store.health().reachable is False
            if name == "child":
                os.write(report, b"ready\\n")
                os.read(go, 1)
        store.close(0.1)
        h = checked(store)
        assert h.pending == 0 and h.dropped == 40 - 20 * len(confirmed), h
        os.write(report, f"confirmed {' '.join(confirmed)}\\n".encode())
        os._exit(0)

    def gateway(path, stop, count):
        '''Writes on by SQLite alone, as the Node module does.'''
        connection = sqlite3.connect(path, timeout=10, isolation_level=None)
        written = 0
        ends = time.monotonic() + WAIT_S
        while not os.path.exists(stop) and time.monotonic() < ends:
            connection.execute(
                "INSERT INTO routing_telemetry (request_id, provider, timestamp)"
                " VALUES (?, 'g', ?)",
                (f"gateway-{written}", NOW),
            )
            written += 1
            time.sleep(0.002)
        connection.close()
        os.write(count, str(written).encode())
        os._exit(0)

    def forked(body, *arguments):
        pid = os.fork()
        if not pid:
            try:
                body(*arguments)
            except BaseException:
                traceback.print_exc()
                os._exit(9)
        return pid

    def third(path):
        connection = sqlite3.connect(path, timeout=10)
        connection.execute("SELECT count(*) FROM routing_telemetry").fetchone()
        connection.close()
        os._exit(0)

    def told(work, fatal, busy, template, folder):
        path, stop = f"{folder}/telemetry.db", f"{folder}/stop"
        os.mkdir(folder)
        shutil.copyfile(template, path)
        report, to_report = os.pipe()
        go, to_go = os.pipe()
        count, to_count = os.pipe()
        parent = forked(scenario, path, work, fatal, busy, to_report, go)
        os.close(to_report)
        os.close(go)
        heard = os.fdopen(report)
        first = heard.readline().split()
        if first and first[0] == "end":
            assert reaped(parent) == 0
            heard.close()
            for end in (to_go, count, to_count):
                os.close(end)
            return int(first[1])
        assert first == ["ready"], first
        with_gateway = forked(gateway, path, stop, to_count)
        assert reaped(parent) == 0
        assert reaped(forked(third, path)) == 0
        os.write(to_go, b"x")
        words = heard.readline().split()
        assert words and words[0] == "confirmed", words
        assert heard.readline() == ""  # the child has ended
        open(stop, "w").close()
        assert reaped(with_gateway) == 0
        gateways = int(os.read(count, 20))
        connection = sqlite3.connect(path)
        there = Counter(r[0].rpartition("-")[0] for r in connection.execute(
            "SELECT request_id FROM routing_telemetry"))
        [[sound]] = connection.execute("PRAGMA integrity_check").fetchall()
        connection.close()
        expected = dict.fromkeys(words[1:], 20) | {"parent": 60, "later": 20, "gateway": gateways}
        assert sound == "ok", sound
        missing = {k: (v, there[k]) for k, v in expected.items() if there[k] != v and v}
        assert not missing, (fatal, missing)
        assert words[1:] == ([] if busy else ["child", "orphan"]), words
        heard.close()
        for end in (to_go, count, to_count):
            os.close(end)
        return None

    if __name__ == "__main__":
        work, busy, template, folder = sys.argv[1], sys.argv[2] == "busy", *sys.argv[3:5]
        step, fatal = map(int, sys.argv[5:7])
        cases = 0
        while (seen := told(globals()[work], fatal, busy, template, f"{folder}/{fatal}")) is None:
            fatal += step
            cases += 1
        assert cases
        say(cases, seen)
"""


@pytest.fixture
def forked(program, new_url, tmp_path):
    """Run the program; how many forks at how many statements."""

    def run(work, busy, step, first=1):
        template = new_url("sqlite-file", at_head=True).removeprefix("sqlite:///")
        folder = tmp_path / "forks"
        folder.mkdir()
        options = (template, folder, step, first)
        [line] = program(PROGRAM, work, busy, *options, noise=".*", timeout=1800)
        return tuple(map(int, line.split()))

    return run


WORKS = ["maintain", "checkpoint", "probe", "read", "add_many", "batch", "read_async", "read_host"]


@pytest.mark.sample(16)
@pytest.mark.parametrize("busy", ["rests", "busy"])
@pytest.mark.parametrize("work", WORKS)
def test_a_fork_at_a_statement_loses_nothing_that_was_confirmed(forked, work, busy):
    step = {"maintain": 50, "read": 11, "probe": 9}.get(work, 5)
    cases, statements = forked(work, busy, step)
    print(f"{cases} forks at {statements} statements")


# one of three: it has the most, and much of it waits; in three parts, which run side by side
OF_MAINTENANCE = [("maintain", 9, first) for first in (1, 4, 7)]


@pytest.mark.slow
@pytest.mark.parametrize("busy", ["rests", "busy"])
@pytest.mark.parametrize(
    ("work", "step", "first"),
    [*OF_MAINTENANCE, *((work, 1, 1) for work in WORKS if work != "maintain")],
)
def test_a_fork_at_any_statement_loses_nothing_that_was_confirmed(forked, work, step, first, busy):
    cases, statements = forked(work, busy, step, first)
    assert cases >= (statements - 1) // step
    print(f"{cases} forks at {statements} statements")
