"""A service that checks its database at start-up, and a store that only reads."""

import asyncio
import time

import pytest
from sqlalchemy import text

from lynkr_store import (
    AsyncStore,
    BadArgument,
    SchemaBehind,
    SchemaError,
    Store,
    StoreClosed,
    StoreSettings,
    StoreUnavailable,
    create_store_engine,
    upgrade,
)
from tests.conftest import BACKENDS, ON_DISK

SYNC_AND_ASYNC = pytest.mark.parametrize("kind", [Store, AsyncStore])


def called(kind, name, *arguments, url, read_only=False, **options):
    """What a method of a new store answers."""
    settings = StoreSettings(url=url, **options)
    if kind is Store:
        with Store(settings=settings, read_only=read_only) as store:
            return getattr(store, name)(*arguments)

    async def call():
        async with AsyncStore(settings=settings, read_only=read_only) as store:
            return await getattr(store, name)(*arguments)

    return asyncio.run(call())


def reaches(kind, url, *, read_only=False):
    """What `health` says first of a database that was checked."""
    settings = StoreSettings(url=url)
    if kind is Store:
        with Store(settings=settings, read_only=read_only) as store:
            store.check()
            return store.health().reachable

    async def look():
        async with AsyncStore(settings=settings, read_only=read_only) as store:
            await store.check()
            return (await store.health()).reachable

    return asyncio.run(look())


@SYNC_AND_ASYNC
def test_check_makes_the_database_where_its_first_use_would(kind, tmp_path):
    url = f"sqlite:///{tmp_path}/telemetry.db"
    called(kind, "check", url=url)
    engine = create_store_engine(url)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM routing_telemetry")) == 0
    engine.dispose()


@SYNC_AND_ASYNC
@pytest.mark.parametrize("backend", ON_DISK)
def test_check_refuses_a_schema_that_is_missing_or_lacks_a_table(kind, backend, new_url):
    url = new_url(backend)
    options = {"upgrade_on_open": False}
    with pytest.raises(SchemaBehind, match="run lynkr-store upgrade"):
        called(kind, "check", url=url, **options)
    upgrade(url)
    called(kind, "check", url=url, **options)
    engine = create_store_engine(url)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE routing_rollups"))
    engine.dispose()
    with pytest.raises(SchemaError, match="routing_rollups"):
        called(kind, "check", url=url, **options)


@SYNC_AND_ASYNC
def test_check_says_that_nothing_answers(kind, tmp_path):
    (tmp_path / "no.db").write_text("this is no database, but long enough to be read as one" * 9)
    with pytest.raises(StoreUnavailable, match="not an SQLite database"):
        called(kind, "check", url=f"sqlite:///{tmp_path}/no.db")
    with pytest.raises(StoreUnavailable, match="check the URL"):
        called(kind, "check", url=f"postgresql:///d?host={tmp_path}")


@SYNC_AND_ASYNC
def test_a_closed_store_is_not_checked(kind, tmp_path):
    store = kind(f"sqlite:///{tmp_path}/telemetry.db")
    if kind is Store:
        store.close()
        with pytest.raises(StoreClosed):
            store.check()
        return

    async def check():
        await store.close()
        await store.check()

    with pytest.raises(StoreClosed):
        asyncio.run(check())


@SYNC_AND_ASYNC
@pytest.mark.parametrize("backend", ON_DISK)
def test_a_store_that_only_reads_reads_the_same_and_writes_nothing(kind, backend, new_url):
    url = new_url(backend, at_head=True)
    assert called(Store, "add_many", [{"provider": "p", "latency_ms": 5}] * 3, url=url) == 3
    for name in ("query", "get_stats", "get_routing_accuracy"):
        whole = called(Store, name, url=url)
        assert whole == called(kind, name, url=url, read_only=True)
    assert reaches(kind, url, read_only=True)
    for name, arguments in (
        ("add_many", ([{"provider": "p"}],)),
        ("maintain", ()),
        ("cleanup", ()),
    ):
        with pytest.raises(BadArgument, match="read-only"):
            called(kind, name, *arguments, url=url, read_only=True)
    assert len(called(Store, "query", url=url)) == 3


@SYNC_AND_ASYNC
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checked_database_is_reachable_however_slow_its_probes(
    kind, backend, new_url, monkeypatch
):
    monkeypatch.setattr("lynkr_store.store.health._WAIT_S", 0.0)
    url = "sqlite://" if backend == "sqlite-memory" else new_url(backend, at_head=True)
    assert reaches(kind, url)


@SYNC_AND_ASYNC
def test_a_probe_is_late_by_the_time_before_the_call(kind, tmp_path, monkeypatch):
    """A machine that stands still during a call makes the database no slower."""
    settings = StoreSettings(url=f"sqlite:///{tmp_path}/telemetry.db")

    def slow(_):
        time.sleep(0.5)

    def frozen():
        monkeypatch.setattr("lynkr_store.store.health._look", slow)
        monkeypatch.setattr("lynkr_store.store.health._LATE_S", 0.0)

    async def asked():
        async with AsyncStore(settings=settings) as store:
            await store.check()
            frozen()
            return [(await store.health()).reachable for _ in range(2)]

    if kind is Store:
        with Store(settings=settings) as store:
            store.check()
            frozen()
            assert [store.health().reachable for _ in range(2)] == [True, False]
    else:
        assert asyncio.run(asked()) == [True, False]


def test_an_asynchronous_store_that_only_reads_takes_no_record(new_url):
    async def record():
        url = new_url("postgres18", at_head=True)
        async with AsyncStore(url, read_only=True) as store:
            assert not store.record(provider="p")
            return await store.health()

    assert dict(asyncio.run(record()).dropped_by) == {"closed": 1}


def test_a_hosts_engine_cannot_be_read_only(new_url):
    from lynkr_store.db.engines import create_store_async_engine  # noqa: PLC0415

    engine = create_store_async_engine(new_url("sqlite-file"))
    with pytest.raises(BadArgument, match="read_only: give a url"):
        AsyncStore(engine=engine, read_only=True)
    asyncio.run(engine.dispose())
