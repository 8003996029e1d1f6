"""Pins the public types: mypy checks this file, nothing runs it."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, assert_type
from uuid import uuid4

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from lynkr_store import (
    AsyncStore,
    AsyncStoreProtocol,
    Cursor,
    Health,
    MaintenanceReport,
    ProviderStats,
    Recorder,
    RoutingAccuracy,
    RoutingEvent,
    RoutingFilter,
    RoutingRepository,
    RoutingRow,
    RoutingRowBrief,
    RoutingStats,
    Store,
    StoreProtocol,
    StoreSettings,
    TextPolicy,
    Window,
)


def inputs() -> None:
    Window(since=datetime.now(UTC), until=1_750_000_000_000)
    RoutingFilter(provider="a", tier=["SIMPLE", "MEDIUM"], model={"m"}, status_code=(200, 503))
    RoutingFilter(has_error=True, min_latency_ms=5, max_cost_usd=0.5)
    RoutingEvent(provider="p", timestamp=datetime.now(UTC), candidates=[{"a": 1}], latency_ms=5)
    StoreSettings(url="sqlite://", cache_ttl_s=0)


def sync(store: Store, session: Session) -> None:
    assert_type(store.record(provider="p"), bool)
    assert_type(store.record({"provider": "p"}, tier="SIMPLE"), bool)
    store.record(provider=uuid4(), cost_usd=Decimal("0.1"), status_code="200", timestamp=5)
    store.record(provider="p", modle="m")  # type: ignore[call-arg]
    store.record(provider="p", latency_ms="fast")  # type: ignore[arg-type]
    fields: dict[str, Any] = {"provider": "p"}
    store.record(**fields)
    assert_type(store.flush(1.0), bool)
    assert_type(store.query(), list[RoutingRow])
    assert_type(store.query(include_text=False), list[RoutingRowBrief])
    assert_type(store.query(include_text=bool(store.flush())), Sequence[RoutingRowBrief])
    assert_type(store.query(limit=1)[0].cursor, Cursor)
    assert_type(store.iter_records(), Iterator[RoutingRow])
    assert_type(store.get_stats(), RoutingStats | None)
    assert_type(store.get_stats(Window()), RoutingStats | None)
    assert_type(store.get_provider_stats("p", Window()), ProviderStats | None)
    assert_type(store.get_routing_accuracy(), RoutingAccuracy | None)
    assert_type(store.add_many([{"provider": "p"}, RoutingEvent(provider="p")]), int)
    assert_type(store.cleanup(timedelta(days=1)), int)
    assert_type(store.cleanup(timedelta(days=1), trust_clock=True), int)
    assert_type(store.maintain(trust_clock=True), MaintenanceReport)
    assert_type(store.maintain().retention_waits, str | None)
    assert_type(store.health(), Health)
    assert_type(store.engine, Engine)
    with Store() as opened:
        assert_type(opened, Store)
    repository = RoutingRepository(session)
    assert_type(repository.query(), list[RoutingRow])
    assert_type(repository.query(include_text=False), list[RoutingRowBrief])
    assert_type(repository.get_stats(), RoutingStats | None)
    RoutingRepository(session, policy=TextPolicy(capture=False, max_chars=5, redact=str.upper))


def protocols(store: Store, later: AsyncStore) -> None:
    """A store is what each protocol says, with the same types."""
    recorders: list[Recorder] = [store, later]
    recorders[0].record(provider="p", modle="m")  # type: ignore[call-arg]
    one: StoreProtocol = store
    assert_type(one.query(), list[RoutingRow])
    assert_type(one.query(include_text=bool(one.flush())), Sequence[RoutingRowBrief])
    assert_type(one.get_stats(Window()), RoutingStats | None)
    other: AsyncStoreProtocol = later
    assert_type(other.iter_records(), AsyncIterator[RoutingRow])


async def asynchronous(store: AsyncStore) -> None:
    assert_type(store.record(provider="p"), bool)
    assert_type(await store.flush(1.0), bool)
    assert_type(await store.query(), list[RoutingRow])
    assert_type(await store.query(include_text=False), list[RoutingRowBrief])
    assert_type(store.iter_records(), AsyncIterator[RoutingRow])
    assert_type(await store.get_stats(), RoutingStats | None)
    assert_type(await store.get_provider_stats("p"), ProviderStats | None)
    assert_type(await store.get_routing_accuracy(Window()), RoutingAccuracy | None)
    assert_type(await store.add_many([]), int)
    assert_type(await store.cleanup(), int)
    assert_type(await store.cleanup(trust_clock=True), int)
    assert_type(await store.maintain(trust_clock=True), MaintenanceReport)
    assert_type(await store.health(), Health)
    async with AsyncStore() as opened:
        assert_type(opened, AsyncStore)


def outputs(stats: RoutingStats, row: RoutingRow) -> None:
    assert_type(stats.avg_latency_by_provider, Mapping[str, int])
    assert_type(stats.total_cost, float | None)
    assert_type(row.timestamp, datetime | None)
    assert_type(row.latency_ms, int | float | None)
    assert_type(row.was_fallback, bool | None)
    assert_type(row.request_text, str | None)
