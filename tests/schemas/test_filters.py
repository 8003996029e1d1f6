"""Filters, windows, settings: bad values are named, with the remedy."""

import re
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from lynkr_store import BadArgument, RoutingFilter, Store, StoreSettings, Window
from lynkr_store.schemas.base import epoch_ms_now
from tests.support.stores import eventually

NAIVE = datetime(2026, 1, 1)  # noqa: DTZ001


def test_a_window_keeps_epoch_milliseconds():
    part = datetime(1970, 1, 1, 0, 0, 1, 500, tzinfo=UTC)
    assert Window(since=part) == Window(since=1001), "the first whole millisecond inside"
    assert Window(since=0).since_ms == 0
    assert Window().since_ms is None
    assert Window(until=-5).until_ms == -5
    assert hash(Window(since=1)) == hash(Window(since=1))


def test_a_statistics_window_has_both_ends():
    day = timedelta(hours=24)
    assert Window().resolved(100_000_000, day) == (13_600_000, 100_000_001)
    assert Window(since=0, until=5).resolved(10, day) == (0, 5)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"since": NAIVE}, "since.*naive"),
        ({"until": NAIVE}, "until.*naive"),
        ({"since": 1.5}, "since.*epoch milliseconds"),
        ({"since": "2026"}, "since.*aware datetime"),
        ({"until": True}, "until"),
        ({"until": 2**63}, "64 bits"),
        ({"from": 1}, "from"),
    ],
)
def test_bad_windows_are_named(values, named):
    with pytest.raises(ValidationError, match=f"(?s){named}"):
        Window(**values)


def test_a_dimension_takes_one_or_several():
    assert RoutingFilter(provider="a") == RoutingFilter(provider=["a", "a"])
    assert RoutingFilter(provider={"b", "a"}).provider == ("a", "b")
    assert RoutingFilter(tier="").tier == ("",)
    assert RoutingFilter(status_code=[500, 200, 500]).status_code == (200, 500)
    assert RoutingFilter(provider=None) == RoutingFilter()
    assert hash(RoutingFilter(tier=["x"])) == hash(RoutingFilter(tier="x"))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"providr": "a"}, "providr.*provider, tier, model"),
        ({"provider": 5}, "provider.*a text"),
        ({"provider": ["a", None]}, "provider.*a text"),
        ({"provider": []}, "provider.*leave the filter out"),
        ({"provider": ["x"] * 1001}, "provider.*1000"),
        ({"status_code": "2xx"}, "status_code.*whole number"),
        ({"status_code": "9" * 30}, "status_code.*whole number"),
        ({"status_code": b"ab"}, "status_code.*whole number"),
        ({"status_code": True}, "status_code"),
        ({"status_code": 2**63}, "64 bits"),
        ({"has_error": "yes"}, "has_error"),
        ({"was_fallback": 2}, "was_fallback.*True or False"),
        ({"min_latency_ms": float("nan")}, "min_latency_ms.*finite"),
        ({"max_cost_usd": "much"}, "max_cost_usd.*finite"),
        ({"max_cost_usd": "inf"}, "max_cost_usd.*finite"),
        ({"max_cost_usd": True}, "max_cost_usd.*finite"),
        ({"min_input_tokens": 5, "max_input_tokens": 4}, "min_input_tokens is greater"),
    ],
)
def test_bad_filters_are_named(values, named):
    with pytest.raises(ValidationError, match=f"(?s){named}"):
        RoutingFilter(**values)
    with pytest.raises(ValidationError):
        RoutingFilter.model_validate(5)


def test_an_argument_wins_over_the_environment_and_that_over_the_default(monkeypatch):
    assert StoreSettings().cache_ttl_s == 5.0
    monkeypatch.setenv("LYNKR_STORE_CACHE_TTL_S", "7")
    monkeypatch.setenv("LYNKR_STORE_URL", "")
    assert StoreSettings().cache_ttl_s == 7.0
    assert StoreSettings().url == "sqlite:///.lynkr/telemetry.db", "an empty value is none"
    assert StoreSettings(cache_ttl_s=9).cache_ttl_s == 9.0
    monkeypatch.setenv("DATABASE_URL", "postgresql://elsewhere/db")
    assert StoreSettings().url == "sqlite:///.lynkr/telemetry.db"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_ttl_s", -1),
        ("cache_ttl_s", float("nan")),
        ("queue_max_rows", 0),
        ("queue_max_bytes", 0),
        ("batch_max_rows", 0),
        ("flush_interval_s", 0),
        ("text_max_chars", -1),
        ("retention_days", 0),
        ("connect_timeout_s", 0),
        ("statement_timeout_s", 0),
        ("unheard_of", 1),
        ("cache_ttl_s", 1e10),
        ("queue_max_rows", 10**10),
        ("queue_max_bytes", 1),
        ("queue_max_bytes", 2_047),
        ("queue_max_bytes", 2**41),
        ("batch_max_rows", 10**10),
        ("spool_max_bytes", 20_480),
        ("spool_max_bytes", 2**63),
        ("spool_after_s", 1e300),
        ("maintenance_interval_s", 1e10),
        ("maintenance_interval_s", 1e-9),
        ("connect_timeout_s", 10**12),
        ("statement_timeout_s", 1e-4),
        ("statement_timeout_s", 1e7),
        *(
            (name, value)
            for name in (
                "cache_ttl_s",
                "flush_interval_s",
                "spool_after_s",
                "retention_days",
                "text_retention_days",
                "rollup_retention_days",
                "maintenance_interval_s",
                "statement_timeout_s",
            )
            for value in (float("inf"), float("nan"))
        ),
    ],
)
def test_bad_options_are_named(name, value):
    with pytest.raises(BadArgument, match=f"^{name}: "):
        StoreSettings(**{name: value})


def test_a_bad_option_of_the_environment_names_its_variable(monkeypatch):
    monkeypatch.setenv("LYNKR_STORE_QUEUE_MAX_ROWS", "s3cret")
    monkeypatch.setenv("LYNKR_STORE_SCHEMA", "pg_s3cret")
    with pytest.raises(BadArgument) as refused:
        StoreSettings(cache_ttl_s=-1)
    words = str(refused.value).split("; ")
    assert [word.partition(":")[0] for word in words] == [
        *("LYNKR_STORE_SCHEMA", "cache_ttl_s", "LYNKR_STORE_QUEUE_MAX_ROWS"),
    ]
    assert "s3cret" not in str(refused.value)
    assert refused.value.__context__ is None


ENDS = {
    "cache_ttl_s": (0, 5e-324, 31_622_400),
    "queue_max_rows": (1, 10**9),
    "queue_max_bytes": (2_048, 2**40),
    "batch_max_rows": (1, 10**9),
    "flush_interval_s": (5e-324, 3_600),
    "text_max_chars": (0, 10**30),
    "spool_max_bytes": (32_768, 2**40),
    "spool_after_s": (0, 31_622_400),
    "retention_days": (5e-324, 36_525),
    "text_retention_days": (5e-324, 36_525),
    "rollup_retention_days": (5e-324, 36_525),
    "maintenance_interval_s": (0.001, 31_622_400),
    "read_connections": (3, 10_000),
    "idle_connection_s": (0.1, 31_622_400),
    "connect_timeout_s": (1, 31_622_400),
    "statement_timeout_s": (0.001, 2_147_483),
}


def test_the_ends_of_every_number_are_known():
    fields = StoreSettings.model_fields.items()
    numbers = {n for n, field in fields if re.search(r"\b(int|float)\b", repr(field.annotation))}
    assert numbers == ENDS.keys()


@pytest.mark.sample(5)
@pytest.mark.parametrize(("name", "value"), [(n, v) for n, ends in ENDS.items() for v in ends])
def test_a_store_works_at_the_ends_of_every_number(tmp_path, name, value):
    options = {"spool_path": tmp_path / "spool.db", name: value}
    settings = StoreSettings(url=f"sqlite:///{tmp_path}/telemetry.db", **options)
    with Store(settings=settings) as store:
        for text in ("a", None):
            assert store.record(provider="p", request_text=text)
            assert store.flush(30)
        store.get_stats()
        store.maintain()
        health = store.health()
        assert (health.written, health.rejected, health.dropped) == (2, 0, 0)
        assert not health.faults_by


def test_postgres_takes_the_largest_timeouts(postgres_url):
    most = {name: ENDS[name][1] for name in ("connect_timeout_s", "statement_timeout_s")}
    with Store(settings=StoreSettings(url=postgres_url, **most)) as store:
        with store.engine.connect() as connection:
            shown = connection.exec_driver_sql("SHOW statement_timeout").scalar_one()
        assert shown == "2147483s"


def test_a_full_small_queue_is_written_before_its_interval(tmp_path):
    settings = StoreSettings(
        url=f"sqlite:///{tmp_path}/telemetry.db", flush_interval_s=3_600, queue_max_rows=10
    )
    with Store(settings=settings) as store:
        store.record(provider="p")
        for _ in range(9):
            store.record(provider="p")
        eventually(lambda: store.health().written >= 10)
    settings = StoreSettings(
        url=f"sqlite:///{tmp_path}/telemetry.db", flush_interval_s=3_600, queue_max_bytes=20_480
    )
    with Store(settings=settings) as store:
        for _ in range(6):
            store.record(provider="p")
        eventually(lambda: store.health().written >= 6)


def test_settings_do_not_show_the_url():
    assert "secret" not in repr(StoreSettings(url="postgresql://u:secret@h/d"))


# -- windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [10**9, 1_750_000_000, 10**10 - 1])
@pytest.mark.parametrize("end", ["since", "until"])
def test_a_window_in_seconds_is_refused_with_the_unit(end, seconds):
    with pytest.raises(ValueError, match="give milliseconds, not seconds"):
        Window(**{end: seconds})


@pytest.mark.parametrize("ms", [-(10**12), 0, 1, 10**9 - 1, 10**10])
def test_other_old_ends_of_a_window_are_taken(ms):
    assert Window(since=ms, until=ms).since_ms == ms


def test_an_old_datetime_is_no_number_of_seconds():
    assert Window(since=datetime(1970, 1, 20, tzinfo=UTC)).since_ms == 19 * 86_400_000


def test_a_window_of_the_time_before_now():
    before = epoch_ms_now()
    window = Window.last(timedelta(hours=6))
    assert before - 6 * 3_600_000 <= window.since_ms <= epoch_ms_now() - 6 * 3_600_000
    assert window.until is None
    for age in (timedelta(-1), 6, None):
        with pytest.raises(BadArgument, match="age: give a timedelta"):
            Window.last(age)


def test_a_spool_path_may_be_a_text(tmp_path):
    settings = StoreSettings(url=f"sqlite:///{tmp_path}/a.db", spool_path=f"{tmp_path}/spool.db")
    with Store(settings=settings) as store:
        assert store.record(provider="p")
        assert store.flush(30)
    assert (tmp_path / "spool.db").exists()
