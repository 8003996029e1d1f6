"""Fixtures of stores for a host's tests: ``pytest_plugins = ["lynkr_store.testing.plugin"]``.

It is not loaded unasked, because every test run in an environment with this library would then
import SQLAlchemy. The settings are for an `AsyncStore`, or for a store of the host's own making.
"""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import text

from lynkr_store import Store, StoreSettings, create_store_engine
from lynkr_store.testing import Clock

_NOT_OF_THE_ENVIRONMENT: Final = {"enabled": True, "schema_name": None}
_SERVER: Final = "LYNKR_STORE_TEST_PG_URL"


def _settings(options: dict[str, Any]) -> StoreSettings:
    return StoreSettings(**_NOT_OF_THE_ENVIRONMENT | options)


@pytest.fixture
def lynkr_options() -> dict[str, Any]:
    """Options of every store here; override it. Records are checked, statistics not cached."""
    return {"strict": True, "cache_ttl_s": 0}


@pytest.fixture
def lynkr_sqlite_settings(tmp_path: Path, lynkr_options: dict[str, Any]) -> StoreSettings:
    """Settings of a new SQLite file."""
    return _settings({"url": f"sqlite:///{tmp_path}/telemetry.db"} | lynkr_options)


@pytest.fixture
def lynkr_postgres_settings(lynkr_options: dict[str, Any]) -> Iterator[StoreSettings]:
    """Settings of a new schema on the server that ``LYNKR_STORE_TEST_PG_URL`` names.

    The test is skipped without that variable; the schema is dropped in the end. The role needs the
    right to create schemas in that database.
    """
    url = os.environ.get(_SERVER)
    if not url:
        pytest.skip(f"set {_SERVER} to the URL of a PostgreSQL database")
    schema = f"lynkr_test_{uuid.uuid4().hex}"
    own = {"url": url, "schema_name": schema, "upgrade_on_open": True}
    yield _settings(own | lynkr_options)
    engine = create_store_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"DROP SCHEMA IF EXISTS {schema} CASCADE"))
    engine.dispose()


@pytest.fixture
def lynkr_sqlite_store(lynkr_sqlite_settings: StoreSettings) -> Iterator[Store]:
    """A store on a new SQLite file, closed after the test."""
    with Store(settings=lynkr_sqlite_settings) as store:
        yield store


@pytest.fixture
def lynkr_postgres_store(lynkr_postgres_settings: StoreSettings) -> Iterator[Store]:
    """A store in a new schema of a PostgreSQL database, closed after the test."""
    with Store(settings=lynkr_postgres_settings) as store:
        yield store


@pytest.fixture
def lynkr_clock() -> Clock:
    """The clock of `lynkr_clocked_store`: ``lynkr_clock.advance(timedelta(hours=25))``."""
    return Clock()


@pytest.fixture
def lynkr_clocked_store(lynkr_clock: Clock, lynkr_options: dict[str, Any]) -> Iterator[Store]:
    """A store in memory whose clock the test moves."""
    settings = _settings({"url": "sqlite://"} | lynkr_options)
    with Store(settings=settings, clock=lynkr_clock) as store:
        yield store


@pytest.fixture
def lynkr_disabled_store(lynkr_options: dict[str, Any]) -> Iterator[Store]:
    """A store that is switched off: every method works, nothing is opened or stored."""
    with Store(settings=_settings(lynkr_options | {"enabled": False})) as store:
        yield store
