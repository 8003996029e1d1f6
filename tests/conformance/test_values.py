"""Values of other libraries, by every way in and in every question, on every backend."""

from collections import Counter

import pytest
from sqlalchemy.orm import Session

from lynkr_store import (
    BadArgument,
    Cursor,
    RoutingEvent,
    RoutingFilter,
    RoutingRepository,
    Window,
    writing,
)
from lynkr_store.ingest.validation import rejection_of
from tests.support.stores import adds_up
from tests.support.values import AT, NOON, TABLE, Tier, is_refused

GOOD = [case for case in TABLE if not is_refused(case[2])]
BAD = [case for case in TABLE if is_refused(case[2])]


def record_of(number, field, value):
    return {"provider": "p", "timestamp": AT + number, "request_id": str(number)} | {field: value}


def in_repository(store, record):
    with Session(writing(store._database.engine)) as session, session.begin():
        RoutingRepository(session).add_many([record])


WAYS = {
    "record, by name": lambda store, record: store.record(**record),
    "record, a mapping": lambda store, record: store.record(record),
    "record, an event": lambda store, record: store.record(RoutingEvent(**record)),
    "record, an event not checked": lambda store, record: store.record(
        RoutingEvent(provider="p").model_copy(update=record)
    ),
    "add_many": lambda store, record: store.add_many([record]),
    "add_many, an event": lambda store, record: store.add_many([RoutingEvent(**record)]),
    "a Session's": in_repository,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_stores_the_same(open_store, way):
    store = open_store()
    store.query()
    causes = Counter()
    for number, (field, value, _) in enumerate(GOOD):
        WAYS[way](store, record_of(number, field, value))
    for number, (field, value, cause) in enumerate(BAD):
        if way.startswith("record") and way != "record, an event":
            assert WAYS[way](store, record_of(number, field, value)) is True
            causes[cause] += 1
        else:
            with pytest.raises(ValueError) as refused:  # noqa: PT011 - looked at below
                WAYS[way](store, record_of(number, field, value))
            if way.endswith("an event"):
                assert rejection_of(refused.value, None).cause == cause
            else:
                assert isinstance(refused.value, BadArgument)
                assert f"({cause}: {field}" in str(refused.value)
    assert store.flush(60)
    health = store.health()
    assert adds_up(health)
    assert Counter(health.rejected_by) == causes
    assert not health.faults_by
    rows = sorted(store.query(limit=1000), key=lambda row: row.id)
    for row, (field, value, wanted) in zip(rows, GOOD, strict=True):
        found = row.cursor.timestamp if field == "timestamp" else getattr(row, field)
        assert (found, type(found)) == (wanted, type(found)), (field, type(value))


def ids(rows):
    return {row.request_id for row in rows}


def test_a_question_finds_what_was_recorded_with_the_same_value(open_store):
    store = open_store()
    cases = {str(n): case for n, case in enumerate(GOOD) if case[0] != "request_id"}
    for number, (field, value, _) in cases.items():
        assert store.record(record_of(int(number), field, value))
    assert store.flush(60)
    several = Counter((field, repr(wanted)) for field, _, wanted in cases.values())
    for number, (field, value, wanted) in cases.items():
        alike = several[field, repr(wanted)]
        if field == "timestamp":
            assert len(store.query(window=Window(since=value, until=NOON + 1))) == alike
            assert number not in ids(store.query(window=Window(until=value), limit=1000))
            assert number not in ids(store.query(before=Cursor(timestamp=value, id=0), limit=1000))
            continue
        if wanted is None:
            continue
        if field in RoutingFilter.model_fields:
            rows = store.query(RoutingFilter(**{field: value}), limit=1000)
        elif f"min_{field}" in RoutingFilter.model_fields:
            bounds = {f"min_{field}": value, f"max_{field}": value}
            rows = store.query(RoutingFilter(**bounds), limit=1000)
        else:
            continue
        assert number in ids(rows), (field, type(value))
        if field == "provider":
            stats = store.get_provider_stats(value, Window(since=AT, until=AT + 1000))
            assert stats.total == alike


def test_a_question_about_a_provider_is_one_whatever_the_class_of_its_name(open_store):
    store = open_store()
    store.record(provider="SIMPLE")
    assert store.flush(30)
    first = store.get_provider_stats("SIMPLE")
    assert store.get_provider_stats(Tier.SIMPLE) is first, "it was kept"
