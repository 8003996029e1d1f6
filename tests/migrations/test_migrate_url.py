"""A URL for changes of the schema alone: the other one leads to a pooler, or may only read."""

import asyncio
import sys

import psycopg
import pytest
from alembic.config import main as alembic_main

from lynkr_store import (
    AsyncStore,
    BadArgument,
    SchemaBehind,
    Store,
    StoreSettings,
    StoreUnavailable,
    UnsupportedDatabase,
    create_store_engine,
)
from lynkr_store.cli import commands
from lynkr_store.db import dialect
from lynkr_store.migrate import revisions
from tests.conftest import POSTGRES
from tests.support.recorded import ROOT

SECRET = "p@ss"  # noqa: S105 - of nobody
READ_ONLY = "&options=-c%20default_transaction_read_only%3Don"


@pytest.fixture
def place(postgres_url, monkeypatch):
    """Two URLs of one database; by the first nothing can be changed."""
    monkeypatch.setenv("LYNKR_STORE_URL", postgres_url + READ_ONLY)
    monkeypatch.setenv("LYNKR_STORE_MIGRATE_URL", postgres_url)
    return postgres_url + READ_ONLY, postgres_url


@pytest.fixture
def command(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["lynkr-store", *arguments])
        try:
            commands.main()
        except SystemExit as ended:
            return ended.code or 0
        return 0

    return run


@pytest.fixture
def alembic(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "path", [*sys.path])  # it puts the checkout in front
        alembic_main(["-c", str(ROOT / "alembic.ini"), *arguments])

    return run


def revision(url, schema=None):
    engine = create_store_engine(url, schema=schema)
    try:
        with engine.connect() as connection:
            return revisions.current(connection)
    finally:
        engine.dispose()


def test_the_command_changes_the_schema_by_it(place, command):
    _, migrate_url = place
    assert command("upgrade") == 0
    assert revision(migrate_url) == revisions.head()
    assert command("downgrade", "0003") == 0
    assert revision(migrate_url) == "0003"


def test_a_url_given_to_the_command_wins(place, command, new_url, capsys):
    url, _ = place
    other = new_url("sqlite-file")
    assert command("upgrade", "--url", other) == 0
    assert revision(other) == revisions.head()
    assert command("upgrade", "--url", url) != 0
    assert "read-only" in capsys.readouterr().err


def test_alembic_changes_the_schema_by_it(place, alembic):
    _, migrate_url = place
    alembic("upgrade", "head")
    assert revision(migrate_url) == revisions.head()
    alembic("downgrade", "base")
    assert revision(migrate_url) is None


def test_alembic_needs_no_other_url(place, alembic, monkeypatch):
    _, migrate_url = place
    monkeypatch.delenv("LYNKR_STORE_URL")
    alembic("upgrade", "0002")
    assert revision(migrate_url) == "0002"


def test_a_url_given_to_alembic_wins(place, alembic, new_url):
    other = new_url("sqlite-file")
    alembic("-x", f"url={other}", "upgrade", "head")
    assert revision(other) == revisions.head()
    assert revision(place[1]) is None


@pytest.mark.parametrize("schema", [None, "telemetry"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_store_upgrades_by_it(place, kind, schema):
    url, migrate_url = place
    settings = StoreSettings(upgrade_on_open=True, schema_name=schema)
    if kind == "sync":
        with Store(settings=settings) as store:
            assert store.query() == []
    else:

        async def body():
            async with AsyncStore(settings=settings) as store:
                assert await store.query() == []

        asyncio.run(body())
    assert revision(migrate_url, schema) == revisions.head()
    assert revision(url, schema) == revisions.head()


def test_the_writer_upgrades_by_it_too(postgres_url):
    settings = StoreSettings(url=postgres_url, migrate_url=postgres_url, upgrade_on_open=True)
    with Store(settings=settings) as store:
        store.record(provider="p")
        assert store.flush(60)


@pytest.mark.slow
def test_a_hosts_engine_is_upgraded_by_it(place):
    url, migrate_url = place
    engine = create_store_engine(url)
    settings = StoreSettings(upgrade_on_open=True)
    with Store(engine=engine, settings=settings) as store:
        assert store.query() == []
    engine.dispose()
    assert revision(migrate_url) == revisions.head()


def test_a_url_that_an_argument_gives_is_also_the_one_to_migrate(place, new_url):
    _, migrate_url = place
    other = new_url("sqlite-file")
    settings = StoreSettings(cache_ttl_s=0)
    for store in (
        Store(other),
        Store(other, settings=settings),
        Store(settings=StoreSettings(url=other)),
    ):
        with store:
            store.record(provider="p")
            assert store.flush(60)
    assert revision(migrate_url) is None


def test_another_database_is_noticed(postgres_url, new_url):
    other = new_url(POSTGRES[-1])
    settings = StoreSettings(url=postgres_url, migrate_url=other, upgrade_on_open=True)
    with Store(settings=settings) as store, pytest.raises(SchemaBehind, match="migrate_url"):
        store.query()


def test_a_server_out_of_reach_is_named_with_the_setting(postgres_url, tmp_path):
    away = f"postgresql://postgres:{SECRET}@/x?host={tmp_path}".replace("p@", "p%40")
    settings = StoreSettings(url=postgres_url, migrate_url=away, upgrade_on_open=True)
    assert SECRET not in repr(settings)
    with Store(settings=settings) as store, pytest.raises(StoreUnavailable) as caught:
        store.query()
    assert str(caught.value).startswith("migrate_url: ")
    assert SECRET not in str(caught.value)


PG, FILE = "postgresql://u@h/db", "sqlite:///x.db"


@pytest.mark.parametrize(
    ("url", "migrate_url", "error", "said"),
    [
        (PG, FILE, BadArgument, "migrate_url: it is for PostgreSQL"),
        (FILE, PG, BadArgument, "migrate_url: it is for PostgreSQL"),
        (FILE, FILE, BadArgument, "migrate_url: it is for PostgreSQL"),
        (PG, "mysql://u@h/db", UnsupportedDatabase, "migrate_url: "),
        (PG, "postgres://u@h/db", UnsupportedDatabase, "migrate_url: write postgresql://"),
    ],
)
def test_a_wrong_one_is_refused(monkeypatch, command, capsys, url, migrate_url, error, said):
    settings = StoreSettings(url=url, migrate_url=migrate_url)
    with pytest.raises(error, match=f"^{said}"):
        Store(settings=settings)
    with pytest.raises(error, match=f"^{said}"):
        dialect.url_to_migrate(settings)
    monkeypatch.setenv("LYNKR_STORE_URL", url)
    monkeypatch.setenv("LYNKR_STORE_MIGRATE_URL", migrate_url)
    assert command("upgrade") == 2
    assert said in capsys.readouterr().err


def test_the_rows_go_by_the_other_url(place):
    """What may only read refuses them; a migration by the other URL has changed nothing there."""
    url, migrate_url = place
    with psycopg.connect(url) as connection:
        assert connection.execute("SHOW default_transaction_read_only").fetchone() == ("on",)
    with Store(settings=StoreSettings(upgrade_on_open=True)) as store:
        store.check()
        with pytest.raises(StoreUnavailable):
            store.add_many([{"provider": "p"}])
    with Store(migrate_url) as store:
        assert store.add_many([{"provider": "p"}]) == 1
