import itertools
import threading
import time
from contextlib import contextmanager

import psycopg
import pytest

from lynkr_store import Store, StoreSettings, create_store_engine
from lynkr_store.migrate.upgrade import upgrade
from tests.support.children import MortalServer, adds_up, run, stored
from tests.support.postgres import available_servers
from tests.support.proxy import Do, Proxy, lose

pytestmark = pytest.mark.sample(2)

WAIT_S = 30

_numbers = itertools.count()


@pytest.fixture(scope="module", params=available_servers(), ids=lambda i: i.name)
def server(request):
    with MortalServer(request.param) as started:
        yield started


@pytest.fixture
def database(server):
    name = f"lost_{next(_numbers)}"
    url = server.create_database(name)
    engine = create_store_engine(url)
    upgrade(engine)
    engine.dispose()
    yield name
    server.drop_database(name)


@pytest.fixture
def url(server, database):
    """The way to the database that loses nothing."""
    return server.url(database)


@pytest.fixture
def proxy(server):
    with Proxy(server.socket) as started:
        yield started


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr("lynkr_store.ingest.deliverer._FIRST_RETRY_S", 0.01)
    monkeypatch.setattr("lynkr_store.ingest.deliverer._LAST_RETRY_S", 0.1)


@pytest.fixture
def open_store(proxy, database):
    opened = []

    def open_(**options):
        store = Store(settings=StoreSettings(url=proxy.url(database), **options))
        opened.append(store)
        return store

    yield open_
    proxy.choose = lose(Do.FORWARD, lambda _: False)
    for store in opened:
        store.close(WAIT_S)


def record(store, numbers, **fields):
    for number in numbers:
        assert store.record(request_id=str(number), provider="p", **fields)


def execute(url, *statements):
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def eventually(found):
    deadline = time.monotonic() + WAIT_S
    while not (answer := found()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
    return answer


REFUSE_SOME = (
    "ALTER TABLE routing_telemetry ADD CONSTRAINT mine CHECK (tier <> 'refused')",
    """CREATE FUNCTION choke() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM 1 / 0; RETURN NEW; END $$""",
    """CREATE TRIGGER choke BEFORE INSERT ON routing_telemetry
    FOR EACH ROW WHEN (NEW.tier = 'choked') EXECUTE FUNCTION choke()""",
)


@pytest.mark.parametrize("how", [Do.CUT_AFTER, Do.CUT_BEFORE], ids=lambda h: h.name.lower())
def test_rows_whose_commit_goes_unanswered_are_stored_once(open_store, proxy, url, how):
    store = open_store(batch_max_rows=10)
    proxy.choose = lose(how, lambda number: number % 2)
    for start in range(0, 200, 20):
        record(store, range(start, start + 20))
        assert store.flush(WAIT_S)
    health = store.health()
    assert adds_up(health)
    assert (health.submitted, health.written, health.pending) == (200, 200, 0)
    assert health.faults_by["OutcomeUnknown"] >= 10
    assert proxy.cuts >= 10
    assert stored(url) == [str(number) for number in range(200)]


def test_a_commit_that_goes_unanswered_again_and_again_is_one_batch(open_store, proxy, url):
    store = open_store()
    proxy.choose = lose(Do.CUT_AFTER, lambda number: number <= 5)
    record(store, range(20))
    assert store.flush(WAIT_S)
    health = store.health()
    assert (health.written, health.faults_by["OutcomeUnknown"]) == (20, 5)
    assert adds_up(health)
    assert stored(url) == [str(number) for number in range(20)]


@pytest.mark.parametrize("how", [Do.CUT_AFTER, Do.CUT_BEFORE], ids=lambda h: h.name.lower())
def test_rows_refused_in_a_try_that_went_unanswered_keep_their_causes(open_store, proxy, url, how):
    execute(url, *REFUSE_SOME)
    store = open_store(batch_max_rows=20)
    proxy.choose = lose(how, lambda number: number % 2)
    kept = []
    for number in range(60):
        tier = {3: "refused", 5: "choked", 6: "refused"}.get(number % 10)
        record(store, [number], tier=tier)
        if tier is None:
            kept.append(str(number))
    assert store.flush(WAIT_S)
    health = store.health()
    assert adds_up(health)
    assert health.faults_by["OutcomeUnknown"] >= 1
    assert dict(health.rejected_by) == {"constraint": 12, "data": 6}
    assert health.written == len(kept)
    assert stored(url) == kept


def test_a_batch_that_is_refused_whole_and_whose_commit_goes_unanswered(open_store, proxy, url):
    execute(url, *REFUSE_SOME)
    store = open_store()
    proxy.choose = lose(Do.CUT_AFTER, lambda number: number <= 2)
    record(store, range(4), tier="refused")
    assert store.flush(WAIT_S)
    health = store.health()
    assert adds_up(health)
    assert (health.written, dict(health.rejected_by)) == (0, {"constraint": 4})
    assert health.faults_by["OutcomeUnknown"] == 2
    assert stored(url) == []


@pytest.mark.slow
def test_a_process_that_replays_a_partly_refused_batch_counts_the_refused_rows(
    open_store, proxy, url, tmp_path
):
    execute(url, *REFUSE_SOME)
    store = open_store(spool_path=tmp_path / "spool.db", spool_after_s=0)

    def lose_all(kind, content):
        choice = lost(kind, content)
        proxy.refusing = proxy.refusing or choice is not Do.FORWARD  # it stays away
        return choice

    lost = lose(Do.CUT_AFTER, lambda number: number == 1)
    proxy.choose = lose_all
    record(store, range(8))
    record(store, range(8, 10), tier="refused")
    assert store.flush(WAIT_S)
    before = store.health()
    assert adds_up(before)
    assert (before.spooled, before.written) == (10, 0)
    assert before.faults_by["OutcomeUnknown"] == 1
    assert stored(url) == [str(number) for number in range(8)], "it was committed"
    store.close(1)
    options = {"url": url, "spool_path": str(tmp_path / "spool.db"), "last_retry_s": 0.1}
    [said] = run("replay", options | {"mark": "after"}, WAIT_S)
    after = said["health"]
    assert adds_up(after)
    assert (after["recovered"], after["written"], after["spooled"]) == (10, 9, 0)
    assert after["rejected_by"] == {"refused_earlier": 2}
    assert stored(url) == [*(str(number) for number in range(8)), "after"]


GATE = 4711  # an advisory lock: a commit waits for it

HELD_COMMITS = (
    f"""CREATE FUNCTION held() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_advisory_xact_lock_shared({GATE}); RETURN NULL; END $$""",
    """CREATE CONSTRAINT TRIGGER held AFTER INSERT ON routing_telemetry
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.tier = 'held') EXECUTE FUNCTION held()""",
)


@contextmanager
def gate_closed(url):
    with psycopg.connect(url, autocommit=True) as gate:
        gate.execute("SELECT pg_advisory_lock(%s)", [GATE])
        yield lambda: gate.execute("SELECT pg_advisory_unlock(%s)", [GATE])


def waiting(url, *, to_commit):
    """Backends that wait inside COMMIT, or in a second try, for the first."""
    with psycopg.connect(url, autocommit=True) as connection:
        found = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND wait_event_type = 'Lock' AND (wait_event = 'advisory') = %s",
            [to_commit],
        ).fetchall()
    return [pid for (pid,) in found]


@pytest.mark.parametrize("end", ["commits", "is ended", "fails"])
def test_a_second_try_waits_for_a_first_that_is_still_in_its_commit(open_store, proxy, url, end):
    execute(url, *HELD_COMMITS)
    store = open_store()
    proxy.choose = lose(Do.CUT_AFTER, lambda number: number == 1)
    with gate_closed(url) as open_gate:
        record(store, range(10), tier="held")
        [first] = eventually(lambda: waiting(url, to_commit=True))
        [second] = eventually(lambda: waiting(url, to_commit=False))
        assert first != second
        assert store.flush(0) is False
        assert stored(url) == []
        assert adds_up(store.health())
        if end == "is ended":
            execute(url, f"SELECT pg_terminate_backend({first})")
        elif end == "fails":
            execute(url, f"SELECT pg_cancel_backend({first})")
        open_gate()
    assert store.flush(WAIT_S)
    health = store.health()
    assert adds_up(health)
    assert (health.written, health.pending, health.faults_by["OutcomeUnknown"]) == (10, 0, 1)
    assert stored(url) == [str(number) for number in range(10)]


@pytest.mark.slow
def test_a_retry_that_waits_longer_than_the_statement_timeout_is_retried(open_store, proxy, url):
    execute(url, *HELD_COMMITS)
    # of the tries alone: the first is to stay in its commit
    store = open_store(statement_timeout_s=1)
    proxy.choose = lose(Do.CUT_AFTER, lambda number: number == 1)
    execute(
        url,
        "CREATE FUNCTION patient() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN SET LOCAL statement_timeout = 0; RETURN NEW; END $$",
        "CREATE TRIGGER patient BEFORE INSERT ON routing_telemetry"
        " FOR EACH ROW EXECUTE FUNCTION patient()",
    )
    with gate_closed(url) as open_gate:
        record(store, range(10), tier="held")
        eventually(lambda: waiting(url, to_commit=True))
        eventually(lambda: store.health().faults_by.get("StoreUnavailable", 0) >= 2)
        open_gate()
    assert store.flush(WAIT_S)
    health = store.health()
    assert adds_up(health)
    assert (health.written, health.dropped) == (10, 0)
    assert stored(url) == [str(number) for number in range(10)]


@pytest.mark.slow
def test_a_process_that_replays_a_spool_waits_for_a_commit_that_another_left_under_way(
    open_store, proxy, url, tmp_path
):
    execute(url, *HELD_COMMITS)
    store = open_store(spool_path=tmp_path / "spool.db", spool_after_s=0)
    proxy.choose = lose(Do.CUT_AFTER, lambda number: number == 1)
    options = {"url": url, "spool_path": str(tmp_path / "spool.db"), "last_retry_s": 0.1}
    said = []
    with gate_closed(url) as open_gate:
        record(store, range(10), tier="held")
        eventually(lambda: waiting(url, to_commit=True))
        assert store.flush(WAIT_S), "it is spooled"
        proxy.refuse()
        store.close(1)
        assert adds_up(store.health())
        assert store.health().spooled == 10
        replay = threading.Thread(
            target=lambda: said.extend(run("replay", options | {"mark": "after"}, WAIT_S))
        )
        replay.start()
        eventually(lambda: waiting(url, to_commit=False))
        open_gate()
        replay.join(WAIT_S)
    [answer] = said
    assert adds_up(answer["health"])
    assert (answer["health"]["recovered"], answer["health"]["written"]) == (10, 11)
    assert stored(url) == [*(str(number) for number in range(10)), "after"]
