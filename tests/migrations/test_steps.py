"""Every revision up, down and up again, on both backends, with rows in it."""

import io
import sqlite3
import subprocess
import sys
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from alembic.config import Config
from alembic.config import main as alembic_main
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, make_url, text

from lynkr_store import DowngradeRefused, LynkrStoreError, Store, create_store_engine
from lynkr_store.backend import VERSION_TABLE
from lynkr_store.db.models import Base
from lynkr_store.maintenance import indexes
from lynkr_store.migrate import revisions
from lynkr_store.migrate.comparison import drift, missing_indexes
from lynkr_store.migrate.upgrade import downgrade, upgrade
from lynkr_store.testing import RecordFactory
from tests.support.recorded import ROOT

pytestmark = pytest.mark.sample(3)

REVISIONS = ["0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0009", "0010"]


def revision_of(engine):
    with engine.connect() as connection:
        return revisions.current(connection)


def rows(connection: Connection):
    return connection.execute(text("SELECT id, provider, timestamp FROM routing_telemetry")).all()


def insert(engine, provider):
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO routing_telemetry (request_id, timestamp, provider) VALUES (:p,1,:p)"
            ),
            {"p": provider},
        )


def test_there_is_one_head():
    script = ScriptDirectory.from_config(Config(ROOT / "alembic.ini"))
    assert script.get_heads() == [REVISIONS[-1]], "merge the revisions into one line"
    assert [s.revision for s in script.walk_revisions()][::-1] == REVISIONS


def test_rows_survive_every_step_up_down_and_up(empty_engine):
    for revision in REVISIONS:
        upgrade(empty_engine, revision)
        assert revision_of(empty_engine) == revision
        insert(empty_engine, f"at {revision}")
    with empty_engine.connect() as connection:
        stored = rows(connection)
    assert len(stored) == len(REVISIONS)
    for revision in REVISIONS[-2::-1]:
        downgrade(empty_engine, revision)
        assert revision_of(empty_engine) == revision
        with empty_engine.connect() as connection:
            assert rows(connection) == stored
    upgrade(empty_engine)
    indexes.build_missing_indexes(empty_engine)
    with empty_engine.connect() as connection:
        assert rows(connection) == stored
        assert drift(connection) == []
        assert missing_indexes(connection) == []


def test_the_migrated_schema_is_the_models(empty_engine):
    upgrade(empty_engine)
    with empty_engine.connect() as connection:
        assert drift(connection) == []
        assert missing_indexes(connection) == []
        inspector = inspect(connection)
        for table in Base.metadata.tables.values():
            there = [column["name"] for column in inspector.get_columns(table.name)]
            assert there == [column.name for column in table.c]
    upgrade(empty_engine)  # a second time there is nothing to do
    assert revision_of(empty_engine) == revisions.head()


def test_drift_is_seen(empty_engine):
    upgrade(empty_engine)
    with empty_engine.begin() as connection:
        connection.execute(text("ALTER TABLE routing_telemetry DROP COLUMN trace_id"))
    with empty_engine.connect() as connection:
        [difference] = drift(connection)
    assert "trace_id" in difference


def test_other_programs_objects_are_no_drift_and_stay(empty_engine):
    upgrade(empty_engine)
    foreign = [
        "CREATE TABLE foreign_table (id INTEGER PRIMARY KEY, note TEXT)",
        "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)",
        "INSERT INTO alembic_version VALUES ('theirs')",
        "ALTER TABLE routing_telemetry ADD COLUMN theirs TEXT",
        "CREATE INDEX their_index ON routing_telemetry (theirs)",
        "DROP INDEX idx_telemetry_tier",
    ]
    with empty_engine.begin() as connection:
        for statement in foreign:
            connection.execute(text(statement))
    with empty_engine.connect() as connection:
        assert drift(connection) == []
        assert missing_indexes(connection) == ["idx_telemetry_tier"]
    downgrade(empty_engine, "base")
    upgrade(empty_engine)
    with empty_engine.connect() as connection:
        assert inspect(connection).has_table("foreign_table")
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "theirs"
        assert inspect(connection).has_table(VERSION_TABLE)


def test_downgrade_to_base_keeps_rows_unless_asked_to_drop_them(empty_engine):
    upgrade(empty_engine)
    insert(empty_engine, "kept")
    with pytest.raises(DowngradeRefused, match="drop-data"):
        downgrade(empty_engine, "base")
    assert revision_of(empty_engine) == revisions.head(), "nothing was changed"
    with empty_engine.connect() as connection:
        assert len(rows(connection)) == 1
        assert drift(connection) == []
    downgrade(empty_engine, "base", drop_data=True)
    with empty_engine.connect() as connection:
        assert not inspect(connection).has_table("routing_telemetry")
    upgrade(empty_engine)
    downgrade(empty_engine, "base")
    assert revision_of(empty_engine) is None


def test_a_table_of_savings_with_rows_is_kept_too(empty_engine):
    upgrade(empty_engine)
    with empty_engine.begin() as connection:
        connection.execute(
            text("INSERT INTO savings_events (timestamp, category, tokens_saved) VALUES (1,'c',2)")
        )
    with pytest.raises(DowngradeRefused, match="savings_events"):
        downgrade(empty_engine, "0003")
    assert revision_of(empty_engine) == revisions.head()


def test_a_failing_upgrade_leaves_nothing_behind(empty_engine, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("half-way")

    upgrade(empty_engine, "0001")
    monkeypatch.setattr("lynkr_store.migrate.operations.has_table", fail)  # revision 0004 asks it
    with pytest.raises(RuntimeError, match="half-way"):
        upgrade(empty_engine)
    assert revision_of(empty_engine) == "0001"
    with empty_engine.connect() as connection:
        there = {column["name"] for column in inspect(connection).get_columns("routing_telemetry")}
    assert len(there) == 26
    monkeypatch.undo()
    upgrade(empty_engine)
    assert revision_of(empty_engine) == revisions.head()


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def alembic(*arguments, url=None, **environment):
    """The alembic command, in this process."""
    where = [] if url is None else ["-x", f"url={url}"]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        patch.setattr(sys, "path", [*sys.path])  # it puts the checkout in front
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            alembic_main(["-c", str(ROOT / "alembic.ini"), *where, *arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        except LynkrStoreError as error:  # a traceback to whoever runs the program
            code = 1
            err.write(str(error))
    return Finished(code, out.getvalue(), err.getvalue())


def test_the_alembic_command_goes_up_checks_and_comes_down(empty_url):
    for command in (
        ["upgrade", "head"],
        ["check"],
        ["downgrade", "base"],
        ["upgrade", "head"],
        ["check"],
    ):
        done = alembic(*command, url=empty_url)
        assert done.returncode == 0, done.stderr
    engine = create_store_engine(empty_url)
    assert revision_of(engine) == revisions.head()
    insert(engine, "p")
    engine.dispose()
    refused = alembic("downgrade", "base", url=empty_url)
    assert refused.returncode != 0
    assert "drop-data=yes" in refused.stderr
    done = alembic("-x", "drop-data=yes", "downgrade", "base", url=empty_url)
    assert done.returncode == 0, done.stderr


def test_the_alembic_command_reads_the_environment(empty_url):
    assert alembic("upgrade", "head", LYNKR_STORE_URL=empty_url).returncode == 0
    engine = create_store_engine(empty_url)
    assert revision_of(engine) == revisions.head()
    engine.dispose()


def test_the_script_does_what_the_upgrade_does(empty_url):
    script = alembic("upgrade", "head", "--sql", url=empty_url)
    assert script.returncode == 0, script.stderr
    url = make_url(empty_url)
    if url.get_backend_name() == "sqlite":
        Path(url.database).parent.mkdir()
        with closing(sqlite3.connect(url.database)) as connection:
            connection.executescript(script.stdout)
    else:
        engine = create_store_engine(empty_url)
        with engine.connect() as connection:
            connection.connection.driver_connection.execute(script.stdout)
        engine.dispose()
    engine = create_store_engine(empty_url)
    with engine.connect() as connection:
        assert revisions.current(connection) == revisions.head()
        assert drift(connection) == []
        assert missing_indexes(connection) == []
    engine.dispose()
    down = alembic("downgrade", "head:base", "--sql", url=empty_url)
    assert down.returncode == 0, down.stderr
    assert "DROP TABLE routing_telemetry" in down.stdout


@pytest.mark.parametrize("way", ["alembic", "command", "store"])
def test_a_fresh_file_has_its_page_size_and_vacuum_by_every_way_in(tmp_path, way):
    path = tmp_path / "new" / "telemetry.db"
    url = f"sqlite:///{path}"
    if way == "alembic":
        assert alembic("upgrade", "head", url=url).returncode == 0
    elif way == "command":
        command = [sys.executable, "-m", "lynkr_store", "upgrade", "--url", url]
        assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0
    else:
        with Store(url) as store:
            store.record(RecordFactory())
    with closing(sqlite3.connect(path)) as connection:
        values = {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_size", "auto_vacuum", "journal_mode")
        }
    assert values == {"page_size": 8192, "auto_vacuum": 2, "journal_mode": "wal"}
