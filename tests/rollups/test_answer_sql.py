"""Statements of statistics: what is sent for one, and how PostgreSQL goes about it."""

import re

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.dialects.postgresql import psycopg

from lynkr_store import Store, StoreSettings, Window
from lynkr_store.queries import statistics
from lynkr_store.rollups import answer_sql
from lynkr_store.rollups.buckets import split_window
from lynkr_store.rollups.state import NOTHING_FOLDED
from lynkr_store.schemas.units import DAY_MS, HOUR_MS
from tests.conftest import POSTGRES

NOW = 1_750_000_000_000
QUESTIONS = [statistics.STATS, statistics.PROVIDER_STATS, statistics.ACCURACY]
ROWS = 20_000
FILL = f"""
INSERT INTO routing_telemetry (request_id, timestamp, provider, tier)
SELECT 'r', {NOW} - n * 10000, CASE WHEN n % 3 = 0 THEN 'p' || n % 900 ELSE 'a' END, 'SIMPLE'
FROM generate_series(1, {ROWS}) AS numbers (n)
"""


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("hours", [0, 1, 24, 24 * 40])
def test_parameters_are_only_what_differs_between_windows(engine, question, hours):
    since = NOW - hours * HOUR_MS - 1
    parts = split_window(since, NOW, NOW)
    given = answer_sql.parameters(parts, since, NOW, NOTHING_FOLDED)
    if question.one_provider:
        given |= {"provider": "a"}
    statement = answer_sql.answer(question, answer_sql.statement_key(parts), long_backlog=False)
    sent = statement.compile(engine).params
    assert {name for name, value in sent.items() if value is None} == set(given)
    if engine.dialect.name == "postgresql":  # SQLite's OFFSET needs a LIMIT, which is sent
        assert set(sent) == set(given)


@pytest.fixture(scope="module", params=POSTGRES)
def store(request, server_of):
    server = server_of(request.param)
    url = server.create_database("questions", "template_head")
    settings = StoreSettings(url=url, cache_ttl_s=0, maintenance_interval_s=86_400)
    with Store(settings=settings, clock=lambda: NOW) as store:
        with store.engine.begin() as connection:
            connection.execute(text(FILL))
        store.maintain()
        with store.engine.begin() as connection:
            connection.execute(text("ANALYZE"))
        yield store
    server.drop_database("questions")


def test_postgresql_plans_a_statistic_once(store):
    for minutes in range(10):
        until = NOW - minutes * 60_000
        assert store.get_stats(Window(since=until - DAY_MS, until=until)).total_requests == 8640
    with store.engine.connect() as connection:  # of its pool, which has one connection
        [(planned, for_any)] = connection.execute(
            text(
                "SELECT sum(custom_plans), sum(generic_plans) FROM pg_prepared_statements "
                "WHERE statement LIKE '%routing_dimensions%'"
            )
        )
        assert (planned, for_any > 0) == (0, True)
        assert connection.scalar(text("SHOW plan_cache_mode")) == "auto"


def test_an_engine_that_commits_each_statement_is_left_as_it_is(store, caplog):
    engine = create_engine(store.engine.url, isolation_level="AUTOCOMMIT")
    settings = StoreSettings(cache_ttl_s=0, maintenance_interval_s=86_400)
    with Store(engine=engine, settings=settings, clock=lambda: NOW) as own:
        for _ in range(8):
            assert own.get_stats().total_requests == 8640
        with engine.connect() as connection:
            assert connection.scalar(text("SHOW plan_cache_mode")) == "auto"
    engine.dispose()
    assert not caplog.records


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("long_backlog", [False, True])
def test_no_more_is_read_of_the_rows_than_one_range_of_one_index(store, question, long_backlog):
    """With the plan for any parameters: a host's transaction may come to it too."""
    since, until = NOW - 10 * DAY_MS - 100_000, NOW - 100_000
    parts = split_window(since, until, NOW)
    statement = answer_sql.answer(
        question, answer_sql.statement_key(parts), long_backlog=long_backlog
    )
    compiled = statement.compile(dialect=psycopg.dialect(paramstyle="numeric_dollar"))
    given = answer_sql.parameters(parts, since, until, ROWS) | {"provider": "'a'"}
    values = ", ".join(str(given[name]) for name in compiled.positiontup)
    with store.engine.connect() as connection:
        for line in (
            "SET LOCAL plan_cache_mode = force_generic_plan",
            f"PREPARE asked AS {compiled}",
        ):
            connection.exec_driver_sql(line)
        plan = connection.exec_driver_sql(f"EXPLAIN EXECUTE asked ({values})").scalars().all()
        connection.exec_driver_sql("DEALLOCATE asked")
    read = [line for line in plan if re.search(r" on routing_telemetry", line)]
    assert len(read) == 1 + len(parts.rows) + len(parts.edges)
    own = "idx_telemetry_timestamp" if long_backlog else "pk_routing_telemetry"
    used = [re.search(r"Index (?:Only )?Scan using (\w+)", line)[1] for line in read]
    assert sorted(used) == sorted([own] + ["idx_telemetry_timestamp"] * (len(read) - 1))
