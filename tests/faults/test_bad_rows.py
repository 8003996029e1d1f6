"""Good and bad records together: each good one is stored once, each bad one costs itself alone."""

import itertools
import threading
import time
from collections import Counter, defaultdict
from datetime import datetime

import pytest
from sqlalchemy import text

from lynkr_store import RoutingEvent, Store, StoreSettings, writing
from lynkr_store.testing import EventFactory
from tests.conftest import BACKENDS, ON_DISK, POSTGRES
from tests.support.stores import adds_up, eventually

AT = 1_750_000_000_000
THREADS = 8


@pytest.fixture
def open_on(new_url):
    opened = []

    def open_on(backend, **options):
        store = Store(settings=StoreSettings(url=new_url(backend, at_head=True), **options))
        opened.append(store)
        store.get_routing_accuracy()
        return store

    yield open_on
    for store in opened:
        store.close()


@pytest.fixture
def _quick_retries(monkeypatch):
    monkeypatch.setattr("lynkr_store.ingest.deliverer._FIRST_RETRY_S", 0.01)
    monkeypatch.setattr("lynkr_store.ingest.deliverer._LAST_RETRY_S", 0.1)


def execute(store, *statements):
    with writing(store.engine).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def column(store, name):
    with store.engine.connect() as connection:
        asked = text(f"SELECT {name} FROM routing_telemetry ORDER BY id")
        return list(connection.scalars(asked))


def is_sqlite(store):
    return store.engine.dialect.name == "sqlite"


def call_on_insert(store, condition, sqlite, postgresql):
    """Have a foreign trigger run these statements for the rows of the condition."""
    if is_sqlite(store):
        execute(
            store,
            f"CREATE TRIGGER foreign_one BEFORE INSERT ON routing_telemetry WHEN {condition} "
            f"BEGIN {sqlite}; END",
        )
    else:
        execute(
            store,
            f"CREATE FUNCTION foreign_one() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF {condition} THEN {postgresql}; END IF; RETURN NEW; END $$",
            "CREATE TRIGGER foreign_one BEFORE INSERT ON routing_telemetry "
            "FOR EACH ROW EXECUTE FUNCTION foreign_one()",
        )


def rule_out_forbidden_models_and_repeated_ids(store):
    call_on_insert(
        store,
        "NEW.model = 'forbidden'",
        "SELECT RAISE(ABORT, 'this model is forbidden')",
        "RAISE EXCEPTION 'this model is forbidden'",
    )
    if not is_sqlite(store):
        execute(
            store,
            "ALTER TABLE routing_telemetry ADD CHECK (tier <> 'forbidden')",
        )
    else:
        execute(
            store,
            "CREATE TRIGGER checks BEFORE INSERT ON routing_telemetry "
            "WHEN NEW.tier = 'forbidden' BEGIN SELECT RAISE(ABORT, 'CHECK'); END",
        )
    execute(store, "CREATE UNIQUE INDEX once ON routing_telemetry (request_id)")


class HostileText(str):
    """A text whose methods raise."""

    __slots__ = ()

    def isascii(self):
        raise RuntimeError("no")

    def __contains__(self, other):
        raise RuntimeError("no")


class HostileNumber(float):
    """A number whose methods raise."""

    def __float__(self):
        raise RuntimeError("no")

    def __le__(self, other):
        raise RuntimeError("no")

    __ge__ = __le__


class HostileMapping(dict):
    """A mapping that cannot be walked through."""

    def __iter__(self):
        raise RuntimeError("no")

    keys = items = values = __iter__


class Hostile:
    """An object of which nothing can be asked."""

    def __getattribute__(self, name):
        raise RuntimeError("no")


def endless_list():
    endless = []
    endless.append(endless)
    return endless


def endless_mapping():
    endless = {}
    endless["again"] = {"and": [endless]}
    return endless


BAD = [
    ("no_provider", lambda: {"tier": "SIMPLE"}),
    ("no_provider", dict),
    ("unknown_name", lambda: {"provider": "p", "providr": "p"}),
    ("unknown_name", lambda: {"provider": "p", "id": 5}),
    ("wrong_type", lambda: {"provider": 5}),
    ("no_provider", lambda: {"provider": None}),
    ("wrong_type", lambda: {"provider": "p", "tier": ["SIMPLE"]}),
    ("wrong_type", lambda: {"provider": "p", "model": b"bytes"}),
    ("wrong_type", lambda: {"provider": "p", "input_tokens": 1.5}),
    ("wrong_type", lambda: {"provider": "p", "input_tokens": "12"}),
    ("wrong_type", lambda: {"provider": "p", "status_code": True}),
    ("wrong_type", lambda: {"provider": "p", "cost_usd": "0.1"}),
    ("wrong_type", lambda: {"provider": "p", "was_fallback": "yes"}),
    ("wrong_type", lambda: {"provider": "p", "stream": 2}),
    ("wrong_type", lambda: {"provider": "p", "timestamp": "yesterday"}),
    ("wrong_type", lambda: {"provider": "p", "attributes": 5}),
    ("wrong_type", lambda: {"provider": "p", "attributes": {"k": object()}}),
    ("wrong_type", lambda: {"provider": "p", "candidates": {"a", "set"}}),
    ("wrong_type", lambda: {"provider": "p", "attributes": endless_list()}),
    ("wrong_type", lambda: {"provider": "p", "cache_decision": endless_mapping()}),
    ("wrong_type", lambda: {"provider": "p", "latency_ms": Hostile()}),
    ("wrong_type", lambda: {"provider": "p", "attributes": Hostile()}),
    ("wrong_type", lambda: {"provider": "p", "attributes": HostileMapping(a=1)}),
    ("wrong_type", lambda: HostileMapping(provider="p")),
    ("wrong_type", lambda: 5),
    ("wrong_type", Hostile),
    ("naive_datetime", lambda: {"provider": "p", "timestamp": datetime(2025, 1, 1)}),  # noqa: DTZ001
    ("out_of_domain", lambda: {"provider": "p", "timestamp": 0}),
    ("out_of_domain", lambda: {"provider": "p", "timestamp": AT * 1000}),
    ("out_of_domain", lambda: {"provider": "p", "input_tokens": 10**13}),
    ("out_of_domain", lambda: {"provider": "p", "latency_ms": -2e9}),
    ("out_of_domain", lambda: {"provider": "p", "cost_usd": 1e300}),
    ("out_of_domain", lambda: {"provider": "p", "quality_score": 1e10}),
]
GOOD = [
    dict,
    lambda: {"attributes": {"nested": [1, {"é": None}]}, "request_text": "why?"},
    lambda: {"model": "a\0b", "latency_ms": float("nan"), "request_text": "\ud800"},
    lambda: {"cost_usd": float("inf"), "session_id": "s" * 600},
    lambda: {"model": HostileText("m"), "latency_ms": HostileNumber(5)},
]
_BAD_EVERY = 9


def plan(thread, count):
    """What one thread records: the record, its id, and why it must be rejected if it must."""
    bad, good = itertools.cycle(BAD), itertools.cycle(GOOD)
    refused = itertools.cycle([{"model": "forbidden"}, {"tier": "forbidden"}, None])
    refused_every = 503 if count > 5_000 else 97  # each costs some savepoints
    previous = None
    for n in range(count):
        name = f"{thread}-{n}"
        if n % refused_every == refused_every - 1:
            fields = next(refused)
            if fields is None:  # an id again
                yield {"provider": "again", "request_id": previous}, previous, None
            else:
                yield {"provider": "p", "request_id": name} | fields, name, "constraint"
        elif n % _BAD_EVERY == _BAD_EVERY - 1:
            cause, make = next(bad)
            yield make(), name, cause
        else:
            record = {"provider": f"p{n}", "request_id": name} | next(good)()
            yield EventFactory(**record) if n % 50 == 0 else record, name, None
            previous = name


def record_all(store, per_thread):
    """Record the plans from threads; return the ids to be stored by each, and both accounts."""
    expected, causes, dropped = defaultdict(list), Counter(), Counter()
    gathered = threading.Lock()
    start = threading.Barrier(THREADS)
    failures = []

    def run(thread):
        stored, seen, rejected, refused = [], set(), Counter(), 0
        start.wait(60)
        try:
            for record, name, cause in plan(thread, per_thread):
                if not store.record(record):
                    refused += 1
                    time.sleep(0.0005)  # that some of the next are taken
                elif cause or name in seen:
                    rejected[cause or "constraint"] += 1
                else:
                    seen.add(name)
                    stored.append(name)
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failures.append(error)
        with gathered:
            expected[thread] = stored
            causes.update(rejected)
            dropped["queue_full"] += refused

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not failures, "record() raised"
    return expected, causes, +dropped


def stored_by_thread(store):
    found = defaultdict(list)
    for name in column(store, "request_id"):
        found[int(name.partition("-")[0])].append(name)
    return found


def check_outcome(store, per_thread, timeout_s):
    began = time.monotonic()
    expected, causes, dropped = record_all(store, per_thread)
    recorded = time.monotonic() - began
    assert store.flush(timeout_s)
    health = store.health()
    print(
        f"\n{THREADS * per_thread} records in {recorded:.1f} s, written after "
        f"{time.monotonic() - began:.1f} s: {health.written} written, "
        f"{dict(health.rejected_by)} rejected, {dict(health.dropped_by)} dropped"
    )
    assert adds_up(health)
    assert health.submitted == THREADS * per_thread
    assert health.rejected_by == causes
    assert health.dropped_by == dropped
    assert health.pending == 0
    assert health.written == sum(map(len, expected.values()))
    expected = {thread: names for thread, names in expected.items() if names}
    assert stored_by_thread(store) == expected, "once each, in the order of its thread"
    assert not health.faults_by
    return dropped


MILLIONS = {"queue_max_rows": 1_000_000, "queue_max_bytes": 2**31}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_5000_records_good_and_bad_have_one_outcome_on_every_backend(open_on, backend):
    store = open_on(backend, **MILLIONS)
    rule_out_forbidden_models_and_repeated_ids(store)
    assert not check_outcome(store, 5_000 // THREADS, 60)
    assert set(store.health().rejected_by) == {cause for cause, _ in BAD} | {"constraint"}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite-file", POSTGRES[-1]])
def test_100000_records_good_and_bad_have_one_outcome(open_on, backend):
    store = open_on(backend, **MILLIONS)
    rule_out_forbidden_models_and_repeated_ids(store)
    assert not check_outcome(store, 100_000 // THREADS, 600)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite-file", POSTGRES[-1]])
def test_100000_records_through_a_small_queue_are_stored_or_counted(open_on, backend):
    store = open_on(backend, queue_max_rows=2_000)
    rule_out_forbidden_models_and_repeated_ids(store)
    dropped = check_outcome(store, 100_000 // THREADS, 300)
    assert dropped["queue_full"] > 0
    store.close(30)
    late = [store.record(provider="late") for _ in range(1234)]
    assert not any(late)
    assert store.health().dropped_by == {**dropped, "closed": 1234}
    assert adds_up(store.health())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ON_DISK)
def test_5000_records_through_a_small_queue_are_stored_or_counted(open_on, backend):
    store = open_on(backend, queue_max_rows=50)
    rule_out_forbidden_models_and_repeated_ids(store)
    assert check_outcome(store, 5_000 // THREADS, 60)["queue_full"] > 0


# they are found out before any server is asked, so one version stands for all
@pytest.mark.sample(4)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in POSTGRES[1:]])
@pytest.mark.parametrize(
    ("cause", "make"), BAD, ids=[f"{n}-{cause}" for n, (cause, _) in enumerate(BAD)]
)
def test_each_kind_of_bad_record_costs_itself_alone(open_on, backend, cause, make):
    store = open_on(backend)
    for record in ({"provider": "before"}, make(), {"provider": "after"}):
        assert store.record(record)
    assert store.flush(30)
    health = store.health()
    assert adds_up(health)
    assert (health.written, dict(health.rejected_by)) == (2, {cause: 1})
    assert column(store, "provider") == ["before", "after"]


# -- values that no database can hold ----------------------------------------------------------

MENDED = [
    ("model", "a\0b\0", "a\ufffdb\ufffd", {"nul": 1}),
    ("model", "x\ud800", "x\ufffd", {"surrogate": 1}),
    ("request_text", "\ud83d\ude00", "\ufffd\ufffd", {"surrogate": 1}),
    ("response_text", "\0", "\ufffd", {"nul": 1}),
    ("attributes", '{"k": "\ud800"}', '{"k": "\ufffd"}', {"surrogate": 1}),
    (
        "attributes",
        {"k": float("nan"), "l": [float("-inf")]},
        '{"k":null,"l":[null]}',
        {"not_finite": 2},
    ),
    ("attributes", {"k": "a\0\udfff"}, '{"k":"a\\u0000\ufffd"}', {"surrogate": 1}),
    ("latency_ms", float("nan"), None, {"not_finite": 1}),
    ("cost_usd", float("inf"), None, {"not_finite": 1}),
    ("quality_score", float("-inf"), None, {"not_finite": 1}),
    ("input_tokens", float("nan"), None, {"not_finite": 1}),
    ("tier", "t" * 513, "t" * 512, {"cut": 1}),
    ("tier", "\U0001f600" * 513, "\U0001f600" * 512, {"cut": 1}),
    ("request_text", "\U0001f600" * 41, "\U0001f600" * 40, {"cut": 1}),
    ("model", "\ufeff\uffff\x01\x7f\U0010ffff", "\ufeff\uffff\x01\x7f\U0010ffff", {}),
    ("model", "", "", {}),
    ("cost_usd", 5e-324, 5e-324, {}),
    ("cost_usd", 0.1 + 0.2, 0.30000000000000004, {}),
    ("latency_ms", -0.0, 0.0, {}),
    ("input_tokens", -(10**12), -(10**12), {}),
    ("retry_count", None, 0, {}),
    ("was_fallback", 1, 1, {}),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sanitized_values_are_equal_on_every_backend(open_on, backend):
    store = open_on(backend, text_max_chars=40)
    counted = Counter()
    for name, value, _, causes in MENDED:
        assert store.record({"provider": "p", name: value})
        assert store.flush(30)
        found = Counter(store.health().mended_by)
        assert found - counted == causes, f"{name}={value!a}"
        counted = found
    health = store.health()
    assert adds_up(health)
    assert health.written == len(MENDED)
    for place, (name, value, stored, _) in enumerate(MENDED):
        found = column(store, name)[place]
        assert found == stored, f"{name}={value!a}"


# -- an error that does not say whose fault it is ----------------------------------------------


def record_around_poison(store, poison, count=40):
    """Every seventh record is poison."""
    for n in range(count):
        assert store.record(
            {"provider": "p", "request_id": str(n)} | (poison if n % 7 == 3 else {})
        )
    fine = [str(n) for n in range(count) if n % 7 != 3]
    return fine, count - len(fine)


def check_poison(store, poison, cause="data"):
    fine, refused = record_around_poison(store, poison)
    assert store.flush(30)
    health = store.health()
    assert adds_up(health)
    assert column(store, "request_id") == fine
    assert dict(health.rejected_by) == {cause: refused}
    assert health.written == len(fine)


def test_a_trigger_that_chokes_on_one_rows_json_costs_that_row(open_on):
    store = open_on("sqlite-file")
    call_on_insert(store, "1", "SELECT json(NEW.attributes)", "")
    check_poison(store, {"attributes": "{no JSON"})


@pytest.mark.parametrize("backend", POSTGRES)
@pytest.mark.parametrize("state", ["42501", "XX000", "0A000", "42P01", "P9999", "21000", "F0000"])
def test_a_trigger_that_raises_an_odd_state_for_one_row_costs_that_row(open_on, backend, state):
    store = open_on(backend)
    raising = f"RAISE EXCEPTION 'no' USING ERRCODE = '{state}'"
    call_on_insert(store, "NEW.model = 'poison'", "", raising)
    check_poison(store, {"model": "poison"}, "constraint" if state == "42501" else "data")


@pytest.mark.parametrize("backend", POSTGRES)
def test_a_trigger_that_parses_one_rows_json_costs_that_row(open_on, backend):
    store = open_on(backend)
    call_on_insert(store, "true", "", "PERFORM NEW.attributes::json")
    check_poison(store, {"attributes": "{no JSON"})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trigger_that_needs_a_missing_table_for_one_row_costs_that_row(open_on, backend):
    store = open_on(backend)
    call_on_insert(
        store,
        "NEW.model = 'poison'",
        "INSERT INTO not_there VALUES (1)",
        "INSERT INTO not_there VALUES (1)",
    )
    if is_sqlite(store):
        # SQLite resolves the trigger's tables for every row: the table takes none at all
        store.record(provider="p")
        assert not store.flush(1)
        assert store.health().pending == 1
        execute(store, "DROP TRIGGER foreign_one")
        assert store.flush(30)
    else:
        check_poison(store, {"model": "poison"})


def let_a_mere_user_write(store, url, policy):
    """A role that must obey a policy of row-level security; return its store."""
    execute(
        store,
        "DROP ROLE IF EXISTS tenant",
        "CREATE ROLE tenant LOGIN",
        "GRANT ALL ON ALL TABLES IN SCHEMA public TO tenant",
        "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO tenant",
        "ALTER TABLE routing_telemetry ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY seen ON routing_telemetry FOR SELECT USING (true)",
        f"CREATE POLICY own ON routing_telemetry FOR INSERT WITH CHECK ({policy})",
    )
    return Store(url.replace("postgres@", "tenant@"))


@pytest.fixture(params=POSTGRES)
def with_policy(request, new_url):
    if request.param == "postgres-external":
        pytest.skip("needs a role of its own")
    url = new_url(request.param, at_head=True)
    opened = []
    owner = Store(url)
    opened.append(owner)

    def with_policy(policy):
        store = let_a_mere_user_write(owner, url, policy)
        opened.append(store)
        return store

    yield with_policy
    for store in reversed(opened[1:]):
        store.close()
    execute(owner, "DROP OWNED BY tenant", "DROP ROLE tenant")
    owner.close()


@pytest.mark.parametrize(
    "policy", ["model IS DISTINCT FROM 'poison'", "coalesce(model, '') <> 'poison'"]
)
def test_a_policy_that_forbids_one_row_costs_that_row(with_policy, policy):
    check_poison(with_policy(policy), {"model": "poison"}, "constraint")


def test_a_policy_that_forbids_a_plain_row_too_costs_only_the_rows_it_forbids(with_policy):
    check_poison(with_policy("provider = 'p'"), {"provider": "another tenant"}, "constraint")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rule_that_forbids_a_plain_row_does_not_let_poison_block_the_others(open_on, backend):
    """A unique id that is taken, as the plain row's is here, says nothing about the poison."""
    store = open_on(backend)
    execute(store, "CREATE UNIQUE INDEX once ON routing_telemetry (request_id)")
    assert store.record(provider="p", request_id="")
    assert store.flush(30)
    call_on_insert(
        store,
        "NEW.model = 'poison'",
        "SELECT json('no JSON')",
        "RAISE EXCEPTION 'no' USING ERRCODE = 'XX000'",
    )
    fine, refused = record_around_poison(store, {"model": "poison"})
    assert store.flush(30)
    health = store.health()
    assert adds_up(health)
    assert column(store, "request_id") == ["", *fine]
    assert dict(health.rejected_by) == {"data": refused}


@pytest.mark.usefixtures("_quick_retries")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_that_takes_no_row_at_all_keeps_the_batch(open_on, backend):
    store = open_on(backend)
    call_on_insert(
        store,
        "NEW.provider IS NOT NULL",
        "SELECT json('no JSON')",
        "RAISE EXCEPTION 'no' USING ERRCODE = 'XX000'",
    )
    for n in range(20):
        assert store.record(provider="p", request_id=str(n))
    eventually(lambda: store.health().faults_by.get("StoreUnavailable", 0) >= 3)
    health = store.health()
    assert adds_up(health)
    assert (health.pending, health.rejected) == (20, 0)
    execute(
        store,
        "DROP TRIGGER foreign_one" + ("" if is_sqlite(store) else " ON routing_telemetry"),
    )
    assert store.flush(60)
    assert column(store, "request_id") == [str(n) for n in range(20)]
    assert store.health().rejected == 0
    assert adds_up(store.health())


# -- events that were not checked when they were made ------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copied_event_is_checked_like_any_record(open_on, backend):
    store = open_on(backend)
    event = RoutingEvent(provider="p")
    for changed in (
        {"model": "a\0b"},
        {"model": "\ud800"},
        {"latency_ms": float("nan")},
        {"model": object()},
        {"input_tokens": 10**30},
        {"nonsense": 1},
        {},
    ):
        assert store.record(event.model_copy(update=changed))
    assert store.record(RoutingEvent.model_construct(tier="no provider"))
    assert store.flush(30)
    health = store.health()
    assert adds_up(health)
    assert column(store, "model")[:3] == ["a\ufffdb", "\ufffd", None]
    assert dict(health.mended_by) == {"nul": 1, "surrogate": 1, "not_finite": 1}
    assert health.rejected_by["wrong_type"] == 1
    assert health.rejected_by["out_of_domain"] == 1
    assert health.rejected_by["no_provider"] == 1
