"""The fixtures for hosts, in this process; `test_plugin.py` has them in a test run of a host's."""

import asyncio
from datetime import timedelta

import pytest

from lynkr_store import AsyncStore
from lynkr_store.testing import RecordFactory
from lynkr_store.testing.plugin import (  # noqa: F401 - pytest finds them here
    lynkr_clock,
    lynkr_clocked_store,
    lynkr_disabled_store,
    lynkr_options,
    lynkr_postgres_settings,
    lynkr_postgres_store,
    lynkr_sqlite_settings,
    lynkr_sqlite_store,
)
from tests.conftest import POSTGRES


@pytest.fixture
def server(new_url, monkeypatch):
    monkeypatch.setenv("LYNKR_STORE_TEST_PG_URL", new_url(POSTGRES[-1]))


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["lynkr_sqlite", "lynkr_postgres"])
def test_a_store_and_its_settings_are_of_the_same_database(server, request, name):
    store = request.getfixturevalue(f"{name}_store")
    store.add_many(RecordFactory.build_batch(3))
    settings = request.getfixturevalue(f"{name}_settings")

    async def count():
        async with AsyncStore(settings=settings) as other:
            return len(await other.query())

    assert asyncio.run(count()) == len(store.query()) == 3


def test_the_clock_of_a_store_moves(lynkr_clocked_store, lynkr_clock):  # noqa: F811
    lynkr_clocked_store.add_many([{"provider": "p"}])
    assert lynkr_clocked_store.query()[0].timestamp == lynkr_clock.now
    lynkr_clock.advance(timedelta(hours=25))
    assert lynkr_clocked_store.get_stats() is None


def test_a_store_that_is_switched_off_stores_nothing(lynkr_disabled_store):  # noqa: F811
    assert lynkr_disabled_store.record(provider="p")
    assert lynkr_disabled_store.query() == []
