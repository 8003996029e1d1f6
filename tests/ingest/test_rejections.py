"""Why a record was rejected: health and the log say it by names and types, never by a value."""

import logging
from decimal import Decimal
from uuid import UUID

import pytest

from lynkr_store import BadArgument, RoutingEvent, RoutingFields, Store, StoreSettings

SECRET = "s3cret"  # noqa: S105 - stands for a text that must not be shown


class Meta(type):
    __name__ = property(lambda _: SECRET)


class Odd(metaclass=Meta):
    def __str__(self):
        return SECRET


REJECTED = [
    ({"modle": SECRET}, ("unknown_name", "modle", "str"), "did you mean model?"),
    ({"tokens_in": 5}, ("unknown_name", "tokens_in", "int"), "did you mean tokens_per_second?"),
    ({f"{SECRET} as a text": 1}, ("unknown_name", None, "int"), None),
    ({"x" * 65: 1}, ("unknown_name", None, "int"), None),
    ({f"{SECRET} {n}": 1 for n in range(300)}, ("unknown_name", None, "int"), None),
    ({"latency_ms": SECRET}, ("wrong_type", "latency_ms", "str"), None),
    ({"latency_ms": Decimal("1e300")}, ("out_of_domain", "latency_ms", "Decimal"), None),
    ({"tier": Odd()}, ("wrong_type", "tier", "Odd"), None),
    ({"tier": b"bytes"}, ("wrong_type", "tier", "bytes"), None),
    ({"timestamp": 5}, ("out_of_domain", "timestamp", "int"), None),
    ({"timestamp": "2026-01-01T12:00"}, ("naive_datetime", "timestamp", "str"), None),
    ({"provider": None}, ("no_provider", "provider", "NoneType"), None),
]


@pytest.fixture
def store():
    with Store("sqlite://") as store:
        yield store


@pytest.mark.parametrize(("fields", "why", "hint"), REJECTED)
def test_health_and_the_log_name_the_cause_the_field_and_the_type(store, caplog, fields, why, hint):
    assert store.record({"provider": "p"} | fields)
    assert store.record({"provider": "p"} | fields)
    assert store.flush(30)
    health = store.health()
    assert dict(health.rejected_by) == {why[0]: 2}
    [rejection] = health.rejections
    cause, field, value_type = why
    many = len(fields) > len(RoutingEvent.model_fields)  # of too many names one stands for all
    assert (rejection.cause, rejection.field) == (cause, field)
    assert rejection.value_type == ("NoneType" if many else value_type)
    assert ("did you mean" in str(rejection)) is (hint is not None)
    assert (hint or "") in str(rejection)
    store.close()
    [line] = [r.getMessage() for r in caplog.records if "was rejected" in r.getMessage()]
    assert str(rejection) in line
    assert "RoutingEvent(**fields)" in line
    assert SECRET not in caplog.text + str(health.model_dump_json())


def test_an_event_that_was_not_checked_says_the_type_it_was_given(store):
    assert store.record(RoutingEvent.model_construct(provider="p", tool_count="many"))
    assert store.flush(30)
    [rejection] = store.health().rejections
    assert str(rejection) == "wrong_type: tool_count (str)"


def test_a_record_without_a_provider_has_no_type(store):
    assert store.record(tier="SIMPLE")
    assert store.flush(30)
    assert str(store.health().rejections[0]) == "no_provider: provider"


def test_the_last_five_of_each_cause_are_kept(store, caplog):
    for number in range(150):
        store.record(provider="p", **{f"name_{number}": 1})
    assert store.flush(30)
    store.record(provider="p", name_147=2)  # again: it is the last one now
    store.record(provider="p", latency_ms="x")
    assert store.flush(30)
    health = store.health()
    assert dict(health.rejected_by) == {"unknown_name": 151, "wrong_type": 1}
    assert [rejection.field for rejection in health.rejections] == [
        *("name_145", "name_146", "name_148", "name_149", "name_147"),
        "latency_ms",
    ]
    store.close()
    assert sum("was rejected" in record.getMessage() for record in caplog.records) == 100


def test_what_was_logged_once_is_not_logged_again(store, caplog):
    for _ in range(3):
        store.record(provider="p", modle="m")
        assert store.flush(30)
    store.close()
    assert caplog.text.count("modle") == 1


def test_a_log_handler_may_ask_for_health(store):
    asked = []

    class Asks(logging.Handler):
        def emit(self, _):
            asked.append(store.health().rejections)

    logger, handler = logging.getLogger("lynkr_store"), Asks()
    logger.addHandler(handler)
    try:
        store.record(provider="p", modle="m")
        assert store.flush(30)
        store.close()
    finally:
        logger.removeHandler(handler)
    assert asked
    assert asked[0][0].field == "modle"


# -- strict ----------------------------------------------------------------------------------------


@pytest.fixture
def strict():
    with Store("sqlite://", settings=StoreSettings(strict=True)) as store:
        yield store


@pytest.mark.parametrize(("fields", "why", "hint"), REJECTED)
def test_a_strict_store_raises_at_the_call(strict, fields, why, hint):
    field = why[1]
    with pytest.raises(BadArgument, match=f"{field}: " if field else "record: ") as refused:
        strict.record({"provider": "p"} | fields)
    assert (hint or "") in str(refused.value)
    assert refused.value.__cause__ is None
    assert strict.health().submitted == 0


def test_a_strict_store_names_every_error(strict):
    with pytest.raises(BadArgument, match="latency_ms: give a number; cost_usd: give a number"):
        strict.record(provider="p", latency_ms="x", cost_usd="y")


@pytest.mark.parametrize("record", [5, [1], RoutingEvent.model_construct(provider=5)], ids=repr)
def test_a_strict_store_refuses_what_is_no_record(strict, record):
    with pytest.raises(BadArgument, match="record: "):
        strict.record(record)


def test_a_strict_store_stores_what_is_valid(strict):
    assert strict.record(provider="p", request_id=UUID(int=5), cost_usd=Decimal("0.1"))
    assert strict.record(RoutingEvent(provider="p"), tier="SIMPLE")
    assert strict.record({"provider": "p"})
    assert strict.flush(30)
    assert strict.health().written == 3


def test_the_typed_keywords_are_the_fields_of_the_event():
    assert list(RoutingFields.__annotations__) == list(RoutingEvent.model_fields)
