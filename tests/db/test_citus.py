"""The statements for tables that Citus distributes, checked on a PostgreSQL server without Citus.

`tests/conformance/test_citus.py` runs them on a cluster.
"""

import random
from datetime import timedelta

import pytest
from sqlalchemy import event, text
from sqlglot import exp, parse_one
from sqlglot.optimizer.scope import traverse_scope

from lynkr_store import RoutingFilter, Store, StoreSettings, Window
from lynkr_store.db import citus
from lynkr_store.db.models import Base
from lynkr_store.schemas.units import DAY_MS, QUARTER_MS
from tests.conftest import POSTGRES
from tests.queries.test_pages import FILTERS
from tests.support.stores import looked

NOW = 1_750_000_000_000
DAYS = 4
ROWS = 600
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


def opened(url, sent, *, distributed):
    """A store on a database without Citus, which is told that its tables are distributed."""
    settings = StoreSettings(
        url=url,
        cache_ttl_s=0,
        maintenance_interval_s=86_400,
        retention_days=DAYS - 1,
        text_retention_days=1,
        rollup_retention_days=DAYS - 2,
    )
    store = Store(settings=settings, clock=lambda: NOW)

    @event.listens_for(store.engine, "connect")
    def tell(_, record):
        record.info[citus._KNOWN] = {None: distributed}

    @event.listens_for(store.engine, "before_cursor_execute")
    def keep(_connection, _cursor, statement, *_):
        sent.append(statement)

    if distributed:
        with store.engine.begin() as connection:
            connection.execute(text("SET LOCAL allow_system_table_mods TO on"))
            connection.execute(text(STAND_IN))
    return store


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
    """Everything that a store answers."""
    for name, window in QUESTIONS.items():
        yield name, store.get_stats(window)
        yield name, store.get_provider_stats("a", window)
        yield name, store.get_routing_accuracy(window)
    filters = {name: criteria for name, (criteria, _) in FILTERS.items()} | OTHER_FILTERS
    for name, criteria in filters.items():
        page = store.query(criteria, limit=9)
        yield name, page
        yield name, store.query(criteria, limit=9, before=page[-1].cursor if page else None)
        window = QUESTIONS["odd ends"]
        yield name, store.query(criteria, window, limit=5, include_text=False)
    yield "each", list(store.iter_records(page_rows=100))
    yield "lag", looked(store).rollup_lag


def life(store):
    """What happens to a store's rows, and its answers after each step."""
    store.add_many(records(1))
    yield "new", [*answers(store)]
    yield "folded", store.maintain()
    yield "folded", [*answers(store)]
    store.add_many(records(2))
    yield "some new", [*answers(store)]
    with store.engine.begin() as connection:  # noticed by triggers, which Citus has not
        connection.execute(text("UPDATE routing_telemetry SET provider = 'b' WHERE id % 10 = 0"))
        connection.execute(text("DELETE FROM routing_telemetry WHERE id % 10 = 1"))
    yield "changed", [*answers(store)]
    yield "mended", store.maintain()
    yield "mended", [*answers(store)]
    yield "deleted", store.cleanup(timedelta(days=2))
    yield "deleted", [*answers(store)]
    yield "recounted", store.recount()
    yield "rebuilt", store.maintain(rebuild=True)
    yield "rebuilt", [*answers(store)]
    with store.engine.begin() as connection:
        connection.execute(text("DELETE FROM routing_telemetry"))
    yield "emptied", store.maintain()
    yield "emptied", [*answers(store)]


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


@pytest.fixture(scope="module", params=POSTGRES)
def lives(request, server_of):
    """The same life of a store with both forms of its statements, and the statements."""
    server, found = server_of(request.param), {}
    for distributed in (False, True):
        name, sent = f"form_{distributed}", []
        url = server.create_database(name, "template_head")
        with opened(url, sent, distributed=distributed) as store:
            found[distributed] = [*life(store)], sent
        server.drop_database(name)
    return found


@pytest.mark.skipif("citus" in POSTGRES, reason="needs a server without Citus")
class TestWithoutCitus:
    def test_both_forms_give_the_same_answers(self, lives):
        (plain, _), (distributed, _) = lives[False], lives[True]
        for (step, expected), (_, found) in zip(plain, distributed, strict=True):
            assert found == expected, step

    def test_no_statement_is_sent_that_citus_refuses(self, lives):
        _, sent = lives[True]
        assert len(sent) > ROWS
        assert {what for statement in {*sent} for what in refused(statement)} == set()

    def test_what_citus_refuses_is_found_among_the_other_form(self, lives):
        _, sent = lives[False]
        assert {what for statement in {*sent} for what in refused(statement)} == {
            "a plan for any parameters",
            "WITH RECURSIVE",
            "LATERAL",
            "FOR UPDATE",
            "a correlated subquery",
        }


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
