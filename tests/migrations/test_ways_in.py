"""The ways to run the revisions, which all come to the same schema."""

import asyncio
import io
import logging
import os
import re
import secrets
import sqlite3
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from alembic.config import main as alembic_main
from psycopg import sql
from sqlalchemy import URL, inspect, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from lynkr_store import (
    BadArgument,
    SchemaAhead,
    Store,
    StoreSettings,
    StoreUnavailable,
    create_store_engine,
    upgrade,
)
from lynkr_store.cli import commands
from lynkr_store.migrate import revisions
from lynkr_store.migrate.upgrade import downgrade, write_script
from tests.conftest import EXTERNAL, ON_DISK, POSTGRES
from tests.migrations.host import application
from tests.support.recorded import ROOT
from tests.support.snapshot import FOLDER, schema_of

pytestmark = pytest.mark.sample(6)

INI = str(ROOT / "alembic.ini")
SCHEMA = "telemetry"
REVISIONS = ["0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0009", "0010"]


@contextmanager
def engine_on(url, schema=None):
    engine = create_store_engine(url, schema=schema)
    try:
        yield engine
    finally:
        engine.dispose()


def check_that_it_is_the_committed_schema(url, schema=None, *, by_script=False):
    with engine_on(url, schema) as engine:
        found = schema_of(engine)
        committed = (FOLDER / f"schema.{engine.dialect.name}.txt").read_text()
        if by_script:  # SQLite keeps each statement's text, and scripts are indented by spaces
            found, committed = found.split(), committed.split()
        assert found == committed
        with engine.connect() as connection:
            assert revisions.current(connection) == revisions.head()


def revision_of(url, schema=None):
    with engine_on(url, schema) as engine, engine.connect() as connection:
        return revisions.current(connection)


@pytest.fixture(params=[*((b, None) for b in ON_DISK), *((b, SCHEMA) for b in POSTGRES)])
def place(request, new_url, monkeypatch):
    """An empty database's URL, and the schema that the environment names."""
    backend, schema = request.param
    if schema:
        monkeypatch.setenv("LYNKR_STORE_SCHEMA", schema)
    return new_url(backend), schema


@pytest.fixture
def alembic(monkeypatch):
    """The alembic command, in this process."""

    def run(*arguments, ini=INI):
        monkeypatch.setattr(sys, "path", [*sys.path])  # it puts the checkout in front
        alembic_main(["-c", str(ini), *arguments])

    return run


@pytest.fixture
def lynkr_store(monkeypatch):
    """The lynkr-store command, in this process; returns its exit code."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lynkr-store", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        return int(ended.value.code or 0)

    return run


# -- as programs -----------------------------------------------------------------------------------

PROGRAMS = {
    "alembic elsewhere": ([sys.executable, "-m", "alembic", "-c", INI], None, POSTGRES[-1]),
    "alembic in the checkout": ([sys.executable, "-m", "alembic"], ROOT, "sqlite-file"),
    "lynkr-store": ([str(Path(sys.executable).with_name("lynkr-store"))], None, POSTGRES[-1]),
    "python -m": ([sys.executable, "-W", "error", "-m", "lynkr_store"], None, "sqlite-file"),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_upgrades_from_any_directory(new_url, tmp_path, program):
    arguments, folder, backend = program
    url = new_url(backend)
    schema = SCHEMA if backend != "sqlite-file" else ""
    environment = {**os.environ, "LYNKR_STORE_URL": url, "LYNKR_STORE_SCHEMA": schema}
    done = subprocess.run(
        [*arguments, "upgrade", "head"],
        cwd=folder or tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    check_that_it_is_the_committed_schema(url, schema)


# -- from code -------------------------------------------------------------------------------------


@contextmanager
def as_text(url):
    yield url


@contextmanager
def as_url(url):
    yield make_url(url)


@contextmanager
def as_url_with_a_driver(url):
    yield make_url(application.driven(url))


@contextmanager
def as_engine(url):
    with engine_on(url, os.environ.get("LYNKR_STORE_SCHEMA")) as engine:
        yield engine
        with engine.connect() as connection:  # it is left open
            assert revisions.current(connection)


@contextmanager
def as_async_engine(url):
    driver = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
    target = make_url(url)
    engine = create_async_engine(target.set(drivername=driver[target.get_backend_name()]))
    yield engine
    asyncio.run(engine.dispose())


TARGETS = [as_text, as_url, as_url_with_a_driver, as_engine, as_async_engine]


def test_code_upgrades_what_it_names_in_any_form(place):
    url, schema = place
    for target, revision in zip(TARGETS, REVISIONS, strict=False):
        with target(url) as named:
            assert upgrade(named, revision) is None
            assert revision_of(url, schema) == revision, target.__name__
    for target in TARGETS:
        with target(url) as named:
            upgrade(named)  # there is nothing to do but for the first
    check_that_it_is_the_committed_schema(url, schema)


@pytest.mark.parametrize("backend", ON_DISK)
def test_a_hosts_engine_upgrades_and_is_left_open(new_url, backend):
    url = new_url(backend)
    if backend == "sqlite-file":
        create_store_engine(url).connect().close()  # makes the folder
    with application.engine_on(url) as host:
        upgrade(host)
        with host.connect() as connection:
            assert revisions.current(connection) == revisions.head()
    check_that_it_is_the_committed_schema(url)


@pytest.mark.parametrize("isolation", ["engine", "options", "SERIALIZABLE"])
@pytest.mark.parametrize("backend", ON_DISK)
def test_an_upgrade_by_a_hosts_engine_is_one_transaction_whatever_its_isolation(
    new_url, backend, isolation, monkeypatch
):
    def fail(*args):
        raise RuntimeError("half-way")

    url = new_url(backend)
    if backend == "sqlite-file":
        create_store_engine(url).connect().close()  # makes the folder
    level = "AUTOCOMMIT" if isolation in ("engine", "options") else isolation
    options = {} if isolation == "options" else {"isolation_level": level}
    with application.engine_on(url, **options) as host:
        used = host.execution_options(isolation_level=level) if isolation == "options" else host
        upgrade(used, "0002")
        with monkeypatch.context() as patched:
            patched.setattr(
                "lynkr_store.migrate.operations.create_indexes", fail
            )  # 0004 ends with it
            with pytest.raises(RuntimeError, match="half-way"):
                upgrade(used)
        with host.connect() as connection:
            assert revisions.current(connection) == "0002"
            assert not inspect(connection).has_table("savings_events")
            columns = inspect(connection).get_columns("routing_telemetry")
            assert len(columns) == 28
        upgrade(used)
    check_that_it_is_the_committed_schema(url)


def test_an_upgrade_runs_inside_an_event_loop(place):
    url, schema = place

    async def main():
        with as_async_engine_in_use(url) as engine:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
                await connection.rollback()
                upgrade(engine, "0001")
                await asyncio.to_thread(upgrade, engine, "0003")
            await engine.dispose()
        upgrade(url, "0004")
        await asyncio.gather(*(asyncio.to_thread(upgrade, url) for _ in range(3)))

    asyncio.run(main())
    check_that_it_is_the_committed_schema(url, schema)


@contextmanager
def as_async_engine_in_use(url):
    driver = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
    target = make_url(url)
    if target.get_backend_name() == "sqlite":
        Path(target.database).parent.mkdir(parents=True)
    yield create_async_engine(target.set(drivername=driver[target.get_backend_name()]))


WRONG = [
    "nonsense",
    "9999",
    "",
    "0",
    "0003:head",
    "head:base",
    "-1",
    "+99",
    "head+1",
    "HEAD",
    "a'b",
]


def test_a_wrong_revision_is_refused_and_nothing_is_changed(empty_url):
    upgrade(empty_url, "0003")
    with engine_on(empty_url) as engine:
        before = schema_of(engine)
        for revision in WRONG:
            with pytest.raises(BadArgument, match="revision"):
                upgrade(engine, revision)
        assert schema_of(engine) == before
    assert revision_of(empty_url) == "0003"


def test_a_wrong_revision_to_return_to_is_refused_and_nothing_is_changed(empty_url):
    upgrade(empty_url, "0003")
    with engine_on(empty_url) as engine:
        before = schema_of(engine)
        for revision in [revision for revision in WRONG if revision != "-1"] + ["-9", "+1"]:
            with pytest.raises(BadArgument, match="revision"):
                downgrade(engine, revision)
        assert schema_of(engine) == before
    assert revision_of(empty_url) == "0003"


@pytest.mark.parametrize("revision", ["nonsense", "9999", "", "head+1", "0001:nonsense"])
@pytest.mark.parametrize("down", [False, True])
def test_a_script_of_a_wrong_revision_is_refused(revision, down):
    with pytest.raises(BadArgument, match="revision"):
        write_script("sqlite://", revision, io.StringIO(), down=down)


@pytest.mark.parametrize("revision", ["0003", "base", "head"])
def test_the_script_of_a_downgrade_must_say_from_where(revision):
    with pytest.raises(BadArgument, match="fromrev"):
        write_script("sqlite://", revision, io.StringIO(), down=True)


def test_the_command_refuses_a_wrong_revision_as_wrong_use(tmp_path, lynkr_store, capsys):
    url = f"sqlite:///{tmp_path}/telemetry.db"
    for arguments in (["upgrade", "nonsense"], ["upgrade", ""], ["downgrade", "nonsense"]):
        assert lynkr_store(*arguments, "--url", url) == commands.Exit.WRONG_USE
        said = capsys.readouterr()
        assert "revision" in said.err


# -- scripts ---------------------------------------------------------------------------------------


def run_script(url, script):
    """Run it as psql or the sqlite3 program does, by the driver alone."""
    if url.startswith("sqlite"):
        path = Path(make_url(url).database)
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(script)
    else:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(script)


def by_code(url, revisions, *, down=False):
    output = io.StringIO()
    write_script(url, revisions, output, down=down)
    return output.getvalue()


def by_alembic(url, revisions, *, down=False):
    config = Config(INI, output_buffer=io.StringIO(), cmd_opts=Namespace(x=[f"url={url}"]))
    (command.downgrade if down else command.upgrade)(config, revisions, sql=True)
    return config.output_buffer.getvalue()


@pytest.mark.sample(3)
@pytest.mark.parametrize("script_of", [by_code, by_alembic])
def test_the_script_by_the_bare_driver_comes_to_the_committed_schema(place, script_of):
    url, schema = place
    run_script(url, script_of(url, "head"))
    check_that_it_is_the_committed_schema(url, schema, by_script=True)
    run_script(url, script_of(url, "head:base", down=True))
    with engine_on(url, schema) as engine, engine.connect() as connection:
        assert inspect(connection).get_table_names() == ["lynkr_store_alembic_version"]
        assert revisions.current(connection) is None
    upgrade(url)  # and the library goes on from there
    check_that_it_is_the_committed_schema(url, schema, by_script=True)


def test_the_command_prints_the_same_scripts(place, lynkr_store, alembic, capfd):
    url, _ = place
    for revisions_, down in (("head", False), ("0003:head", False), ("head:0002", True)):
        word = "downgrade" if down else "upgrade"
        expected = by_code(url, revisions_, down=down)
        assert lynkr_store(word, revisions_, "--sql", "--url", url) == 0
        assert capfd.readouterr().out == expected
        alembic("-x", f"url={url}", word, revisions_, "--sql")
        assert capfd.readouterr().out == expected


@pytest.mark.sample(3)
@pytest.mark.parametrize("since", REVISIONS[:-1])
def test_a_script_from_any_revision_comes_to_the_committed_schema(empty_url, since):
    upgrade(empty_url, since)
    with engine_on(empty_url) as engine:
        with engine.begin() as connection:
            connection.execute(
                text(
                    "INSERT INTO routing_telemetry (request_id, timestamp, provider) "
                    "VALUES ('r', 1, 'p')"
                )
            )
        run_script(empty_url, by_code(empty_url, f"{since}:head"))
        check_that_it_is_the_committed_schema(empty_url, by_script=True)
        run_script(empty_url, by_code(empty_url, f"head:{since}", down=True))
        assert revision_of(empty_url) == since
        down = schema_of(engine)
        upgrade(empty_url)
        downgrade(engine, since)
        assert schema_of(engine) == down, "the same as a downgrade that was not scripted"
        with engine.connect() as connection:
            kept = connection.scalars(text("SELECT request_id FROM routing_telemetry"))
            assert kept.all() == ["r"]


@pytest.mark.parametrize(
    "name", ["two words", 'a "b"', "back\\slash", "Ünï", "50%", "a :b", "a\tb"]
)
def test_a_script_takes_any_schemas_name_as_it_is(new_url, monkeypatch, name):
    url = new_url(POSTGRES[-1])
    monkeypatch.setenv("LYNKR_STORE_SCHEMA", name)
    run_script(url, by_code(url, "head"))
    assert revision_of(url, name) == revisions.head()
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT DISTINCT schemaname FROM pg_tables WHERE tablename LIKE '%telemetry'"
        )
        assert found.fetchall() == [(name,)]


@pytest.mark.parametrize("way", ["upgrade", "alembic elsewhere", "lynkr-store"])
def test_a_setting_that_is_wrong_and_not_needed_stops_no_migration(new_url, monkeypatch, way):
    url = new_url("sqlite-file")
    monkeypatch.setenv("LYNKR_STORE_URL", url)
    monkeypatch.setenv("LYNKR_STORE_BATCH_MAX_ROWS", "nonsense")
    if way == "upgrade":
        upgrade(url)
    else:
        subprocess.run([*PROGRAMS[way][0], "upgrade", "head"], check=True, capture_output=True)
    assert revision_of(url) == revisions.head()


HOSTILE = "CREATE TABLE public.planted ()"
HOSTILE_NAMES = [
    f"$make$; {HOSTILE}; --",
    f"$${HOSTILE}$$",
    f"'; {HOSTILE}; --",
    f"\\'; {HOSTILE}; --",
    f"\\\\'; {HOSTILE}; --",
    f'"; {HOSTILE}; --',
    f"'') IS NULL THEN {HOSTILE}; --",
    f"*/ {HOSTILE}; /*",
    f"\n\\! \n{HOSTILE};",
]


@pytest.mark.sample(5)
@pytest.mark.parametrize("standard", ["on", "off"])
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_schemas_name_is_a_name_in_a_script_whatever_it_says(
    new_url, monkeypatch, name, standard
):
    url = new_url(POSTGRES[-1])
    monkeypatch.setenv("LYNKR_STORE_SCHEMA", name)
    run_script(url, f"SET standard_conforming_strings = {standard}; {by_code(url, 'head')}")
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT DISTINCT schemaname FROM pg_tables "
            "WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        )
        assert found.fetchall() == [(name,)]


def test_the_script_runs_for_a_user_with_rights_on_the_schema(postgres_url, monkeypatch):
    monkeypatch.setenv("LYNKR_STORE_SCHEMA", SCHEMA)
    role = f"poor_{secrets.token_hex(4)}"
    name = sql.Identifier(role)
    with psycopg.connect(postgres_url, autocommit=True) as owner:
        owner.execute(sql.SQL("CREATE ROLE {} LOGIN").format(name))
        try:
            owner.execute(sql.SQL("CREATE SCHEMA telemetry AUTHORIZATION {}").format(name))
            url = make_url(postgres_url).set(username=role).render_as_string(hide_password=False)
            run_script(url, by_code(url, "head"))
            check_that_it_is_the_committed_schema(url, SCHEMA)
        finally:
            owner.execute(sql.SQL("DROP OWNED BY {}").format(name))
            owner.execute(sql.SQL("DROP ROLE {}").format(name))


# -- which URL -------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """URLs of files that are not there yet."""
    return [f"sqlite:///{tmp_path}/{name}.db" for name in ("option", "environment", "ini")]


@pytest.mark.parametrize(
    "given", [("option", "environment", "ini"), ("environment", "ini"), ("ini",)]
)
def test_the_option_beats_the_environment_which_beats_the_ini_file(
    tmp_path, monkeypatch, alembic, three, given
):
    option, environment, in_file = three
    ini = tmp_path / "of a host's.ini"
    lines = Path(INI).read_text().replace("%(here)s", str(ROOT))
    ini.write_text(re.sub(r"(?m)^sqlalchemy.url = .*$", f"sqlalchemy.url = {in_file}", lines))
    if "environment" in given:
        monkeypatch.setenv("LYNKR_STORE_URL", environment)
    alembic(*(["-x", f"url={option}"] if "option" in given else []), "upgrade", "head", ini=ini)
    assert [path.stem for path in tmp_path.glob("*.db")] == [given[0]]
    check_that_it_is_the_committed_schema(f"sqlite:///{tmp_path}/{given[0]}.db")


@pytest.mark.parametrize("given", ["option", "environment", "default"])
def test_the_commands_option_beats_the_environment(
    tmp_path, monkeypatch, lynkr_store, three, given, capsys
):
    option, environment, _ = three
    monkeypatch.chdir(tmp_path)
    if given != "default":
        monkeypatch.setenv("LYNKR_STORE_URL", environment)
    assert lynkr_store("upgrade", *(["--url", option] if given == "option" else [])) == 0
    assert capsys.readouterr().out == f"at revision {revisions.head()}\n"
    made = {"option": "option.db", "environment": "environment.db"}.get(
        given, ".lynkr/telemetry.db"
    )
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.db")] == [made]


ODD_FILES = ["a b/c d.db", "50% off.db", "a:b@c.db", "at#hash.db", "why?.db", "数据.db", "it's.db"]


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_files_odd_name_is_taken_as_it_is_by_every_way(tmp_path, name, alembic, lynkr_store):
    path = tmp_path / name
    url = URL.create("sqlite", database=str(path))
    written = url.render_as_string(hide_password=False)
    alembic("-x", f"url={written}", "upgrade", "0001")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert lynkr_store("upgrade", "0002", "--url", written) == 0
    upgrade(url, "0003")
    upgrade(written, "0004")
    with application.engine_on(written) as host:
        upgrade(host)
    assert [p for p in tmp_path.rglob("*.db") if p.is_file()] == [path]
    check_that_it_is_the_committed_schema(written)


ODD_USER = "o'brien @:/%40 #?é"
ODD_PASSWORD = "p@ss:w/rd %41 %?#&=é+"  # noqa: S105 - of a role that the test makes
ODD_DATABASE = "per%cent a+b/c?d#é %41"


@pytest.fixture
def behind_a_password(postgres_url, server_of, request):
    """The URL of an oddly named database for a user with an odd name who must give a password."""
    if EXTERNAL:
        pytest.skip("who may log in is that server's business")
    target = make_url(postgres_url)
    database = f"{ODD_DATABASE} {secrets.token_hex(4)}"
    url = URL.create(
        "postgresql",
        ODD_USER,
        ODD_PASSWORD,
        database=database,
        query=target.query,
    )
    with psycopg.connect(postgres_url, autocommit=True) as owner:
        [hba] = owner.execute("SHOW hba_file").fetchone()
        rules = Path(hba).read_text()
        name = sql.Identifier(ODD_USER)
        owner.execute(
            sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(name, sql.Literal(ODD_PASSWORD))
        )
        owner.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(database), name))
        try:
            Path(hba).write_text(f'local all "{ODD_USER}" scram-sha-256\n{rules}')
            owner.execute("SELECT pg_reload_conf()")
            _wait_until_refused(url.set(password="wrong"))  # noqa: S106 - of nobody
            yield url
        finally:
            Path(hba).write_text(rules)
            owner.execute("SELECT pg_reload_conf()")
            owner.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(database)))
            owner.execute(sql.SQL("DROP ROLE {}").format(name))


def _wait_until_refused(url):
    """The server reads its rules again in its own time."""
    deadline = time.monotonic() + 30
    with application.engine_on(url.render_as_string(hide_password=False)) as engine:
        while time.monotonic() < deadline:
            try:
                engine.connect().close()
            except OperationalError:
                return
            time.sleep(0.01)
    raise AssertionError("the server goes on letting everybody in")


def test_odd_names_and_passwords_reach_the_server_by_every_way(
    behind_a_password, alembic, lynkr_store, monkeypatch
):
    url = behind_a_password
    written = url.render_as_string(hide_password=False)
    alembic("-x", f"url={written}", "upgrade", "0001")
    assert revision_of(url) == "0001"
    assert lynkr_store("upgrade", "0002", "--url", written) == 0
    upgrade(url, "0003")
    upgrade(written, "0004")
    with application.engine_on(written) as host:
        upgrade(host, "0005")
    asynchronous = create_async_engine(url.set(drivername="postgresql+psycopg"))
    upgrade(asynchronous, "0006")
    asyncio.run(asynchronous.dispose())
    monkeypatch.setenv("LYNKR_STORE_URL", written)
    alembic("upgrade", "head")
    check_that_it_is_the_committed_schema(written)
    with Store() as store:
        store.record(provider="p")
        assert store.flush(30)
        assert len(store.query()) == 1
    [script] = {by_code(target, "head") for target in (url, written)}
    assert "p@ss" not in script


def test_no_way_in_repeats_the_password_when_the_server_refuses_it(
    behind_a_password, lynkr_store, capfd, caplog
):
    caplog.set_level(logging.DEBUG)
    secret = "wrong @:/ %41 one"  # noqa: S105 - of nobody
    url = behind_a_password.set(password=secret)
    with pytest.raises(StoreUnavailable) as refused:
        upgrade(url)
    code = lynkr_store("upgrade", "--url", url.render_as_string(hide_password=False))
    assert code == commands.Exit.UNREACHABLE
    said = capfd.readouterr()
    for words in (str(refused.value), said.err, said.out, caplog.text):
        assert secret not in words
        assert "wrong%20" not in words and "wrong @" not in words and "wrong+" not in words
    assert "authentication failed" in said.err


def test_the_servers_socket_may_be_named_in_the_query(postgres_url):
    host = make_url(postgres_url).query.get("host")
    if not host:
        pytest.skip("the server listens elsewhere")
    port = make_url(postgres_url).query["port"]
    database = make_url(postgres_url).database
    forms = (
        f"postgresql://postgres@/{database}?host={host}&port={port}",
        f"postgresql://postgres@:{port}/{database}?host={host}",
        f"postgresql:///{database}?user=postgres&host={host}&port={port}",
        f"postgresql+psycopg://postgres@/{database}?host=/nowhere:1&host={host}:{port}",
    )
    for revision, url in zip(REVISIONS, forms, strict=False):
        upgrade(url, revision)
        assert revision_of(url) == revision


def settings_of(engine):
    names = ("work_mem", "application_name", "search_path", "statement_timeout", "timezone")
    with engine.connect() as connection:
        return {name: connection.scalar(text(f"SHOW {name}")) for name in names}


@pytest.mark.parametrize("schema", [None, "two words"])
@pytest.mark.parametrize(
    "options",
    ["-c work_mem=5MB -c search_path=elsewhere", ("-c work_mem=5MB", "--search_path=elsewhere")],
    ids=["once", "twice"],
)
def test_options_of_the_url_are_kept_with_ours(postgres_url, options, schema):
    query = {"options": options, "application_name": "a gateway's"}
    url = make_url(postgres_url).update_query_dict(query)
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE SCHEMA elsewhere")
    upgrade(create_store_engine(url, schema=schema))
    with engine_on(url, schema) as engine:
        assert settings_of(engine) == {
            "work_mem": "5MB",
            "application_name": "a gateway's",
            "search_path": "elsewhere, pg_temp" if schema is None else f'"{schema}", pg_temp',
            "statement_timeout": "30s",
            "timezone": "UTC",
        }
        with engine.connect() as connection:
            where = connection.scalar(text("SELECT current_schema()"))
            assert where == (schema or "elsewhere")
            assert inspect(connection).has_table("routing_telemetry", schema=where)
    with engine_on(url.update_query_dict({"options": "-c statement_timeout=7s"})) as engine:
        assert settings_of(engine)["statement_timeout"] == "7s", "the URL's own wins"


# -- a good guest ----------------------------------------------------------------------------------


def logging_as_it_is():
    found = {"root": logging.root}
    found |= {
        n: a for n, a in logging.root.manager.loggerDict.items() if isinstance(a, logging.Logger)
    }
    return {
        name: (
            logger.level,
            logger.disabled,
            logger.propagate,
            [*logger.handlers],
            [*logger.filters],
        )
        for name, logger in found.items()
    } | {"disable": logging.root.manager.disable, "last resort": logging.lastResort}


@pytest.fixture
def hosts_logging():
    """Loggers, levels and handlers as a host has set them up."""
    names = ("", "host", "alembic", "alembic.runtime.migration", "sqlalchemy.engine", "lynkr_store")
    before = {
        name: (logging.getLogger(name).level, logging.getLogger(name).disabled) for name in names
    }
    handler = logging.StreamHandler(io.StringIO())
    logging.getLogger().addHandler(handler)
    for name, level in zip(names, (30, 10, 40, 0, 30, 20), strict=True):
        logging.getLogger(name).setLevel(level)
    logging.getLogger("host.quiet").disabled = True
    yield handler.stream
    logging.getLogger().removeHandler(handler)
    for name, (level, disabled) in before.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).disabled = disabled


def test_no_way_in_changes_the_hosts_logging_or_prints_anything(
    place, hosts_logging, alembic, capfd
):
    url, schema = place
    upgrade("sqlite://")  # whatever is imported, or made on first use, is there now
    before = logging_as_it_is()
    upgrade(url, "0002")
    with engine_on(url, schema) as engine:
        downgrade(engine, "0001")
    alembic("-x", f"url={url}", "upgrade", "head")
    by_code(url, "head")
    settings = StoreSettings(url=url, upgrade_on_open=True)
    with Store(settings=settings) as store:
        store.query()
    after = logging_as_it_is()
    assert {name: after[name] for name in before} == before
    assert not [name for name in after.keys() - before.keys() if after[name][3]], "no handlers"
    said = capfd.readouterr()
    assert (said.out, said.err, hosts_logging.getvalue()) == ("", "", "")


def test_a_host_that_asks_for_alembics_log_gets_it(tmp_path, caplog):
    caplog.set_level(logging.INFO, "alembic")
    upgrade(f"sqlite:///{tmp_path}/telemetry.db")
    running = [r.getMessage() for r in caplog.records if r.name == "alembic.runtime.migration"]
    assert len([words for words in running if "Running upgrade" in words]) == len(REVISIONS)


def with_connection(connection, **options):
    config = Config(INI, **options)
    config.attributes["connection"] = connection
    return config


def test_a_host_runs_the_revisions_in_a_transaction_of_its_own(empty_url):
    with engine_on(empty_url) as host:
        with host.connect() as connection:
            connection.execute(text("CREATE TABLE of_the_host (id INTEGER)"))
            command.upgrade(with_connection(connection), "head")
            assert inspect(connection).has_table("routing_telemetry")
            connection.rollback()
        with host.connect() as connection:
            assert inspect(connection).get_table_names() == []
        with host.begin() as connection:
            connection.execute(text("CREATE TABLE of_the_host (id INTEGER)"))
            command.upgrade(with_connection(connection), "head")
        with host.begin() as connection:
            connection.execute(text("DROP TABLE of_the_host"))
    check_that_it_is_the_committed_schema(empty_url)
    with engine_on(empty_url) as host, host.begin() as connection:
        command.downgrade(with_connection(connection), "0003")
        command.check(with_head_first(connection))
    check_that_it_is_the_committed_schema(empty_url)


def with_head_first(connection):
    command.upgrade(with_connection(connection), "head")
    return with_connection(connection, stdout=io.StringIO())


@pytest.mark.parametrize("backend", ON_DISK)
def test_a_hosts_plain_connection_serves_too_and_in_one_transaction(new_url, backend, monkeypatch):
    def fail(*args):
        raise RuntimeError("half-way")

    url = new_url(backend)
    if backend == "sqlite-file":
        create_store_engine(url).connect().close()  # makes the folder
    with application.engine_on(url) as host:
        with monkeypatch.context() as patched:
            patched.setattr("lynkr_store.migrate.operations.add_columns", fail)
            with pytest.raises(RuntimeError, match="half-way"), host.begin() as connection:
                command.upgrade(with_connection(connection), "head")
        with host.connect() as connection:
            assert inspect(connection).get_table_names() == []
        with host.begin() as connection:
            command.upgrade(with_connection(connection), "head")
        with host.connect() as connection:
            assert revisions.current(connection) == revisions.head()
    check_that_it_is_the_committed_schema(url)


@pytest.mark.parametrize("whose", ["the host's", "the store's"])
@pytest.mark.parametrize("backend", ON_DISK)
def test_what_a_connection_without_a_transaction_was_given_is_committed(new_url, backend, whose):
    """As Alembic itself does: who began a transaction ends it, who did not need not."""
    url = new_url(backend)
    with engine_on(url) as own, application.engine_on(url) as host:
        own.connect().close()  # makes the folder
        with (own if whose == "the store's" else host).connect() as connection:
            command.upgrade(with_connection(connection), "head")
    check_that_it_is_the_committed_schema(url)


def test_a_hosts_connection_is_put_into_the_schema_of_the_environment(postgres_url, monkeypatch):
    monkeypatch.setenv("LYNKR_STORE_SCHEMA", SCHEMA)
    with application.engine_on(postgres_url) as host:
        with host.begin() as connection:
            command.upgrade(with_connection(connection), "head")
            assert connection.scalar(text("SHOW search_path")) == '"$user", public', "as it was"
        with host.connect() as connection:
            assert inspect(connection).get_table_names() == []
    check_that_it_is_the_committed_schema(postgres_url, SCHEMA)


def test_a_connection_of_an_engine_in_a_schema_stays_there(postgres_url):
    with engine_on(postgres_url, SCHEMA) as engine:
        with engine.begin() as connection:
            connection.execute(text("CREATE SCHEMA telemetry"))
        with engine.begin() as connection:
            command.upgrade(with_connection(connection), "head")
    check_that_it_is_the_committed_schema(postgres_url, SCHEMA)


# -- a schema that a newer release made ------------------------------------------------------------


def get_ahead(url, schema=None, *, rolling):
    """Leave the schema as release 9.9 does, which has a revision more."""
    upgrade(url)
    with engine_on(url, schema) as engine, engine.begin() as connection:
        connection.execute(text("ALTER TABLE routing_telemetry ADD COLUMN newer TEXT"))
        connection.execute(text("UPDATE lynkr_store_alembic_version SET version_num = '9998'"))
        note = "INSERT INTO lynkr_store_revisions VALUES ('9998', :rolling, :after, '9.9')"
        connection.execute(text(note), {"rolling": rolling, "after": revisions.head()})


def test_a_schema_that_is_harmlessly_ahead_is_left_alone_by_every_way(
    place, alembic, lynkr_store, capfd
):
    url, schema = place
    get_ahead(url, schema, rolling=1)
    with engine_on(url, schema) as engine:
        before = schema_of(engine)
        alembic("-x", f"url={url}", "upgrade", "head")
        assert lynkr_store("upgrade", "--url", url) == 0
        assert "at revision 9998" in capfd.readouterr().out
        upgrade(url)
        upgrade(engine)
        with Store(settings=StoreSettings(url=url, upgrade_on_open=True)) as store:
            assert store.query() == []
        assert schema_of(engine) == before
    assert revision_of(url, schema) == "9998"


def test_alembics_api_leaves_a_schema_that_is_harmlessly_ahead_alone(empty_url):
    get_ahead(empty_url, rolling=1)
    command.upgrade(Config(INI, cmd_opts=Namespace(x=[f"url={empty_url}"])), "head")
    with engine_on(empty_url) as engine, engine.begin() as connection:
        command.upgrade(with_connection(connection), "head")
    assert revision_of(empty_url) == "9998"


def test_a_schema_that_is_too_far_ahead_is_refused_by_every_way_with_the_release_to_install(
    place, alembic, lynkr_store, capfd
):
    url, schema = place
    get_ahead(url, schema, rolling=0)
    for way in (
        lambda: alembic("-x", f"url={url}", "upgrade", "head"),
        lambda: alembic("-x", f"url={url}", "downgrade", "0003"),
        lambda: upgrade(url),
        lambda: Store(url).query(),
    ):
        with pytest.raises(SchemaAhead, match=r"lynkr-store 9\.9 or newer"):
            way()
    assert lynkr_store("upgrade", "--url", url) == commands.Exit.NO
    assert "lynkr-store 9.9 or newer" in capfd.readouterr().err
    assert revision_of(url, schema) == "9998"


@pytest.mark.parametrize("rolling", [1, 0])
def test_the_alembic_program_ends_well_or_with_the_release_to_install(tmp_path, rolling):
    url = f"sqlite:///{tmp_path}/telemetry.db"
    get_ahead(url, rolling=rolling)
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "-c", INI, "-x", f"url={url}", "upgrade", "head"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) is bool(rolling), done.stderr
    assert ("lynkr-store 9.9 or newer" in done.stderr) is not bool(rolling)


# -- what is left to maintain() --------------------------------------------------------------------


def with_a_row_at(url, revision):
    """A database whose list indexes are still to be built, on a table with a row."""
    upgrade(url, revision)
    with engine_on(url) as engine, engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO routing_telemetry (request_id, timestamp, provider) VALUES ('r', 1, 'p')"
        )


LEFT = (
    "left to 'lynkr-store maintain': ix_routing_telemetry_model_timestamp, "
    "ix_routing_telemetry_provider_failed_timestamp, ix_routing_telemetry_tier_timestamp"
)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ON_DISK)
def test_alembic_prints_which_indexes_are_left_to_maintain(new_url, backend):
    url = new_url(backend)
    with_a_row_at(url, "0007")

    def upgrading():
        program = [sys.executable, "-m", "alembic", "-c", INI, "-x", f"url={url}"]
        return subprocess.run(
            [*program, "upgrade", "head"], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()

    assert [sorted_names(line) for line in upgrading()] == [LEFT]
    with Store(url) as store:
        store.maintain()
    assert upgrading() == []


@pytest.mark.parametrize("backend", ON_DISK)
def test_an_upgrade_by_code_logs_which_indexes_are_left_to_maintain(
    new_url, backend, caplog, capsys
):
    url = new_url(backend)
    with caplog.at_level(logging.INFO, "lynkr_store"):
        with_a_row_at(url, "0003")
        upgrade(url, "0007")
        assert caplog.records == [], "maintain() needs the head"
        upgrade(url)
    [said] = caplog.records
    assert (said.levelname, sorted_names(said.getMessage())) == ("INFO", LEFT)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("backend", ON_DISK)
def test_the_command_names_indexes_only_at_the_head(new_url, backend, lynkr_store, capsys):
    url = new_url(backend)
    with_a_row_at(url, "0003")
    for revision, said in (("0007", 0), ("head", 1)):
        assert lynkr_store("upgrade", revision, "--url", url) == 0
        assert capsys.readouterr().out.count("left to") == said


def sorted_names(line):
    said, _, names = line.partition(": ")
    return f"{said}: {', '.join(sorted(names.split(', ')))}"
