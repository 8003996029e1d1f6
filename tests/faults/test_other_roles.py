"""Other roles of a PostgreSQL database: what they plant, what they own, what rights they need."""

import asyncio
import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
from psycopg import sql
from psycopg.errors import InsufficientPrivilege
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from lynkr_store import (
    AsyncStore,
    Cursor,
    DowngradeRefused,
    RoutingFilter,
    RoutingRepository,
    SchemaError,
    Store,
    StoreSettings,
    Window,
    create_store_engine,
)
from lynkr_store.cli.commands import app
from lynkr_store.db.models import TELEMETRY, Base
from lynkr_store.migrate.revisions import foreign_owners
from lynkr_store.migrate.upgrade import upgrade
from lynkr_store.storage import diagnosis, identities, ledger
from lynkr_store.testing import RecordFactory
from tests.conftest import POSTGRES
from tests.support.planted import FEW_TYPES, TYPES, plant
from tests.support.stores import Asynchronous, adds_up, looked

NOW = 1_750_000_000_000
MINUTE_MS = 60_000
DAY_MS = 86_400_000
SCHEMA = "telemetry"
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "postgresql.md"

FILTERS = [
    *(
        {name: values}
        for name in (
            *("provider", "tier", "model", "session_id"),
            *("request_id", "request_type", "routing_method"),
        )
        for values in ("a", ["a", "b"])
    ),
    {"tier": [f"t-{number}" for number in range(101)]},  # too many for one index
    {"status_code": 200},
    {"status_code": [200, 503]},
    {"has_error": True},
    {"has_error": False},
    {"was_fallback": False},
    *(
        {f"{side}_{name}": bound}
        for side in ("min", "max")
        for name in ("latency_ms", "cost_usd", "quality_score", "input_tokens", "output_tokens")
        for bound in (1, 1.5)
    ),
    {"provider": "a", "tier": "SIMPLE", "model": "m", "status_code": 200, "has_error": False},
]
WINDOWS = [None, Window(since=NOW - 10 * MINUTE_MS), Window(until=NOW - MINUTE_MS)]
PLACES = [None, Cursor(timestamp=NOW, id=9), Cursor(timestamp=NOW + 0.5, id=9)]


def records(since: int = NOW - 40 * MINUTE_MS, count: int = 50) -> list[dict[str, object]]:
    return [
        RecordFactory(timestamp=since + n * MINUTE_MS, failed=n % 7 == 0, provider="ab"[n % 2])
        for n in range(count)
    ]


@pytest.fixture
def roles(request, server_of) -> Iterator[SimpleNamespace]:
    """A database of roles that may do little: one that owns it, one that stores, and another."""
    server = server_of(request.param)
    number, password = secrets.token_hex(4), secrets.token_hex(8)
    names = {name: f"{name}_{number}" for name in ("owner", "app", "other")}
    database = server.create_database(f"roles_{number}")
    url = make_url(database)
    identifiers = {name: sql.Identifier(role) for name, role in names.items()}
    identifiers |= {"database": sql.Identifier(url.database), "schema": sql.Identifier(SCHEMA)}

    def execute(*lines: str, database: str = database) -> None:
        with psycopg.connect(database, autocommit=True) as connection:
            for line in lines:
                connection.execute(sql.SQL(line).format(**identifiers))

    execute(
        *(f"CREATE ROLE {{{name}}} LOGIN PASSWORD '{password}'" for name in names),
        "GRANT {owner}, {app}, {other} TO CURRENT_USER",
        "ALTER DATABASE {database} OWNER TO {owner}",
    )
    urls = {
        name: url.set(username=role, password=password).render_as_string(hide_password=False)
        for name, role in names.items()
    }
    yield SimpleNamespace(execute=execute, urls=urls, names=names, url=database)
    server.drop_database(f"roles_{number}")
    execute(
        *(f"DROP ROLE {{{name}}}" for name in names),
        database=server.url("template_head"),
    )


@contextmanager
def nothing_fails() -> Iterator[None]:
    """No statement of any engine does, not even one whose error nobody is told."""
    failed: list[str] = []

    def note(context: object) -> None:
        failed.append(f"{str(context.original_exception).splitlines()[0]}: {context.statement}")

    event.listen(Engine, "handle_error", note)
    try:
        yield
    finally:
        event.remove(Engine, "handle_error", note)
        assert not failed, "\n\n".join(dict.fromkeys(failed))


def read_lists(repository) -> None:
    """With every filter, window and cursor, of a store or a repository."""
    for asked in FILTERS:
        repository.query(RoutingFilter(**asked), WINDOWS[1], limit=3)
    for window in WINDOWS:
        for before in PLACES:
            for text in (True, False):
                repository.query(
                    RoutingFilter(has_error=True), window, before=before, include_text=text
                )


def ask(repository) -> None:
    """Each statistic of each window, of a store or a repository."""
    for window in WINDOWS:
        assert repository.get_stats(window).total_requests
        assert repository.get_provider_stats("a", window).total
        assert repository.get_routing_accuracy(window).total_requests


def use(store) -> None:
    """All that a store does with a database at head."""
    for record in records():
        store.record(record)
    assert store.flush(60)
    assert store.add_many(records()) == 50
    for days in (13, 15, 25):
        store.add_many(records(NOW - days * DAY_MS, 5))
    read_lists(store)
    ask(store)
    assert len(list(store.iter_records(RoutingFilter(provider="a")))) >= 50
    for rebuild in (True, False):
        report = store.maintain(rebuild=rebuild)
        assert rebuild <= (report.rows_folded > 0)
    assert report.rollup_lag <= 0  # ids that retention took count too
    ask(store)
    assert store.cleanup(timedelta(days=12)) == 10
    for include_text in (True, False):  # across the gap that this left
        rows = store.follow(after=0, poll_s=0.01, include_text=include_text)
        assert len(list(islice(rows, 100))) == 100
    health = looked(store)
    assert (health.reachable, health.last_error, health.pending) == (True, None, 0)
    assert adds_up(health)


def use_by_every_way(url: str, schema: str | None = None) -> None:
    """By stores and a host's Session, sync and async, on engines of the store's and a host's."""
    options = {"cache_ttl_s": 0, "maintenance_interval_s": 86_400, "schema_name": schema}
    options |= {"retention_days": 20, "text_retention_days": 14}
    of_url, of_engine = StoreSettings(url=url, **options), StoreSettings(**options)
    host_url = make_url(url).set(drivername="postgresql+psycopg")
    with asyncio.Runner() as runner:
        # which SQLAlchemy would look up by an operator of nobody's, before the store has a say
        no_hstore = {"use_native_hstore": False}
        host = create_engine(host_url, **no_hstore)
        host_async = create_async_engine(host_url, **no_hstore)
        for store in (
            Store(settings=of_url, clock=lambda: NOW),
            Asynchronous(AsyncStore(settings=of_url, clock=lambda: NOW), runner),
            Store(engine=host, settings=of_engine, clock=lambda: NOW),
            Asynchronous(
                AsyncStore(engine=host_async, settings=of_engine, clock=lambda: NOW), runner
            ),
        ):
            use(store)
            store.close()
        if schema is None:
            with Session(host) as session:  # in its ordinary path
                repository = RoutingRepository(session, clock=lambda: NOW)
                repository.add_many(records())
                read_lists(repository)
                ask(repository)
        host.dispose()
        runner.run(host_async.dispose())
    own = create_store_engine(url, schema=schema)
    with own.begin() as connection:
        ledger.expire_ledger(connection, NOW * 2)
        look_for_faults(connection, schema or "public")
        connection.rollback()
    own.dispose()


def look_for_faults(connection, schema: str) -> None:
    """What is asked after rows were refused; the refusals themselves are other tests'."""
    said = SimpleNamespace(
        schema_name=schema,
        table_name=TELEMETRY.name,
        column_name="id",
        constraint_name=TELEMETRY.primary_key.name,
    )
    assert diagnosis.hindrance(connection) is None
    assert diagnosis.without_ids(connection) is None
    assert "assigned an id" in diagnosis._given_twice(connection, said)
    assert "assigns no id" in diagnosis._null(connection, said)
    assert not diagnosis._is_secured(connection)
    assert identities.problems(connection) == []
    assert identities.set_forward(connection) == ()


def command(url: str, *line: str) -> str:
    done = CliRunner().invoke(app, [*line, "--url", url])
    assert done.exit_code == 0, (line, done.output, done.exception)
    return done.output


def everything(url: str, schema: str | None, monkeypatch) -> None:
    """All that the library does, from an empty database to an empty database."""
    monkeypatch.setenv("LYNKR_STORE_SCHEMA", schema or "")
    own = create_store_engine(url, schema=schema)
    for revision in ("0001", "0003", "head"):
        upgrade(own, revision)
    own.dispose()
    use_by_every_way(url, schema)
    for line in (
        ("check",),
        ("stats", "--last", "52w"),
        ("query", "--provider", "a", "--last", "52w"),
        ("health",),
        ("maintain", "--rebuild", "--trust-clock"),
        ("cleanup", "--older-than", "30d", "--trust-clock"),
        ("upgrade",),
    ):
        command(url, *line)
    refused = CliRunner().invoke(app, ["downgrade", "0007", "--url", url])
    assert isinstance(refused.exception, DowngradeRefused), refused.output
    for revision in ("0007", "base"):
        command(url, "downgrade", revision, "--drop-data")


@pytest.mark.slow
@pytest.mark.parametrize("roles", POSTGRES, indirect=True)
@pytest.mark.parametrize(
    "types", [FEW_TYPES, pytest.param(TYPES, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_nothing_that_another_role_planted_is_called(roles, types, monkeypatch):
    """On the release before, opening a store, a query and a statistic called some."""
    roles.execute("GRANT CREATE ON SCHEMA public TO {owner}, {other}")
    operators, functions = plant(roles.url, "public", roles.names["other"], types)
    assert (operators > 7_000, functions > 7_000) == (True, True)
    for statement in (
        "SELECT CAST(1 AS float8) + 0.5",
        "SELECT CAST(1 AS float8) >= CAST(1 AS bigint)",
        "SELECT CAST('a' AS text) = CAST('a' AS varchar)",
        "SELECT - CAST('a' AS text)",
        "SELECT count(CAST('a' AS text))",
        "SELECT to_regclass(CAST('a' AS varchar))",
    ):
        with pytest.raises(InsufficientPrivilege, match=r"planted|count|to_regclass"):
            roles.execute(statement, database=roles.urls["owner"])
    with nothing_fails():
        everything(roles.urls["owner"], None, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("roles", POSTGRES, indirect=True)
def test_nothing_that_another_role_planted_in_a_schema_of_the_stores_own_is_called(
    roles, monkeypatch
):
    roles.execute(
        "CREATE SCHEMA {schema} AUTHORIZATION {owner}",
        "GRANT USAGE, CREATE ON SCHEMA {schema} TO {other}",
    )
    plant(roles.url, SCHEMA, roles.names["other"], FEW_TYPES)
    with nothing_fails():
        everything(roles.urls["owner"], SCHEMA, monkeypatch)


def rights() -> list[str]:
    """The statements that the documentation gives."""
    [block] = re.findall(r"(?ms)^```sql\n(.*?)^```", PAGE.read_text())
    lines = re.sub(r"--.*", "", block).split(";")
    known = {"lynkr_owner": "{owner}", "lynkr_app": "{app}", "gateway": "{database}"}
    return [
        re.sub(r"lynkr_owner|lynkr_app|gateway", lambda found: known[found[0]], line.strip())
        for line in lines
        if line.strip() and not line.strip().startswith(("CREATE ROLE", "CREATE DATABASE"))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("roles", POSTGRES, indirect=True)
def test_a_role_with_the_rights_that_the_readme_gives_can_do_everything_but_upgrade(roles, caplog):
    roles.execute(*rights())
    upgrade(roles.urls["owner"], "0008")
    with pytest.raises(
        SchemaError, match=r"lacks a right \(.*permission denied .*public\)\. Upgrade as the"
    ):
        upgrade(roles.urls["app"])
    upgrade(roles.urls["owner"])
    with nothing_fails():
        use_by_every_way(roles.urls["app"])
        assert command(roles.urls["app"], "upgrade") == "at revision 0010\n"
        for line in (
            ("check",),
            ("health",),
            ("maintain", "--trust-clock"),  # the rows are of a fixed time
            ("cleanup", "--older-than", "30d", "--trust-clock"),
        ):
            command(roles.urls["app"], *line)
    assert not caplog.records


@pytest.mark.parametrize("roles", POSTGRES, indirect=True)
def test_a_foreign_owner_is_reported_when_a_store_is_opened_and_by_check(roles, caplog):
    """A role that may create in the schema was there first; by the release before nobody knew."""
    roles.execute("GRANT CREATE ON SCHEMA public TO {other}")
    upgrade(roles.urls["other"])
    roles.execute(
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {app}",
        database=roles.urls["other"],
    )
    caplog.set_level(logging.INFO, "lynkr_store")
    with Store(roles.urls["app"]) as store:
        store.record(provider="p")
        assert store.flush(30)
        assert store.query()
    [said] = caplog.records
    assert said.levelname == "WARNING"
    other = roles.names["other"]
    assert said.message.startswith(f"the role {other!r}, of which this user is not a member, owns ")
    tables = [*(f"the table {name}" for name in sorted(Base.metadata.tables))]
    assert all(table in said.message for table in [*tables, "lynkr_store_alembic_version"])
    assert said.message in command(roles.urls["app"], "check")
    assert f"owns the table {tables[0][10:]}" in command(roles.urls["app"], "check", "--json")


OWNERS = {
    "this user": "ALTER TABLE routing_telemetry OWNER TO {app}",
    "a role of which it is a member": "GRANT {other} TO {app}",
    "a role of a role of which it is a member": "GRANT {other} TO {owner}; GRANT {owner} TO {app}",
    "the database's owner": "ALTER DATABASE {database} OWNER TO {other}",
    "a superuser": "ALTER ROLE {other} SUPERUSER",
}


@pytest.mark.parametrize("roles", POSTGRES, indirect=True)
@pytest.mark.parametrize("whose", OWNERS)
def test_an_owner_that_has_to_be_trusted_is_not_said(roles, whose):
    roles.execute(
        "CREATE TABLE routing_telemetry (id bigint)",
        "ALTER TABLE routing_telemetry OWNER TO {other}",
    )
    assert len(owners(roles.urls["app"])) == 1
    roles.execute(OWNERS[whose])
    assert owners(roles.urls["app"]) == []


@pytest.mark.parametrize("roles", POSTGRES, indirect=True)
def test_the_owner_of_the_schema_is_checked_too(roles):
    roles.execute(
        "CREATE SCHEMA {schema} AUTHORIZATION {other}",
        "CREATE TABLE {schema}.routing_telemetry (id bigint)",
        "ALTER TABLE {schema}.routing_telemetry OWNER TO {app}",
        "GRANT USAGE ON SCHEMA {schema} TO {app}",
    )
    [said] = owners(roles.urls["app"], SCHEMA)
    assert f"{roles.names['other']!r}, of which this user is not a member, owns the schema" in said
    assert owners(roles.urls["app"]) == []  # it does not look there


def owners(url: str, schema: str | None = None) -> list[str]:
    engine = create_store_engine(url, schema=schema)
    with engine.connect() as connection:
        found = foreign_owners(connection)
    engine.dispose()
    return found


@pytest.mark.parametrize("schema", [None, SCHEMA])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_temporary_table_of_the_session_hides_none_of_the_stores(postgres_url, schema, kind):
    """PostgreSQL looks there first, and a pool or a pooler hands the session round."""
    settings = StoreSettings(url=postgres_url, schema_name=schema, cache_ttl_s=0)
    upgrade(create_store_engine(postgres_url, schema=schema))
    with asyncio.Runner() as runner:
        store = (
            Store(settings=settings)
            if kind == "sync"
            else Asynchronous(AsyncStore(settings=settings), runner)
        )
        engines = [store._database.engine, store._database.of_writer]
        if kind == "async":
            engines.append(store._engines._spare[0].sync_engine)
        for engine in engines:

            @event.listens_for(engine, "connect")
            def plant_table(connection, _):
                place = schema or "public"
                cursor = connection.cursor()
                cursor.execute(
                    f"CREATE TEMP TABLE {TELEMETRY.name} "
                    f"(LIKE {place}.{TELEMETRY.name} INCLUDING ALL)"
                )
                cursor.close()
                connection.commit()

        store.record(provider="p")
        assert store.flush(60)
        store.add_many([{"provider": "p"}])
        store.maintain()
        assert len(store.query()) == 2
        assert store.get_stats().total_requests == 2
        store.close()
    with psycopg.connect(make_url(postgres_url).render_as_string(hide_password=False)) as other:
        found = other.execute(f"SELECT count(*) FROM {schema or 'public'}.{TELEMETRY.name}")
        assert found.fetchone() == (2,)
