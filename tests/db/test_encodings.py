"""Texts of any language reach the database as they are, or it is refused, untouched."""

import asyncio

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from lynkr_store import (
    AsyncStore,
    RoutingRepository,
    Store,
    StoreSettings,
    UnsupportedDatabase,
    upgrade,
    writing,
)
from lynkr_store.cli import commands
from tests.migrations.host import application
from tests.migrations.host.catalogue import theirs
from tests.support.stores import adds_up, looked

TEXT = "é 数据 🙂 \ufffd"

each_kind = pytest.mark.parametrize("kind", ["Store", "AsyncStore"])


@pytest.fixture(params=["LATIN1", "SQL_ASCII"])
def another_encoding(request, postgres_url):
    """A database of another encoding, and its name."""
    other = sql.Identifier(f"{make_url(postgres_url).database}_other")
    with psycopg.connect(postgres_url, autocommit=True) as owner:
        owner.execute(
            sql.SQL(
                "CREATE DATABASE {} ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
            ).format(other, sql.Literal(request.param))
        )
        url = make_url(postgres_url)
        url = url.set(database=f"{url.database}_other").render_as_string(hide_password=False)
        yield url, request.param
        owner.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(other))


def by_command(url, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lynkr-store", "upgrade", "--url", url])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == commands.Exit.WRONG_USE
    return capsys.readouterr().err


def test_a_database_of_another_encoding_is_refused_before_anything_is_made(
    another_encoding, monkeypatch, capsys
):
    url, encoding = another_encoding
    before = theirs(url)
    host = create_engine(application.driven(url), client_encoding="utf8")
    said = [by_command(url, monkeypatch, capsys)]
    for target in (url, host):
        with pytest.raises(UnsupportedDatabase) as refused:
            upgrade(target)
        said.append(str(refused.value))
        settings = StoreSettings(url=url, upgrade_on_open=True, schema_name="telemetry")
        with Store(settings=settings, engine=host if target is host else None) as store:
            with pytest.raises(UnsupportedDatabase) as refused:
                store.query()
            said.append(str(refused.value))
            store.record(provider="p")
            assert store.flush(0.5) is False, "it waits"
            said.append(looked(store).last_error)
            store.close(0)
            assert adds_up(store.health())
    host.dispose()
    for words in said:
        assert f"the database's encoding is {encoding}" in words
        assert "CREATE DATABASE" in words
    assert theirs(url) == before


@each_kind
@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_JIS_2004"])
def test_the_environment_does_not_choose_the_clients_encoding(
    postgres_url, monkeypatch, encoding, kind
):
    monkeypatch.setenv("PGCLIENTENCODING", encoding)
    upgrade(postgres_url)

    def sync():
        with Store(postgres_url) as store:
            store.record(provider="p", request_text=TEXT)
            assert store.flush(30)
            store.add_many([{"provider": "q", "request_text": TEXT}])
            return store.query(), store.health()

    async def asynchronously():
        async with AsyncStore(postgres_url) as store:
            store.record(provider="p", request_text=TEXT)
            assert await store.flush(30)
            await store.add_many([{"provider": "q", "request_text": TEXT}])
            return await store.query(), await store.health()

    rows, health = sync() if kind == "Store" else asyncio.run(asynchronously())
    assert [row.request_text for row in rows] == [TEXT] * 2
    assert (health.rejected, health.last_error) == (0, None)


def test_a_hosts_engine_of_another_client_encoding_is_refused(postgres_url):
    driven = application.driven(postgres_url)
    host = create_engine(driven, client_encoding="latin1")
    with pytest.raises(UnsupportedDatabase, match="client encoding of its connections is LATIN1"):
        upgrade(host)
    upgrade(postgres_url)
    for schema in (None, "public"):
        settings = StoreSettings(schema_name=schema)
        with Store(engine=host, settings=settings) as store:
            with pytest.raises(UnsupportedDatabase, match="client_encoding='utf8'"):
                store.query()
            store.record(provider="p", request_text=TEXT)
            assert store.flush(0.5) is False, "it waits"
            assert "client encoding" in store.health().last_error
            store.close(0)
    with (
        Session(writing(host)) as session,
        pytest.raises(UnsupportedDatabase, match="client encoding"),
    ):
        RoutingRepository(session).add_many([{"provider": "p", "request_text": TEXT}])
    host.dispose()

    async def main():
        host = create_async_engine(driven, client_encoding="latin1")
        async with AsyncStore(engine=host) as store:
            with pytest.raises(UnsupportedDatabase, match="client encoding"):
                await store.add_many([{"provider": "p", "request_text": TEXT}])
        await host.dispose()

    asyncio.run(main())
