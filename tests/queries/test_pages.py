"""Lists: the index each is read from, on tables large enough to tell, and the same rows without."""

from collections import Counter
from functools import cache
from itertools import islice

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session
from sqlalchemy.schema import DropIndex

from lynkr_store import Cursor, RoutingFilter, RoutingRepository, Window, create_store_engine
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.functions import unindexed
from lynkr_store.db.models import INDEXES, TELEMETRY
from lynkr_store.maintenance import indexes
from lynkr_store.migrate.upgrade import upgrade
from lynkr_store.queries import pages
from tests.conftest import CITUS, ON_DISK

ROWS = 20_000
FIRST_MS = 1_750_000_000_000
PAGE = 20
TIER, MODEL, PROVIDER, SESSION, TIME = (
    "ix_routing_telemetry_tier_timestamp",
    "ix_routing_telemetry_model_timestamp",
    "ix_routing_telemetry_provider_failed_timestamp",
    "idx_telemetry_session_id",
    "idx_telemetry_timestamp",
)
OF_ONE_SERVER = pytest.mark.skipif(bool(CITUS), reason="a plan of a table on one server")
OWN = [index for index in INDEXES if index.name in {TIER, MODEL, PROVIDER}]

# Common values, some seldom, some that were given up half-way; ties; what is missing; late rows.
FILL = f"""
WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {ROWS})
INSERT INTO routing_telemetry (
    request_id, timestamp, provider, tier, model, session_id, error_type, request_text
)
SELECT
    'r', {FIRST_MS} + (CASE WHEN n % 50 = 0 THEN n / 2 ELSE n END) / 3 * 1000,
    CASE WHEN n % 4000 = 7 THEN 'rare' WHEN n < {ROWS} / 2 AND n % 3 = 0 THEN 'old'
        WHEN n % 5 = 0 THEN 'b' ELSE 'a' END,
    CASE WHEN n % 4000 = 9 THEN 'RARE' WHEN n < {ROWS} / 2 AND n % 4 < 2 THEN 'OLD'
        WHEN n % 7 = 0 THEN NULL ELSE 'SIMPLE' END,
    CASE WHEN n % 4000 = 11 THEN 'm-rare' WHEN n < {ROWS} / 2 AND n % 4 < 2 THEN 'm-old'
        WHEN n % 11 = 0 THEN NULL ELSE 'm' END,
    CASE WHEN n % 13 > 0 THEN 's-' || n / 40 END,
    CASE WHEN n % 97 = 0 THEN 'overloaded' END,
    'a question'
FROM numbers
"""

FILTERS = {
    "provider": (RoutingFilter(provider="a"), PROVIDER),
    "rare provider": (RoutingFilter(provider="rare"), PROVIDER),
    "old provider": (RoutingFilter(provider="old"), PROVIDER),
    "absent provider": (RoutingFilter(provider="none"), PROVIDER),
    "providers": (RoutingFilter(provider=["a", "old", "rare"]), PROVIDER),
    "tier": (RoutingFilter(tier="SIMPLE"), TIER),
    "rare tier": (RoutingFilter(tier="RARE"), TIER),
    "old tier": (RoutingFilter(tier="OLD"), TIER),
    "absent tier": (RoutingFilter(tier="none"), TIER),
    "tiers": (RoutingFilter(tier=["OLD", "RARE", "SIMPLE"]), TIER),
    "model": (RoutingFilter(model="m"), MODEL),
    "rare model": (RoutingFilter(model="m-rare"), MODEL),
    "old model": (RoutingFilter(model="m-old"), MODEL),
    "models": (RoutingFilter(model=["m-old", "m-rare"]), MODEL),
    "session": (RoutingFilter(session_id="s-100"), SESSION),
    "sessions": (RoutingFilter(session_id=["s-100", "s-7", "none"]), SESSION),
    "errors": (RoutingFilter(has_error=True), PROVIDER),
    "a provider's errors": (RoutingFilter(provider="b", has_error=True), PROVIDER),
    "a provider's successes": (RoutingFilter(provider="b", has_error=False), PROVIDER),
    "a tier's errors": (RoutingFilter(tier="SIMPLE", has_error=True), PROVIDER),
    "a provider's tier": (RoutingFilter(provider="b", tier="SIMPLE"), PROVIDER),
    "a tier's model": (RoutingFilter(tier="SIMPLE", model="m"), MODEL),
    "a model's provider": (RoutingFilter(model="m", provider=["a", "b"]), MODEL),
    "a session's errors": (RoutingFilter(session_id="s-100", has_error=True), SESSION),
    "all": (RoutingFilter(), TIME),
    "successes": (RoutingFilter(has_error=False), None),
}
MIDDLE = FIRST_MS + ROWS // 6 * 1000
PLACES = {
    "first page": (None, None),
    "in a window": (Window(since=FIRST_MS + 1_000_000, until=MIDDLE), None),
    "after a cursor": (None, Cursor(timestamp=MIDDLE, id=ROWS // 2)),
    "both": (Window(until=MIDDLE + 500_000), Cursor(timestamp=MIDDLE, id=ROWS // 2)),
    "a cursor above the window": (Window(until=MIDDLE - 500_000), Cursor(timestamp=MIDDLE, id=1)),
}


@pytest.fixture(scope="module", params=ON_DISK)
def filled(request, tmp_path_factory, server_of):
    """A database with rows and every index; without statistics."""
    if request.param == "sqlite-file":
        url = f"sqlite:///{tmp_path_factory.mktemp('lists')}/telemetry.db"
    else:
        url = server_of(request.param).create_database("lists", "template_head")
    engine = create_store_engine(url)
    upgrade(engine)
    with engine.begin() as connection:
        if request.param != "sqlite-file":
            connection.execute(
                text("ALTER TABLE routing_telemetry SET (autovacuum_enabled = false)")
            )
        connection.execute(text(FILL))
    yield engine
    engine.dispose()
    if request.param != "sqlite-file":
        server_of(request.param).drop_database("lists")


def page(engine, criteria, window=None, before=None, limit=PAGE, **options):
    with Session(engine) as session:
        repository = RoutingRepository(session)
        return repository.query(criteria, window, before=before, limit=limit, **options)


def plan(engine, criteria, window=None, before=None):
    """The plan's lines, and the indexes in them that an index of ours or the gateway's could be."""
    window = window or Window()
    statement, values = pages.rows(
        backend_of(engine),
        criteria,
        window.since_ms,
        window.until_ms,
        limit=PAGE,
        before=before,
        include_text=True,
    )
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    with engine.connect() as connection:
        compiled = statement.params(values).compile(engine, compile_kwargs={"literal_binds": True})
        rows = connection.exec_driver_sql(explain + str(compiled)).all()
    lines = "\n".join(str(row[-1]) for row in rows)
    return lines, {index.name for index in INDEXES if index.name in lines}


@cache
def stored(engine):
    """Every row, the newest first."""
    columns = "timestamp, id, provider, tier, model, session_id, error_type"
    with engine.connect() as connection:
        return sorted(
            connection.execute(text(f"SELECT {columns} FROM routing_telemetry")).all(),
            key=lambda row: (row.timestamp, row.id),
            reverse=True,
        )


def expected(engine, criteria, window, before, limit=PAGE):
    """The same page by a look at every row."""
    since, until = (window.since_ms, window.until_ms) if window else (None, None)
    place = before and (before.timestamp, before.id)
    asked = {
        name: values
        for name in ("provider", "tier", "model", "session_id")
        if (values := getattr(criteria, name)) is not None
    }
    found = (
        row.id
        for row in stored(engine)
        if (since is None or row.timestamp >= since)
        and (until is None or row.timestamp < until)
        and (place is None or (row.timestamp, row.id) < place)
        and criteria.has_error in (None, row.error_type is not None)
        and all(getattr(row, name) in values for name, values in asked.items())
    )
    return [*islice(found, limit)]


@OF_ONE_SERVER
@pytest.mark.sample(3)
@pytest.mark.parametrize("asked", [asked for asked, (_, index) in FILTERS.items() if index])
def test_a_page_is_read_from_its_index(filled, asked):
    criteria, index = FILTERS[asked]
    several = len(criteria.model_dump(exclude_none=True, exclude={"has_error"})) > 1
    for place in PLACES.values():
        lines, used = plan(filled, criteria, *place)
        if criteria.has_error and criteria.provider is None:
            used.discard("idx_telemetry_provider")  # the providers are looked up in theirs
        if several and filled.dialect.name == "postgresql":  # which may look in both
            assert index in used, lines
        else:
            assert used == {index}, lines
        assert "Seq Scan" not in lines


@pytest.mark.sample(3)
@pytest.mark.parametrize("asked", FILTERS)
def test_a_page_has_the_rows_that_a_full_scan_finds(filled, asked):
    criteria, _ = FILTERS[asked]
    for name, place in PLACES.items():
        found = [row.id for row in page(filled, criteria, *place)]
        assert found == expected(filled, criteria, *place), name


def test_pages_follow_each_other_without_a_gap_to_the_end(filled):
    for asked in ("providers", "errors", "old tier", "rare model"):
        criteria, _ = FILTERS[asked]
        whole = expected(filled, criteria, None, None, ROWS)[:500]
        before, seen = None, []
        while len(seen) < len(whole) and (rows := page(filled, criteria, None, before, 97)):
            seen += [row.id for row in rows]
            before = rows[-1].cursor
        assert seen[: len(whole)] == whole
        assert Counter(seen).most_common(1)[0][1] == 1


def test_texts_are_read_or_left_out_by_either_way(filled):
    for asked in ("tier", "errors", "all"):
        criteria, _ = FILTERS[asked]
        whole, brief = page(filled, criteria), page(filled, criteria, include_text=False)
        assert [row.id for row in whole] == [row.id for row in brief]
        assert {row.request_text for row in whole} == {"a question"}
        assert not hasattr(brief[0], "request_text")


def test_more_values_than_are_put_together_are_found_all_the_same(filled):
    many = [f"none-{number}" for number in range(pages._MAX_PREFIXES)]
    criteria = RoutingFilter(tier=[*many, "RARE", "OLD"])
    assert [r.id for r in page(filled, criteria)] == expected(filled, criteria, None, None)


@OF_ONE_SERVER
def test_statistics_of_the_table_change_no_way_to_the_rows(engine):
    """Values of which the table has most, and the newest rows none."""
    with engine.begin() as connection:
        connection.execute(text(FILL))
        connection.execute(text("ANALYZE"))
    for asked in ("old tier", "old model", "old provider", "tier", "errors", "session"):
        criteria, index = FILTERS[asked]
        lines, used = plan(engine, criteria)
        assert index in used, lines
        assert TIME not in used, lines


def test_without_the_stores_indexes_lists_are_the_same(engine):
    """A database that was adopted and has not been maintained."""
    with engine.begin() as connection:
        for index in OWN:
            connection.execute(DropIndex(index))
        connection.execute(text(FILL))
    asked = [
        (criteria, window, before)
        for criteria, _ in FILTERS.values()
        for window, before in [PLACES["both"]]
    ]
    without = [[row.id for row in page(engine, *one)] for one in asked]
    assert set(indexes.build_missing_indexes(engine).names) == {index.name for index in OWN}
    assert [[row.id for row in page(engine, *one)] for one in asked] == without
    assert without == [expected(engine, *one) for one in asked]


def test_an_odd_value_is_found_among_the_errors(new_url):
    """Another writer's text that is no UTF-8, a blob, and a time that is none."""
    engine = create_store_engine(new_url("sqlite-file", at_head=True))
    with engine.begin() as connection:
        for provider in ("CAST(x'ff41' AS TEXT)", "x'0041'", "''", "'a'"):
            for at in ("1750000000000", "'soon'", "12.5"):
                connection.exec_driver_sql(
                    "INSERT INTO routing_telemetry (request_id, timestamp, provider, error_type) "
                    f"VALUES ('r', {at}, {provider}, 'e')"
                )
    seen, before = [], None
    while rows := page(engine, RoutingFilter(has_error=True), None, before, 5):
        seen += [row.id for row in rows]
        before = rows[-1].cursor
    assert seen == [11, 8, 5, 2, 10, 7, 4, 1, 12, 9, 6, 3]
    engine.dispose()


def test_a_hidden_column_keeps_its_values(filled):
    with filled.connect() as connection:
        statement = select(unindexed(TELEMETRY.c.tier)).where(unindexed(TELEMETRY.c.id) == 9)
        assert connection.scalar(statement) == "RARE"
