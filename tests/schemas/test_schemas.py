"""What goes in and what comes out, without a database."""

import copy
import itertools
import json
import math
import pickle
import uuid
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lynkr_store import Cursor, RoutingEvent, RoutingRow, RoutingRowBrief, RoutingStats
from lynkr_store.db.models import TELEMETRY
from lynkr_store.ingest.validation import TextPolicy, new_ids, rejection_of, row_of
from lynkr_store.schemas import Reading, epoch_ms, utc
from lynkr_store.schemas.base import construct_all
from lynkr_store.schemas.units import half_up
from lynkr_store.testing import EventFactory, RecordFactory

NOW = 1_750_000_000_000


def test_new_ids_are_random_uuids():
    found = [uuid.UUID(text) for text in itertools.islice(new_ids(), 200)]
    assert len(set(found)) == 200
    assert {(one.version, one.variant) for one in found} == {(4, uuid.RFC_4122)}


def test_an_event_has_a_field_for_every_column():
    assert set(RoutingEvent.model_fields) == set(TELEMETRY.c.keys()) - {"id"}
    assert list(RoutingEvent.model_fields) == TELEMETRY.c.keys()[1:], "in the table's order"
    assert set(RoutingRow.model_fields) == {*TELEMETRY.c.keys(), "cursor"}
    assert set(RoutingRow.model_fields) - set(RoutingRowBrief.model_fields) == {
        "request_text",
        "response_text",
    }


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("tool_count", [0, -5, 10**12, None]),
        ("latency_ms", [0, 1.5, -1, 10**9, None]),
        ("cost_usd", [0, -1e6, 1e6, None]),
        ("quality_score", [1e9, 50, None]),
        ("timestamp", [946_684_800_000, 4_102_444_799_999, None]),
        ("stream", [True, False, 0, 1, None]),
        ("provider", ["", "größe", "x" * 512]),
    ],
)
def test_values_of_the_domain_are_taken(field, values):
    for value in values:
        assert getattr(RoutingEvent(**{"provider": "p", field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "cause"),
    [
        ("tool_count", 10**12 + 1, "out_of_domain"),
        ("tool_count", 1.5, "wrong_type"),
        ("tool_count", True, "wrong_type"),
        ("tool_count", "1", "wrong_type"),
        ("latency_ms", 1e9 + 1, "out_of_domain"),
        ("latency_ms", "1", "wrong_type"),
        ("latency_ms", True, "wrong_type"),
        ("cost_usd", -1e6 - 1, "out_of_domain"),
        ("quality_score", 1e10, "out_of_domain"),
        ("ttft_ms", 1e10, "out_of_domain"),
        ("timestamp", 946_684_799_999, "out_of_domain"),
        ("timestamp", 4_102_444_800_000, "out_of_domain"),
        ("timestamp", datetime(1999, 1, 1, tzinfo=UTC), "out_of_domain"),
        ("timestamp", datetime(2026, 1, 1), "naive_datetime"),  # noqa: DTZ001
        ("timestamp", 10**30, "wrong_type"),
        ("timestamp", 1.75e12 + 0.5, "wrong_type"),
        ("timestamp", "2026-01-01", "wrong_type"),
        ("timestamp", True, "wrong_type"),
        ("was_fallback", 2, "wrong_type"),
        ("was_fallback", "yes", "wrong_type"),
        ("stream", "yes", "wrong_type"),
        ("provider", None, "no_provider"),
        ("provider", 5, "wrong_type"),
        ("tier", b"SIMPLE", "wrong_type"),
        ("candidates", {1, 2}, "wrong_type"),
        ("attributes", {"a": object()}, "wrong_type"),
        ("attributes", 5, "wrong_type"),
        ("unheard_of", 1, "unknown_name"),
    ],
)
def test_others_are_refused_with_their_cause_and_without_their_value(field, value, cause):
    with pytest.raises(ValidationError) as refused:
        RoutingEvent(**({"provider": "p"} | {field: value, "request_text": "secret"}))
    assert rejection_of(refused.value, None).cause == cause
    assert field in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_missing_provider_has_a_cause_of_its_own():
    with pytest.raises(ValidationError) as refused:
        RoutingEvent(tier="SIMPLE")
    assert rejection_of(refused.value, None).cause == "no_provider"
    with pytest.raises(ValidationError):
        RoutingEvent.model_validate(5)


def test_json_fields_are_text_and_take_values():
    event = RoutingEvent(
        provider="p",
        candidates=[{"a": float("nan")}, ("é", None)],
        attributes='{"kept": "as it is',
        cache_decision={"n\0ul": "\ud800"},
    )
    assert json.loads(event.candidates) == [{"a": None}, ["é", None]]
    assert event.attributes == '{"kept": "as it is'
    assert event.cache_decision == '{"n\\u0000ul":"\ufffd"}'


def test_sanitizing_names_each_cause():
    event = RoutingEvent(
        provider="a\0", tier="\udfff", latency_ms=math.inf, cost_usd=math.nan, model="m" * 513
    )
    assert (event.provider, event.tier, event.latency_ms, event.cost_usd) == (
        "a\ufffd",
        "\ufffd",
        None,
        None,
    )
    assert event.mended == ("nul", "surrogate", "not_finite", "not_finite", "cut")
    assert EventFactory().mended == ()
    assert RoutingEvent(provider="p", request_text="t" * 9999).mended == ()


def test_events_are_frozen():
    with pytest.raises(ValidationError):
        EventFactory().tier = "x"
    assert EventFactory(timestamp=NOW) == EventFactory(timestamp=NOW)


def test_rows_are_completed_and_texts_cut():
    row, mended = row_of({"provider": "p", "request_text": "abcé🚀"}, NOW, TextPolicy(max_chars=4))
    assert row["timestamp"] == NOW
    assert len(row["request_id"]) == 36
    assert row["request_text"] == "abcé"
    assert mended == ("cut",)
    row, mended = row_of(RecordFactory(), NOW, TextPolicy(capture=False))
    assert row["request_text"] is row["response_text"] is None
    assert mended == ()


@pytest.mark.parametrize("model", [RoutingRow, RoutingRowBrief])
def test_instances_made_at_once_are_those_that_pydantic_constructs(model):
    values = [dict.fromkeys(model.model_fields, n) for n in range(3)]
    made = construct_all(model, [dict(each) for each in values])
    expected = [model.model_construct(**each) for each in values]
    assert made == expected
    for one, other in zip(made, expected, strict=True):
        assert one.model_fields_set == other.model_fields_set
        assert (one.model_extra, one.__pydantic_private__) == (
            other.model_extra,
            other.__pydantic_private__,
        )
        assert one.model_copy() == other.model_copy()
        assert pickle.loads(pickle.dumps(one)) == other  # noqa: S301 - our own


def test_instants():
    assert epoch_ms(datetime(1970, 1, 1, tzinfo=UTC)) == 0
    east = timezone(timedelta(hours=5, minutes=30))
    assert epoch_ms(datetime(1970, 1, 1, 5, 30, tzinfo=east)) == 0
    part = datetime(1970, 1, 1, 0, 0, 0, 1500, tzinfo=UTC)
    assert (epoch_ms(part), epoch_ms(part, round_up=True)) == (1, 2)
    whole = datetime(1970, 1, 1, 0, 0, 0, 2000, tzinfo=UTC)
    assert epoch_ms(whole, round_up=True) == 2
    for bad in (None, 1.5, "1", True, 2**63):
        with pytest.raises(ValueError, match="instant"):
            epoch_ms(bad)


@given(st.datetimes(timezones=st.just(UTC)))
def test_instants_go_in_and_out(instant):
    ms = epoch_ms(instant)
    assert timedelta() <= instant - utc(ms) < timedelta(milliseconds=1)


@given(st.integers(-(10**18), 10**18), st.integers(1, 10**12), st.integers(0, 4))
def test_rounding_is_half_up_on_the_exact_fraction(numerator, denominator, digits):
    unit = 10**digits
    scaled = half_up(numerator, denominator, digits) * unit
    assert abs(scaled * denominator - numerator * unit) <= denominator / 2 + abs(scaled) * 1e-15 * (
        denominator
    )


@pytest.mark.parametrize(
    ("numerator", "denominator", "digits", "wanted"),
    [
        (1, 2, 0, 1),
        (-1, 2, 0, 0),
        (-3, 2, 0, -1),
        (25, 1000, 2, 0.03),
        (5, 100, 1, 0.1),
        (0, 7, 4, 0),
    ],
)
def test_ties_go_up(numerator, denominator, digits, wanted):
    assert half_up(numerator, denominator, digits) == wanted


READ = [
    ("number", 5, 5, 0),
    ("number", 79.5, 79.5, 0),
    ("number", None, None, 0),
    ("number", "12", 12, 0),
    ("number", " -1.5e1 ", -15, 0),
    ("number", "1.25", 1.25, 0),
    ("number", "1_0", None, 1),
    ("number", "nan", None, 1),
    ("number", "٣", None, 1),
    ("number", "1e999", None, 1),
    ("number", "", None, 1),
    ("number", b"12", None, 1),
    ("number", math.inf, None, 1),
    ("text", "a", "a", 0),
    ("text", None, None, 0),
    ("text", b"a\xff", "a\ufffd", 0),
    ("text", 5, "5", 0),
    ("flag", 1, True, 0),
    ("flag", 0, False, 0),
    ("flag", None, None, 0),
    ("flag", 2, None, 1),
    ("flag", "yes", None, 1),
    ("instant", 0, utc(0), 0),
    ("instant", utc(5), utc(5), 0),
    ("instant", 1.5, utc(1), 0),
    ("instant", "7", utc(7), 0),
    ("instant", NOW * 1000, None, 1),
    ("instant", "soon", None, 1),
]


@pytest.mark.parametrize(("kind", "stored", "wanted", "unreadable"), READ)
def test_stored_values_are_read_by_their_columns_meaning(kind, stored, wanted, unreadable):
    reading = Reading()
    assert getattr(reading, kind)(stored) == wanted
    assert reading.unreadable == unreadable


def stored(**values):
    row = dict.fromkeys(TELEMETRY.c.keys()) | {"id": 7, "timestamp": NOW, "provider": "p"} | values
    (read,) = RoutingRow.from_stored(tuple(row), [tuple(row.values())], Reading())
    return read


def test_a_rows_cursor_has_the_stored_timestamp_as_it_is():
    assert stored().cursor == Cursor(timestamp=NOW, id=7)
    assert stored(timestamp="odd").cursor.timestamp == "odd"
    row = stored()
    assert row.model_dump(mode="json")["cursor"] == str(row.cursor)
    for again in (
        RoutingRow.model_validate_json(row.model_dump_json()),
        RoutingRow(**row.model_dump(mode="json")),
        RoutingRow(**row.model_dump()),
    ):
        assert again == row
        assert again.cursor == row.cursor


@pytest.mark.parametrize("text", ["", "5", "a:b", "1:2:3x", ":"])
def test_a_bad_cursor_is_named(text):
    with pytest.raises(ValueError, match="cursor"):
        Cursor.parse(text)


def test_results_pickle_copy_hash_and_ignore_what_a_newer_release_adds():
    stats = RoutingStats(
        total_requests=1,
        avg_latency_by_provider={"b": 1, "a": 2},
        avg_quality_by_tier={},
        error_rate=0.0,
        over_provisioned_pct=0.0,
        under_provisioned_pct=0.0,
        requests_by_provider={"a": 1},
        requests_by_tier={},
        total_cost=None,
        unpriced_requests=1,
        added_later=5,
    )
    assert list(stats.avg_latency_by_provider) == ["a", "b"]
    assert pickle.loads(pickle.dumps(stats)) == copy.deepcopy(stats) == stats  # noqa: S301
    assert hash(stats) == hash(copy.deepcopy(stats))
    assert json.loads(stats.model_dump_json())["avg_latency_by_provider"] == {"a": 2, "b": 1}
    assert type(stats.to_gateway()["avgLatencyByProvider"]) is dict
    assert pickle.loads(pickle.dumps(stored())) == stored()  # noqa: S301


def test_an_unknown_name_is_answered_by_a_similar_one():
    with pytest.raises(ValidationError) as refused:
        RoutingEvent(modle="s3cret", latency_ms="fast", **{"x" * 100_000: 1})
    said = {error["loc"][0]: (error["type"], error["msg"]) for error in refused.value.errors()}
    assert said["modle"] == ("extra_forbidden", "a record has no such field; did you mean model?")
    assert said["latency_ms"] == ("wrong_type", "give a number")
    assert said["x" * 100_000] == ("extra_forbidden", "a record has no such field")
    assert said["provider"][0] == "missing"
    assert "s3cret" not in str(refused.value)
