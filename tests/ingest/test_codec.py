"""Records that need no mending, checked while they are unpacked; and those that do, among them."""

import math
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from itertools import count

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ormsgpack import packb
from pydantic import ValidationError

from lynkr_store import RoutingEvent
from lynkr_store.ingest.batch import BatchBuilder
from lynkr_store.ingest.codec import AS_IT_IS, STAMP, packable, plain_columns
from lynkr_store.ingest.conversion import columns_of
from lynkr_store.ingest.queue import RecordQueue
from lynkr_store.ingest.validation import TextPolicy, rejection_of, row_of
from lynkr_store.schemas import FLAG_FIELDS, TEXT_FIELDS
from lynkr_store.testing import EventFactory, RecordFactory

NOW = 1_750_000_000_000

_EDGES = (1, 10**6, 10**9, 10**12, 946_684_800_000, 4_102_444_800_000, 2**53, 2**63, 2**64 - 1)
_TEXTS = [
    *(
        "",
        "p",
        "a\0",
        "\0",
        "\ud800",
        "e\ud800",
        "\n",
        "\ufffd",
        "é🚀",
        "{}",
        "1",
        '{"k": "\0"}',
        "é\0",
    ),
    *(what * length for what in ("x", "🚀", "\0") for length in (512, 513)),
]
_NUMBERS = [
    *(sign * (edge + d) for edge in _EDGES for d in (-1, 0, 1) for sign in (1, -1)),
    *(0.5, -0.0, 1.0, 1e6 + 0.5, 1e9 + 0.5, 1e300, 5e-324, math.nan, math.inf, -math.inf),
]
_OTHERS = [
    *(
        None,
        True,
        False,
        b"",
        b"x",
        [],
        {},
        [1, 0.1, "é\n\x7f", None],
        {"a": {"b": [True]}},
        [[math.nan]],
    ),
    *({"a": math.inf}, {"a\0": "\0"}, ["\ud800"], {"a": b""}, {"a": 1e16, "b": 1e-5}, ["1"]),
    datetime(2025, 1, 1),  # noqa: DTZ001
    *(datetime(year, 1, 1, tzinfo=UTC) for year in (1999, 2000, 2099, 2100)),
    datetime(2025, 1, 1, microsecond=1_999, tzinfo=timezone(timedelta(hours=-7))),
]


def packed(record):
    """As the queue holds it; None where it is not packed."""
    record = record | ({} if record.get("timestamp") is not None else {STAMP: NOW})
    texts = [record.pop(name, None) for name in TEXT_FIELDS]
    try:
        return packb(record, packable, AS_IT_IS), *texts
    except (TypeError, ValueError, RecursionError):
        return None


def plain_row(record):
    """The record's row, where it needs no mending."""
    one = packed(record)
    columns, others = plain_columns([one]) if one else ({}, [0])
    assert others == ([] if columns else [0])
    return {name: column[0] for name, column in columns.items()}


_WHOLE = [n for n, f in RoutingEvent.model_fields.items() if f.annotation in (int, int | None)]


def is_converted(name, value):
    """Whether it is of another type than its field has, so that an event converts it."""
    if type(value) is str:
        return name in ("timestamp", "status_code")
    return type(value) is float and name in (*_WHOLE, *FLAG_FIELDS, "timestamp")


def check_both_ways(record):
    """Say whether it is plain; if so it must be the very row that an event makes."""
    row = plain_row(record)
    try:
        event = RoutingEvent.model_validate(record)
    except ValidationError:
        assert not row, ascii(record)
        return False
    if event.mended or any(is_converted(name, value) for name, value in record.items()):
        assert not row, ascii(record)
    else:
        stored = {n: int(v) if type(v) is bool else v for n, v in vars(event).items()}
        if stored["timestamp"] is None:
            stored["timestamp"] = NOW
        assert repr(row) == repr(stored), f"value, type and order: {record!a}"
    return bool(row)


@pytest.mark.parametrize("field", RoutingEvent.model_fields)
def test_every_odd_value_of_a_field_is_the_same_both_ways(field):
    taken = [
        check_both_ways({"provider": "p", field: value}) for value in _TEXTS + _NUMBERS + _OTHERS
    ]
    assert set(taken) == {True, False}


_text = st.text(st.characters(), max_size=6) | st.sampled_from(_TEXTS)
_nested = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def _records(draw):
    """Records as they are unpacked: a good one, of whose values some are replaced."""
    record = RecordFactory(stream=True, retry_count=1, attributes=draw(_nested))
    for name in draw(st.sets(st.sampled_from(list(RoutingEvent.model_fields)), max_size=3)):
        record[name] = draw(_nested | st.sampled_from(_OTHERS + _NUMBERS))
    for name in draw(st.sets(st.sampled_from([*record, "nonsense"]), max_size=3)):
        if record.pop(name, None) is None:
            record[name] = 1
    return record


@settings(max_examples=100)
@given(_records())
@example(RecordFactory(attributes={"region": "eu", "tags": ["a", 0.1, None, {"é": True}]}))
def test_a_record_that_needs_no_sanitizing_is_the_same_row_both_ways(record):
    check_both_ways(record)


@pytest.mark.parametrize(("depth", "good"), [(100, True), (1_000, False)])
def test_containers_nested_too_deep_for_json_are_refused_both_ways(depth, good):
    nested = []
    for _ in range(depth):
        nested = [nested]
    assert check_both_ways({"provider": "p", "attributes": nested}) is good


class Subclass(str):
    __slots__ = ()


_records_of_all_kinds = st.lists(
    _records()
    | st.builds(RecordFactory)
    | st.builds(EventFactory)
    | st.sampled_from(
        [
            {},
            {"provider": "p"},
            {"provider": Subclass("p"), "response_text": Subclass("t")},
            {"provider": "p", "tier": "\ud800", "attributes": (1, 2)},
            {"provider": "p", "request_text": "a\0", "candidates": [math.nan]},
            {"provider": "p", "request_text": "x" * 9, "response_text": "y" * 8, "nonsense": 1},
        ]
    ),
    max_size=12,
)


@settings(max_examples=100)
@given(_records_of_all_kinds, st.booleans(), st.sampled_from([None, str.upper, {}.__getitem__]))
def test_records_together_are_the_rows_that_each_makes_alone(records, capture, redact):
    policy = TextPolicy(capture=capture, max_chars=8, redact=redact)
    wanted, rejected, mended = [], Counter(), Counter()
    for record in records:
        try:
            row, causes = row_of(record, NOW, policy)
        except ValidationError as error:
            rejected[rejection_of(error, record)] += 1
        else:
            wanted.append({name: value for name, value in row.items() if value is not None})
            mended.update(causes)
    intake = RecordQueue(lambda: NOW, 10**6, 10**9, ring=lambda: None, after_close=lambda: True)
    for record in records:
        intake.submit(dict(record) if isinstance(record, dict) else record)
    found = Counter(), Counter()
    ids = map("id {}".format, count())
    gathering = BatchBuilder()
    taken = intake.take(10**6, 10**9).records
    for some in (taken[:5], taken[5:]):
        if some:
            gathering.add(columns_of(some, policy, ids.__next__, *found))
    rows = [{n: v for n, v in row.items() if v is not None} for row in gathering.take()]
    named = map("id {}".format, count())
    for row, alone in zip(rows, wanted, strict=True):
        if row["request_id"] != alone["request_id"]:
            alone["request_id"] = next(named)
        assert row == alone
    assert found == (rejected, mended)
