"""The statements for tables that Citus distributes, checked on a PostgreSQL server without Citus.

`tests/conformance/test_citus.py` runs them on a cluster.
"""

import random
import re
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice

import psycopg
import pytest
from sqlalchemy import Engine, Pool, event, text
from sqlalchemy.orm import Session
from sqlglot import exp, parse_one
from sqlglot.optimizer.scope import traverse_scope

from lynkr_store import RoutingFilter, RoutingRepository, Store, StoreSettings, Window, copy
from lynkr_store.db import citus
from lynkr_store.db.models import Base
from lynkr_store.schemas.units import DAY_MS, QUARTER_MS
from tests.conftest import POSTGRES
from tests.queries.test_pages import FILTERS
from tests.support.stores import looked

NOW = 1_750_000_000_000
DAYS = 4
ROWS = 200
QUESTIONS = {
    "a day": Window(since=NOW - DAY_MS, until=NOW),
    "all": Window(since=0, until=NOW + DAY_MS),
    "odd ends": Window(since=NOW - 3 * DAY_MS + 12_345, until=NOW - DAY_MS - 54_321),
    "one quarter": Window(since=NOW - QUARTER_MS // 3, until=NOW),
    "old": Window(since=NOW - 9 * DAY_MS, until=NOW - 3 * DAY_MS),
}
OTHER_FILTERS = {
    "a status": RoutingFilter(status_code=[200, 500]),
    "a fallback": RoutingFilter(was_fallback=True),
    "bounds": RoutingFilter(min_latency_ms=10, max_latency_ms=500, min_cost_usd=0.001),
}
STAND_IN = """
CREATE FUNCTION pg_catalog.run_command_on_all_nodes(command text)
RETURNS TABLE (success boolean, result text) LANGUAGE plpgsql AS $$
BEGIN success := true; EXECUTE command INTO result; RETURN NEXT; END $$
"""


@contextmanager
def told(sent, *, distributed):
    """Tell each connection to PostgreSQL that its tables are distributed, or that they are not."""

    def tell(connection, record):
        if isinstance(connection, psycopg.Connection):
            record.info[citus._KNOWN] = {None: distributed}

    def keep(connection, _cursor, statement, *_):
        if connection.dialect.name == "postgresql":
            sent.append(statement)

    event.listen(Pool, "connect", tell)
    event.listen(Engine, "before_cursor_execute", keep)
    try:
        yield
    finally:
        event.remove(Pool, "connect", tell)
        event.remove(Engine, "before_cursor_execute", keep)


def opened(url):
    settings = StoreSettings(
        url=url,
        cache_ttl_s=0,
        maintenance_interval_s=86_400,
        retention_days=DAYS - 1,
        text_retention_days=1,
        rollup_retention_days=DAYS - 2,
    )
    return Store(settings=settings, clock=lambda: NOW)


def records(seed):
    some = random.Random(seed)
    for number in range(ROWS):
        yield {
            "request_id": f"r-{seed}-{number}",
            "timestamp": NOW - some.randrange(20) * DAY_MS // 5 - some.randrange(QUARTER_MS),
            "provider": some.choice(["a", "b", "old", "rare"]),
            "tier": some.choice(["SIMPLE", "COMPLEX", None]),
            "model": some.choice(["m", "m-old", None]),
            "session_id": f"s-{number % 7}",
            "error_type": some.choice([None, None, "overloaded"]),
            "was_fallback": some.random() < 0.1,
            "status_code": some.choice([200, 500]),
            "latency_ms": some.randrange(1000),
            "cost_usd": some.random() / 100,
            "request_text": "a question",
        }


def answers(store):
    """What a store answers."""
    for name, window in QUESTIONS.items():
        yield name, store.get_stats(window)
        yield name, store.get_provider_stats("a", window)
    yield "accuracy", store.get_routing_accuracy(QUESTIONS["all"])
    filters = {name: criteria for name, (criteria, _) in FILTERS.items()} | OTHER_FILTERS
    for name, criteria in filters.items():
        page = store.query(criteria, limit=9)
        yield name, page
        yield name, store.query(criteria, limit=9, before=page[-1].cursor if page else None)
    yield "odd ends", store.query(window=QUESTIONS["odd ends"], limit=9, include_text=False)
    yield "each", (each := [*store.iter_records(page_rows=100)])
    yield "followed", [*islice(store.follow(after=0, poll_s=0.01), len(each))]
    yield "lag", looked(store).rollup_lag


def copies(url, other_url, folder):
    """What copies do, from the database to a file and to another one, and back from the file."""
    file = folder / "rows.jsonl"
    for places in ((url, file), (url, other_url), (file, other_url)):
        for _ in range(2):
            yield copy(*places)
    with opened(other_url) as store:
        yield [*answers(store)]


def life(store, copied):
    """What happens to a store's rows, and its answers after each step."""
    store.add_many(records(1))
    yield "folded", store.maintain()
    store.add_many(records(2))
    yield "some new", [*answers(store)]
    with store.engine.begin() as connection:  # noticed by triggers, which Citus has not
        connection.execute(text("UPDATE routing_telemetry SET provider = 'b' WHERE id % 10 = 0"))
        connection.execute(text("DELETE FROM routing_telemetry WHERE id % 10 = 1"))
    yield "changed", [*answers(store)]
    yield "mended", store.maintain()
    yield "deleted", store.cleanup(timedelta(days=2))
    yield "deleted", [*answers(store)]
    yield "copied", [*copied]
    yield "recounted", store.recount()
    yield "rebuilt", store.maintain(rebuild=True)
    with store.engine.begin() as connection:
        connection.execute(text("DELETE FROM routing_telemetry"))
    yield "emptied", store.maintain()
    yield "emptied", store.get_stats(QUESTIONS["all"])


def refused(statement):
    """What of a statement Citus cannot plan, if a table that it distributes is in it."""
    if "plan_cache_mode" in statement:
        yield "a plan for any parameters"
    if "routing_telemetry" not in statement or not statement.startswith(("SELECT", "WITH", "INS")):
        return
    tree = parse_one(statement.replace("%%", "%"), read="postgres")
    if not any(table.name == "routing_telemetry" for table in tree.find_all(exp.Table)):
        return  # a name in a text
    if any(each.args.get("recursive") for each in tree.find_all(exp.With)):
        yield "WITH RECURSIVE"
    if tree.find(exp.Lateral):
        yield "LATERAL"
    if tree.find(exp.Lock):
        yield "FOR UPDATE"
    if isinstance(tree, exp.Insert) and tree.find(exp.Select):
        yield "INSERT … SELECT"
    for scope in traverse_scope(tree):
        if scope.is_correlated_subquery and any(
            table.name == "routing_telemetry" for table in scope.tables
        ):
            yield "a correlated subquery"


def lived(server, folder, *, distributed):
    """What happened in a store's life, and the statements that it sent."""
    names = ("lived", "lived_copy")
    url, other_url = [server.create_database(name, "template_head") for name in names]
    for each in (url, other_url):
        with psycopg.connect(each) as connection:
            connection.execute("SET LOCAL allow_system_table_mods TO on")
            connection.execute(STAND_IN)
    folder.mkdir()
    sent = []
    with told(sent, distributed=distributed), opened(url) as store:
        steps = [*life(store, copies(url, other_url, folder))]
    for name in names:
        server.drop_database(name)
    return steps, [*dict.fromkeys(re.sub(r"\d+", "1", statement) for statement in sent)]


@pytest.mark.skipif("citus" in POSTGRES, reason="needs a server without Citus")
@pytest.mark.parametrize("postgres", POSTGRES)
def test_both_forms_answer_the_same_and_citus_refuses_none_of_the_other(
    postgres, server_of, tmp_path
):
    server = server_of(postgres)
    plain, of_plain = lived(server, tmp_path / "plain", distributed=False)
    distributed, of_distributed = lived(server, tmp_path / "distributed", distributed=True)
    for (step, expected), (_, found) in zip(plain, distributed, strict=True):
        assert found == expected, step
    assert len(of_distributed) > len(FILTERS)
    assert {what for each in of_distributed for what in refused(each)} == set()
    assert {what for each in of_plain for what in refused(each)} == {
        "a plan for any parameters",
        "WITH RECURSIVE",
        "LATERAL",
        "FOR UPDATE",
        "a correlated subquery",
    }


@pytest.mark.skipif("citus" in POSTGRES, reason="needs a server without Citus")
@pytest.mark.parametrize("postgres", POSTGRES)
def test_the_stores_own_batches_take_one_connection_to_each_server(postgres, new_url):
    """Not those in a host's transaction, whose own statements the setting would slow down."""
    url, sent = new_url(postgres, at_head=True), []

    def settings():
        return sum("citus.multi_shard_modify_mode" in statement for statement in sent)

    with told(sent, distributed=True), opened(url) as store:
        store.add_many(records(1))
        assert settings() == 1
        assert store.record(provider="a")
        assert store.flush(60)
        assert settings() == 2
        with Session(store.engine) as session:
            assert RoutingRepository(session).add_many(records(2)) == ROWS
        assert settings() == 2


def test_without_the_extension_nothing_is_distributed(engine):
    with engine.connect() as connection:
        if "citus" not in POSTGRES:
            assert not citus.has_citus(connection)
            assert citus.managed_tables(connection) == set()
        citus.refuse_worker(connection)
        assert citus.is_distributed(connection) == citus.has_citus(connection)
        assert citus.ids_of_workers(connection) is None
        assert citus.managed_tables(connection) in (set(), {*Base.metadata.tables})


@pytest.mark.parametrize("postgres", POSTGRES)
def test_the_catalogue_is_asked_once_for_each_connection(postgres, new_url):
    sent = []
    settings = StoreSettings(url=new_url(postgres, at_head=True), cache_ttl_s=0)
    with Store(settings=settings) as store:
        event.listen(
            store.engine,
            "before_cursor_execute",
            lambda _connection, _cursor, statement, *_: sent.append(statement),
        )
        for _ in range(5):
            store.query()
            store.get_stats()
    asked = [each for each in sent if "pg_dist_partition')" in each]
    assert 1 <= len(asked) <= 4
