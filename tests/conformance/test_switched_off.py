"""A store that is not enabled: every name works, and nothing is opened, stored or found."""

import asyncio
import inspect
from datetime import timedelta

import pytest
from sqlalchemy import create_engine

from lynkr_store import AsyncStore, MaintenanceReport, Store, StoreSettings
from lynkr_store.db.engines import create_store_async_engine
from tests.support.stores import eventually

CALLS = {
    "record": lambda s: s.record(provider="p"),
    "flush": lambda s: s.flush(5),
    "check": lambda s: s.check(),
    "query": lambda s: s.query(),
    "get_stats": lambda s: s.get_stats(),
    "get_provider_stats": lambda s: s.get_provider_stats("p"),
    "get_routing_accuracy": lambda s: s.get_routing_accuracy(),
    "add_many": lambda s: s.add_many([{"provider": "p"}]),
    "cleanup": lambda s: s.cleanup(timedelta(days=1)),
    "recount": lambda s: s.recount(),
}
ANSWERS = dict.fromkeys(CALLS) | {"record": True, "flush": True, "query": []}
ANSWERS |= dict.fromkeys(("add_many", "cleanup", "recount"), 0)


@pytest.fixture
def off(monkeypatch):
    monkeypatch.setenv("LYNKR_STORE_ENABLED", "false")


@pytest.fixture(params=["a file", "PostgreSQL", "an engine"])
def given(request, tmp_path):
    """Where it would store; nothing answers at the URL."""
    if request.param == "an engine":
        return {"engine": create_engine(f"sqlite:///{tmp_path}/telemetry.db")}
    at = {
        "a file": f"sqlite:///{tmp_path}/a/t.db",
        "PostgreSQL": f"postgresql:///d?host={tmp_path}",
    }
    return {"url": at[request.param]}


@pytest.mark.usefixtures("off")
def test_every_method_works_and_nothing_is_stored(given, tmp_path, caplog):
    with Store(**given) as store:
        for _ in range(2):
            assert {name: call(store) for name, call in CALLS.items()} == ANSWERS
            assert list(store.iter_records()) == []
            assert isinstance(store.maintain(), MaintenanceReport)
            health = store.health()
            assert (health.submitted, health.written, health.dropped) == (0, 0, 0)
            assert not health.enabled
        eventually(lambda: store.health().reachable)
    assert store.record(provider="p") is False, "closed"
    assert list(tmp_path.iterdir()) == []
    assert caplog.text == ""
    if engine := given.get("engine"):
        engine.dispose()


@pytest.mark.usefixtures("off")
def test_every_method_of_an_asynchronous_store_works(given, tmp_path):
    async def ask():
        host = None
        if "engine" in given:
            host = create_store_async_engine(f"sqlite:///{tmp_path}/telemetry.db")
        async with AsyncStore(**({"engine": host} if host else given)) as store:
            found = {}
            for name, call in CALLS.items():
                answer = call(store)
                found[name] = await answer if inspect.isawaitable(answer) else answer
            assert found == ANSWERS
            assert [row async for row in store.iter_records()] == []
            assert (await store.health()).submitted == 0
        if host:
            await host.dispose()

    asyncio.run(ask())
    assert list(tmp_path.iterdir()) == []


def test_it_may_be_switched_off_in_code_and_read_only(tmp_path):
    settings = StoreSettings(url=f"sqlite:///{tmp_path}/t.db", enabled=False, strict=True)
    with Store(settings=settings, read_only=True) as store:
        assert store.query() == []
        assert not store.settings.enabled
        with pytest.raises(ValueError, match="modle"):
            store.record(provider="p", modle="m")
        assert store.record(provider="p")
    assert list(tmp_path.iterdir()) == []
