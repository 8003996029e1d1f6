"""A store's metrics, read through the real SDK."""

import asyncio
import gc
import weakref

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from lynkr_store import AsyncStore, BadArgument, Store, StoreSettings
from lynkr_store.integrations.otel import observe
from tests.support.stores import Asynchronous, adds_up, eventually

STATE, CAUSE = "lynkr_store.row.state", "lynkr_store.row.cause"

NOTHING = {(state, None): 0 for state in ("written", "spooled", "pending", "rejected", "dropped")}


@pytest.fixture
def reader():
    return InMemoryMetricReader()


@pytest.fixture
def meter(reader):
    provider = MeterProvider([reader], shutdown_on_exit=False)
    yield provider.get_meter("a host")
    provider.shutdown()


def metrics(reader):
    found = reader.get_metrics_data()
    return {
        metric.name: metric
        for resource in (found.resource_metrics if found else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def rows(reader):
    return {
        (point.attributes[STATE], point.attributes.get(CAUSE)): point.value
        for point in metrics(reader)["lynkr_store.rows"].data.data_points
    }


def of_store(store):
    """The store itself: a test's stand-in of an asynchronous one is no store."""
    return store._store if isinstance(store, Asynchronous) else store


def test_every_record_is_in_one_place(open_store, reader, meter):
    store = open_store(flush_interval_s=3600)
    observe(of_store(store), meter)
    for provider in ("p", "p", 5, None, "p"):
        store.record(provider=provider)
    assert rows(reader) == NOTHING | {("pending", None): 5}
    assert metrics(reader)["lynkr_store.queue.bytes"].data.data_points[0].value > 0
    assert store.flush(30)
    assert rows(reader) == NOTHING | {
        ("written", None): 3,
        ("rejected", "wrong_type"): 1,
        ("rejected", "no_provider"): 1,
    }
    health = store.health()
    assert adds_up(health)
    assert sum(rows(reader).values()) == health.submitted
    assert metrics(reader)["lynkr_store.queue.bytes"].data.data_points[0].value == 0


def test_names_and_units(reader, meter):
    with Store("sqlite://") as store:
        observe(store, meter)
        store.record(provider="p")
        assert store.flush(30)
        found = metrics(reader)
    assert {name: metric.unit for name, metric in found.items()} == {
        "lynkr_store.rows": "{row}",
        "lynkr_store.queue.bytes": "By",
        "lynkr_store.batch.duration": "s",
    }
    assert not found["lynkr_store.rows"].data.is_monotonic
    [point] = found["lynkr_store.batch.duration"].data.data_points
    assert (point.count, dict(point.attributes)) == (1, {})
    assert 0 < point.sum < 60
    assert point.explicit_bounds[0] < 0.01 < point.explicit_bounds[-1]


def test_an_attempt_that_fails_has_its_error(tmp_path, reader, meter):
    settings = StoreSettings(url=f"sqlite:///{tmp_path}/t.db", upgrade_on_open=False)
    with Store(settings=settings) as store:
        observe(store, meter, attributes={"lynkr_store.name": "first"})
        store.record(provider="p")
        assert not store.flush(0)
        eventually(lambda: "lynkr_store.batch.duration" in metrics(reader))
        points = metrics(reader)["lynkr_store.batch.duration"].data.data_points
        assert {point.attributes["lynkr_store.name"] for point in points} == {"first"}
        assert {point.attributes["error.type"] for point in points} == {"SchemaBehind"}
        store.close(0)
    # by "outcome_unknown" if an attempt was under way
    assert sum(count for (state, _), count in rows(reader).items() if state == "dropped") == 1


def test_two_stores_of_one_process(reader, meter):
    with Store("sqlite://") as first, Store("sqlite://") as second:
        for name, store in (("first", first), ("second", second)):
            observe(store, meter, attributes={"store": name})
            store.record(provider="p")
            assert store.flush(30)
        found = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
        written = {
            point.attributes["store"]: point.value
            for metric in found
            if metric.name == "lynkr_store.rows"
            for point in metric.data.data_points
            if point.attributes[STATE] == "written"
        }
    assert written == {"first": 1, "second": 1}


def test_within_a_running_loop(reader, meter):
    async def main():
        async with AsyncStore("sqlite://") as store:
            observe(store, meter)
            store.record(provider="p")
            await store.flush()
            return rows(reader)

    assert asyncio.run(main())["written", None] == 1


def test_a_store_is_not_kept_alive(reader, meter):
    store = Store("sqlite://")
    observe(store, meter)
    assert rows(reader)["written", None] == 0
    gone = weakref.ref(store)
    store.close()
    assert rows(reader)["pending", None] == 0, "a closed store still says"
    del store
    gc.collect()
    assert gone() is None
    assert not metrics(reader)


def test_a_switched_off_store_has_no_rows(reader, meter):
    with Store(settings=StoreSettings(enabled=False)) as store:
        observe(store, meter)
        store.record(provider="p")
        assert set(rows(reader).values()) == {0}


def test_arguments_are_checked(meter):
    with pytest.raises(BadArgument, match="store: give a Store"):
        observe("sqlite://", meter)
    with Store("sqlite://") as store:
        observe(store, meter)
        with pytest.raises(BadArgument, match="reports it already"):
            observe(store, meter)
