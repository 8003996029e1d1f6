"""Statistics are those of the rows that are there, whoever changed or deleted them, and how."""

import json
import logging
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import pytest
from sqlalchemy import delete, event, func, insert, select, update
from sqlalchemy.exc import ProgrammingError
from typer.testing import CliRunner

from lynkr_store import RollupsRefused, Store, StoreSettings, Window, create_store_engine
from lynkr_store.backend import Backend
from lynkr_store.cli.commands import app
from lynkr_store.db import triggers
from lynkr_store.db.dialect import disposing, writing
from lynkr_store.db.models import CHANGES, TELEMETRY
from lynkr_store.maintenance import retention, run
from lynkr_store.migrate.comparison import drift, missing_triggers
from lynkr_store.migrate.upgrade import downgrade, upgrade
from lynkr_store.rollups import fold, repair, state
from lynkr_store.rollups.buckets import floor_to
from lynkr_store.schemas.units import DAY_MS, INSTANT_MAX_MS, INSTANT_MIN_MS
from tests.conftest import POSTGRES
from tests.rollups.test_rollups import answered, from_rows, opener, put
from tests.support.stores import eventually

pytestmark = pytest.mark.sample(3)

NOW = 1_750_000_000_000
START = floor_to(DAY_MS, NOW) - DAY_MS
MINUTE_MS = 60_000
ALL = Window(since=0)
_t = TELEMETRY.c


@pytest.fixture(autouse=True)
def _enough_time(monkeypatch):
    """Have the checks of maintenance end by themselves, also on a busy machine."""
    for share in ("COUNTING", "SCRUBBING"):
        monkeypatch.setattr(run, share, 20)


@pytest.fixture
def store(open_store):
    """One that maintains when it is told to, and keeps no answer."""
    return open_store(clock=lambda: NOW, cache_ttl_s=0, maintenance_interval_s=86_400)


def by_sql(store, *statements):
    """What somebody else does, in one transaction."""
    with writing(store._database.engine).begin() as connection:
        for statement in statements:
            if isinstance(statement, str):
                connection.exec_driver_sql(statement)
            else:
                connection.execute(statement)


def minutes(count, since=START, **fields):
    """A row a minute."""
    return [
        {"provider": "p", "timestamp": since + n * MINUTE_MS, "cost_usd": 0.5, **fields}
        for n in range(count)
    ]


def said(store, window=ALL):
    stats = store.get_stats(window)
    return None if stats is None else (stats.total_requests, stats.total_cost, stats.source)


def noted(store):
    with store._database.engine.connect() as connection:
        return connection.scalar(select(func.count()).select_from(CHANGES))


# -- changes by SQL --------------------------------------------------------------------------------


def test_a_changed_cost_is_the_statistics_cost_at_once_and_after_maintenance(store):
    store.add_many([{"provider": "p", "timestamp": NOW - 1}])
    store.maintain()
    assert said(store) == (1, None, "rows")
    by_sql(store, update(TELEMETRY).values(cost_usd=1))
    assert [row.cost_usd for row in store.query()] == [1.0]
    assert said(store) == (1, 1.0, "rows")
    report = store.maintain()
    assert (report.quarters_recounted, report.quarters_mended) == (1, 0)
    assert said(store) == (1, 1.0, "rows")
    assert noted(store) == 0


@pytest.mark.parametrize("first", [0, 1, 100, 388], ids="from row {}".format)
def test_deleted_rows_are_not_counted_unless_they_were_the_oldest(store, first):
    """One session's 12 of 400 rows, by SQL; of the oldest it looks like retention."""
    rows = minutes(400)
    for n in range(first, first + 12):
        rows[n]["session_id"] = "s"
    store.add_many(rows)
    store.maintain()
    assert said(store) == (400, 200.0, "rows")
    by_sql(store, delete(TELEMETRY).where(_t.session_id == "s"))
    assert len(store.query(limit=1000)) == 388
    right = (400, 200.0, "buckets") if first == 0 else (388, 194.0, "rows")
    assert said(store) == right
    store.maintain()
    assert said(store) == right
    later = sum(n not in range(first, first + 12) for n in range(90, 400))
    assert said(store, Window(since=START + 90 * MINUTE_MS)) == (later, later / 2, "rows")


CHANGES_BY_SQL = {
    "a cost": "UPDATE routing_telemetry SET cost_usd = 2 WHERE provider = 'a'",
    "a provider": "UPDATE routing_telemetry SET provider = 'new' WHERE provider = 'a'",
    "a tier to none": "UPDATE routing_telemetry SET tier = NULL",
    "an error": "UPDATE routing_telemetry SET error_type = 'E', was_fallback = 1",
    "every instant, to later": "UPDATE routing_telemetry SET timestamp = timestamp + 7200000",
    "every instant, to earlier": "UPDATE routing_telemetry SET timestamp = timestamp - 7200000",
    "an instant, out of the domain": (
        "UPDATE routing_telemetry SET timestamp = 5 WHERE provider = 'a'"
    ),
    "an id, above all": "UPDATE routing_telemetry SET id = id + 100000 WHERE provider = 'a'",
    "an id, below all": "UPDATE routing_telemetry SET id = -id WHERE provider = 'a'",
    "one provider's rows": "DELETE FROM routing_telemetry WHERE provider = 'a' AND id > 3",
    "the newest rows": "DELETE FROM routing_telemetry WHERE id > 90",
    "rows in the middle": "DELETE FROM routing_telemetry WHERE id BETWEEN 20 AND 70",
    "a text": "UPDATE routing_telemetry SET request_text = NULL",
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("what", CHANGES_BY_SQL)
def test_answers_are_those_of_the_rows_at_once_and_after_maintenance(engine, what):
    begin = opener(engine)
    windows = [
        (0, 2**62),
        (START, START + DAY_MS),
        (START + 3 * MINUTE_MS, START + 80 * MINUTE_MS),
        (START + 20 * MINUTE_MS, START + 25 * MINUTE_MS),
    ]
    with begin() as connection:
        put(
            connection,
            *(
                {
                    "timestamp": START + n * MINUTE_MS,
                    "provider": "ab"[n % 2],
                    "tier": "SIMPLE",
                    "cost_usd": n / 7,
                    "request_text": "x",
                }
                for n in range(100)
            ),
        )
    fold.fold(begin)
    with begin() as connection:
        connection.exec_driver_sql(CHANGES_BY_SQL[what])
        changed = connection.scalar(select(func.count()).select_from(CHANGES))
    assert bool(changed) == (what != "a text")
    exactly = what != "every instant, to later"  # until then it looks like retention
    for window in windows:
        found, raw_from = answered(engine, *window)
        if raw_from is None:
            assert found == from_rows(engine, *window)
        else:
            assert not exactly
    assert repair.apply_changes(begin).done
    fold.fold(begin)
    for window in windows:
        assert answered(engine, *window) == (from_rows(engine, *window), None)


def test_what_retention_deletes_stays_as_history_and_its_entries_go_in_one_statement(store):
    store.add_many(minutes(1440))
    store.maintain()
    by_sql(store, f"DELETE FROM routing_telemetry WHERE timestamp < {START + 700 * MINUTE_MS}")
    assert said(store) == (1440, 720.0, "buckets")
    report = store.maintain()
    assert (report.quarters_recounted, report.quarters_mended) == (0, 0)
    assert said(store) == (1440, 720.0, "buckets")
    assert said(store, Window(since=START + 700 * MINUTE_MS)) == (740, 370.0, "rows")
    assert noted(store) == 0
    assert store.cleanup(timedelta(milliseconds=NOW - (START + 800 * MINUTE_MS))) == 100
    assert noted(store) > 0
    store.maintain()
    assert (noted(store), said(store)) == (0, (1440, 720.0, "buckets"))


@pytest.mark.parametrize("earlier", [0, 1], ids=["the first quarter", "a later one"])
def test_what_retention_deletes_is_history_beside_a_late_row_that_is_older(store, earlier):
    """Retention deletes what was folded when it began; the late row was folded since."""
    store.add_many(minutes(10, START - earlier * DAY_MS))
    store.maintain()
    if earlier:
        assert store.cleanup(timedelta(milliseconds=NOW - START), trust_clock=True) == 10
        store.add_many(minutes(10))
        store.maintain()
    folded = run.folded_upto(store._database)
    store.add_many(minutes(1, START + MINUTE_MS // 2))
    run.fold(store._database)
    cutoff = START + 5 * MINUTE_MS
    assert retention.delete_older(store._database, cutoff, upto_id=folded) == 5
    for _ in range(2):
        assert said(store)[0] == 11 + 10 * earlier
        store.maintain()
    assert store.cleanup(timedelta(milliseconds=NOW - cutoff), trust_clock=True) == 1
    store.maintain()
    assert said(store)[0] == 11 + 10 * earlier


def test_rows_changed_and_then_removed_by_retention_are_history(store):
    store.add_many(minutes(60))
    store.maintain()
    by_sql(
        store,
        update(TELEMETRY).values(cost_usd=1),
        delete(TELEMETRY).where(_t.timestamp < START + 30 * MINUTE_MS),
    )
    store.maintain()
    assert said(store) == (60, 45.0, "buckets")
    assert said(store, Window(since=START + 30 * MINUTE_MS)) == (30, 30.0, "rows")


def test_odd_values_make_no_trigger_fail(engine):
    begin = opener(engine)
    odd = [0, -(2**62), 2**62, INSTANT_MIN_MS - 1, INSTANT_MIN_MS, INSTANT_MAX_MS]
    texts = ["'text'", "x'00ff'", "79.5", "1e300", "'1749999600000.5'", "1749999600000.5"]
    with begin() as connection:
        into = "INSERT INTO routing_telemetry (request_id, provider, timestamp) VALUES ('r', 'p', "
        for value in odd if engine.dialect.name == "postgresql" else [*odd, *texts]:
            connection.exec_driver_sql(f"{into}{value})")
    fold.fold(begin)
    with begin() as connection:
        connection.exec_driver_sql("UPDATE routing_telemetry SET cost_usd = 1")
        connection.exec_driver_sql("UPDATE routing_telemetry SET timestamp = timestamp")
    repair.apply_changes(begin)
    window = (0, 2**62)
    assert answered(engine, *window) == (from_rows(engine, *window), None)
    with begin() as connection:
        connection.exec_driver_sql("DELETE FROM routing_telemetry")
        starts = set(connection.scalars(select(CHANGES.c.start)))
    assert starts <= {INSTANT_MIN_MS, 1_749_999_600_000}
    assert INSTANT_MIN_MS in starts


@pytest.mark.parametrize("way", ["OR IGNORE", "OR REPLACE", "OR FAIL", "OR ABORT", "OR ROLLBACK"])
def test_with_every_conflict_clause_of_sqlite_the_trigger_fails_no_statement(new_url, way):
    engine = create_store_engine(new_url("sqlite-file", at_head=True))
    begin = opener(engine)
    with begin() as connection:
        put(connection, *({"timestamp": START + n} for n in range(4)))
    fold.fold(begin)
    with begin() as connection:
        for _ in range(2):
            connection.exec_driver_sql(f"UPDATE {way} routing_telemetry SET cost_usd = 1")
        assert connection.scalar(select(func.count()).select_from(CHANGES)) == 1
    repair.apply_changes(begin)
    assert answered(engine, 0, NOW) == (from_rows(engine, 0, NOW), None)
    engine.dispose()


def test_a_change_between_the_reading_of_rows_and_the_commit_is_counted_the_next_time(
    engine, monkeypatch
):
    """PostgreSQL: whoever writes is not held up, and its entry is not taken out unread."""
    if engine.dialect.name == "sqlite":
        pytest.skip("its writers come one after the other")
    begin = opener(engine)
    with begin() as connection:
        put(connection, *({"timestamp": START + n * MINUTE_MS} for n in range(30)))
    fold.fold(begin)
    by_other = iter([lambda: change(2), lambda: change(3)])

    def change(cost):
        with begin() as connection:
            connection.execute(update(TELEMETRY).values(cost_usd=cost))

    recount = fold.recount

    def then_changed(connection, start):
        counted = recount(connection, start)
        next(by_other, lambda: None)()
        return counted

    monkeypatch.setattr(fold, "recount", then_changed)
    change(1)
    for _ in range(3):
        repair.apply_changes(begin)
        assert answered(engine, 0, NOW) == (from_rows(engine, 0, NOW), None)
    with begin() as connection:
        assert connection.scalar(folds_left()) is None


def folds_left():
    return select(func.max(CHANGES.c.id))


@pytest.mark.parametrize("name", POSTGRES[-1:])
def test_rows_that_retention_deletes_while_a_quarter_is_counted_stay_history(
    name, new_url, monkeypatch
):
    engine = create_store_engine(new_url(name, at_head=True))
    begin = opener(engine)
    with begin() as connection:
        put(connection, *({"timestamp": START + n * MINUTE_MS} for n in range(60)))
    fold.fold(begin)
    read_state = repair.read_state

    def removed_meanwhile(connection):
        stands = read_state(connection)
        with begin() as other:
            other.execute(delete(TELEMETRY).where(_t.timestamp < START + 20 * MINUTE_MS))
        return stands

    with begin() as connection:
        connection.execute(update(TELEMETRY).values(cost_usd=1))
    monkeypatch.setattr(repair, "read_state", removed_meanwhile)
    repair.apply_changes(begin)
    monkeypatch.undo()
    repair.apply_changes(begin)
    found, raw_from = answered(engine, 0, NOW)
    assert (sum(sums[0] for sums in found.values()), raw_from) == (60, START + 20 * MINUTE_MS)
    engine.dispose()


@pytest.mark.parametrize("moment", range(0, 24, 3))
def test_after_a_kill_at_any_statement_changes_are_applied_the_next_time(engine, moment):
    begin = opener(engine)
    with begin() as connection:
        put(connection, *({"timestamp": START + n * MINUTE_MS} for n in range(40)))
    fold.fold(begin)
    with begin() as connection:
        connection.execute(update(TELEMETRY).values(cost_usd=1))
        connection.execute(delete(TELEMETRY).where(_t.id == 20))
    left = iter(range(moment))

    class KilledError(Exception):
        pass

    @contextmanager
    def killing():
        with begin() as connection:
            execute = connection.execute

            def counted(*args, **kwargs):
                if next(left, None) is None:
                    raise KilledError
                return execute(*args, **kwargs)

            connection.execute = counted
            yield connection

    with suppress(KilledError):
        repair.apply_changes(killing)
    window = (START + 7 * MINUTE_MS, NOW)
    assert answered(engine, *window) == (from_rows(engine, *window), None)
    repair.apply_changes(begin)
    assert answered(engine, 0, NOW) == (from_rows(engine, 0, NOW), None)


# -- ids -------------------------------------------------------------------------------------------

EMPTY_AND_RESTART = {
    Backend.SQLITE: ["DELETE FROM routing_telemetry", "DELETE FROM sqlite_sequence"],
    Backend.POSTGRESQL: ["TRUNCATE routing_telemetry RESTART IDENTITY"],
}


@pytest.mark.slow
@pytest.mark.parametrize("between", [False, True], ids=["at once", "after a maintenance"])
@pytest.mark.parametrize("then", [1, 100, 300], ids="{} rows then".format)
def test_ids_that_start_again_are_folded_again(store, then, between):
    store.add_many(minutes(200))
    store.maintain()
    by_sql(store, *EMPTY_AND_RESTART[store._database.backend])
    if between:
        store.maintain()
    store.add_many(minutes(then, cost_usd=2.0))
    store.maintain()
    assert said(store) == (then, 2.0 * then, "rows")
    with store._database.engine.connect() as connection:
        assert connection.scalar(state.lag()) == 0
    store.add_many(minutes(5, since=START + 600 * MINUTE_MS))
    assert said(store)[0] == then + 5
    assert store.maintain(rebuild=True).rollup_lag == 0
    assert said(store) == (then + 5, 2.0 * then + 2.5, "rows")


def test_ids_that_start_again_after_older_history_keep_it_as_history(store):
    store.add_many(minutes(200))
    store.maintain()
    by_sql(store, *EMPTY_AND_RESTART[store._database.backend])
    store.add_many(minutes(100, since=START + 600 * MINUTE_MS))
    store.maintain()
    later = Window(since=START + 600 * MINUTE_MS)
    assert said(store, later) == (100, 50.0, "rows")
    assert said(store) == (300, 150.0, "buckets")


def test_an_empty_table_whose_ids_continue_is_retention(store):
    store.add_many(minutes(200))
    store.maintain()
    by_sql(store, "DELETE FROM routing_telemetry")
    store.maintain()
    assert said(store) == (200, 100.0, "buckets")
    store.add_many(minutes(100, since=NOW - 100 * MINUTE_MS))
    store.maintain()
    assert said(store) == (300, 150.0, "buckets")
    assert said(store, Window(since=NOW - 100 * MINUTE_MS)) == (100, 50.0, "rows")


def test_the_lag_is_never_below_zero(store):
    """The newest row's id is not the greatest that was given."""
    rows = [{"provider": "p", "timestamp": at} for at in (NOW - 1, NOW - 90 * DAY_MS)]
    store.add_many(rows)
    store.maintain()
    assert store.cleanup(timedelta(days=30)) == 1
    assert store.maintain().rollup_lag == 0
    eventually(lambda: store.health().rollup_lag is not None)
    assert store.health().rollup_lag == 0


@pytest.mark.parametrize("since", [START - 300 * MINUTE_MS, START, START + 7 * MINUTE_MS, NOW - 1])
def test_rows_with_ids_that_were_passed_are_counted_after_a_maintenance(store, since):
    """A restored or merged row names its id. By the release before 101 rows gave 1."""
    store.add_many([{"provider": "p", "timestamp": START + 5 * MINUTE_MS, "cost_usd": 0.5}])
    by_sql(store, update(TELEMETRY).values(id=1000))
    store.maintain()
    rows = [
        row | {"id": n + 1, "request_id": "r", "timestamp": since - n * MINUTE_MS}
        for n, row in enumerate(minutes(100))
    ]
    by_sql(store, insert(TELEMETRY).values(rows))
    assert store.maintain().quarters_mended > 0
    while store.maintain().quarters_mended:
        pass  # on a busy machine one run has not the time for all quarters
    assert said(store) == (101, 50.5, "rows")


# -- a database that loses what is folded ----------------------------------------------------------

LOSING = {
    Backend.SQLITE: [
        "CREATE TRIGGER loses BEFORE INSERT ON routing_rollups BEGIN SELECT RAISE(IGNORE); END"
    ],
    Backend.POSTGRESQL: [
        "CREATE FUNCTION loses() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
        """CREATE TRIGGER loses BEFORE INSERT ON routing_rollups
        FOR EACH ROW EXECUTE FUNCTION loses()""",
    ],
}
NO_LONGER = {
    Backend.SQLITE: ["DROP TRIGGER loses"],
    Backend.POSTGRESQL: ["DROP TRIGGER loses ON routing_rollups", "DROP FUNCTION loses()"],
}


@pytest.mark.parametrize("table", ["routing_rollups", "routing_dimensions"])
def test_a_fold_that_loses_rows_is_rolled_back_and_says_so(store, table):
    store.add_many(minutes(100))
    backend = store._database.backend
    by_sql(store, *(each.replace("routing_rollups", table) for each in LOSING[backend]))
    with pytest.raises(
        RollupsRefused, match="a rule, trigger or policy on one of them discards rows"
    ):
        store.maintain()
    # asked again: on a busy machine the latest error may be that health() got no answer in time
    eventually(lambda: "RollupsRefused" in store.health().last_error)
    assert dict(store.health().faults_by) == {"RollupsRefused": 1}
    assert said(store) == (100, 50.0, "rows")
    by_sql(store, *(each.replace("routing_rollups", table) for each in NO_LONGER[backend]))
    assert store.maintain().rows_folded == 100
    assert said(store) == (100, 50.0, "rows")


def test_a_stores_own_thread_says_so_too(open_store):
    store = open_store(clock=lambda: NOW, cache_ttl_s=0, maintenance_interval_s=0.01)
    assert store.get_stats() is None
    by_sql(store, *LOSING[store._database.backend])
    store.add_many(minutes(10))
    eventually(lambda: store.health().faults_by.get("RollupsRefused", 0) > 1)
    assert said(store) == (10, 5.0, "rows")


# -- roll-ups of late rows -------------------------------------------------------------------------


def test_roll_ups_are_kept_where_rows_are(store):
    """By the release before `get_stats` gave None after a maintenance, a rebuild did not help."""
    old = NOW - 500 * DAY_MS
    store.add_many([*minutes(1, since=NOW - 2 * DAY_MS), *minutes(1, since=NOW - 1)])
    store.maintain()
    assert store.cleanup(timedelta(days=1)) == 1
    store.add_many(minutes(10, since=old))
    window = Window(since=old - 1, until=old + DAY_MS)
    for rebuild in (False, True, False):
        store.maintain(rebuild=rebuild)
        assert len(store.query(window=window)) == 10
        assert said(store, window)[:2] == (10, 5.0)
    assert store.cleanup(timedelta(days=1)) == 10
    store.maintain()
    assert said(store, window) is None
    assert said(store, Window(since=NOW - 3 * DAY_MS))[0] == 2


# -- what no trigger sees --------------------------------------------------------------------------


@contextmanager
def without_triggers(store):
    """As a restore, a bulk load or REPLACE on SQLite works, or a database that takes none."""
    engine, backend = store._database.engine, store._database.backend
    with writing(engine).begin() as connection:
        for statement in triggers.dropping(backend):
            connection.exec_driver_sql(statement)
        yield connection
        for statement in triggers.creating(backend):
            connection.exec_driver_sql(statement)


def test_the_scrub_finds_what_no_trigger_saw_and_says_so(store, caplog):
    store.add_many(minutes(200))
    store.maintain()
    with without_triggers(store) as connection:
        connection.execute(update(TELEMETRY).where(_t.id == 50).values(cost_usd=1.5))
        connection.execute(update(TELEMETRY).where(_t.id == 90).values(provider="new"))
    assert said(store) == (200, 100.0, "rows"), "nothing tells"
    caplog.set_level(logging.WARNING, "lynkr_store")
    report = store.maintain()
    assert (report.quarters_recounted, report.quarters_mended) == (0, 2)
    assert said(store) == (200, 101.0, "rows")
    assert store.get_stats(ALL).requests_by_provider == {"p": 199, "new": 1}
    assert any("2 quarters of an hour differed" in record.message for record in caplog.records)
    assert store.maintain().quarters_mended == 0


def test_rows_deleted_without_triggers_are_found_by_their_number(store):
    store.add_many(minutes(200))
    store.maintain()
    with without_triggers(store) as connection:
        connection.execute(delete(TELEMETRY).where(_t.id.in_([30, 60, 200])))
    assert store.maintain().quarters_mended == 3
    assert said(store) == (197, 98.5, "rows")


def test_both_resume_where_they_were_stopped(store, monkeypatch):
    monkeypatch.setattr(repair, "_COUNTED_ROWS", 20)
    monkeypatch.setattr(repair, "_SCRUBBED_ROWS", 20)
    monkeypatch.setattr(repair, "PAUSE_S", 0)
    store.add_many(minutes(200))
    store.maintain()
    database = store._database
    with without_triggers(store) as connection:
        connection.execute(update(TELEMETRY).values(cost_usd=1))
    for check, found in ((repair.compare_counts, 0), (repair.scrub, 14)):
        steps = 0
        mended = repair.Repaired(0, done=False)
        total = 0
        while not mended.done:
            stop = partial(next, iter([False]), True)  # noqa: FBT003
            mended = check(database.write_transaction, read=database.read, stop=stop)
            total += mended.quarters
            steps += 1
            assert steps < 50
        assert (steps > 5, total) == (True, found)
    assert said(store) == (200, 200.0, "rows")


def test_recount_repairs_the_window_that_was_changed(store):
    store.add_many(minutes(200))
    store.maintain()
    with without_triggers(store) as connection:
        connection.execute(update(TELEMETRY).values(cost_usd=1))
    hour = Window(since=START + 60 * MINUTE_MS, until=START + 120 * MINUTE_MS)
    assert store.recount(hour) == 60
    assert said(store) == (200, 130.0, "rows")
    assert store.recount(Window(since=START + 10, until=START + 20)) == 15
    assert store.recount(Window(since=2**62, until=2**63 - 1)) == 0
    assert store.recount(Window(since=5, until=4)) == 0
    assert store.recount() == 200
    assert said(store) == (200, 200.0, "rows")


def test_recount_keeps_what_is_known_of_removed_rows(store):
    store.add_many(minutes(200))
    store.maintain()
    store.cleanup(timedelta(milliseconds=NOW - (START + 100 * MINUTE_MS)))
    assert store.recount() == 95  # from the first whole quarter on
    assert said(store) == (200, 100.0, "buckets")


# -- other roles, copies, and tables that are gone -------------------------------------------------


@pytest.mark.parametrize("name", POSTGRES[-1:])
def test_a_role_that_may_only_change_rows_needs_no_right_to_the_entries(name, new_url):
    url = new_url(name, at_head=True)
    engine = create_store_engine(url)
    begin = opener(engine)
    with begin() as connection:
        put(connection, *({"timestamp": START + n * MINUTE_MS} for n in range(30)))
    fold.fold(begin)
    with begin() as connection:
        connection.exec_driver_sql("CREATE ROLE changer_of_rows")
        connection.exec_driver_sql(
            "GRANT SELECT, UPDATE, DELETE, TRUNCATE ON routing_telemetry TO changer_of_rows"
        )
    try:
        with begin() as connection:
            connection.exec_driver_sql("SET LOCAL ROLE changer_of_rows")
            # whatever the session has of the same names
            connection.exec_driver_sql("CREATE TEMPORARY TABLE routing_changes (start text)")
            connection.exec_driver_sql("UPDATE routing_telemetry SET cost_usd = 1")
            connection.exec_driver_sql("SET LOCAL search_path = ''")  # as pg_restore has it
            connection.exec_driver_sql("DELETE FROM public.routing_telemetry WHERE id = 17")
        with begin() as connection:
            assert connection.scalar(
                select(func.count()).select_from(CHANGES).where(CHANGES.c.newest.is_not(None))
            )
        with engine.connect() as connection:
            connection.exec_driver_sql("SET LOCAL ROLE changer_of_rows")
            connection.exec_driver_sql("CREATE TEMPORARY TABLE own (id bigint)")
            with pytest.raises(ProgrammingError, match="permission denied for function"):
                connection.exec_driver_sql(
                    "CREATE TRIGGER captures AFTER TRUNCATE ON own FOR EACH STATEMENT "
                    f"EXECUTE FUNCTION public.{triggers.FUNCTION}()"
                )
    finally:
        with begin() as connection:
            connection.exec_driver_sql("DROP OWNED BY changer_of_rows")
            connection.exec_driver_sql("DROP ROLE changer_of_rows")
    repair.apply_changes(begin)
    assert answered(engine, 0, NOW) == (from_rows(engine, 0, NOW), None)
    engine.dispose()


@pytest.mark.parametrize("name", POSTGRES[-1:])
def test_a_sequence_of_the_entries_that_is_behind_is_set_forward(name, new_url):
    with Store(new_url(name, at_head=True)) as store:
        store.add_many(minutes(2))
        by_sql(store, "UPDATE routing_telemetry SET cost_usd = 1")
        by_sql(store, "ALTER TABLE routing_changes ALTER COLUMN id RESTART")
        assert store.maintain().sequences_set == ("routing_changes_id_seq",)
        by_sql(store, "UPDATE routing_telemetry SET cost_usd = 2")
        assert said(store) == (2, 4.0, "rows")


@pytest.mark.parametrize("name", POSTGRES[-1:])
def test_a_trigger_without_its_table_fails_no_statement(name, new_url):
    engine = create_store_engine(new_url(name, at_head=True))
    begin = opener(engine)
    with begin() as connection:
        put(connection, {}, {})
        connection.exec_driver_sql("DROP TABLE routing_changes")
        connection.exec_driver_sql("UPDATE routing_telemetry SET cost_usd = 1")
        connection.exec_driver_sql("DELETE FROM routing_telemetry WHERE id = 1")
        connection.exec_driver_sql("ALTER SCHEMA public RENAME TO moved")
        connection.exec_driver_sql("DELETE FROM moved.routing_telemetry")
    engine.dispose()


@pytest.mark.parametrize("name", POSTGRES[-1:])
@pytest.mark.parametrize("schema", ["telemetry", 'odd "$lynkr_store$" \'schema\\'])
def test_the_entries_are_in_the_tables_schema(name, new_url, schema):
    engine = create_store_engine(new_url(name), schema=schema)
    upgrade(engine)
    begin = opener(engine)
    with begin() as connection:
        put(connection, {"timestamp": START})
    fold.fold(begin)
    with begin() as connection:
        connection.exec_driver_sql("UPDATE routing_telemetry SET cost_usd = 1")
        assert list(connection.scalars(select(CHANGES.c.start))) == [START]
    downgrade(engine, "0009")
    with begin() as connection:
        connection.exec_driver_sql("UPDATE routing_telemetry SET cost_usd = 1")
        left = f"SELECT count(*) FROM pg_proc WHERE proname = '{triggers.FUNCTION}'"
        assert connection.exec_driver_sql(left).scalar() == 0
    engine.dispose()


@pytest.mark.parametrize("name", POSTGRES[-1:])
def test_where_the_database_takes_no_triggers_maintenance_finds_what_was_changed(name, new_url):
    """As on Citus, whose distributed tables take none: it says `feature_not_supported`."""
    url = new_url(name)
    engine = create_store_engine(url)
    begin = opener(engine)
    with begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION refuses() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN "
            "RAISE 'triggers are not supported' USING ERRCODE = 'feature_not_supported'; END $$"
        )
        connection.exec_driver_sql(
            "CREATE EVENT TRIGGER refuses ON ddl_command_start WHEN TAG IN ('CREATE TRIGGER') "
            "EXECUTE FUNCTION refuses()"
        )
    upgrade(engine)
    with engine.connect() as connection:
        assert drift(connection) == []
        assert missing_triggers(connection) == list(triggers.NAMES[Backend.POSTGRESQL])
    with Store(settings=StoreSettings(url=url, cache_ttl_s=0), clock=lambda: NOW) as store:
        store.add_many(minutes(100))
        store.maintain()
        by_sql(
            store,
            "UPDATE routing_telemetry SET cost_usd = 1 WHERE id = 50",
            "DELETE FROM routing_telemetry WHERE id = 70",
        )
        assert store.maintain().quarters_mended == 2
        assert said(store) == (99, 50.0, "rows")
    downgrade(engine, "0009")
    engine.dispose()


def test_a_downgrade_takes_our_triggers_and_leaves_others(engine):
    begin = opener(engine)
    foreign = {
        "sqlite": "CREATE TRIGGER theirs AFTER DELETE ON routing_telemetry BEGIN SELECT 1; END",
        "postgresql": "CREATE TRIGGER theirs BEFORE UPDATE ON routing_telemetry "
        "FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    }[engine.dialect.name]
    listed = {
        "sqlite": "SELECT name FROM sqlite_schema WHERE type = 'trigger' ORDER BY name",
        "postgresql": "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal ORDER BY tgname",
    }[engine.dialect.name]
    with begin() as connection:
        connection.exec_driver_sql(foreign)
    ours = list(triggers.NAMES[Backend(engine.dialect.name)])
    for revision, names in (("0009", []), ("0010", ours)):
        if revision == "0009":
            downgrade(engine, revision)
        else:
            upgrade(engine)
        with begin() as connection:
            assert list(connection.exec_driver_sql(listed).scalars()) == [*names, "theirs"]


def test_check_names_triggers_that_are_missing_and_the_remedy_makes_them_again(url):
    def command(*line):
        return CliRunner().invoke(app, [*line, "--url", url])

    engine = create_store_engine(url)
    backend = Backend(engine.dialect.name)
    name = triggers.NAMES[backend][0]
    assert "triggers" not in command("check").output
    with opener(engine)() as connection:
        of = "" if backend is Backend.SQLITE else " ON routing_telemetry"
        connection.exec_driver_sql(f"DROP TRIGGER {name}{of}")
    said = command("check")
    assert (said.exit_code, f"triggers missing or disabled: {name};" in said.output) == (0, True)
    assert json.loads(command("check", "--json").output)["missing_triggers"] == [name]
    for line in (("downgrade", "0009"), ("upgrade",)):
        assert command(*line).exit_code == 0
    assert json.loads(command("check", "--json").output)["missing_triggers"] == []
    engine.dispose()


@pytest.mark.parametrize("name", POSTGRES)
def test_rows_that_are_stored_while_a_quarter_is_counted_are_no_difference(name, new_url):
    """Each statement sees what was committed before it."""
    settings = StoreSettings(url=new_url(name, at_head=True), cache_ttl_s=0)
    with (
        Store(settings=settings, clock=lambda: NOW) as store,
        disposing(create_store_engine(settings.url)) as others,
    ):
        store.add_many(minutes(5))
        store.maintain()

        def store_one(*_):
            with others.begin() as connection:
                put(connection, *minutes(1))

        database = store._database
        with database.write_transaction() as connection:
            event.listen(database.engine, "before_cursor_execute", store_one)
            try:
                assert not repair._recompute_if_different(connection, START)
            finally:
                event.remove(database.engine, "before_cursor_execute", store_one)
