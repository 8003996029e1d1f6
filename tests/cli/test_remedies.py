"""What keeps the command from a database is said with its remedy, and by the right exit code."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from psycopg import sql
from sqlalchemy import make_url

from lynkr_store import SchemaError, Store, StoreSettings, upgrade
from tests.cli.test_commands import done, run
from tests.faults.test_disks import small_disk
from tests.support.recorded import ROOT

NO, UNREACHABLE = 1, 3


@pytest.fixture
def app(postgres_url):
    """A role that has what PostgreSQL gives to everybody, and the URL of the database for it."""
    role = f"app_{secrets.token_hex(4)}"
    with psycopg.connect(postgres_url, autocommit=True) as owner:
        owner.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # as of PostgreSQL 15
        owner.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
        url = make_url(postgres_url).set(username=role).render_as_string(hide_password=False)
        yield owner, role, url
        owner.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        owner.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def check_that_the_grant_is_named(owner, url, grant):
    """By every way in; and the statement that is named is the one that helps."""
    refused = run("upgrade", "--url", url)
    assert (refused.returncode, grant in refused.stderr) == (NO, True), refused.stderr
    config = Config(str(ROOT / "alembic.ini"), cmd_opts=Namespace(x=[f"url={url}"]))
    for way in (
        lambda: upgrade(url),
        lambda: command.upgrade(config, "head"),
        lambda: Store(settings=StoreSettings(url=url, upgrade_on_open=True)).query(),
    ):
        with pytest.raises(SchemaError) as said:
            way()
        assert grant in str(said.value)
    owner.execute(grant)
    done("upgrade", "--url", url)
    with Store(url) as store:
        assert store.query() == []


def test_no_right_to_create_in_public_names_the_grant(app):
    owner, role, url = app
    check_that_the_grant_is_named(owner, url, f"GRANT USAGE, CREATE ON SCHEMA public TO {role}")


def test_no_right_to_use_public_names_the_grant(app):
    owner, role, url = app
    owner.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")  # what is made is temporary then
    check_that_the_grant_is_named(owner, url, f"GRANT USAGE, CREATE ON SCHEMA public TO {role}")


def test_no_right_to_create_in_a_named_schema_names_the_grant(app, monkeypatch):
    owner, role, url = app
    monkeypatch.setenv("LYNKR_STORE_SCHEMA", "Our data")
    owner.execute('CREATE SCHEMA "Our data"')
    owner.execute(f'GRANT USAGE ON SCHEMA "Our data" TO {role}')
    grant = f'GRANT USAGE, CREATE ON SCHEMA "Our data" TO {role}'
    check_that_the_grant_is_named(owner, url, grant)


def test_a_table_of_another_role_s_needs_its_owner_and_no_grant(app):
    owner, role, url = app
    upgrade(make_url(url).set(username=owner.info.user), "0008")
    owner.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
    owner.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    refused = run("upgrade", "--url", url)
    assert refused.returncode == NO
    assert "Upgrade as the role that owns the tables" in refused.stderr
    assert "GRANT" not in refused.stderr


def test_what_the_server_says_of_a_connection_is_said_with_what_to_check(app):
    owner, role, url = app
    cases = {
        'database "nowhere" does not exist': make_url(url).set(
            database="nowhere", username=owner.info.user
        ),
        "is not permitted to log in": make_url(url),
        'role "nobody_here" does not exist': make_url(url).set(username="nobody_here"),
    }
    owner.execute(f"ALTER ROLE {role} NOLOGIN")
    for said, target in cases.items():
        for name in ("upgrade", "check", "stats", "maintain"):
            finished = run(name, "--url", target.render_as_string(hide_password=False))
            assert finished.returncode == UNREACHABLE
            assert said in finished.stderr
            assert "check the URL's host, port, user, password and database" in finished.stderr


# -- SQLite ----------------------------------------------------------------------------------------

_AS_NOBODY = """
import contextlib, io, json, os, pwd, sys
from lynkr_store import Store
from lynkr_store.cli import commands
with Store("sqlite://") as store:  # all that is loaded late is loaded
    store.record(provider="p"), store.flush(30), store.maintain()
nobody = pwd.getpwnam("nobody")
os.setgroups([]), os.setgid(nobody.pw_gid), os.setuid(nobody.pw_uid)
answers = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["lynkr-store", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            commands.main()
        except SystemExit as ended:
            answers.append([int(ended.code or 0), out.getvalue() + err.getvalue()])
print(json.dumps(answers))
"""


@pytest.fixture
def open_folder():
    """One that others may enter: pytest shuts its own whenever a run begins on the machine."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without rights")
def test_a_file_or_directory_without_rights_is_reported(open_folder):
    folder = open_folder
    for name in ("shut", "open"):
        (folder / name).mkdir()
        upgrade(f"sqlite:///{folder}/{name}/a.db")
    (folder / "shut").chmod(0o700)
    (folder / "open" / "a.db").chmod(0o644)
    upgrade(f"sqlite:///{folder}/open/secret.db")
    give = "give the path of a file that this user may read and write"
    may_not = "this user may not write the file or its directory"
    at = {
        name: f"sqlite:///{folder}/{name}"
        for name in ("shut/a.db", "open/secret.db", "open/a.db", "open/new/b.db", "open/b.db")
    }
    cases = [
        (["stats", "--url", at["shut/a.db"]], UNREACHABLE, "this user may not read its directory"),
        (["upgrade", "--url", at["shut/a.db"]], UNREACHABLE, give),
        (["stats", "--url", at["open/secret.db"]], UNREACHABLE, give),
        (["maintain", "--url", at["open/secret.db"]], UNREACHABLE, give),
        (["stats", "--url", at["open/a.db"]], 0, "no requests"),
        (["check", "--url", at["open/a.db"]], 0, "revision"),
        (["cleanup", "--older-than", "1d", "--url", at["open/a.db"]], UNREACHABLE, may_not),
        (["upgrade", "--url", at["open/new/b.db"]], UNREACHABLE, "where this user may write"),
        (["upgrade", "--url", at["open/b.db"]], UNREACHABLE, give),
    ]
    orders = json.dumps([arguments for arguments, _, _ in cases])
    started = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, orders], capture_output=True, text=True, check=False
    )
    assert started.returncode == 0, started.stderr
    for (arguments, code, words), answer in zip(cases, json.loads(started.stdout), strict=True):
        assert (answer[0], words in answer[1]) == (code, True), (arguments, answer)


def test_a_read_only_file_system_is_reported(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        url = f"sqlite:///{disk}/a.db"
        upgrade(url)
        remount = ["mount", "-o", "remount,ro", str(disk)]
        assert subprocess.run(remount, check=False, capture_output=True).returncode == 0
        assert run("stats", "--url", url).returncode == 0
        refused = run("cleanup", "--older-than", "1d", "--url", url)
        assert refused.returncode == UNREACHABLE
        assert "file system that is not read-only" in refused.stderr
        made = run("upgrade", "--url", f"sqlite:///{disk}/new/b.db")
        assert made.returncode == UNREACHABLE
        assert "cannot be created" in made.stderr


def test_a_file_that_is_no_database_is_reported(tmp_path):
    path = tmp_path / "a.db"
    path.write_bytes(b"a page of text, and long enough to be told from an empty file\n" * 200)
    for name in ("stats", "check", "upgrade", "maintain", "health"):
        finished = run(name, "--url", f"sqlite:///{path}")
        assert finished.returncode == UNREACHABLE
        if name != "health":
            assert "give another path" in finished.stderr or "give the path of" in finished.stderr
