"""URLs: what they say, what is refused, and that no part of a password ever shows."""

import logging
import os
import subprocess
import sys

import pytest
from sqlalchemy import create_engine, event, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from lynkr_store import (
    AsyncStore,
    BadArgument,
    Store,
    StoreSettings,
    StoreUnavailable,
    UnsupportedDatabase,
    create_store_engine,
    upgrade,
)
from lynkr_store.cli import commands
from lynkr_store.db.dialect import parse_url
from lynkr_store.db.engines import create_store_async_engine
from lynkr_store.db.urls import settings_in, shown
from tests.support.recorded import ROOT
from tests.support.stores import looked

# -- passwords that are not percent-encoded --------------------------------------------------------

SPLIT_WRONGLY = {
    "a port": "postgresql://u:S3cr3t:a@b:S3cr3t@db/x",
    "an @": "postgresql://u:pa@S3cr3t@host/db",
    "an @ and a slash": "postgresql://u:pa@x/S3cr3t@host/db",
    "an @ and a question mark": "postgresql://u:pa@x?S3cr3t@host/db",
    "an @ and a parameter": "postgresql://u:pa@x?S3cr3t=S3cr3t@host/db",
    "an @ and a bracket": "postgresql://u:pa@[S3cr3t@host/db",
    "an @ in the password alone": "postgresql://u:S3cr3t@x@",
    "a slash in the user": "postgresql://u/x:S3cr3t@S3cr3t@host/db",
    "a driver": "postgresql+psycopg://u:pa@S3cr3t@host/db",
    "hosts of libpq's form": "postgresql://u:S3cr3t@h1:5432,h2:5432/db",
    "no port": "postgresql://u:S3cr3t@h:/db",
}


@pytest.mark.parametrize("url", SPLIT_WRONGLY.values(), ids=SPLIT_WRONGLY)
def test_a_password_that_is_not_percent_encoded_is_refused_and_not_repeated(url, caplog):
    caplog.set_level(logging.DEBUG)
    calls = (create_store_engine, create_store_async_engine, Store, AsyncStore, upgrade, parse_url)
    for call in calls:
        with pytest.raises(ValueError, match=r"percent-encode the user and the password") as said:
            call(url)
        assert isinstance(said.value, BadArgument)
        assert "?host=h1:5432&host=h2:5432" in str(said.value)
        assert "S3cr3t" not in f"{said.value} {said.value!r} {said.value.__cause__}"
        assert said.value.__suppress_context__ or said.value.__context__ is None
    assert "S3cr3t" not in caplog.text


def test_a_url_that_was_split_wrongly_before_is_refused_too():
    with pytest.raises(UnsupportedDatabase, match="percent-encode"):
        Store(engine=create_engine("postgresql+psycopg://u:pa@S3cr3t@host/db"))


INI = "[alembic]\nscript_location = {}\nsqlalchemy.url = {}\n"


@pytest.mark.sample(4)
@pytest.mark.parametrize("way", ["option", "environment", "ini file"])
@pytest.mark.parametrize("program", ["lynkr-store", "alembic"])
def test_every_way_to_name_the_url_says_the_same(tmp_path, program, way):
    url = SPLIT_WRONGLY["an @"]
    ini = tmp_path / "alembic.ini"
    ini.write_text(INI.format(ROOT / "migrations", url if way == "ini file" else ""))
    environment = {**os.environ, **({"LYNKR_STORE_URL": url} if way == "environment" else {})}
    if program == "alembic":
        option = ["-x", f"url={url}"] if way == "option" else []
        command = ["alembic", "-c", str(ini), *option, "upgrade", "head"]
    elif way == "ini file":
        pytest.skip("lynkr-store reads none")
    else:
        command = ["lynkr_store", "upgrade", *(["--url", url] if way == "option" else [])]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if program == "alembic" else commands.Exit.WRONG_USE)
    assert "percent-encode the user and the password" in done.stderr
    assert "S3cr3t" not in done.stderr + done.stdout


def test_a_percent_sign_in_an_ini_file_is_not_repeated(tmp_path):
    ini = tmp_path / "alembic.ini"
    ini.write_text(INI.format(ROOT / "migrations", "postgresql://u:pa%40S3cr3t@host/db"))
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "-c", str(ini), "upgrade", "head"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "sqlalchemy.url: in an ini file write %% for each %" in done.stderr
    assert "S3cr3t" not in done.stderr + done.stdout


PASSWORDS = ["p:a", "p/a", "p?a", "p#a", "p%zz", "p a", "[p]", "p&a=b", "p\\a", "p'a", "pä"]


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_that_can_be_recognised_is_taken_as_it_is_and_never_shows(tmp_path, password):
    secret = f"S3cr3t{password}S3cr3t"
    url = f"postgresql://u:{secret}@/db?host={tmp_path}"
    with Store(url) as store:
        assert store.engine.url.password == secret
        with pytest.raises(StoreUnavailable) as refused:
            store.query()
        said = f"{store!r} {store.engine!r} {store.settings!r} {refused.value}"
        assert "S3cr3t" not in said + str(looked(store).last_error)
        store.close(0)


# -- passwords in the query ------------------------------------------------------------------------

IN_QUERY = ["password=S3cr3t", "user=me&password=S3cr3t", "sslpassword=S3cr3t"]


@pytest.mark.parametrize("query", IN_QUERY)
def test_a_password_in_the_query_never_shows(tmp_path, query, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    url = f"postgresql:///db?host={tmp_path}&{query}"
    said = []
    with Store(settings=StoreSettings(url=url)) as store:
        with pytest.raises(StoreUnavailable) as refused:
            store.query()
        said += [store, store.settings, store.engine, refused.value, looked(store).last_error]
        store.close(0)
    for create in (create_engine, create_async_engine):
        host = create(make_url(url).set(drivername="postgresql+psycopg"))
        open_ = Store if create is create_engine else AsyncStore
        said.append(open_(engine=host))
    monkeypatch.setattr(sys, "argv", ["lynkr-store", "upgrade", "--url", url])
    with pytest.raises(SystemExit):
        commands.main()
    printed = capfd.readouterr()
    words = " ".join(f"{each} {each!r}" for each in said)
    assert str(tmp_path).replace("/", "%2F") in words, "it is the password that is hidden"
    assert "S3cr3t" not in words + caplog.text + printed.out + printed.err


def arguments_of(engine):
    """What the engine gives to its driver."""
    seen = {}

    def do_connect(dialect, record, arguments, options):
        seen.update(options)
        raise StoreUnavailable("nobody is to be called")

    sync_engine = getattr(engine, "sync_engine", engine)
    event.listen(sync_engine, "do_connect", do_connect)
    with pytest.raises(StoreUnavailable, match="nobody"):
        sync_engine.raw_connection()
    return seen


@pytest.mark.parametrize("query", IN_QUERY)
@pytest.mark.parametrize("create", [create_store_engine, create_store_async_engine])
def test_a_password_in_the_query_reaches_the_driver(query, create):
    engine = create(f"postgresql://you@h/db?{query}")
    seen = arguments_of(engine)
    name = query.rpartition("&")[2].partition("=")[0]
    assert seen[name] == "S3cr3t"
    assert seen["user"] == ("me" if "user=" in query else "you")
    assert "S3cr3t" not in repr(engine)


# -- other parameters ------------------------------------------------------------------------------

CREATE = [create_store_engine, create_store_async_engine]

REFUSED = {
    "autocommit=true": "has no parameter 'autocommit'",
    "row_factory=x": "has no parameter 'row_factory'",
    "cursor_factory=x": "has no parameter 'cursor_factory'",
    "context=x": "has no parameter 'context'",
    "conninfo=host%3Dx": "has no parameter 'conninfo'",
    "pool_size=5": "has no parameter 'pool_size'",
    "plugin=x": "plugins of SQLAlchemy",
    "prepare_threshold=often": "prepare_threshold must be a whole number",
    "prepare_threshold=-1": "prepare_threshold must be a whole number",
    "prepare_threshold=1&prepare_threshold=2": "prepare_threshold is given twice",
    "connect_timeout=soon": "connect_timeout must be a whole number",
    "connect_timeout=1&connect_timeout=2": "connect_timeout is given twice",
    "sslmode=a&sslmode=b": "sslmode is given twice",
    "password=a&password=b": "password is given twice",
    "client_encoding=latin1": "client_encoding: the store always uses UTF-8",
}


@pytest.mark.parametrize("create", CREATE)
@pytest.mark.parametrize(("query", "said"), REFUSED.items())
def test_a_parameter_that_cannot_work_is_refused_by_name(create, query, said):
    with pytest.raises(BadArgument, match=said):
        create(f"postgresql://u@h/db?{query}")


GIVEN = {
    "connect_timeout=3": {"connect_timeout": 3},
    "": {"connect_timeout": 5, "client_encoding": "UTF8", "options": ""},
    "client_encoding=utf-8": {"client_encoding": "UTF8"},
    "application_name=me%40here": {"application_name": "me@here"},
    "application_name=me@here": {"application_name": "me@here"},
    "keepalives_idle=7": {"keepalives_idle": "7", "keepalives_count": 3},
    "host=h1:5432&host=h2:5433": {"host": "h1,h2", "port": "5432,5433"},
    "options=-c%20jit%3Don&options=-c%20a.b%3D1": {"options": "-c jit=on -c a.b=1"},
    "target_session_attrs=read-write": {"target_session_attrs": "read-write"},
    "prepare_threshold=0": {"prepare_threshold": None},  # until a connection is found to be direct
}


@pytest.mark.parametrize("create", CREATE)
@pytest.mark.parametrize(("query", "given"), GIVEN.items())
def test_a_parameter_reaches_the_driver(create, query, given, monkeypatch):
    monkeypatch.setenv("PGOPTIONS", "-c search_path=elsewhere")
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    seen = arguments_of(create(f"postgresql://u@/db?{query}"))
    assert {name: seen[name] for name in given} == given


@pytest.mark.parametrize("query", ["timeout=soon", "plugin=x", "detect_types=x"])
def test_a_parameter_of_a_file_that_cannot_work_is_refused(tmp_path, query):
    for create in CREATE:
        with pytest.raises(BadArgument, match="url: "):
            create(f"sqlite:///{tmp_path}/t.db?{query}")


OPTIONS = {
    "-c work_mem=5MB -c search_path=elsewhere": [
        ("work_mem", "5MB"),
        ("search_path", "elsewhere"),
    ],
    "-cstatement_timeout=7s  --search-path=a\\ b,c -c  Jit=on": [
        ("statement_timeout", "7s"),
        ("search_path", "a b,c"),
        ("jit", "on"),
    ],
    '-c search_path="a\\\\b"': [("search_path", '"a\\b"')],
    "-B 100 -c x -c": [],
    "": [],
}


@pytest.mark.parametrize(("options", "settings"), OPTIONS.items())
def test_settings_are_found_in_startup_options(options, settings):
    assert list(settings_in(options)) == settings


def test_what_people_see_of_a_url_is_all_but_the_passwords():
    url = make_url("postgresql://u:a@h/db?sslpassword=b&password=c&sslmode=require")
    assert shown(url) == "postgresql://u:***@h/db?sslmode=require"
    assert shown(make_url("sqlite:////x/y.db")) == "sqlite:////x/y.db"
