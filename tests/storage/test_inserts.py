"""How batches enter the table, on both backends: once, in order, a refused row by itself."""

import itertools
import threading
from contextlib import contextmanager

import pytest
from sqlalchemy import create_engine, func, insert, select, text
from sqlalchemy.exc import DBAPIError

from lynkr_store import create_store_engine, writing
from lynkr_store.db.dialect import parse_url
from lynkr_store.db.models import LEDGER, TELEMETRY
from lynkr_store.ingest.validation import TextPolicy, row_of
from lynkr_store.migrate.upgrade import upgrade
from lynkr_store.storage.inserts import insert_isolating, insert_once
from lynkr_store.storage.ledger import LEDGER_DAYS, expire_ledger
from tests.conftest import BACKENDS, ON_DISK

NOW = 1_750_000_000_000
DAY_MS = 86_400_000


@pytest.fixture(params=BACKENDS)
def engine(request, new_url):
    engine = create_store_engine(new_url(request.param))
    upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture(params=ON_DISK)
def shared_engine(request, new_url):
    engine = create_store_engine(new_url(request.param, at_head=True))
    yield engine
    engine.dispose()


@pytest.fixture(params=ON_DISK)
def host_engine(request, new_url):
    engine = create_engine(parse_url(new_url(request.param, at_head=True)))
    yield engine
    engine.dispose()


def rows_named(*names):
    return [row_of({"provider": "p", "request_id": n}, NOW, TextPolicy())[0] for n in names]


@contextmanager
def transaction(engine):
    with writing(engine).connect() as connection, connection.begin():
        yield connection


def stored(engine):
    with engine.connect() as connection:
        return connection.scalars(select(TELEMETRY.c.request_id).order_by(TELEMETRY.c.id)).all()


def ledger(engine):
    with engine.connect() as connection:
        return dict(connection.execute(select(LEDGER.c.batch_id, LEDGER.c.row_count)).all())


def execute(engine, *statements):
    with transaction(engine) as connection:
        for statement in statements:
            connection.execute(text(statement))


def make_unique(engine):
    execute(engine, "CREATE UNIQUE INDEX once ON routing_telemetry (request_id)")


def let_a_trigger_choke(engine):
    """On the model 'poison', with an error that does not say whose fault it is."""
    if engine.dialect.name == "sqlite":
        execute(
            engine,
            "CREATE TRIGGER chokes AFTER INSERT ON routing_telemetry WHEN NEW.model = 'poison' "
            "BEGIN SELECT json('no JSON'); END",
        )
    else:
        execute(
            engine,
            "CREATE FUNCTION chokes() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF NEW.model = 'poison' THEN RAISE EXCEPTION 'no' USING ERRCODE = 'XX000'; END IF; "
            "RETURN NEW; END $$",
            "CREATE TRIGGER chokes AFTER INSERT ON routing_telemetry "
            "FOR EACH ROW EXECUTE FUNCTION chokes()",
        )


def test_a_batch_is_stored_in_order_and_entered_in_the_ledger(engine):
    names = [str(n) for n in range(50)]
    with transaction(engine) as connection:
        assert insert_once(connection, "b", rows_named(*names), NOW) == (50, {})
    assert stored(engine) == names
    with engine.connect() as connection:
        entered = connection.execute(text("SELECT * FROM ingest_batches")).all()
    assert entered == [("b", 50, NOW)]


def test_a_second_call_with_the_same_id_stores_nothing_and_returns_the_count(engine):
    for _ in range(3):
        with transaction(engine) as connection:
            assert insert_once(connection, "b", rows_named("1", "2"), NOW) == (2, {})
    assert stored(engine) == ["1", "2"]
    with transaction(engine) as connection:
        assert insert_once(connection, "c", rows_named("1", "2"), NOW) == (2, {})
    assert stored(engine) == ["1", "2", "1", "2"], "another batch may hold equal rows"
    assert ledger(engine) == {"b": 2, "c": 2}


def test_a_try_that_was_rolled_back_is_not_remembered(engine):
    with writing(engine).connect() as connection, connection.begin() as begun:
        assert insert_once(connection, "b", rows_named("1"), NOW) == (1, {})
        begun.rollback()
    assert (stored(engine), ledger(engine)) == ([], {})
    with transaction(engine) as connection:
        assert insert_once(connection, "b", rows_named("1"), NOW) == (1, {})
    assert stored(engine) == ["1"]


def test_refused_rows_correct_the_count_in_the_ledger(engine):
    make_unique(engine)
    batch = rows_named("1", "2", "1", "3", "2")
    with transaction(engine) as connection:
        assert insert_once(connection, "b", batch, NOW) == (3, {"constraint": 2})
    assert (stored(engine), ledger(engine)) == (["1", "2", "3"], {"b": 3})
    with transaction(engine) as connection:
        assert insert_once(connection, "b", batch, NOW) == (3, {}), "what the first try stored"
        assert insert_once(connection, "c", batch, NOW) == (0, {"constraint": 5})
    assert (stored(engine), ledger(engine)) == (["1", "2", "3"], {"b": 3, "c": 0})


@pytest.mark.parametrize("at", [0, 499, 500, 599])
def test_many_rows_of_which_one_is_refused_are_left_to_their_parts(engine, at):
    make_unique(engine)
    with transaction(engine) as connection:
        assert insert_once(connection, "a", rows_named("599"), NOW) == (1, {})
    names = [str(n) for n in range(599)]
    with writing(engine).connect() as connection, connection.begin() as begun:
        rows = rows_named(*names[:at], "599", *names[at:])
        assert insert_once(connection, "b", rows, NOW) is None
        begun.rollback()
    assert (stored(engine), ledger(engine)) == (["599"], {"a": 1})
    with transaction(engine) as connection:
        assert insert_once(connection, "c", rows_named(*names), NOW) == (599, {})
    assert stored(engine) == ["599", *names]


def test_a_fault_that_is_no_rows_is_raised_and_leaves_nothing(engine):
    execute(engine, "ALTER TABLE routing_telemetry RENAME TO elsewhere")
    with pytest.raises(DBAPIError), transaction(engine) as connection:
        insert_once(connection, "b", rows_named("1", "2"), NOW)
    execute(engine, "ALTER TABLE elsewhere RENAME TO routing_telemetry")
    assert (stored(engine), ledger(engine)) == ([], {})


def test_without_the_ledger_nothing_is_stored(engine):
    execute(engine, "ALTER TABLE ingest_batches RENAME TO elsewhere")
    with pytest.raises(DBAPIError), transaction(engine) as connection:
        insert_once(connection, "b", rows_named("1"), NOW)
    assert stored(engine) == []


@pytest.mark.slow
def test_the_rows_around_any_bad_ones_are_stored_in_order(engine):
    """Every subset of six rows, refused by a trigger whose error is unclear."""
    let_a_trigger_choke(engine)
    subsets = list(itertools.product([False, True], repeat=6))
    for number, poisoned in enumerate(subsets):
        batch = rows_named(*"abcdef")
        for row, poison in zip(batch, poisoned, strict=True):
            row["model"] = "poison" if poison else "fine"
        expected = [n for n, poison in zip("abcdef", poisoned, strict=True) if not poison]
        refused = {"data": sum(poisoned)} if any(poisoned) else {}
        with transaction(engine) as connection:
            answer = insert_once(connection, str(number), batch, NOW)
            assert answer == (len(expected), refused)
            found = connection.scalars(
                select(TELEMETRY.c.request_id).order_by(TELEMETRY.c.id)
            ).all()
            assert found == expected
            connection.execute(TELEMETRY.delete())
    assert len(subsets) == 64
    assert ledger(engine) == {str(n): 6 - sum(p) for n, p in enumerate(subsets)}


def test_finding_out_whose_fault_it_is_leaves_no_row_behind(engine):
    let_a_trigger_choke(engine)
    [row] = rows_named("1")
    with transaction(engine) as connection:
        assert insert_isolating(connection, [row | {"model": "poison"}]) == {"data": 1}
    assert stored(engine) == []


def test_the_callers_transaction_stays_the_callers(engine):
    make_unique(engine)
    with writing(engine).connect() as connection, connection.begin() as begun:
        connection.execute(insert(TELEMETRY), rows_named("mine"))
        assert insert_isolating(connection, rows_named("1", "mine", "2")) == {"constraint": 1}
        found = connection.scalar(select(func.count()).select_from(TELEMETRY))
        assert found == 3
        begun.rollback()
    assert stored(engine) == []


def test_no_rows_are_no_work(engine):
    with transaction(engine) as connection:
        assert insert_once(connection, "b", [], NOW) == (0, {})
    assert ledger(engine) == {"b": 0}


@pytest.mark.parametrize("committed", [True, False])
def test_a_second_try_waits_for_a_first_that_is_still_under_way(shared_engine, committed):
    answers = []

    def second_try():
        with transaction(shared_engine) as connection:
            answers.append(insert_once(connection, "b", rows_named("1", "2"), NOW))

    with writing(shared_engine).connect() as connection, connection.begin() as begun:
        assert insert_once(connection, "b", rows_named("1", "2"), NOW) == (2, {})
        thread = threading.Thread(target=second_try)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not answers
        if committed:
            begun.commit()
        else:
            begun.rollback()
    thread.join(30)
    assert answers == [(2, {})]
    assert (stored(shared_engine), ledger(shared_engine)) == (["1", "2"], {"b": 2})


def test_the_ledger_forgets_after_30_days_in_bounded_steps(engine):
    assert LEDGER_DAYS == 30
    edge = NOW - 30 * DAY_MS
    old = [
        {"batch_id": f"old {n}", "row_count": 1, "committed_at": edge - 1 - n} for n in range(2500)
    ]
    kept = [
        {"batch_id": name, "row_count": 1, "committed_at": at}
        for name, at in (("at the edge", edge), ("recent", NOW - DAY_MS), ("ahead", NOW + DAY_MS))
    ]
    with transaction(engine) as connection:
        connection.execute(insert(LEDGER), old + kept)
    for left in (1500, 500, 0, 0):
        with transaction(engine) as connection:
            expire_ledger(connection, NOW)
        entries = ledger(engine)
        assert len(entries) == left + 3
        assert {f"old {n}" for n in range(left)} <= set(entries), "the oldest go first"
    assert set(ledger(engine)) == {"at the edge", "recent", "ahead"}


def test_a_hosts_engine_needs_none_of_our_events(host_engine):
    make_unique(host_engine)
    batch = rows_named("1", "2", "1", "3")
    with host_engine.connect() as connection, connection.begin() as begun:
        assert insert_once(connection, "b", batch, NOW) == (3, {"constraint": 1})
        begun.rollback()
    assert (stored(host_engine), ledger(host_engine)) == ([], {}), "no SAVEPOINT was the commit"
    for refused in ({"constraint": 1}, {}):
        with host_engine.connect() as connection, connection.begin():
            assert insert_once(connection, "b", batch, NOW) == (3, refused)
    assert (stored(host_engine), ledger(host_engine)) == (["1", "2", "3"], {"b": 3})


def test_isolating_on_a_hosts_engine_is_undone_with_its_transaction(host_engine):
    make_unique(host_engine)
    with host_engine.connect() as connection, connection.begin() as begun:
        assert insert_isolating(connection, rows_named("1", "1", "2")) == {"constraint": 1}
        begun.rollback()
    assert stored(host_engine) == []
