"""Whatever happens to the rows, a statistic that calls itself exact is the sum of the rows."""

import math
import random
import threading
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import BigInteger, delete, func, literal, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from lynkr_store import Store, StoreSettings, StoreUnavailable, create_store_engine
from lynkr_store.backend import Backend
from lynkr_store.db import triggers
from lynkr_store.db.models import CHANGES, DIMENSIONS, PROGRESS, ROLLUPS, SUMMED, TELEMETRY
from lynkr_store.rollups import fold as folding
from lynkr_store.rollups import measures, repair
from lynkr_store.rollups.answer import ask
from lynkr_store.schemas.units import DAY_MS
from tests.rollups.test_rollups import (
    EVERYTHING,
    INSTANTS,
    NOW,
    RECORDS,
    RELAXED,
    Killed,
    added_up,
    kill_after,
    opener,
    place,  # noqa: F401 - a fixture
    put,
    rebuild_in_part,
)

_t = TELEMETRY.c
_READ = (
    *("id", "timestamp", "provider", "model", "tier", "request_type", "error_type"),
    *("was_fallback", *SUMMED),
)


# -- what is right, by Python's integers -----------------------------------------------------------


def by_python(rows, since, until):
    """The measures of the rows of a window, as `added_up` gives them."""
    total = {}
    for row in rows:
        if not since <= row.timestamp < until:
            continue
        quality = _number(row.quality_score, SUMMED["quality_score"].limit)
        tokens = _number(row.output_tokens, SUMMED["output_tokens"].limit)
        known = [_number(getattr(row, name), domain.limit) for name, domain in SUMMED.items()]
        counted = [
            1,
            row.error_type is not None,
            row.was_fallback == 1,
            quality is not None
            and quality > 80
            and tokens is not None
            and tokens < 50
            and row.tier in ("REASONING", "COMPLEX"),
            quality is not None and quality < 45 and row.tier == "SIMPLE",
            *(value is not None for value in known),
            *(
                0 if value is None else math.floor(value * domain.scale + 0.5)
                for value, domain in zip(known, SUMMED.values(), strict=True)
            ),
        ]
        key = (row.provider, row.model, row.tier, row.request_type)
        so_far = total.get(key)
        total[key] = list(map(int.__add__, so_far, counted)) if so_far else list(map(int, counted))
    own = len(measures.COUNTED) + 1
    return {
        key: [
            *sums[:own],
            *zip(sums[own : own + len(SUMMED)], sums[own + len(SUMMED) :], strict=True),
        ]
        for key, sums in total.items()
    }


def _number(value, limit):
    return value if isinstance(value, int | float) and -limit <= value <= limit else None


@contextmanager
def one_snapshot(engine):
    options = {}
    if engine.dialect.name == "postgresql":
        options["isolation_level"] = "REPEATABLE READ"
    with engine.connect().execution_options(**options) as connection, Session(connection) as s:
        yield s


_PLAIN = select(*(_t[name].label(name) for name in _READ))


def stored(session):
    """The rows as they were stored."""
    names = ", ".join(_READ)
    return session.connection().exec_driver_sql(f"SELECT {names} FROM routing_telemetry").all()


def check(engine, windows, *, sure):
    """Compare the answers with the rows of the same snapshot; return how many were exact."""
    exact = 0
    for since, until in windows:
        with one_snapshot(engine) as session:
            answer = ask(session, EVERYTHING, since, until, NOW)
            rows = stored(session)
            if answer.raw_from is not None:  # and from then on it is exact again
                since = answer.raw_from  # noqa: PLW2901
                answer = ask(session, EVERYTHING, since, until, NOW)
                assert answer.raw_from is None or since >= until
        if answer.raw_from is None and sure:
            exact += 1
            assert added_up(answer.parts) == by_python(rows, since, until), (since, until)
    return exact


# -- what can happen -------------------------------------------------------------------------------

OLD = st.integers(NOW - 2 * DAY_MS, NOW)
IDS = st.integers(1, 60)
CHANGED = st.one_of(
    st.tuples(st.just("cost_usd"), st.one_of(st.none(), st.floats(0, 1))),
    st.tuples(st.just("provider"), st.sampled_from(["a", "z"])),
    st.tuples(st.just("tier"), st.sampled_from([None, "SIMPLE", "COMPLEX"])),
    st.tuples(st.just("error_type"), st.sampled_from([None, "E"])),
    st.tuples(st.just("timestamp"), INSTANTS),
    st.tuples(st.just("request_text"), st.just("x")),
)
STEPS = st.one_of(
    st.tuples(st.just("put"), st.lists(RECORDS, min_size=1, max_size=6)),
    st.tuples(st.just("put"), st.lists(RECORDS, min_size=1, max_size=6)),
    st.tuples(st.just("restore"), st.lists(st.tuples(IDS, RECORDS), min_size=1, max_size=4)),
    st.tuples(st.just("change"), st.tuples(IDS, IDS, CHANGED)),
    st.tuples(st.just("change_unseen"), st.tuples(IDS, IDS, CHANGED)),
    st.tuples(st.just("renumber"), st.tuples(IDS, st.integers(100, 200))),
    st.tuples(st.just("delete"), st.tuples(IDS, IDS)),
    st.tuples(st.just("delete_provider"), st.sampled_from(["a", "é"])),
    st.tuples(st.just("cleanup"), OLD),
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.just("fold"), st.integers(0, 3)),
    st.tuples(st.just("killed"), st.integers(0, 25)),
    st.tuples(st.just("maintain"), st.none()),
    st.tuples(st.just("rebuild"), st.integers(0, 3)),
    st.tuples(st.just("trim"), OLD),
)


class World:
    """A database and what is done to it."""

    def __init__(self, engine):
        self.engine = engine
        self.begin = opener(engine)
        self.backend = Backend(engine.dialect.name)
        self.sure = True  # that the store was told of every change
        with self.begin() as connection:
            for table in (TELEMETRY, ROLLUPS, DIMENSIONS, PROGRESS, CHANGES):
                connection.execute(delete(table))
            self._restart_ids(connection)

    def _restart_ids(self, connection):
        if self.backend is Backend.SQLITE:
            connection.exec_driver_sql(
                "DELETE FROM sqlite_sequence WHERE name = 'routing_telemetry'"
            )
        else:
            connection.exec_driver_sql("ALTER TABLE routing_telemetry ALTER COLUMN id RESTART")

    def _numbers_forward(self, connection):
        if self.backend is Backend.POSTGRESQL:
            connection.exec_driver_sql(
                "SELECT setval(ids, greatest(max(id), pg_sequence_last_value(ids::regclass), 1)) "
                "FROM pg_get_serial_sequence('routing_telemetry', 'id') AS ids "
                "LEFT JOIN routing_telemetry ON true GROUP BY ids"
            )

    def put(self, records):
        with self.begin() as connection:
            put(connection, *records)

    def restore(self, numbered):
        with self.begin() as connection:
            there = set(connection.scalars(select(_t.id)))
            records = {number: record for number, record in numbered if number not in there}
            put(connection, *({"id": number} | record for number, record in records.items()))
            greatest = connection.scalar(select(func.max(_t.id)))
            if greatest in records:
                self._numbers_forward(connection)
        self.sure = False

    def change(self, what):
        first, last, (name, value) = what
        with self.begin() as connection:
            connection.execute(
                update(TELEMETRY).where(_t.id.between(first, last)).values({name: value})
            )

    def change_unseen(self, what):
        with self.begin() as connection:
            for statement in triggers.dropping(self.backend):
                connection.exec_driver_sql(statement)
        self.change(what)
        with self.begin() as connection:
            for statement in triggers.creating(self.backend):
                connection.exec_driver_sql(statement)
        self.sure = False

    def renumber(self, what):
        old, new = what
        with self.begin() as connection:
            if connection.scalar(select(_t.id).where(_t.id == new)) is None:
                connection.execute(update(TELEMETRY).where(_t.id == old).values(id=new))
                self._numbers_forward(connection)

    def delete(self, ids):
        with self.begin() as connection:
            connection.execute(delete(TELEMETRY).where(_t.id.between(*ids)))

    def delete_provider(self, provider):
        with self.begin() as connection:
            connection.execute(delete(TELEMETRY).where(_t.provider == provider))

    def cleanup(self, cutoff):
        with self.begin() as connection:
            connection.execute(delete(TELEMETRY).where(_t.timestamp < cutoff))

    def restart(self, _):
        with self.begin() as connection:
            if self.backend is Backend.POSTGRESQL:
                connection.exec_driver_sql("TRUNCATE routing_telemetry RESTART IDENTITY")
            else:
                connection.execute(delete(TELEMETRY))
                self._restart_ids(connection)
        self.sure = False

    def fold(self, steps):
        done = []
        repair.apply_changes(self.begin)
        folding.fold(self.begin, on_step=done.append, stop=lambda: len(done) > steps)

    def killed(self, statements):
        left = iter(range(statements))

        @contextmanager
        def begin():
            with self.begin() as connection:
                kill_after(connection, left)
                yield connection

        with suppress(Killed):
            repair.apply_changes(begin)
            folding.fold(begin)

    def maintain(self, _):
        repair.apply_changes(self.begin)
        assert folding.fold(self.begin).done
        for check_ in (repair.compare_counts, repair.scrub):
            assert check_(self.begin, read=self.begin, stop=lambda: False).done
        self.sure = True

    def rebuild(self, steps):
        rebuild_in_part(self.begin, steps)

    def trim(self, before):
        folding.trim(self.begin, before)


WINDOWS = st.lists(st.tuples(INSTANTS, INSTANTS), min_size=1, max_size=3)


@settings(RELAXED, max_examples=10)
@given(steps=st.lists(STEPS, max_size=10), windows=WINDOWS)
def test_whatever_happens_an_answer_that_says_rows_is_exact(place, steps, windows):  # noqa: F811
    check_world(place, steps, windows)


@pytest.mark.slow
@settings(RELAXED, max_examples=150)
@given(steps=st.lists(STEPS, max_size=14), windows=WINDOWS)
def test_whatever_happens_many_times_an_answer_that_says_rows_is_exact(place, steps, windows):  # noqa: F811
    check_world(place, steps, windows)


def check_world(place, steps, windows):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        for module in (folding, repair):
            patch.setattr(module, "PAUSE_S", 0)
        patch.setattr(folding, "STEP_ROWS", 3)
        patch.setattr(folding, "_PATIENCE_S", 0.0)
        patch.setattr(repair, "_COUNTED_ROWS", 5)
        patch.setattr(repair, "_SCRUBBED_ROWS", 5)
        world = World(place)
        asked = [*windows, (0, 2**62), (NOW - DAY_MS, NOW + 1)]
        for name, value in steps:
            getattr(world, name)(value)
            check(place, asked, sure=world.sure)
        world.maintain(None)
        check(place, asked, sure=True)


# -- all at once -----------------------------------------------------------------------------------

QUICK = 10
LONG = 120


def instant(chance):
    return NOW - chance.choice([0, 5, 60, 600, 1_440, 2_000]) * 60_000 + chance.randrange(10**6)


class Others:
    """Each does one thing again and again, in a thread of its own."""

    def __init__(self, store, engine):
        self.store = store
        self.begin = opener(engine)
        self.stop = threading.Event()
        self.failed = []

    def write(self, chance):
        for _ in range(chance.randrange(1, 6)):
            self.store.record(
                provider=chance.choice("abc"),
                timestamp=instant(chance),
                tier=chance.choice(["SIMPLE", "COMPLEX"]),
                cost_usd=chance.random(),
                quality_score=chance.randrange(100),
                output_tokens=chance.randrange(100),
            )
        self.store.flush(30)

    def change(self, chance):
        since = instant(chance)
        some = _t.timestamp.between(since, since + chance.choice([1_000, 10**6, 10**7]))
        what = chance.choice(
            [
                update(TELEMETRY).where(some).values(cost_usd=chance.random()),
                update(TELEMETRY).where(some).values(provider=chance.choice("abz")),
                update(TELEMETRY).where(some).values(timestamp=instant(chance)),
                delete(TELEMETRY).where(some, _t.provider == "a"),
                delete(TELEMETRY).where(some, _t.id % literal(3, BigInteger) == 0),
            ]
        )
        with self.begin() as connection:
            connection.execute(what)

    def clean_up(self, chance):
        cutoff = NOW - chance.choice([1_900, 2_100, 1_000]) * 60_000
        with self.begin() as connection:
            connection.execute(delete(TELEMETRY).where(_t.timestamp < cutoff))
        self.stop.wait(0.2)

    def maintain(self, chance):
        self.store.maintain(budget_s=1, rebuild=chance.random() < 0.2)

    def run(self, work, chance):
        while not self.stop.is_set():
            try:
                work(chance)
            except (StoreUnavailable, DBAPIError) as error:  # a lock, a deadlock: others go on
                if not any(word in str(error) for word in ("lock", "serialize")):
                    self.failed.append(error)
                    return
            self.stop.wait(0.01)  # several of each between two checks, and time for the checks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "checks"),
    [(1, QUICK), *(pytest.param(seed, LONG, marks=pytest.mark.slow) for seed in range(2, 4))],
)
def test_during_writes_changes_and_retention_an_answer_that_says_rows_is_exact(url, seed, checks):
    """Each check in one snapshot, while others write, change, delete, fold and clean up."""
    chance, exact = random.Random(seed), 0
    engine = create_store_engine(url)
    settings_ = StoreSettings(url=url, maintenance_interval_s=86_400, flush_interval_s=0.01)
    with Store(settings=settings_, clock=lambda: NOW + 1) as store:
        store.add_many([{"provider": "a", "timestamp": NOW - 2_000 * 60_000}])
        others = Others(store, engine)
        threads = [
            threading.Thread(target=others.run, args=(work, random.Random(seed * 100 + number)))
            for number, work in enumerate(
                (others.write, others.change, others.clean_up, others.maintain)
            )
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in range(checks):
                since, until = sorted((instant(chance), instant(chance)))
                asked = [(since, until), (0, 2**62), (NOW - DAY_MS, NOW + 1)]
                exact += check(engine, asked, sure=True)
        finally:
            others.stop.set()
            for thread in threads:
                thread.join(60)
        assert not others.failed
        assert exact > checks
        store.maintain()
        check(engine, [(0, 2**62), (NOW - DAY_MS, NOW + 1)], sure=True)
    engine.dispose()
