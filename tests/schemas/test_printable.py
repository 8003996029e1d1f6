"""What others named cannot make a terminal obey: in errors, in logs, in what the command prints."""

import contextlib
import json
import logging
import re
import sqlite3
import warnings

import pytest
from sqlalchemy import create_engine

from lynkr_store import (
    AdoptionRefused,
    LynkrStoreError,
    SchemaAhead,
    Store,
    create_store_engine,
    exceptions,
    writing,
)
from lynkr_store.cli import render
from lynkr_store.exceptions import MissingDriver, printable
from lynkr_store.migrate import revisions
from lynkr_store.migrate.upgrade import upgrade
from lynkr_store.testing import RecordFactory
from tests.cli.test_commands import done, run
from tests.conftest import POSTGRES
from tests.support.recorded import gateway_file

NOW = 1_750_000_000_000
ODD = "\x1b]0;owned\x07\x9b31m\u202e[red]x[link=http://e]y[/link]:smile:\r\nok"
"""A terminal's title, a colour by one character, a turned direction, rich's markup, a line."""
SHOWN = r"\x1b]0;owned\x07\x9b31m\u202e[red]x[link=http://e]y[/link]:smile:\r\nok"


def quoted(name):
    return '"' + name.replace('"', '""') + '"'


def execute(engine, *statements):
    with writing(engine).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def check_obeyed_by_none(*said):
    for text in said:
        assert all(c.isprintable() or c == "\n" for c in text), ascii(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (ODD, SHOWN),
        ("", ""),
        ("größe 模型 🚀 [red] a\\b", "größe 模型 🚀 [red] a\\b"),
        ("\x00\x7f\x85\u2028\u200b\ufeff", r"\x00\x7f\x85\u2028\u200b\ufeff"),
        ("\ud800\U000e0001", r"\ud800\U000e0001"),
        ('it\'s "quoted"\t', 'it\'s "quoted"\\t'),
    ],
)
def test_what_a_terminal_obeys_or_hides_is_shown_as_an_escape(text, shown):
    assert printable(text) == shown
    assert printable(printable(text)) == shown


def test_every_error_of_the_librarys_own_is_printable():
    kinds = [
        kind
        for kind in vars(exceptions).values()
        if isinstance(kind, type) and issubclass(kind, LynkrStoreError)
    ]
    assert len(kinds) > 10
    for kind in kinds:
        assert SHOWN in str(kind(ODD))
        check_obeyed_by_none(str(kind(ODD)), repr(kind(ODD)))
    assert AdoptionRefused(ODD).difference == SHOWN
    assert str(MissingDriver("plain")) == "plain"


# -- the command -------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite-file", POSTGRES[-1]])
def url(request, new_url):
    """A database in which whatever has a name has an odd one."""
    url = new_url(request.param, at_head=True)
    with Store(url) as store:
        for n in range(3):
            names = dict.fromkeys(("provider", "model", "tier", "error_type"), ODD)
            store.record(RecordFactory(timestamp=NOW + n, **names))
        assert store.flush(30)
    return url


@pytest.fixture
def engine(url):
    engine = create_store_engine(url)
    yield engine
    engine.dispose()


WHOLE = ("--since", "0", "--until", str(NOW + 100))


@pytest.mark.parametrize("colour", [{}, {"FORCE_COLOR": "1", "NO_COLOR": ""}])
def test_values_that_clients_chose_are_shown_and_not_obeyed(url, colour):
    for command in (["stats"], ["stats", "--provider", ODD], ["query"]):
        said = done(*command, "--url", url, *WHOLE, COLUMNS="400", **colour)
        said = re.sub(r"\x1b\[[0-9;]*m", "", said)  # rich's own colours
        check_obeyed_by_none(said)
        assert SHOWN in said.replace("\n", ""), "on one line or several"


def test_json_escapes_what_a_terminal_obeys(url):
    for command in (["stats"], ["query"]):
        said = done(*command, "--url", url, *WHOLE, "--json")
        check_obeyed_by_none(said)
        assert r"\u001b]0;owned\u0007\u009b31m\u202e[red]" in said
    [first, *_] = json.loads(done("query", "--url", url, *WHOLE, "--gateway"))
    assert first["provider"] == first["model"] == first["error_type"] == ODD
    texts = ["größe 🚀", "\U000e0001\ud800", '\u2028\x85 a\\b "c"']
    for text in texts:
        assert (
            json.loads("".join(map(render._escaped, json.dumps(text, ensure_ascii=False)))) == text
        )


def test_columns_and_indexes_of_odd_names_are_said_by_check(url, engine):
    execute(
        engine,
        f"ALTER TABLE routing_telemetry ADD COLUMN {quoted(ODD)} TEXT",
        f"CREATE INDEX {quoted('i' + ODD)} ON routing_telemetry ({quoted(ODD)})",
        "ALTER TABLE routing_telemetry DROP COLUMN finish_reason",
        f"ALTER TABLE routing_telemetry ADD COLUMN finish_reason {odd_type(engine)}",
    )
    for options in ([], ["--json"]):
        checked = run("check", "--url", url, *options)
        check_obeyed_by_none(checked.stdout, checked.stderr)
        assert checked.returncode == 1
        assert "finish_reason" in checked.stdout


def odd_type(engine):
    if engine.dialect.name == "sqlite":
        return "INTEGER"
    execute(engine, f"CREATE DOMAIN {quoted('d' + ODD)} AS int")
    return quoted("d" + ODD)


def test_a_column_of_a_type_that_nobody_knows_is_shown_in_the_warning(url, engine):
    """SQLAlchemy warns of it, with its names."""
    if engine.dialect.name != "sqlite":
        execute(engine, f"CREATE TYPE {quoted('t' + ODD)} AS (n int)")
        execute(
            engine,
            f"ALTER TABLE routing_telemetry ADD COLUMN {quoted(ODD)} {quoted('t' + ODD)}",
        )
    else:
        execute(
            engine,
            f"ALTER TABLE routing_telemetry ADD COLUMN {quoted(ODD)} {quoted('t' + ODD)}",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        checked = run("check", "--url", url)
    assert checked.returncode == 0, checked.stdout
    check_obeyed_by_none(checked.stdout, checked.stderr)
    if engine.dialect.name != "sqlite":
        assert "warning: Did not recognize type" in checked.stderr


def test_a_revision_of_an_odd_name_is_shown(url, engine):
    execute(engine, "UPDATE lynkr_store_alembic_version SET version_num = 'x'")
    with engine.begin() as connection:
        if engine.dialect.name != "sqlite":
            connection.exec_driver_sql(
                "ALTER TABLE lynkr_store_alembic_version ALTER COLUMN version_num TYPE text"
            )
        mark = "?" if engine.dialect.name == "sqlite" else "%s"
        connection.exec_driver_sql(
            f"UPDATE lynkr_store_alembic_version SET version_num = {mark}", (ODD,)
        )
    for command in ("check", "stats", "upgrade", "maintain"):
        finished = run(command, "--url", url)
        assert finished.returncode == 1
        assert SHOWN in finished.stderr
        check_obeyed_by_none(finished.stdout, finished.stderr)
    for options in ([], ["--json"]):
        check_obeyed_by_none(done("health", "--url", url, *options))
    with pytest.raises(SchemaAhead) as caught:
        upgrade(engine)
    check_obeyed_by_none(str(caught.value))
    with engine.begin() as connection:  # and a newer release that says so of itself
        mark = "?, ?, ?, ?" if engine.dialect.name == "sqlite" else "%s, %s, %s, %s"
        connection.exec_driver_sql(
            f"INSERT INTO lynkr_store_revisions VALUES ({mark})", (ODD, 0, revisions.head(), ODD)
        )
    finished = run("check", "--url", url)
    assert f"install lynkr-store {SHOWN}" in finished.stderr
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE lynkr_store_revisions SET rolling = 1")
    checked = run("check", "--url", url)
    assert f"revision {SHOWN}" in checked.stdout
    check_obeyed_by_none(checked.stdout, checked.stderr)


def test_a_file_is_refused_with_its_odd_names_shown(tmp_path, caplog):
    path = gateway_file(tmp_path / "telemetry.db")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(
            f"ALTER TABLE routing_telemetry ADD COLUMN {quoted(ODD)} TEXT NOT NULL DEFAULT 'x'"
        )
        connection.execute(
            f"CREATE UNIQUE INDEX {quoted('i' + ODD)} ON routing_telemetry (request_id)"
        )
    refused = run("upgrade", "--url", f"sqlite:///{path}")
    assert refused.returncode == 1
    assert f"i{SHOWN}" in refused.stderr
    check_obeyed_by_none(refused.stdout, refused.stderr)
    caplog.set_level(logging.INFO, "lynkr_store")
    with Store(f"sqlite:///{path}") as store:
        with pytest.raises(AdoptionRefused) as caught:
            store.get_stats()
        check_obeyed_by_none(str(caught.value), caught.value.difference)
        assert store.record(provider="p")
        store.flush(0.5)
        assert SHOWN in store.health().last_error
        store.close(0)
    check_obeyed_by_none(*(record.getMessage() for record in caplog.records))


def test_a_file_of_an_odd_name_is_shown(tmp_path):
    path = tmp_path / "a\x1b[31m[red]b.db"
    url = f"sqlite:///{path}"
    for command in ("stats", "check", "query"):
        finished = run(command, "--url", url)
        assert finished.returncode == 3
        assert r"a\x1b[31m[red]b.db" in finished.stderr
        check_obeyed_by_none(finished.stdout, finished.stderr)
    done("upgrade", "0003", "--url", url)
    said = done("upgrade", "--url", url, "--backup")
    assert r"copied to" in said
    assert r"a\x1b[31m[red]b.db" in said
    check_obeyed_by_none(said)


def test_a_setting_that_is_none_names_its_variable():
    finished = run("stats", LYNKR_STORE_CACHE_TTL_S="[red]\x1b[31m")
    assert finished.returncode == 2
    assert "LYNKR_STORE_CACHE_TTL_S" in finished.stderr
    check_obeyed_by_none(finished.stdout, finished.stderr)


def test_a_hosts_engine_of_an_odd_file_is_shown(tmp_path):
    store = Store(engine=create_engine(f"sqlite:///{tmp_path}/a\x1b[31m.db"))
    check_obeyed_by_none(repr(store), str(store))
    store.close()
