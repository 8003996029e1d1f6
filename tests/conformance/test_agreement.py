"""SQLite and PostgreSQL give the same answer to every question, whatever is stored."""

import math
import sqlite3
from collections import defaultdict
from contextlib import closing
from datetime import timedelta
from fractions import Fraction
from types import SimpleNamespace

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from lynkr_store import RoutingFilter, Store, StoreSettings, Window
from lynkr_store.rollups import answer_sql, measures
from lynkr_store.rollups.answer import ask
from tests.conftest import POSTGRES

NOW = 1_750_000_000_000
WINDOWS = [Window(since=NOW, until=NOW + 10), Window(since=-(10**6)), Window(since=0, until=2**62)]

ROUNDING_EDGES = [
    *(k + 0.5 for k in (-3, -1, 0, 1, 2, 41)),
    *(k / 1000 + 0.0005 for k in (-2, 0, 1, 499, 1000)),
    1e-10,
    -1e-10,
    0.49999999999999994,  # plus a half it is 1.0 in doubles
    5e-10,
    1.5e-9,
    -0.0,
    0.1,
    1 / 3,
    44.35,
    80.0000001,
]
NUMBERS = st.one_of(
    st.none(),
    st.sampled_from(ROUNDING_EDGES),
    st.sampled_from([10**6, 10**9, -(10**9), 10**12, 2**53, 2**53 + 1, 9 * 10**18, 1e300, -1e19]),
    st.floats(-100, 100),
    st.floats(-1e9, 1e9),
    st.integers(-5, 200),
)
ODD = st.sampled_from(["text", "", "12abc", "  7 ", b"\x00\xff", b"12", "1e400", "NaN", "0x10"])
NAMES = st.sampled_from([None, "", "a", "A", "größe", "模型", "é", "e\u0301", "SIMPLE", "COMPLEX"])
ERRORS = st.sampled_from([None, "", "E", "500.0"])

REALS = ("cost_usd", "quality_score", "tokens_per_second")
COLUMNS = (
    "timestamp",
    "provider",
    "tier",
    "was_fallback",
    "error_type",
    "latency_ms",
    "output_tokens",
    *REALS,
)


def rows(numbers):
    return st.lists(
        st.fixed_dictionaries(
            {
                "timestamp": st.sampled_from(
                    [NOW - 1, NOW, NOW + 9, NOW + 10, 0, -10_000, NOW * 1000]
                ),
                "provider": NAMES.map(lambda name: name or ""),
                "tier": NAMES,
                "was_fallback": st.sampled_from([0, 1, None, 2]),
                "error_type": ERRORS,
                "latency_ms": numbers,
                "output_tokens": numbers,
                **dict.fromkeys(REALS, numbers),
            }
        ),
        max_size=12,
    )


@pytest.fixture(scope="module", params=POSTGRES)
def pair(request, server_of, tmp_path_factory):
    """A store on each backend, and a way to put rows into both tables past the store."""
    path = tmp_path_factory.mktemp("agreement") / "telemetry.db"
    server = server_of(request.param)
    url = server.create_database("agreement", "template_head")
    common = {"cache_ttl_s": 0, "upgrade_on_open": True}
    lite = Store(settings=StoreSettings(url=f"sqlite:///{path}", **common), clock=lambda: NOW)
    post = Store(settings=StoreSettings(url=url, **common), clock=lambda: NOW)
    assert lite.query() == post.query() == []
    names, marks = ", ".join(COLUMNS), ", ".join(["{}"] * len(COLUMNS))
    query = make_url(url)
    conninfo = query.set(drivername="postgresql").render_as_string(hide_password=False)
    with closing(sqlite3.connect(path)) as raw, psycopg.connect(conninfo) as connection:
        raw.execute("PRAGMA synchronous = OFF")

        def put(records):
            raw.execute("DELETE FROM routing_telemetry")
            connection.execute("TRUNCATE routing_telemetry")
            for number, record in enumerate(records):
                values = [record[name] for name in COLUMNS]
                raw.execute(
                    f"INSERT INTO routing_telemetry (request_id, {names}) VALUES (?, "
                    + marks.format(*["?"] * len(COLUMNS))
                    + ")",
                    [str(number), *values],
                )
                connection.execute(
                    f"INSERT INTO routing_telemetry (request_id, {names}) VALUES (%s, "
                    + marks.format(*["%s"] * len(COLUMNS))
                    + ")",
                    [str(number), *(copied(n, record[n]) for n in COLUMNS)],
                )
            raw.commit()
            connection.commit()

        yield SimpleNamespace(lite=lite, post=post, put=put)
    lite.close()
    post.close()
    server.drop_database("agreement")


def copied(name, value):
    """A stored value as a copy into PostgreSQL has it."""
    if name in ("provider", "tier", "error_type", "timestamp", "was_fallback"):
        return value
    if isinstance(value, str | bytes):
        # SQLite itself turns text that is a number into one, on its way into the column
        return 7 if value == "  7 " else None
    if name == "output_tokens" and value is not None:
        whole = math.floor(value + 0.5) if abs(value) < 2**52 else int(value)
        return whole if abs(whole) < 2**63 else None
    return None if value is None else float(value)


def check_same(pair, records):
    pair.put(records)
    for window in WINDOWS:
        # the sums themselves: rounding to a statistic's digits would hide a unit
        assert sums(pair.lite, window) == sums(pair.post, window)
        assert pair.lite.get_stats(window) == pair.post.get_stats(window)
        assert pair.lite.get_routing_accuracy(window) == pair.post.get_routing_accuracy(window)
        for provider in {record["provider"] for record in records}:
            mine = pair.lite.get_provider_stats(provider, window)
            assert mine == pair.post.get_provider_stats(provider, window)
    for bounds in ({"min_latency_ms": 0.5}, {"max_cost_usd": 1e-10}, {"was_fallback": True}):
        criteria = RoutingFilter(**bounds)
        mine, other = (
            [row.request_id for row in store.query(criteria)] for store in (pair.lite, pair.post)
        )
        # ids differ in the two tables, but not their order
        assert mine == other


def sums(store, window):
    """Every count and half of a sum, by provider and tier."""
    since, until = window.resolved(NOW, timedelta(hours=24))
    with Session(store.engine) as session:
        answer = ask(session, EVERYTHING, since, until, NOW)
    return sorted((str(part.by), part.sums) for part in answer.parts)


EVERYTHING = answer_sql.Question(by=("provider", "tier"), names=measures.ALL)


RELAXED = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def one(**values):
    record = dict.fromkeys(COLUMNS) | {"timestamp": NOW, "provider": "a", "was_fallback": 0}
    return [record | values]


@pytest.mark.slow
@RELAXED
@given(records=rows(NUMBERS))
@example(records=one(latency_ms=0.0005) + one(latency_ms=0.0015))
@example(records=one(latency_ms=0.49999999999999994))
@example(records=one(cost_usd=5e-10, quality_score=-0.5, output_tokens=2**53 + 1))
@example(records=one(latency_ms=-0.0005, cost_usd=-1e-10))
@example(records=one(latency_ms=9 * 10**18, cost_usd=1e300, quality_score=1e10))
@example(records=one(tier=None) + one(tier="") + one(provider=""))
@example(records=one(timestamp=NOW * 1000) + one(timestamp=-10_000))
def test_both_backends_agree_on_every_statistic(pair, records):
    check_same(pair, records)


@pytest.mark.slow
@RELAXED
@given(records=rows(st.one_of(NUMBERS, ODD)))
@example(records=one(latency_ms="text", cost_usd=b"\x00\xff", output_tokens=12.5))
@example(records=one(quality_score="", output_tokens=-0.5, latency_ms="  7 "))
def test_what_is_no_number_counts_as_not_measured(pair, records):
    check_same(pair, records)


@RELAXED
@given(records=rows(NUMBERS))
def test_the_figures_are_the_exact_ones(pair, records):
    """Against fractions: each value scaled to its integer, each mean rounded half up."""
    pair.put(records)
    inside = [r for r in records if NOW <= r["timestamp"] < NOW + 10]
    stats = pair.lite.get_stats(WINDOWS[0])
    if not inside:
        assert stats is None
        return
    latencies, qualities = defaultdict(list), defaultdict(list)
    for record in inside:
        latencies[record["provider"]].append(units(record["latency_ms"], 10**9, 1000))
        if record["tier"] is not None:
            qualities[record["tier"]].append(units(record["quality_score"], 10**9, 10**6))
    assert stats.avg_latency_by_provider == means(latencies, 1000, 0)
    assert stats.avg_quality_by_tier == means(qualities, 10**6, 1)
    costs = [units(record["cost_usd"], 10**6, 10**9) for record in inside]
    known = [cost for cost in costs if cost is not None]
    assert stats.unpriced_requests == len(costs) - len(known)
    assert stats.total_cost == (rounded(Fraction(sum(known), 10**9), 4) if known else None)
    errors = sum(record["error_type"] is not None for record in inside)
    assert stats.error_rate == rounded(Fraction(100 * errors, len(inside)), 1)


def units(value, limit, scale):
    if value is None or not -limit <= value <= limit:
        return None
    return math.floor(float(value) * scale + 0.5)


def means(groups, scale, digits):
    measured = {name: [v for v in values if v is not None] for name, values in groups.items()}
    return {
        name: rounded(Fraction(sum(values), len(values) * scale), digits)
        for name, values in measured.items()
        if values
    }


def rounded(exact, digits):
    return math.floor(exact * 10**digits + Fraction(1, 2)) / 10**digits
