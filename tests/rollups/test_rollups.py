"""Roll-ups change what an answer costs, and never the answer."""

import os
import signal
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import BigInteger, cast, delete, event, insert, select, text
from sqlalchemy.orm import Session

from lynkr_store import RoutingRepository, Store, StoreSettings, Window, create_store_engine
from lynkr_store.db.dialect import writing
from lynkr_store.db.models import CHANGES, DIMENSIONS, PROGRESS, ROLLUPS, TELEMETRY, Base
from lynkr_store.maintenance import run
from lynkr_store.rollups import answer_sql, measures, state
from lynkr_store.rollups import fold as folding
from lynkr_store.rollups.answer import Part, ask
from lynkr_store.rollups.answer_sql import Question, StatementKey
from lynkr_store.rollups.buckets import ceil_to, floor_to, split_window
from lynkr_store.rollups.state import NOTHING_FOLDED, read_state
from lynkr_store.schemas.units import DAY_MS, INSTANT_MIN_MS, QUARTER_MS
from tests.conftest import POSTGRES

NOW = 1_750_000_000_000
EVERYTHING = Question(by=("provider", "model", "tier", "request_type"), names=measures.ALL)
COLUMNS = tuple(measures.measure_columns())


@pytest.fixture
def begin(engine):
    """Opens a transaction that may write."""
    return opener(engine)


def opener(engine):
    @contextmanager
    def begin():
        with writing(engine).begin() as connection:
            yield connection

    return begin


def put(connection, *records):
    plain = {"request_id": "r", "provider": "a", "timestamp": NOW - 1}
    for record in records:
        connection.execute(insert(TELEMETRY).values(plain | record))


def added_up(parts):
    """The measures of an answer's parts, by their dimensions."""
    total = {}
    for part in parts:
        sums = total.setdefault(part.by, Counter())
        sums.update(dict(zip(COLUMNS, part.sums, strict=True)))
    joined = {
        key: [
            *(sums[name] for name in ("requests", *measures.COUNTED)),
            *(
                (sums[f"{name}_count"], (sums[f"{name}_high"] << 31) + sums[f"{name}_low"])
                for name in measures.SUMMED
            ),
        ]
        for key, sums in total.items()
    }
    return {key: sums for key, sums in joined.items() if sums[0]}


def answered(engine, since, until):
    with Session(engine) as session:
        answer = ask(session, EVERYTHING, since, until, NOW)
    return added_up(answer.parts), answer.raw_from


def from_rows(engine, since, until):
    """The answer as it is without roll-ups."""
    given = answer_sql.parameters(split_window(0, 0, 0), since, until, NOTHING_FOLDED)
    with engine.connect() as connection:
        statement = answer_sql.answer(EVERYTHING, StatementKey(0, 0, 0), long_backlog=True)
        parts = connection.execute(statement, given).mappings().all()
    return added_up(
        Part(
            tuple(part[name] for name in EVERYTHING.by),
            tuple(int(part[name] or 0) for name in COLUMNS),
        )
        for part in parts
        if part["sign"]
    )


def test_null_and_the_empty_text_are_two_dimensions(engine, begin):
    named = [{"model": model, "tier": tier} for model in (None, "") for tier in (None, "", "T")]
    with begin() as connection:
        put(connection, *named, *named)
    assert folding.fold(begin) == (12, True)
    found, raw_from = answered(engine, 0, NOW)
    assert found == from_rows(engine, 0, NOW)
    assert {key[1:3]: sums[0] for key, sums in found.items()} == {
        (record["model"], record["tier"]): 2 for record in named
    }
    assert raw_from is None


def test_names_of_any_length_can_be_folded(engine, begin):
    long = "é" * 5_000  # more than an index of PostgreSQL takes
    with begin() as connection:
        put(connection, {"model": long, "request_type": long}, {"model": long + "x"})
    folding.fold(begin)
    assert answered(engine, 0, NOW)[0] == from_rows(engine, 0, NOW)


def test_sums_of_the_greatest_values_do_not_overflow(engine, begin):
    great = {"cost_usd": 10**6, "quality_score": -(10**9), "input_tokens": 10**12}
    with begin() as connection:
        connection.execute(
            insert(TELEMETRY),
            [
                {"request_id": "r", "provider": "a", "timestamp": NOW - 1, **great}
                for _ in range(12_000)
            ],
        )
    folding.fold(begin)
    found, _ = answered(engine, 0, NOW)
    assert found == from_rows(engine, 0, NOW)
    [sums] = found.values()
    assert (12_000, 12_000 * 10**15) in sums


def test_a_fold_goes_in_steps_and_can_be_stopped(engine, begin, monkeypatch):
    monkeypatch.setattr(folding, "STEP_ROWS", 4)
    with begin() as connection:
        put(connection, *({"timestamp": NOW - n} for n in range(1, 11)))
    told = []
    assert folding.fold(begin, on_step=told.append, stop=lambda: len(told) == 2) == (8, False)
    assert answered(engine, 0, NOW)[0] == from_rows(engine, 0, NOW)
    assert folding.fold(begin, on_step=told.append) == (2, True)
    assert told == [4, 8, 2]
    assert folding.fold(begin) == (0, True)
    assert answered(engine, 0, NOW)[0] == from_rows(engine, 0, NOW)


def test_ids_far_apart_are_folded_in_as_few_steps(engine, begin, monkeypatch):
    monkeypatch.setattr(folding, "STEP_ROWS", 4)
    with begin() as connection:
        put(connection, *({"id": n * 10**6, "timestamp": NOW - n} for n in range(1, 11)))
    told = []
    assert folding.fold(begin, on_step=told.append) == (10, True)
    assert told == [4, 8, 10]
    assert answered(engine, 0, NOW)[0] == from_rows(engine, 0, NOW)


def test_nothing_can_be_folded_too(engine, begin):
    assert folding.fold(begin) == (0, True)
    assert folding.rebuild(begin) == 0
    assert answered(engine, 0, NOW) == ({}, None)


@pytest.mark.parametrize("name", POSTGRES)
def test_a_row_whose_id_is_lower_and_comes_later_is_not_lost(name, new_url, monkeypatch):
    """The identity gives out ids before their transactions commit."""
    monkeypatch.setattr(folding, "_PATIENCE_S", 0.05)
    with Store(settings=StoreSettings(url=new_url(name, at_head=True), cache_ttl_s=0)) as store:
        engine, begin = store.engine, opener(store.engine)
        with engine.connect() as slow:
            transaction = slow.begin()
            put(slow, {"provider": "slow"})
            with begin() as connection:
                put(connection, {"provider": "quick"})
            assert folding.fold(begin) == (0, False)
            assert store.get_stats(Window(since=0)).requests_by_provider == {"quick": 1}
            transaction.commit()
        assert folding.fold(begin) == (2, True)
        assert store.get_stats(Window(since=0)).requests_by_provider == {"quick": 1, "slow": 1}


@pytest.mark.parametrize("name", POSTGRES)
def test_a_fold_waits_for_open_transactions_and_delays_none(name, new_url):
    with Store(settings=StoreSettings(url=new_url(name, at_head=True), cache_ttl_s=0)) as store:
        begin = opener(store.engine)
        asked, looks = threading.Event(), []

        def end_later(transaction):
            asked.wait(30)
            with begin() as connection:  # who writes meanwhile is not held up, nor waited for
                put(connection, {"provider": "later"})
            transaction.commit()

        @contextmanager
        def telling():
            with begin() as connection:
                yield connection
            looks.append(1)
            if len(looks) > 2:  # it has looked who writes, and looks again
                asked.set()

        with store.engine.connect() as slow:
            transaction = slow.begin()
            put(slow, {"provider": "slow"})
            with begin() as connection:
                put(connection, {"provider": "quick"})
            thread = threading.Thread(target=end_later, args=(transaction,))
            thread.start()
            assert folding.fold(telling) == (2, True)
            thread.join()
        assert sum(store.get_stats(Window(since=0)).requests_by_provider.values()) == 3


@pytest.mark.parametrize("most", [1, 20_000], ids="{} between".format)
@pytest.mark.parametrize("kept", [0, 1], ids="{} kept".format)
def test_rows_deleted_between_the_read_and_the_write_are_not_counted(
    engine, begin, kept, most, monkeypatch
):
    monkeypatch.setattr(folding, "_MOST_BETWEEN", most)
    with begin() as connection:
        put(connection, {"provider": "gone"}, *[{"provider": "kept"}] * kept)
    looks = []

    @contextmanager
    def look():
        with begin() as connection:
            yield connection
        looks.append(1)
        if len(looks) == 3:  # the newest id, new dimensions, and now the sums were read
            with begin() as connection:
                connection.execute(delete(TELEMETRY).where(TELEMETRY.c.provider == "gone"))

    assert folding.fold(begin, read=look) == (kept, True)
    assert len(looks) == 3
    measured, removed_before = answered(engine, 0, NOW)
    assert measured == from_rows(engine, 0, NOW)
    assert removed_before is None or not kept


def test_a_folder_leaves_to_a_quicker_one_what_that_one_folded(engine, begin):
    with begin() as connection:
        put(connection, {}, {})
    looks = []

    @contextmanager
    def look():
        with begin() as connection:
            yield connection
        looks.append(1)
        if len(looks) == 3:
            assert folding.fold(begin) == (2, True)

    assert folding.fold(begin, read=look) == (0, True)
    assert answered(engine, 0, NOW) == (from_rows(engine, 0, NOW), None)


@pytest.mark.parametrize("name", POSTGRES)
def test_a_folder_in_the_background_leaves_its_rows_to_the_one_that_folds(name, new_url):
    """Many that waited would each read all rows, and the last wait for all the others' steps."""
    with Store(settings=StoreSettings(url=new_url(name, at_head=True), cache_ttl_s=0)) as store:
        database, begin = store._database, opener(store.engine)
        with begin() as connection:
            put(connection, {"provider": "a"})
        assert run.fold(database, alone=True) == (1, 0, True)
        with begin() as connection:
            put(connection, {"provider": "a"}, {"provider": "b"})
        with begin() as other:
            assert folding.held_watermark(other) == 1
            assert run.fold(database, alone=True) == (0, 0, False)
        assert run.fold(database, alone=True) == (2, 0, True)
        with begin() as connection:
            put(connection, {"provider": "a"})
            connection.execute(text("DELETE FROM routing_telemetry WHERE provider = 'b'"))
        with begin() as other:
            assert folding.held_watermark(other) == 3
            assert run.fold(database, alone=True) == (0, 0, False)
        assert run.fold(database, alone=True) == (1, 1, True)


def test_two_folders_at_once_fold_each_row_once(engine, begin, monkeypatch):
    monkeypatch.setattr(folding, "STEP_ROWS", 3)
    for _ in range(5):
        with begin() as connection:
            put(connection, *({"timestamp": NOW - n} for n in range(1, 31)))
        folders = [threading.Thread(target=folding.fold, args=(begin,)) for _ in range(2)]
        for folder in folders:
            folder.start()
        for folder in folders:
            folder.join()
    with begin() as connection:
        requests = connection.scalars(select(ROLLUPS.c.requests).where(ROLLUPS.c.span_ms == DAY_MS))
        assert sum(requests) == 150
    assert answered(engine, 0, NOW)[0] == from_rows(engine, 0, NOW)


def test_without_roll_ups_no_row_is_read(engine, begin):
    with begin() as connection:
        put(connection, {}, {})
        assert read_state(connection).oldest_row is None
    folding.fold(begin)
    with begin() as connection:
        assert read_state(connection).oldest_row == NOW - 1


def test_a_session_may_have_an_engine_for_each_table(engine, begin):
    with begin() as connection:
        put(connection, {}, {"timestamp": NOW - DAY_MS - 1})
    folding.fold(begin)
    with begin() as connection:
        connection.execute(delete(TELEMETRY).where(TELEMETRY.c.timestamp < NOW - 1))
    tables = Base.metadata.tables.values()
    with Session(binds=dict.fromkeys(tables, engine)) as session:
        repository = RoutingRepository(session, clock=lambda: NOW)
        assert repository.get_stats(Window(since=0)).total_requests == 2
        assert repository.add_many([{"provider": "b"}]) == 1
        assert len(repository.query()) == 2


def test_the_lag_is_reported_before_the_first_fold_and_after(engine, begin):
    def lag():
        with begin() as connection:
            return connection.scalar(state.lag())

    assert lag() is None
    with begin() as connection:
        put(connection, {}, {}, {})
        assert connection.scalar(state.lag()) == 3
        folding.held_watermark(connection)
    assert lag() == 3
    folding.fold(begin)
    assert lag() == 0
    with begin() as connection:
        put(connection, {})
    assert lag() == 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("work", [folding.fold, folding.rebuild])
def test_after_kill_9_behind_any_statement_it_is_resumed(url, engine, work, step, monkeypatch):
    monkeypatch.setattr(folding, "STEP_ROWS", 3)
    monkeypatch.setattr(folding, "PAUSE_S", 0)
    begin = opener(engine)
    moments = 0
    while not (done := _killed_after(moments, url, engine, work)):
        moments += step
        with begin() as connection:
            assert done is False
            put(connection, {"timestamp": NOW - 1000 - moments, "cost_usd": 0.1})
        assert answered(engine, 0, NOW) == (from_rows(engine, 0, NOW), None)
        folding.fold(begin)
    assert moments > 8
    folding.fold(begin)
    assert folding.fold(begin) == (0, True)
    assert answered(engine, 0, NOW) == (from_rows(engine, 0, NOW), None)
    print(f"{moments} moments")


def _killed_after(statements, url, engine, work):
    """Do the work in a process that is killed behind so many statements; whether it did it all."""
    with opener(engine)() as connection:
        put(connection, *({"timestamp": NOW - n} for n in range(1, 8)))
    engine.dispose()
    child = os.fork()
    if child == 0:
        own = create_store_engine(url)
        left = iter(range(statements))

        def kill(*_):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        event.listen(own, "after_cursor_execute", kill)
        event.listen(own, "commit", kill)
        try:
            work(opener(own))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)


def test_what_retention_removed_stays_in_whole_quarters(engine, begin):
    start = floor_to(DAY_MS, NOW) - DAY_MS
    with begin() as connection:
        put(connection, *({"timestamp": start + n * 60_000} for n in range(60)))
    folding.fold(begin)
    cutoff = start + 20 * 60_000  # in the middle of the second quarter
    with begin() as connection:
        connection.execute(delete(TELEMETRY).where(TELEMETRY.c.timestamp < cutoff))
    requests = {
        (since, until): (sum(v[0] for v in found.values()), raw_from)
        for since, until in (
            (start, start + 60 * 60_000),
            (start + 60_000, start + 60 * 60_000),
            (start + 60_000, start + 16 * 60_000),
            (cutoff, start + 60 * 60_000),
            (start + 30 * 60_000, start + 41 * 60_000),
        )
        for found, raw_from in [answered(engine, since, until)]
    }
    assert list(requests.values()) == [
        (60, cutoff),
        (60, cutoff),
        (30, cutoff),
        (40, None),
        (11, None),
    ]


def test_it_is_remembered_what_was_removed_when_old_rows_come_late(engine, begin):
    start = floor_to(DAY_MS, NOW)
    with begin() as connection:
        put(connection, *({"timestamp": start + n * QUARTER_MS} for n in range(8)))
    folding.fold(begin)
    with begin() as connection:
        connection.execute(delete(TELEMETRY).where(TELEMETRY.c.timestamp < start + 6 * QUARTER_MS))
        put(connection, {"timestamp": start + QUARTER_MS})
    for _ in range(2):
        found, raw_from = answered(engine, start, start + DAY_MS)
        assert sum(sums[0] for sums in found.values()) == 9
        assert raw_from == start + 6 * QUARTER_MS
        folding.fold(begin)


def test_roll_ups_go_when_they_are_old_and_their_rows_are_gone(engine, begin):
    today = floor_to(DAY_MS, NOW)
    with begin() as connection:
        put(connection, *({"timestamp": today - n * DAY_MS} for n in range(100)))
    folding.fold(begin)
    folding.trim(begin, today)
    assert total(engine) == (100, None), "while the rows are there, their roll-ups are needed"
    with begin() as connection:
        connection.execute(delete(TELEMETRY).where(TELEMETRY.c.timestamp < today - 9 * DAY_MS))
    folding.trim(begin, today - 20 * DAY_MS - 1)
    assert total(engine) == (22, today - 9 * DAY_MS)
    folding.trim(begin, today)
    assert total(engine) == (10, today - 9 * DAY_MS)
    folding.trim(begin, today, stop=lambda: True)


def test_without_old_roll_ups_no_write_lock_is_taken(begin):
    def refuse():
        pytest.fail("a transaction that may write was begun")

    today = floor_to(DAY_MS, NOW)
    folding.trim(refuse, today, read=begin)
    with begin() as connection:
        put(connection, {"timestamp": today})
    folding.fold(begin)
    folding.trim(refuse, today + DAY_MS - 1, read=begin)


def total(engine):
    found, raw_from = answered(engine, 0, NOW)
    return sum(sums[0] for sums in found.values()), raw_from


def test_when_all_rows_are_gone_the_history_is_there(engine, begin):
    with begin() as connection:
        put(connection, {}, {"cost_usd": 0.25})
    folding.fold(begin)
    with begin() as connection:
        connection.execute(delete(TELEMETRY))
    found, raw_from = answered(engine, 0, NOW)
    assert [sums[0] for sums in found.values()] == [2]
    assert raw_from == ceil_to(QUARTER_MS, NOW)
    assert folding.rebuild(begin) == 0
    assert answered(engine, 0, NOW) == (found, raw_from)


def test_a_statistic_says_where_it_comes_from(engine, begin):
    with begin() as connection:
        put(connection, {"timestamp": NOW - DAY_MS}, {})
    folding.fold(begin)
    with Store(engine=engine, clock=lambda: NOW, settings=StoreSettings(cache_ttl_s=0)) as store:
        whole = Window(since=NOW - 2 * DAY_MS)
        assert (store.get_stats(whole).source, store.get_stats(whole).raw_from) == ("rows", None)
        with begin() as connection:
            connection.execute(delete(TELEMETRY).where(TELEMETRY.c.timestamp < NOW - 1))
        for answer in (
            store.get_stats(whole),
            store.get_provider_stats("a", whole),
            store.get_routing_accuracy(whole),
        ):
            assert answer.source == "buckets"
            assert answer.raw_from.timestamp() * 1000 == NOW - 1
            assert "source" not in answer.to_gateway()
        assert store.get_stats(Window(since=NOW - 1)).source == "rows"


def test_a_fold_between_two_statements_of_an_answer_is_noticed(engine, begin, monkeypatch):
    """On READ COMMITTED the second statement sees what was committed after the first."""
    with begin() as connection:
        put(connection, {}, {})
    with engine.connect() as connection:
        stale = connection.execute(state.state_query()).one()
    folding.fold(begin)
    given = iter([stale])

    class StaleSession(Session):
        def execute(self, statement, *args, **kwargs):
            if statement is state.state_query() and (old := next(given, None)):
                return SimpleNamespace(one=lambda: old)
            return super().execute(statement, *args, **kwargs)

    whole = 0, ceil_to(QUARTER_MS, NOW)  # nothing at its ends tells by itself
    with StaleSession(engine) as session:
        answer = ask(session, EVERYTHING, *whole, NOW)
    assert added_up(answer.parts) == from_rows(engine, *whole)


class Interrupted(Session):
    """Something happens before one of its statements, by number."""

    def __init__(self, engine, number, happens):
        super().__init__(engine)
        self._left = iter([lambda: None] * number + [happens])

    def execute(self, *args, **kwargs):
        next(self._left, lambda: None)()
        return super().execute(*args, **kwargs)


def interrupted(engine, number, happens, window):
    with Interrupted(engine, number, happens) as session:
        answer = ask(session, EVERYTHING, *window, NOW)
    return sum(sums[0] for sums in added_up(answer.parts).values()), answer.raw_from


@pytest.mark.parametrize("number", range(4))
def test_a_fold_at_any_moment_makes_no_end_longer_whose_rows_are_there(engine, begin, number):
    start = floor_to(QUARTER_MS, NOW)
    old = start - 40 * DAY_MS
    with begin() as connection:
        put(connection, *({"timestamp": at} for at in (old + 100, old + 200_000, start + 10_000)))
    folding.fold(begin)
    with begin() as connection:
        connection.execute(delete(TELEMETRY).where(TELEMETRY.c.timestamp < start))
        put(connection, *({"timestamp": start + s * 1000} for s in (20, 500, 510)))
    window = old + 150_000, start + 300_000  # two rows are later, in the same quarter
    answer = interrupted(engine, number, lambda: folding.fold(begin), window)
    assert answer == (4, start + 10_000)


@pytest.mark.parametrize("number", range(4))
def test_rows_removed_at_any_moment_are_in_the_answer_or_it_says_so(engine, begin, number):
    start = floor_to(QUARTER_MS, NOW) - DAY_MS

    def remove(minutes):
        before = start + minutes * 60_000
        with begin() as connection:
            connection.execute(delete(TELEMETRY).where(TELEMETRY.c.timestamp < before))

    with begin() as connection:
        put(connection, *({"timestamp": start + n * 60_000} for n in range(30)))
    folding.fold(begin)
    remove(3)
    window = start + 5 * 60_000, start + DAY_MS
    answer = interrupted(engine, number, lambda: remove(10), window)
    before, after = (25, None), (30, start + 10 * 60_000)
    assert answer in ([after] if number == 0 else [before, after])


# -- whatever happens ------------------------------------------------------------------------------

INSTANTS = st.one_of(
    st.integers(NOW - 2 * DAY_MS, NOW),
    st.integers(NOW - 2 * QUARTER_MS, NOW + 2 * QUARTER_MS),
    st.sampled_from([0, 10, NOW * 1000, 946_684_799_999, 946_684_800_000, NOW + 400 * DAY_MS]),
)
RECORDS = st.fixed_dictionaries(
    {
        "timestamp": INSTANTS,
        "provider": st.sampled_from(["a", "A", "é", ""]),
        "model": st.sampled_from([None, "", "m"]),
        "tier": st.sampled_from([None, "SIMPLE", "COMPLEX"]),
        "request_type": st.sampled_from([None, "chat"]),
        "error_type": st.sampled_from([None, None, "", "E"]),
        "was_fallback": st.sampled_from([None, False, True]),
        "quality_score": st.one_of(st.none(), st.floats(-100, 100), st.just(1e300)),
        "output_tokens": st.one_of(st.none(), st.integers(-5, 100), st.just(2**60)),
        "latency_ms": st.one_of(st.none(), st.floats(-1e9, 1e9)),
        "cost_usd": st.one_of(st.none(), st.floats(0, 1), st.just(1e6)),
    }
)
STEPS = st.one_of(
    st.tuples(st.just("put"), st.lists(RECORDS, min_size=1, max_size=6)),
    st.tuples(st.just("fold"), st.integers(0, 3)),
    st.tuples(st.just("killed"), st.integers(0, 12)),
    st.tuples(st.just("cleanup"), INSTANTS.filter(lambda at: 10 < at <= NOW)),
    st.tuples(st.just("rebuild"), st.integers(0, 3)),
)
WINDOWS = st.tuples(INSTANTS, INSTANTS)


class Killed(Exception):
    pass


def kill_after(connection, left):
    """Have a connection raise `Killed` at each statement after as many as are left."""

    def counted(execute):
        def one_more(*args, **kwargs):
            if next(left, None) is None:
                raise Killed
            return execute(*args, **kwargs)

        return one_more

    for way in ("execute", "exec_driver_sql"):
        setattr(connection, way, counted(getattr(connection, way)))


def rebuild_in_part(begin, steps):
    """Rebuild the roll-ups, and be interrupted after more than so many steps."""
    done = []

    def interrupt(rows):
        done.append(rows)
        if len(done) > steps:
            raise Killed

    with suppress(Killed):
        folding.rebuild(begin, on_step=interrupt)


class History:
    """What happens to a database."""

    def __init__(self, engine):
        self.engine = engine
        self.begin = opener(engine)
        with self.begin() as connection:
            for table in (TELEMETRY, ROLLUPS, DIMENSIONS, PROGRESS, CHANGES):
                connection.execute(delete(table))
        self.known = []  # id and instant of each row that is there or in the roll-ups

    def put(self, records):
        with self.begin() as connection:
            put(connection, *records)
            rows = select(TELEMETRY.c.id, cast(TELEMETRY.c.timestamp, BigInteger))
            last = max((row_id for row_id, _ in self.known), default=0)
            self.known += connection.execute(rows.where(TELEMETRY.c.id > last)).all()

    def fold(self, steps):
        done = []
        folding.fold(self.begin, on_step=done.append, stop=lambda: len(done) > steps)

    def rebuild(self, steps):
        rebuild_in_part(self.begin, steps)

    def killed(self, statements):
        """Fold, and be killed before a statement: the transaction never ends well."""

        @contextmanager
        def begin():
            with self.begin() as connection:
                kill_after(connection, iter(range(statements)))
                yield connection

        with suppress(Killed):
            folding.fold(begin)

    def cleanup(self, cutoff):
        with self.begin() as connection:
            watermark = connection.scalar(state.watermark())
            connection.execute(delete(TELEMETRY).where(TELEMETRY.c.timestamp < cutoff))
        self.known = [
            (row_id, at)
            for row_id, at in self.known
            if at >= cutoff or (row_id <= watermark and at >= INSTANT_MIN_MS)
        ]

    def requests(self, since, until):
        return sum(since <= at < until for _, at in self.known)


@pytest.fixture(scope="module", params=["sqlite-file", POSTGRES[-1]])
def place(request, server_of, tmp_path_factory):
    if request.param == "sqlite-file":
        url = f"sqlite:///{tmp_path_factory.mktemp('rollups') / 'telemetry.db'}"
        drop = lambda: None  # noqa: E731
    else:
        server = server_of(request.param)
        url = server.create_database("rollups", "template_head")
        drop = lambda: server.drop_database("rollups")  # noqa: E731
    store = Store(settings=StoreSettings(url=url, upgrade_on_open=True))
    assert store.query() == []
    yield store.engine
    store.close()
    drop()


RELAXED = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
HISTORIES = {
    "steps": st.lists(STEPS, max_size=9),
    "windows": st.lists(WINDOWS, min_size=1, max_size=4),
}


@settings(RELAXED, max_examples=20)
@given(**HISTORIES)
def test_whatever_happens_the_answer_is_that_of_the_rows(place, steps, windows):
    check_history(place, steps, windows)


@pytest.mark.slow
@settings(RELAXED, max_examples=200)
@given(**HISTORIES)
def test_whatever_happens_many_times_the_answer_is_that_of_the_rows(place, steps, windows):
    check_history(place, steps, windows)


def check_history(place, steps, windows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding, "STEP_ROWS", 3)
        patch.setattr(folding, "_PATIENCE_S", 0.0)
        history = History(place)
        cleaned = False
        for step in steps:
            name, value = step
            getattr(history, name)(value)
            cleaned |= name == "cleanup"
            for since, until in [*windows, (0, 2**62), (NOW - DAY_MS, NOW + 1)]:
                found, raw_from = answered(place, since, until)
                if raw_from is None:
                    assert found == from_rows(place, since, until)
                else:
                    assert cleaned
                    assert since < raw_from
                    requests = sum(sums[0] for sums in found.values())
                    quarters = floor_to(QUARTER_MS, since), ceil_to(QUARTER_MS, until)
                    assert history.requests(since, until) <= requests
                    assert requests <= history.requests(*quarters)
