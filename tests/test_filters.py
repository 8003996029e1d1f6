"""Filters, windows, settings: bad values are named, with the remedy."""

from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from lynkr_store import RoutingFilter, StoreSettings, Window

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
        ({"provider": []}, "provider.*leave it out"),
        ({"provider": ["x"] * 1001}, "provider.*1000"),
        ({"status_code": "200"}, "status_code.*whole number"),
        ({"status_code": True}, "status_code"),
        ({"status_code": 2**63}, "64 bits"),
        ({"has_error": "yes"}, "has_error"),
        ({"was_fallback": 1}, "was_fallback"),
        ({"min_latency_ms": float("nan")}, "min_latency_ms.*finite"),
        ({"max_cost_usd": "1"}, "max_cost_usd.*finite"),
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
    ],
)
def test_bad_options_are_named(name, value):
    with pytest.raises(ValidationError, match=name):
        StoreSettings(**{name: value})


def test_settings_do_not_show_the_url():
    assert "secret" not in repr(StoreSettings(url="postgresql://u:secret@h/d"))
