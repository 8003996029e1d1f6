"""Every shape a gateway's file can have, with the oddest values, is adopted as it is."""

import itertools
import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from lynkr_store import Store, create_store_engine
from lynkr_store.db.models import TELEMETRY
from lynkr_store.maintenance import indexes
from lynkr_store.migrate import comparison, revisions
from lynkr_store.migrate import upgrade as migrate
from tests.support.gateway import (
    CORE,
    LATER,
    PINS,
    PINS_INDEX,
    RELEASES,
    SAVINGS_INDEX,
    STORED,
    connect,
    open_as,
    say,
)
from tests.support.recorded import ADDITIVE, INDEXES, OWN_INDEXES, ROOT, SAVINGS, gateway_file

OWN = tuple(c.name for c in TELEMETRY.c if c.name not in {"id", *CORE, *LATER})
"""The columns that no gateway knows."""

# As SQL says them, for some of them no driver can bind.
ODD = {
    "INTEGER": (
        "NULL",
        "0",
        "12.5",
        "'many'",
        "'500'",
        "''",
        "x'fffe00'",
        "9223372036854775807",
        "-9223372036854775808",
        "1e300",
        "-1e999",
        "CAST(x'ff41' AS TEXT)",
        "-0.0",
        "1750000000000000",
        "1750000000000.5",
        "'0x10'",
        "7",
    ),
    "REAL": (
        "NULL",
        "3",
        "0.1",
        "'n/a'",
        "''",
        "x'00ff'",
        "1e-320",
        "1e999",
        "9007199254740993",
        "CAST(x'fe' AS TEXT)",
        "-0.0",
    ),
    "TEXT": (
        "NULL",
        "''",
        "500.0",
        "12",
        "x'ff00fe'",
        "CAST(x'ff4100' AS TEXT)",
        "CAST(x'eda080' AS TEXT)",
        "char(0) || 'after'",
        """'{"not": json'""",
        "'ünï ☃ 😀 '",
        "printf('%.*c', 9000, 'x')",
    ),
    "BLOB": ("NULL", "x'00'", "1.0", "'text'"),
}
ROWS = max(map(len, ODD.values()))

FOREIGN = (
    "CREATE TABLE log (said TEXT)",
    "CREATE TABLE notes (id INTEGER PRIMARY KEY REFERENCES routing_telemetry, body BLOB)",
    "INSERT INTO notes VALUES (1, x'00ff'), (2, CAST(x'ff' AS TEXT))",
    "CREATE TABLE pairs (a TEXT, b TEXT, PRIMARY KEY (b, a)) WITHOUT ROWID",
    "INSERT INTO pairs VALUES ('a', 12.5)",
    "CREATE VIEW slow AS SELECT id, latency_ms FROM routing_telemetry WHERE latency_ms > 1000",
    "CREATE VIEW everything AS SELECT * FROM routing_telemetry",
    "CREATE VIEW broken AS SELECT x FROM nowhere",
    (
        "CREATE TRIGGER said AFTER INSERT ON routing_telemetry "
        "BEGIN INSERT INTO log VALUES (new.request_id); END"
    ),
    (
        "CREATE TRIGGER altered AFTER UPDATE ON routing_telemetry "
        "BEGIN INSERT INTO log VALUES ('altered'); END"
    ),
    "CREATE TRIGGER instead INSTEAD OF INSERT ON slow BEGIN SELECT 1; END",
    "CREATE INDEX idx_telemetry_model ON routing_telemetry (model COLLATE NOCASE, tier DESC)",
    "CREATE INDEX theirs ON routing_telemetry (error_type) WHERE error_type IS NOT NULL",
    "PRAGMA user_version = 7",
    "PRAGMA application_id = 12345",
)


class State(NamedTuple):
    """What a file holds, byte by byte.

    Attributes:
        objects: Name and SQL of everything in its schema.
        columns: Each table's columns, as SQLite tells them.
        rows: Each table's rows: every value as its bytes, as SQL writes it, and its type.
        header: What applications may note there.
    """

    objects: dict
    columns: dict
    rows: dict
    header: tuple


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "telemetry.db"


def state(connection, of=None):
    """What the file holds; with ``of``, only what it held then."""
    connection.text_factory = bytes
    objects = {
        (kind, name): (table, page, sql)
        for kind, name, table, page, sql in connection.execute("SELECT * FROM sqlite_schema")
        if of is None or (kind, name) in of.objects
    }
    columns, rows = {}, {}
    for kind, name in objects:
        if kind != b"table":
            continue
        table = name.decode()
        columns[table] = [
            (column, *rest)
            for _, column, *rest in connection.execute(f"PRAGMA table_xinfo({table})")
            if of is None or column in {there for there, *_ in of.columns[table]}
        ]
        shown = ", ".join(
            f"hex({c}), quote({c}), typeof({c})"
            for c in (there.decode() for there, *_ in columns[table])
        )
        rows[table] = connection.execute(f"SELECT {shown} FROM {table}").fetchall()
    pragmas = ("user_version", "application_id", "page_size", "auto_vacuum", "encoding")
    header = tuple(connection.execute(f"PRAGMA {name}").fetchone() for name in pragmas)
    connection.text_factory = str
    return State(objects, columns, rows, header)


def furnish(path):
    """Fill a gateway's file with rows whose values are not what their columns say, and more."""
    with closing(connect(path)) as connection:
        declared = [
            (name, kind, needed)
            for _, name, kind, needed, _, key in connection.execute(
                "PRAGMA table_info(routing_telemetry)"
            )
            if not key
        ]
        connection.execute("BEGIN")
        for number in range(ROWS):
            values = []
            for place, (_, kind, needed) in enumerate(declared):
                odd = ODD[kind][1:] if needed else ODD[kind]
                values.append(odd[(number + place) % len(odd)])
            connection.execute(
                f"INSERT INTO routing_telemetry ({', '.join(name for name, *_ in declared)}) "
                f"VALUES ({', '.join(values)})"
            )
        # ids with gaps, of which the last ones must not come again
        connection.execute("DELETE FROM routing_telemetry WHERE id = 3")
        connection.execute("UPDATE routing_telemetry SET id = 1000 WHERE id = 4")
        connection.execute(
            "INSERT INTO routing_telemetry (id, request_id, timestamp, provider) "
            "VALUES (2000, '', '', '')"
        )
        connection.execute("DELETE FROM routing_telemetry WHERE id = 2000")
        connection.execute("COMMIT")
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema")}
        if "savings_events" in tables:
            connection.execute("INSERT INTO savings_events VALUES (5, 12.5, 500.0, 'few')")
        if "session_pins" in tables:
            connection.execute(
                "INSERT INTO session_pins (session_id, provider, score, ts) "
                "VALUES (x'ff', CAST(x'ff' AS TEXT), 'none', 0.5)"
            )
        for statement in FOREIGN:
            connection.execute(statement)


def upgrade(path):
    engine = create_store_engine(f"sqlite:///{path}")
    migrate.upgrade(engine)
    with engine.connect() as connection:
        assert revisions.current(connection) == revisions.head()
        assert comparison.drift(connection) == []
    engine.dispose()


def traces(path, observer):
    """What any write would alter, whichever connection wrote."""
    wal = path.with_name(f"{path.name}-wal")
    return (
        observer.execute("PRAGMA data_version").fetchone(),
        observer.execute("PRAGMA schema_version").fetchone(),
        (path.stat().st_size, path.stat().st_mtime_ns),
        wal.read_bytes() if wal.exists() else b"",
    )


def check_adopted(path):
    """Adopt the file; what was there stays, a second time nothing is written, gateways go on."""
    with closing(connect(path)) as observer:
        before = state(observer)
        found = [name.decode() for name, *_ in before.columns["routing_telemetry"]]
        (mode,) = observer.execute("PRAGMA journal_mode").fetchone()
        untouched = traces(path, observer)
        upgrade(path)
        check_kept(observer, before, found)
        if mode != "wal":
            switch_to_wal(path)
        adopted, once = traces(path, observer), state(observer)
        assert adopted[0] != untouched[0], "what tells that nothing is written tells nothing"
        upgrade(path)
        assert traces(path, observer) == adopted, "a second upgrade has written"
        assert state(observer) == once
        check_gateways_go_on(path, observer)
        assert state(observer).header == before.header
    upgrade(path)


def switch_to_wal(path):
    """Connect once more: a file that is not in WAL mode goes there when it is ours."""
    engine = create_store_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    engine.dispose()


def check_kept(connection, before, found):
    after = state(connection, of=before)
    assert after.rows == before.rows, "a value or its type has changed"
    assert after.columns == before.columns
    assert after.header == before.header
    ours = (b"table", b"routing_telemetry")
    *place, sql = before.objects.pop(ours)
    *place_now, sql_now = after.objects.pop(ours)
    assert place_now == place, "the table was made anew"
    assert sql_now.startswith(sql.rpartition(b")")[0].rstrip())
    assert after.objects == before.objects, "an object of somebody else's has changed"
    missing = [name for name in LATER if name not in found]
    there = [row[1] for row in connection.execute("PRAGMA table_info(routing_telemetry)")]
    assert there == [*found, *missing, *OWN], "in the order in which the gateway adds them"
    for name in (*missing, *OWN):
        expected = [(0, "integer")] if name == "pinned" else [(None, "null")]
        new = f"SELECT DISTINCT {name}, typeof({name}) FROM routing_telemetry"
        assert connection.execute(new).fetchall() in ([], expected)


def check_gateways_go_on(path, observer):
    """Every release opens the file and writes, and what it says at the opening alters no table."""
    tables = {"routing_telemetry", "savings_events", "session_pins"}
    columns = {name: there for name, there in state(observer).columns.items() if name in tables}
    (last,) = observer.execute(
        "SELECT seq FROM sqlite_sequence WHERE name = 'routing_telemetry'"
    ).fetchone() or (0,)
    for name, release in RELEASES.items():
        with closing(open_as(release, path)) as gateway:
            gateway.execute(release.insert(), release.record(name))
            gateway.row_factory = sqlite3.Row
            row = gateway.execute("SELECT * FROM routing_telemetry ORDER BY id DESC").fetchone()
            assert row["id"] == (last := last + 1), "an id came again"
            assert row["request_id"] == name
            assert {c: row[c] for c in release.columns[1:]} == {
                c: STORED[c] for c in release.columns[1:]
            }
            unset = [c for c in (*LATER, *OWN) if c not in release.columns]
            assert {c: row[c] for c in unset} == {c: 0 if c == "pinned" else None for c in unset}
    there = state(observer).columns
    if "session_pins" in columns:  # not ours: a later gateway adds its own
        there["session_pins"] = there["session_pins"][: len(columns["session_pins"])]
    assert {name: there[name] for name in columns} == columns
    indexes = {row[1] for row in observer.execute("PRAGMA index_list(routing_telemetry)")}
    assert indexes >= set(INDEXES)
    if ("trigger", "said") in observer.execute("SELECT type, name FROM sqlite_schema").fetchall():
        said = observer.execute("SELECT said FROM log ORDER BY rowid").fetchall()
        assert said == [(name,) for name in RELEASES], "their triggers run for each row, no other"


@pytest.mark.sample(7)
@pytest.mark.parametrize("odd", [True, False], ids=["odd rows", "no rows"])
@pytest.mark.parametrize(
    ("made", "opened"),
    list(itertools.combinations_with_replacement(RELEASES, 2)),
    ids=lambda name: f"{name}",
)
def test_a_file_of_every_release_opened_by_every_later_one_is_adopted(path, made, opened, odd):
    for name in (made, opened):
        open_as(RELEASES[name], path).close()
    if odd:
        furnish(path)
    check_adopted(path)


OPENING = RELEASES["9.14.1"].opening()


@pytest.mark.sample(7)
@pytest.mark.parametrize("made", [None, "8.0.1"], ids=["new", "8.0.1"])
@pytest.mark.parametrize("cut", range(3, len(OPENING)))
def test_a_gateway_that_ended_anywhere_in_its_opening_is_adopted(path, made, cut):
    if made:
        open_as(RELEASES[made], path).close()
    with closing(connect(path)) as gateway:
        for statement in OPENING[:cut]:
            say(gateway, statement)
    furnish(path)
    check_adopted(path)


def random_file(path, chosen):
    """A file with any of the later columns, indexes and tables, in any mode of SQLite's."""
    columns = [column for column in ADDITIVE if chosen.random() < 0.5]
    if chosen.random() < 0.3:
        chosen.shuffle(columns)
    theirs = ["theirs BLOB", "their_count INTEGER NOT NULL DEFAULT 7"]
    for column in theirs[: chosen.randrange(3)]:
        columns.insert(chosen.randrange(len(columns) + 1), column)
    indexes = chosen.sample([*INDEXES], chosen.randrange(len(INDEXES) + 1))
    more = []
    for statements in ((SAVINGS, SAVINGS_INDEX), (PINS, PINS_INDEX)):
        more += [s.format("") for s in statements[: chosen.randrange(3)]]
    encoding, size = chosen.choice(["UTF-8", "UTF-16le"]), chosen.choice([512, 4096, 65536])
    with closing(connect(path)) as connection:
        connection.execute(f"PRAGMA encoding = '{encoding}'")
        connection.execute(f"PRAGMA page_size = {size}")
        connection.execute(f"PRAGMA auto_vacuum = {chosen.randrange(3)}")
        connection.execute("CREATE TABLE first (page)")  # which fixes them
        connection.execute(f"PRAGMA journal_mode = {chosen.choice(['wal', 'delete'])}")
    gateway_file(path, tuple(columns), tuple(indexes), [], *more)
    with closing(connect(path)) as connection:
        for name, value in (("encoding", encoding), ("page_size", size)):
            assert connection.execute(f"PRAGMA {name}").fetchone() == (value,)


@pytest.mark.sample(7)
@pytest.mark.parametrize("seed", range(50))
def test_any_subset_of_columns_indexes_and_tables_is_adopted(path, seed):
    chosen = random.Random(seed)
    random_file(path, chosen)
    furnish(path)
    if chosen.random() < 0.3:
        with closing(connect(path)) as connection:
            connection.execute("ANALYZE")
    check_adopted(path)


@pytest.mark.parametrize("name", RELEASES)
def test_a_gateway_that_has_the_file_open_can_still_use_its_prepared_statements(path, name):
    release = RELEASES[name]
    with closing(open_as(release, path)) as gateway:
        insert = release.insert()
        newest = "SELECT * FROM routing_telemetry ORDER BY id DESC LIMIT 1"
        gateway.execute(insert, release.record("before"))
        width = len(gateway.execute(newest).fetchone())
        upgrade(path)
        gateway.execute(insert, release.record("after"))
        row = gateway.execute(newest).fetchone()
        assert row[1] == "after"
        assert len(row) == len(TELEMETRY.c) > width
        assert gateway.execute("SELECT count(*) FROM routing_telemetry").fetchone() == (2,)


def test_a_foreign_index_on_an_expression_is_no_reason_to_warn(path):
    open_as(RELEASES["9.14.1"], path).close()
    with closing(connect(path)) as connection:
        connection.execute("CREATE INDEX theirs ON routing_telemetry (lower(model))")
    check_adopted(path)


# -- what Alembic says of it --------------------------------------------------------------------


def alembic(path, *arguments):
    where = ["-c", str(ROOT / "alembic.ini"), "-x", f"url=sqlite:///{path}"]
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "alembic", *where, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def fresh(path):
    upgrade(path)


def adopted(path):
    open_as(RELEASES["8.0.1"], path).close()
    furnish(path)
    upgrade(path)
    assert missing_indexes(path) == {"idx_telemetry_session_id", *OWN_INDEXES}


def adopted_and_given_its_indexes(path):
    adopted(path)
    engine = create_store_engine(f"sqlite:///{path}")
    assert "idx_telemetry_session_id" in indexes.build_missing_indexes(engine).names
    engine.dispose()
    assert missing_indexes(path) == set()


def adopted_and_maintained(path):
    adopted(path)
    with Store(f"sqlite:///{path}") as store:
        assert "idx_telemetry_session_id" in store.maintain().indexes_built
    assert missing_indexes(path) == set()


def missing_indexes(path):
    engine = create_store_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        missing = set(comparison.missing_indexes(connection))
    engine.dispose()
    return missing


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "make", [fresh, adopted, adopted_and_given_its_indexes, adopted_and_maintained]
)
def test_alembic_finds_no_drift_and_writes_nothing(path, make):
    make(path)
    upgrade(path)  # where comparison.drift is asked
    with closing(connect(path)) as observer:
        before = traces(path, observer)
        checked = alembic(path, "check")
        assert checked.returncode == 0, checked.stderr
        assert "No new upgrade operations" in checked.stdout
        assert traces(path, observer) == before


@pytest.mark.sample(2)
@pytest.mark.parametrize("command", ["check", "current"])
def test_alembic_reads_a_gateways_file_without_a_trace(path, command):
    open_as(RELEASES["9.4.6"], path).close()
    furnish(path)
    with closing(connect(path)) as observer:
        before = traces(path, observer)
        looked = alembic(path, command)
        assert (looked.returncode == 0) == (command == "current")
        if command == "check":
            assert "not up to date" in looked.stderr + looked.stdout
        assert traces(path, observer) == before


def test_a_downgrade_of_a_gateways_file_that_was_never_adopted_leaves_no_trace(path):
    open_as(RELEASES["9.4.6"], path).close()
    furnish(path)
    with closing(connect(path)) as observer:
        before = traces(path, observer)
        engine = create_store_engine(f"sqlite:///{path}")
        migrate.downgrade(engine, "base")
        engine.dispose()
        assert traces(path, observer) == before
