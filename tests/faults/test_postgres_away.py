import itertools
import time
from contextlib import contextmanager

import pytest

from lynkr_store import Store, StoreSettings, create_store_engine
from lynkr_store.migrate.upgrade import upgrade
from tests.support.children import MortalServer, adds_up, launch, run, stored
from tests.support.postgres import available_servers
from tests.support.proxy import Do, Proxy, forward

WAIT_S = 60
SOON_S = 15  # on a busy machine, where it is about a second otherwise
MIB = 2**20

_numbers = itertools.count()


@pytest.fixture(scope="module", params=available_servers(), ids=lambda i: i.name)
def server(request):
    with MortalServer(request.param) as started:
        yield started


@pytest.fixture
def database(server):
    name = f"away_{next(_numbers)}"
    engine = create_store_engine(server.create_database(name))
    upgrade(engine)
    engine.dispose()
    yield name
    server.drop_database(name)


@pytest.fixture
def url(server, database):
    return server.url(database)


@pytest.fixture
def proxy(server):
    with Proxy(server.socket) as started:
        yield started


@pytest.fixture
def away(server, proxy):
    """Take the server away, in one of three ways, until the block ends."""

    @contextmanager
    def away(how):
        begin, end = {
            "killed": (server.kill, server.start_again),
            "frozen": (server.freeze, server.thaw),
            "cut": (lambda: cut_in_a_batch(proxy), proxy.admit),
        }[how]
        begin()
        try:
            yield
        finally:
            end()

    return away


def cut_in_a_batch(proxy):
    """Lose every connection while rows are on their way, and take no more."""

    def choose(kind, _):
        if kind != b"d":  # rows, as COPY sends them
            return Do.FORWARD
        proxy.refusing = True
        return Do.CUT_AFTER

    proxy.choose = choose
    deadline = time.monotonic() + WAIT_S
    while not proxy.refusing:
        assert time.monotonic() < deadline, "no batch came by"
        time.sleep(0.01)
    proxy.choose = forward
    proxy.cut()


def assert_whole(url, recorded, *more):
    """Every record is stored, once and in order."""
    found = stored(url)
    assert found[: len(found) - len(more)] == [str(number) for number in range(recorded)]
    assert found[len(found) - len(more) :] == list(more)


# -- 500 rows of 8 KB a second, and a burst -------------------------------------------------------

SHORT = {"outage_s": 2.0, "burst_rows": 200, "last_retry_s": 0.5, "spool_after_s": 0.5}
LONG = {"outage_s": 20.0, "burst_rows": 2_000, "last_retry_s": 5.0, "spool_after_s": 1.0}
QUEUE = {"queue_max_bytes": 256 * MIB, "queue_max_rows": 200_000}
LOAD = {"rate": 500, "row_bytes": 8_192, "burst_row_bytes": 50 * 1024}

WAYS = ["killed", "frozen", "cut"]
each_way = pytest.mark.parametrize("how", WAYS)
each_outage = pytest.mark.parametrize(
    ("how", "length"),
    [
        *(pytest.param(how, SHORT, id=f"{how}, 2 s") for how in WAYS),
        pytest.param("killed", LONG, id="killed, 20 s", marks=pytest.mark.slow),
    ],
)


@contextmanager
def outage(child, away, how, length):
    """The server is away while the child records; a burst comes in the middle of it."""
    assert child.heard()["ready"]
    time.sleep(1)  # in full swing
    with away(how):
        time.sleep(length["outage_s"] / 2)
        assert adds_up(child.ask("burst")["health"])
        time.sleep(length["outage_s"] / 2)
        yield


def assert_nothing_lost(end, how, length):
    health = end["health"]
    print(f"{how}: {end['recorded']} records, {end['memory'] / MIB:.0f} MiB, {health['faults_by']}")
    assert end["confirmed"]
    assert adds_up(health)
    assert (health["dropped"], health["rejected"], health["pending"]) == (0, 0, 0)
    assert end["recorded"] > LOAD["rate"] * length["outage_s"]
    assert end["memory"] <= QUEUE["queue_max_bytes"] + 100 * 10**6


@pytest.mark.slow
@each_outage
def test_an_outage_loses_nothing_and_memory_stays_bounded(proxy, database, url, away, how, length):
    options = LOAD | QUEUE | length | {"url": proxy.url(database)}
    with launch("recorder", options) as child:
        with outage(child, away, how, length):
            pass
        child.ask("stop")
        end = child.ask("close")
    assert_nothing_lost(end, how, length)
    assert end["health"]["written"] == end["recorded"]
    assert_whole(url, end["recorded"])


@pytest.mark.slow
@each_outage
def test_what_an_outage_left_in_the_spool_is_written_when_it_is_over(
    proxy, database, url, away, how, length, tmp_path
):
    options = LOAD | QUEUE | length | {"spool_path": str(tmp_path / "spool.db")}
    with launch("recorder", options | {"url": proxy.url(database)}) as child:
        with outage(child, away, how, length):
            assert child.ask("stop")["health"]["spooled"] > 0
        end = child.ask("close")
    assert_nothing_lost(end, how, length)
    assert end["health"]["written"] == end["recorded"]
    assert_whole(url, end["recorded"])


@pytest.mark.slow
@each_outage
def test_what_is_spooled_survives_a_kill_at_the_end_of_an_outage(
    proxy, database, url, away, how, length, tmp_path
):
    options = LOAD | QUEUE | length | {"spool_path": str(tmp_path / "spool.db")}
    with (
        launch("recorder", options | {"url": proxy.url(database)}) as child,
        outage(child, away, how, length),
    ):
        child.ask("stop")
        last = child.ask("flush")
        child.kill()
    assert_nothing_lost(last, how, length)
    assert last["health"]["spooled"] > 0
    finish(url, last["recorded"], options, left=last["health"]["spooled"])


def finish(url, recorded, options, *, left):
    """Another process opens the spool, and all is stored."""
    own = {"url": url, "spool_path": options["spool_path"], "last_retry_s": 0.5, "mark": "after"}
    [said] = run("replay", own, 2 * WAIT_S)
    assert said["confirmed"]
    health = said["health"]
    assert adds_up(health)
    assert (health["recovered"], health["written"], health["spooled"]) == (left, left + 1, 0)
    assert_whole(url, recorded, "after")


# -- a connection cut at each message -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [Do.CUT_BEFORE, Do.CUT_AFTER],
    ids=lambda how: how.name.lower(),
)
def test_a_connection_cut_at_any_message_costs_a_try(
    proxy, database, url, how, monkeypatch, capsys
):
    monkeypatch.setattr("lynkr_store.ingest.deliverer._FIRST_RETRY_S", 0.01)
    monkeypatch.setattr("lynkr_store.ingest.deliverer._LAST_RETRY_S", 0.05)
    kinds = set()
    for fatal in itertools.count(1):
        messages = itertools.count(1)
        cut = []

        def choose(kind, content, fatal=fatal, messages=messages, cut=cut):
            if next(messages) != fatal:
                return Do.FORWARD
            cut.append(kind)
            return how

        proxy.choose = choose
        settings = StoreSettings(url=proxy.url(database), batch_max_rows=3)
        with Store(settings=settings) as store:
            for number in range(5):
                store.record(request_id=f"{fatal}-{number}", provider="p")
            assert store.flush(WAIT_S)
            health = store.health()
        assert adds_up(health)
        assert (health.written, health.pending) == (5, 0)
        found = [name for name in stored(url) if name.startswith(f"{fatal}-")]
        assert found == [f"{fatal}-{number}" for number in range(5)]
        kinds.update(cut)
        if not cut:
            break
    with capsys.disabled():
        print(f"\n{how.value} at {fatal - 1} messages of {len(kinds)} kinds")
    assert fatal > 15


# -- the end, and the state -----------------------------------------------------------------------


@pytest.fixture
def store_of(proxy, database):
    opened = []

    def open_(**options):
        store = Store(settings=StoreSettings(url=proxy.url(database), **options))
        opened.append(store)
        return store

    yield open_
    for store in opened:
        store.close(0)


def in_use(store):
    for number in range(10):
        store.record(request_id=str(number), provider="p")
    assert store.flush(WAIT_S)
    eventually(lambda: store.health().reachable)


def eventually(holds):
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def quickest_s(call):
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


@pytest.mark.slow
@pytest.mark.parametrize("rows", [10, 5_000])
@pytest.mark.parametrize("spooling", [False, True], ids=["memory", "spool"])
def test_a_close_against_a_frozen_server_returns_in_time(
    store_of, away, url, tmp_path, spooling, rows
):
    store = store_of(**({"spool_path": tmp_path / "spool.db"} if spooling else {}))
    in_use(store)
    with away("frozen"):
        for number in range(rows):
            assert store.record(request_id=str(10 + number), provider="p", request_text="x" * 1_000)
        assert store.flush(0.2) is False
        store.health()  # a look is under way too
        began = time.monotonic()
        store.close(0.5)
        took = time.monotonic() - began
        health = store.health()
        print(f"{rows} rows, spool: {spooling}: {took:.2f} s, {dict(health.dropped_by)}")
        assert took < SOON_S
        assert adds_up(health)
        assert (health.written, health.pending) == (10, 0)
        if spooling:
            assert (health.spooled, health.dropped) == (rows, 0)
        else:
            by = health.dropped_by
            assert by["outcome_unknown"] > 0
            assert by["outcome_unknown"] + by.get("deadline", 0) == health.dropped == rows
    if spooling:
        finish(url, 10 + rows, {"spool_path": str(tmp_path / "spool.db")}, left=rows)
    else:
        found = stored(url)
        assert found == [str(number) for number in range(len(found))]
        assert len(found) >= 10


@pytest.mark.sample(3)
@each_way
def test_health_answers_at_once_while_the_server_is_away(store_of, away, how):
    store = store_of()
    in_use(store)
    if how == "cut":
        for number in range(10, 20):
            store.record(request_id=str(number), provider="p")

    with away(how):
        for number in range(20, 30):
            store.record(request_id=str(number), provider="p")
        best = quickest_s(store.health)
        assert best < 0.15
        eventually(lambda: not store.health().reachable)
        assert quickest_s(store.health) < 0.15
        health = store.health()
        print(f"{how}: {best * 1000:.0f} ms, {health.last_error}")
        assert adds_up(health)
        assert health.pending >= 10
    assert store.flush(WAIT_S)
    eventually(lambda: store.health().reachable)
    health = store.health()
    assert adds_up(health)
    assert health.written == health.submitted
