"""The fixtures that hosts use, in a test run of a host's."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from lynkr_store import RoutingEvent, Store
from lynkr_store.testing import Clock, EventFactory, RecordFactory
from tests.conftest import POSTGRES

HOST = """
import asyncio
from datetime import timedelta

import pytest

from lynkr_store import AsyncStore, RoutingFilter, Store
from lynkr_store.testing import RecordFactory


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("name", ["lynkr_sqlite_store", "lynkr_postgres_store"])
def test_each_test_has_a_database_of_its_own(request, name, number):
    store = request.getfixturevalue(name)
    store.add_many(RecordFactory.build_batch(3))
    assert len(store.query()) == 3


@pytest.mark.parametrize("name", ["lynkr_sqlite_settings", "lynkr_postgres_settings"])
def test_an_asynchronous_store(request, name):
    async def main():
        async with AsyncStore(settings=request.getfixturevalue(name)) as store:
            store.record(RecordFactory())
            await store.flush()
            return await store.query()

    assert len(asyncio.run(main())) == 1


def test_a_misspelt_field_is_an_error(lynkr_sqlite_store):
    with pytest.raises(ValueError, match="did you mean model"):
        lynkr_sqlite_store.record({"provider": "p", "modle": "m"})


def test_the_clock_moves(lynkr_clocked_store, lynkr_clock):
    lynkr_clocked_store.add_many([{"provider": "p"}])
    assert lynkr_clocked_store.query()[0].timestamp == lynkr_clock.now
    lynkr_clocked_store.add_many(RecordFactory.build_batch(3))
    assert lynkr_clocked_store.get_stats().total_requests == 4
    lynkr_clock.advance(timedelta(hours=25))
    assert lynkr_clocked_store.get_stats() is None


def test_nothing_is_stored(lynkr_disabled_store):
    assert lynkr_disabled_store.record(provider="p")
    assert lynkr_disabled_store.query() == []


class TestOptionsOfTheHosts:
    @pytest.fixture
    def lynkr_options(self, lynkr_options):
        return lynkr_options | {"capture_text": False}

    def test_they_are_used(self, lynkr_sqlite_store):
        lynkr_sqlite_store.add_many([RecordFactory()])
        assert lynkr_sqlite_store.query()[0].request_text is None
"""


def run_host(tmp_path, *arguments, **variables):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["lynkr_store.testing.plugin"]\n')
    (tmp_path / "test_host.py").write_text(HOST)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LYNKR_STORE_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-rs", "-q", *arguments],
        cwd=tmp_path,
        env=kept | {"LYNKR_STORE_ENABLED": "false", "LYNKR_STORE_SCHEMA": "s"} | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("server", POSTGRES)
def test_a_hosts_tests_pass_and_leave_nothing(tmp_path, new_url, server):
    url = new_url(server)
    done = run_host(tmp_path, LYNKR_STORE_TEST_PG_URL=url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed" in done.stdout
    with Store(url) as store, store.engine.connect() as connection:
        left = connection.exec_driver_sql(
            "SELECT nspname FROM pg_namespace WHERE nspname ~ '^lynkr'"
        )
        assert left.all() == []


@pytest.mark.slow
def test_without_a_server_its_tests_are_skipped_and_say_why(tmp_path):
    done = run_host(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed, 3 skipped" in done.stdout
    assert "set LYNKR_STORE_TEST_PG_URL to the URL of a PostgreSQL database" in done.stdout


@pytest.mark.slow
def test_the_plugin_is_not_loaded_unasked(tmp_path):
    (tmp_path / "test_nothing.py").write_text(
        "import sys\n\ndef test_nothing():\n    assert 'lynkr_store' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_clock():
    clock = Clock(0)
    clock.advance(timedelta(days=1, milliseconds=5))
    assert clock() == clock.now_ms == 86_400_005
    clock.advance(timedelta(days=-1))
    assert clock.now == datetime(1970, 1, 1, 0, 0, 0, 5000, tzinfo=UTC)


def test_the_factories_records_are_valid():
    records = RecordFactory.build_batch(4)
    assert all(RoutingEvent(**record) for record in records)
    failed = RecordFactory(failed=True)
    assert (failed["error_type"], failed["status_code"]) == ("overloaded", 503)
    assert RecordFactory(unmeasured=True)["latency_ms"] is None
    assert EventFactory(tier="COMPLEX").tier == "COMPLEX"
