"""Values of other libraries: what is taken in a record is taken in a question, and as the same."""

import json
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pendulum
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from lynkr_store import Cursor, RoutingEvent, RoutingFilter, Window
from lynkr_store.ingest.batch import BatchBuilder
from lynkr_store.ingest.conversion import prepare
from lynkr_store.ingest.queue import RecordQueue, as_submitted
from lynkr_store.ingest.validation import TextPolicy, rejection_of, row_of
from lynkr_store.schemas import datetime_of
from tests.support.values import (
    AT,
    HOSTILE,
    NOON,
    TABLE,
    Index,
    NamedZone,
    Number,
    OtherInt,
    OtherText,
    OwnArithmetic,
    Plain,
    Tier,
    is_refused,
    named,
    noon,
)

PLAIN = (str, int, float, type(None))


def record_of(field, value):
    return {"provider": "p", field: value}


def written(record):
    """The row that a record becomes by way of the queue, or why it is rejected."""
    intake = RecordQueue(lambda: AT, 10, 10**6, ring=lambda: None, after_close=lambda: True)
    assert intake.submit(dict(record))
    batch = BatchBuilder()
    rejected, _ = prepare(intake.take(10, 10**9).records, batch, TextPolicy(), iter("i").__next__)
    return next(iter(rejected)).cause if rejected else batch.take()[0]


def refusal_of(make):
    with pytest.raises(ValidationError) as refused:
        make()
    return refused.value


@pytest.mark.parametrize("case", TABLE, ids=named)
def test_a_record_takes_a_value_or_names_its_cause(case):
    field, value, wanted = case
    record = record_of(field, value)
    if is_refused(wanted):
        refused = refusal_of(lambda: RoutingEvent(**record))
        assert rejection_of(refused, None).cause == wanted
        assert field in str(refused)
        assert refused.__context__ is None or type(refused.__context__) is RuntimeError
        assert written(record) == wanted
    else:
        row, _ = row_of(record, AT, TextPolicy())
        assert repr(row[field]) == repr(wanted)
        assert type(row[field]) in PLAIN
        found = written(record).get(field)
        assert (found, type(found)) == (wanted, type(wanted))


DIMENSIONS = {
    *("provider", "tier", "model", "session_id", "request_id", "request_type", "routing_method"),
    *("status_code", "was_fallback"),
}
BOUNDED = {"latency_ms", "cost_usd", "quality_score", "input_tokens", "output_tokens"}


def asked(field, value):
    """What a question has of a value, or None where it has no such field."""
    if field in DIMENSIONS:
        found = getattr(RoutingFilter(**{field: value}), field)
        return found[0] if isinstance(found, tuple) else found
    if field in BOUNDED:
        low, high = f"min_{field}", f"max_{field}"
        criteria = RoutingFilter(**{low: value, high: value})
        assert getattr(criteria, low) == getattr(criteria, high)
        return getattr(criteria, low)
    if field == "timestamp":
        until, cursor = Window(until=value).until, Cursor(timestamp=value, id=1)
        assert Window(since=value).since == until == cursor.timestamp
        return until
    return None


ASKED = [case for case in TABLE if case[0] in {*DIMENSIONS, *BOUNDED, "timestamp"}]


@pytest.mark.parametrize("case", ASKED, ids=named)
def test_a_question_takes_what_a_record_takes(case):
    field, value, wanted = case
    if wanted is None:  # NaN and infinities: nothing in a record, and no bound
        assert field in refused_words(field, value)
    elif not is_refused(wanted):
        found = asked(field, value)
        assert found == wanted
        assert type(found) in (str, int, float, bool)
    elif wanted == "out_of_domain":
        return  # whatever may be asked for, there is no such row
    elif value is None or isinstance(value, list):
        return  # not asked; several values
    elif is_of_a_url(field, value):
        return
    elif field == "input_tokens":
        return  # any number is a bound of theirs
    elif not (isinstance(value, np.ndarray) and value.ndim):
        assert ("until" if field == "timestamp" else field) in refused_words(field, value)


def is_of_a_url(field, value):
    """Whether a filter may take a text for a number or a flag, which no record does."""
    return isinstance(value, str) and field in {*BOUNDED, "was_fallback"}


def refused_words(field, value):
    refused = refusal_of(lambda: asked(field, value))
    assert "own" not in str(refused)
    return str(refused)


def test_several_values_are_each_converted():
    several = [OtherText("a"), Tier.SIMPLE, Plain.TEXT]
    assert RoutingFilter(tier=several).tier == ("SIMPLE", "a", "a text")
    assert RoutingFilter(status_code=np.array([503, 200])).status_code == (200, 503)
    assert RoutingFilter(status_code={"404", 200, Decimal(500)}).status_code == (200, 404, 500)
    assert RoutingFilter(status_code="503").status_code == (503,)
    with pytest.raises(ValidationError, match="1000"):
        RoutingFilter(status_code=range(10**9))


FIELDS = ["provider", "request_text", "input_tokens", "status_code", "cost_usd", "stream"]


@pytest.mark.parametrize("field", [*FIELDS, "timestamp", "attributes"])
@pytest.mark.parametrize("kind", HOSTILE, ids=lambda kind: kind.__name__)
def test_a_value_whose_methods_raise_or_lie_is_refused_for_its_type(kind, field):
    if field in ("stream", "attributes") and kind.__name__ == "Bool":
        return  # it passes for one
    for value in (kind(), [kind()], {"nested": kind()}) if field == "attributes" else (kind(),):
        record = record_of(field, value)
        refused = refusal_of(lambda record=record: RoutingEvent(**record))
        assert rejection_of(refused, None).cause == "wrong_type"
        assert written(record) == "wrong_type"


@pytest.mark.parametrize("field", ["provider", "status_code", "min_cost_usd", "has_error"])
@pytest.mark.parametrize("kind", HOSTILE, ids=lambda kind: kind.__name__)
def test_a_question_refuses_it_too(kind, field):
    if kind.__name__ == "Bool" and field == "has_error":
        return
    assert field in str(refusal_of(lambda: RoutingFilter(**{field: kind()})))
    for make in (lambda: Window(since=kind()), lambda: Cursor(timestamp=kind(), id=1)):
        refusal_of(make)
    refusal_of(lambda: Cursor(timestamp=1, id=kind()))


_numbers = (
    st.integers(-(2**70), 2**70)
    | st.floats()
    | st.integers(-(2**15), 2**15).map(float)
    | st.decimals()
    | st.fractions()
    | st.fractions(max_denominator=8)
    | st.integers(-(2**63), 2**63 - 1).map(np.int64)
    | st.floats(width=32).map(np.float32)
    | st.floats().map(np.float64)
    | st.booleans()
    | st.booleans().map(np.bool_)
    | st.integers(-9, 9).map(OtherInt)
    | st.integers(-9, 10**13).map(Index)
    | st.sampled_from([Number.SEVEN, Plain.HALF, Plain.YES])
)
_texts = (
    st.text(st.characters(), max_size=5)
    | st.text("0123456789", max_size=16)
    | st.text().map(OtherText)
    | st.uuids()
    | st.sampled_from([Tier.SIMPLE, Plain.TEXT, "x" * 600])
    | st.binary(max_size=3)
)
_instants = (
    st.datetimes()
    | st.datetimes(timezones=st.timezones())
    | st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat)
    | st.datetimes(datetime(2001, 1, 1), datetime(2090, 1, 1), timezones=st.timezones()).map(  # noqa: DTZ001
        pendulum.instance
    )
    | st.integers(AT, AT + 10**12)
)


@given(st.sampled_from(sorted({*DIMENSIONS, *BOUNDED, "timestamp"})), _numbers | _texts | _instants)
def test_records_and_questions_agree(field, value):
    try:
        event = RoutingEvent(**record_of(field, value))
    except ValidationError as error:
        taken = rejection_of(error, None).cause == "out_of_domain" or "tokens" in field
        if not (taken or is_of_a_url(field, value)):
            refusal_of(lambda: asked(field, value))
        return
    taken = getattr(event, field)
    is_infinite = isinstance(value, float | Decimal) and not np.isfinite(float(value))
    if taken is None or is_infinite:  # no number: it was taken for None, a flag for its default
        refusal_of(lambda: asked(field, value))
    elif field == "timestamp":
        assert Cursor(timestamp=value, id=1).timestamp == taken
        assert Window(since=value).since - taken in (0, 1), "a window's bound is rounded up"
    else:
        assert asked(field, value) == taken


@given(_numbers)
def test_a_number_is_taken_for_what_it_is(value):
    try:
        taken = RoutingEvent(provider="p", cost_usd=value).cost_usd
    except ValidationError:
        return
    if taken is None:
        assert not np.isfinite(float(value))
    elif isinstance(value, Decimal):
        assert taken == float(value)
    elif isinstance(value, Index):
        assert taken == value.number
    elif isinstance(value, OtherInt):
        assert taken == int.__int__(value)
    elif not isinstance(value, Plain):
        assert Fraction(taken) == Fraction(value.item() if isinstance(value, np.generic) else value)


@given(st.datetimes(timezones=st.timezones()))
def test_an_instant_of_any_library_is_the_same_instant(instant):
    wanted = (instant - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    own = OwnArithmetic.combine(instant.date(), instant.timetz()).replace(fold=instant.fold)
    for value in (instant, own, instant.isoformat()):
        assert Cursor(timestamp=value, id=1).timestamp == wanted
    found = datetime_of(own)
    assert type(found) is datetime
    assert found.replace(tzinfo=None) == instant.replace(tzinfo=None, fold=0)
    assert found.utcoffset() == instant.utcoffset()


def test_an_instant_holds_no_zone_of_another_library_in_the_queue():
    intake = RecordQueue(lambda: AT, 10, 10**6, ring=lambda: None, after_close=lambda: True)
    for value in (
        pendulum.datetime(2025, 12, 31, 7, 0, 0, 123_000, tz="America/New_York"),
        noon(OwnArithmetic, NamedZone(), 14),
    ):
        intake.submit({"provider": "p", "timestamp": value})
    for queued in intake.take(10, 10**9).records:
        record, _ = as_submitted(queued)
        assert type(record["timestamp"]) is datetime
        assert record["timestamp"] == noon()


M = 2**63 - 1


@pytest.mark.parametrize(
    ("timestamp", "row_id", "kept"),
    [
        (AT, 1, AT),
        (np.int64(AT), np.int64(1), AT),
        (float(AT), 1.0, AT),
        (AT + 0.5, 1, AT + 0.5),
        (-M, -M, -M),
        (M, M, M),
        (noon(), 1, NOON),
        (noon().isoformat(), Number.SEVEN, NOON),
    ],
)
def test_a_cursor_takes_a_rows_place(timestamp, row_id, kept):
    cursor = Cursor(timestamp=timestamp, id=row_id)
    assert (cursor.timestamp, type(cursor.timestamp)) == (kept, type(kept))
    assert cursor.id == row_id
    assert type(cursor.id) is int
    assert Cursor.parse(str(cursor)) == cursor


@pytest.mark.parametrize(
    ("timestamp", "row_id", "words"),
    [
        (2**63, 1, "timestamp.*64 bits"),
        (10**400, 1, "timestamp.*64 bits"),
        (1e300, 1, "timestamp.*64 bits"),
        (float("nan"), 1, "timestamp.*instant"),
        (float("inf"), 1, "timestamp.*instant"),
        ("abc", 1, "timestamp.*instant"),
        ("5", 1, "timestamp.*instant"),
        (b"x", 1, "timestamp.*instant"),
        (True, 1, "timestamp.*instant"),
        (None, 1, "timestamp.*instant"),
        (noon(zone=None), 1, "timestamp.*naive"),
        (AT, 2**63, "id.*64 bits"),
        (AT, -(10**30), "id.*64 bits"),
        (AT, 1.5, "id.*whole number"),
        (AT, "1", "id.*whole number"),
        (AT, True, "id.*whole number"),
    ],
)
def test_another_cursor_is_refused_when_it_is_made(timestamp, row_id, words):
    with pytest.raises(ValidationError, match=f"(?s){words}"):
        Cursor(timestamp=timestamp, id=row_id)


@pytest.mark.parametrize(
    "text",
    ["9" * 20 + ":1", "1:" + "9" * 20, f"{2**63}:1", "9" * 5_000 + ":1", "1e99:1", "\u0661:1"],
)
def test_a_huge_cursor_in_text_form_is_refused(text):
    with pytest.raises(ValueError, match="its text is <epoch ms>:<id>"):
        Cursor.parse(text)


SAMPLES = {
    "string": "a text",
    "date-time": "2025-12-31T12:00:00.123Z",
    "integer": 5,
    "number": 1.5,
    "boolean": True,
    "null": None,
}


def offered(schema):
    """A value of each kind that a field's JSON schema offers."""
    for one in schema.get("anyOf", [schema]):
        if one.get("type") == "array":
            yield [SAMPLES[one["items"]["type"]]]
        elif "type" in one:
            yield SAMPLES[one.get("format", one["type"])]
            if "maximum" in one:
                yield from (one["maximum"], one["minimum"], float(one["maximum"]))


@pytest.mark.parametrize("model", [RoutingEvent, RoutingFilter, Window, Cursor])
def test_what_the_json_schema_offers_is_taken(model: type[BaseModel]):
    schema = model.model_json_schema()
    least = {"provider": "p", "id": 1, "timestamp": AT}
    least = {name: least[name] for name in schema.get("required", ())}
    kinds = re.findall(r'"date-time"', json.dumps(schema))
    assert kinds or model is RoutingFilter
    for name, field in schema["properties"].items():
        for value in offered(field):
            if name == "timestamp" and value == 5 and model is RoutingEvent:
                continue  # no event of 1970
            model(**least | {name: value})
            model.model_validate_json(json.dumps(least | {name: value}))
