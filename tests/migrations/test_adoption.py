"""A gateway's own database becomes ours, or is refused untouched."""

import asyncio
import itertools
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from lynkr_store import (
    AdoptionRefused,
    AsyncStore,
    DowngradeRefused,
    RoutingFilter,
    Store,
    Window,
    create_store_engine,
)
from lynkr_store.migrate import adoption, revisions
from lynkr_store.migrate.comparison import drift, missing_indexes
from lynkr_store.migrate.upgrade import downgrade, upgrade
from tests.support.recorded import (
    ADDITIVE,
    DATA,
    INDEXES,
    OWN_INDEXES,
    SAVINGS,
    core_columns,
    gateway_file,
    gateway_table,
    insert_rows,
    needs_data,
)

ROW = {"request_id": "r", "timestamp": 1_750_000_000_000, "provider": "ollama", "latency_ms": 12.5}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "telemetry.db"


def upgraded(path, revision="head"):
    engine = create_store_engine(f"sqlite:///{path}")
    upgrade(engine, revision)
    return engine


def contents(path, columns=None):
    """Every row with each value's storage class."""
    with closing(sqlite3.connect(path)) as connection:
        columns = columns or [
            row[1] for row in connection.execute("PRAGMA table_info(routing_telemetry)")
        ]
        shown = ", ".join(f"{name}, typeof({name})" for name in columns)
        stored = connection.execute(f"SELECT {shown} FROM routing_telemetry ORDER BY id").fetchall()
    return columns, stored


def check_adopted(path, floor):
    columns, before = contents(path)
    engine = upgraded(path)
    with engine.connect() as connection:
        assert revisions.current(connection) == revisions.head()
        assert drift(connection) == []
        assert adoption.adopted_revision(connection) == floor
    assert contents(path, columns)[1] == before, "a value or its storage class changed"
    upgrade(engine)
    assert contents(path, columns)[1] == before
    engine.dispose()


@needs_data
@pytest.mark.parametrize(
    ("version", "columns", "floor"),
    [("9c8fe01", 26, "0001"), ("4779c17", 28, "0002"), ("f0bd703", 37, "0004")],
)
def test_every_version_of_the_gateway_is_adopted_and_keeps_writing(path, version, columns, floor):
    shutil.copy(DATA / "gateway-versions" / f"{version}.db", path)
    path.chmod(0o644)
    names, rows = contents(path)
    assert (len(names), len(rows)) == (columns, 40)
    check_adopted(path, floor)
    with closing(sqlite3.connect(path)) as connection, connection:
        own = [name for name in names if name != "id"]
        connection.execute(
            f"INSERT INTO routing_telemetry ({', '.join(own)}) "
            f"SELECT {', '.join(own)} FROM routing_telemetry WHERE id = 1"
        )
    with Store(f"sqlite:///{path}") as store:
        assert store.get_stats(Window(since=0)).total_requests == 41
        assert len(store.query(limit=50)) == 41


SHAPES = [(*ADDITIVE[:count],) for count in range(len(ADDITIVE) + 1)] + [
    (ADDITIVE[1],),
    (ADDITIVE[10],),
    ADDITIVE[3:5],
    (ADDITIVE[0], ADDITIVE[6], ADDITIVE[9]),
]


@pytest.mark.sample(5)
@pytest.mark.parametrize("savings", [False, True])
@pytest.mark.parametrize("columns", SHAPES, ids=lambda columns: f"{26 + len(columns)} columns")
def test_any_subset_of_the_later_columns_is_completed(path, columns, savings):
    more = [SAVINGS, "INSERT INTO savings_events VALUES (1, 2, 'c', 3)"] if savings else []
    gateway_file(path, columns, tuple(INDEXES), [ROW], *more)
    names = {column.split()[0] for column in columns}
    floor = "0001"
    if names & {"request_text", "response_text"}:
        floor = "0002"
    if names - {"request_text", "response_text"}:
        floor = "0003"
    check_adopted(path, "0004" if savings else floor)


def test_pinned_reads_0_on_older_rows_as_in_the_gateways_own_files(path):
    gateway_file(path, 2, rows=[ROW])
    upgraded(path).dispose()
    assert contents(path, ["pinned", "cache_decision"])[1] == [(0, "integer", None, "null")]


TOLERATED = {
    "foreign table": "CREATE TABLE session_pins (session_id TEXT PRIMARY KEY, ts INTEGER NOT NULL)",
    "foreign view": "CREATE VIEW pins AS SELECT * FROM routing_telemetry",
    "foreign trigger": "CREATE TRIGGER t AFTER INSERT ON routing_telemetry BEGIN SELECT 1; END",
    "nullable column": "ALTER TABLE routing_telemetry ADD COLUMN theirs BLOB",
    "default": "ALTER TABLE routing_telemetry ADD COLUMN theirs TEXT NOT NULL DEFAULT 'x'",
    "foreign index": "CREATE INDEX their_index ON routing_telemetry (model)",
    "foreign version table": "CREATE TABLE alembic_version (version_num TEXT)",
}


@pytest.mark.parametrize("statement", TOLERATED.values(), ids=TOLERATED)
def test_what_is_not_ours_is_tolerated_and_stays(path, statement):
    gateway_file(path, 2, tuple(INDEXES), [ROW], statement)
    with closing(sqlite3.connect(path)) as connection:
        before = connection.execute("SELECT name FROM sqlite_schema").fetchall()
    check_adopted(path, "0002")
    with closing(sqlite3.connect(path)) as connection:
        after = connection.execute("SELECT name FROM sqlite_schema").fetchall()
    assert set(before) <= set(after)


def test_an_id_may_say_not_null_and_types_may_be_in_lower_case(path):
    core = core_columns().replace("AUTOINCREMENT", "AUTOINCREMENT NOT NULL").replace("REAL", "real")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(gateway_table(core=core))
    check_adopted(path, "0002")


def test_words_in_comments_and_quotes_are_no_constraints(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(gateway_table(("theirs TEXT DEFAULT 'CHECK'",), tail=" -- no CHECK"))
    check_adopted(path, "0001")


def with_core(old, new):
    return [gateway_table(core=core_columns().replace(old, new))]


PLAIN = gateway_table()
LOOK_ALIKES = {
    "another type": (with_core("latency_ms INTEGER", "latency_ms REAL"), "latency_ms: its type"),
    "nullability": (with_core("model TEXT", "model TEXT NOT NULL"), "model: its NOT NULL"),
    "nullable provider": (with_core("provider TEXT NOT NULL", "provider TEXT"), "provider: its"),
    "another default": (with_core("retry_count INTEGER DEFAULT 0", "retry_count INTEGER"), "retry"),
    "key": (
        with_core("id INTEGER PRIMARY KEY AUTOINCREMENT", "id INTEGER PRIMARY KEY"),
        "AUTOINCREMENT",
    ),
    "no key": (with_core("id INTEGER PRIMARY KEY AUTOINCREMENT", "id INTEGER"), "id: its key"),
    "uniqueness": (
        with_core("request_id TEXT NOT NULL", "request_id TEXT NOT NULL UNIQUE"),
        "unique",
    ),
    "unique index": ([PLAIN, "CREATE UNIQUE INDEX u ON routing_telemetry (id)"], "unique index, u"),
    "generated column": (
        [gateway_table(("theirs TEXT GENERATED ALWAYS AS (model) VIRTUAL",))],
        "generated",
    ),
    "missing column": (with_core("tier TEXT, ", ""), "tier is missing"),
    "spelling": (with_core("tier TEXT", "Tier TEXT"), "is spelled Tier"),
    "spelling of a later column": ([gateway_table(("Pinned INTEGER DEFAULT 0",))], "Pinned"),
    "type of a later column": ([gateway_table(("pinned TEXT",))], "pinned: its type"),
    "type of our own column": ([gateway_table(("trace_id INTEGER",))], "trace_id: its type"),
    "foreign column NOT NULL": ([gateway_table(("theirs TEXT NOT NULL",))], "theirs is NOT NULL"),
    "check": (with_core("tier TEXT", "tier TEXT CHECK (tier <> '')"), "CHECK"),
    "collation": (with_core("tier TEXT", "tier TEXT COLLATE NOCASE"), "COLLATE"),
    "foreign key": (
        [
            "CREATE TABLE s (id TEXT PRIMARY KEY)",
            *with_core("session_id TEXT", "session_id TEXT REFERENCES s"),
        ],
        "foreign key",
    ),
    "strict": ([gateway_table(tail=" STRICT")], "STRICT"),
    "a view": (
        [
            PLAIN.replace("routing_telemetry", "t"),
            "CREATE VIEW routing_telemetry AS SELECT * FROM t",
        ],
        "is not a table but a view",
    ),
    "name of the table": ([PLAIN.replace("routing_telemetry", "Routing_Telemetry")], "spelled"),
    "savings of another shape": (
        [PLAIN, SAVINGS.replace("tokens_saved INTEGER", "tokens_saved REAL")],
        "savings_events.tokens_saved",
    ),
    "savings alone": ([SAVINGS], "savings_events exists without"),
    "an index on another table": (
        [PLAIN, "CREATE TABLE t (tier TEXT)", "CREATE INDEX idx_telemetry_tier ON t (tier)"],
        "idx_telemetry_tier is on the table t",
    ),
    "an index without its table": (
        ["CREATE TABLE t (tier TEXT)", "CREATE INDEX idx_savings_timestamp ON t (tier)"],
        "idx_savings_timestamp is on the table t",
    ),
    "an index on other columns": (
        [PLAIN, "CREATE INDEX idx_telemetry_tier ON routing_telemetry (model)"],
        "idx_telemetry_tier is not on",
    ),
    "a partial index": (
        [PLAIN, "CREATE INDEX idx_telemetry_tier ON routing_telemetry (tier) WHERE tier > ''"],
        "idx_telemetry_tier is not on",
    ),
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("journal", ["delete", "wal"])
@pytest.mark.parametrize(("statements", "named"), LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alikes_are_refused_and_not_a_byte_changes(path, statements, named, journal):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {journal}")
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    before = path.read_bytes()
    engine = create_store_engine(f"sqlite:///{path}")
    with pytest.raises(AdoptionRefused) as refused:
        upgrade(engine)
    engine.dispose()
    assert named in refused.value.difference
    assert named in str(refused.value)
    assert path.read_bytes() == before
    with Store(f"sqlite:///{path}") as store:
        store.record(provider="waits")
        with pytest.raises(AdoptionRefused):
            store.query()
        store.close(0)
        assert store.health().dropped == 1
    assert path.read_bytes() == before


def test_missing_indexes_wait_for_maintain_where_there_are_rows(path):
    gateway_file(path, 0, (), [ROW])
    engine = upgraded(path)
    with engine.connect() as connection:
        assert {*missing_indexes(connection)} == {*INDEXES, *OWN_INDEXES}
        assert drift(connection) == [], "an index that waits is no drift"
    engine.dispose()
    with Store(f"sqlite:///{path}") as store:
        assert {*store.maintain().indexes_built} == {*INDEXES, *OWN_INDEXES}
        assert store.maintain().indexes_built == ()


def test_missing_indexes_of_an_empty_table_are_built_at_once(path):
    gateway_file(path, 0, ())
    engine = upgraded(path)
    with engine.connect() as connection:
        assert missing_indexes(connection) == []
    engine.dispose()


@pytest.mark.parametrize(
    ("columns", "savings", "floor"),
    [(0, 0, "0001"), (2, 0, "0002"), (8, 0, "0003"), (11, 1, "0004")],
)
def test_no_downgrade_goes_below_what_was_adopted(path, columns, savings, floor):
    gateway_file(path, columns, tuple(INDEXES), [ROW], *[SAVINGS] * savings)
    names, before = contents(path)
    engine = upgraded(path)
    downgrade(engine, floor)
    for below in ("base", *(f"{n:04}" for n in range(1, int(floor)))):
        with pytest.raises(DowngradeRefused, match=f"adopted at revision {floor}"):
            downgrade(engine, below, drop_data=True)
    with engine.connect() as connection:
        assert revisions.current(connection) == floor
    assert contents(path, names)[1] == before
    upgrade(engine)
    engine.dispose()
    assert contents(path, names)[1] == before


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE routing_telemetry (id INTEGER)",
        "CREATE VIEW routing_telemetry AS SELECT 1",
        "CREATE TABLE savings_events (id INTEGER)",
        "CREATE TABLE t (tier TEXT); CREATE INDEX idx_telemetry_tier ON t (tier)",
    ],
)
def test_postgres_tables_of_our_names_are_refused(postgres_url, statement):
    engine = create_store_engine(postgres_url)
    with engine.begin() as connection:
        for part in statement.split("; "):
            connection.execute(text(part))
    with pytest.raises(AdoptionRefused, match="nothing was changed"):
        upgrade(engine)
    with engine.connect() as connection:
        assert revisions.current(connection) is None
    engine.dispose()


ODD = [
    {
        "latency_ms": "text",
        "cost_usd": "much",
        "output_tokens": b"\x00\xff",
        "quality_score": "good",
    },
    {
        "latency_ms": 9 * 10**18,
        "output_tokens": 9 * 10**18,
        "cost_usd": 1e300,
        "was_fallback": "no",
    },
    {"timestamp": 1_750_000_000_000_000, "latency_ms": 79.5, "output_tokens": 79.5},
    {"timestamp": "yesterday", "latency_ms": 5},
    {"timestamp": 1_750_000_000_000.5, "retry_count": 1.5, "pinned": 7},
    {"latency_ms": 100, "quality_score": 50, "cost_usd": 0.5, "output_tokens": 10},
]


def odd_file(path):
    gateway_file(path, 11, tuple(INDEXES))
    with closing(sqlite3.connect(path)) as connection, connection:
        insert_rows(connection, [ROW | {"latency_ms": None} | values for values in ODD])
        connection.execute(
            "UPDATE routing_telemetry SET model = CAST(x'ff41' AS TEXT) WHERE id = 1"
        )
        connection.execute("UPDATE routing_telemetry SET tier = CAST(x'fe' AS TEXT) WHERE id = 1")
        connection.execute("UPDATE routing_telemetry SET tier = CAST(x'fd' AS TEXT) WHERE id = 2")
        connection.execute("UPDATE routing_telemetry SET provider = x'6f6c6c616d61' WHERE id = 6")
    return path


def test_no_stored_value_makes_an_answer_fail(path):
    with Store(f"sqlite:///{odd_file(path)}") as store:
        for window in (Window(since=0), Window(since=0, until=2**62), Window(until=2**60)):
            stats = store.get_stats(window)
            store.get_provider_stats("ollama", window)
            store.get_routing_accuracy(window)
        stats = store.get_stats(Window(since=0, until=2**62))
        assert stats.total_requests == 5, "a timestamp that is text lies in no window"
        assert stats.avg_latency_by_provider == {"ollama": 90}, "79.5 and 100"
        assert stats.requests_by_tier == {"\ufffd": 2}
        assert stats.total_cost == 0.5
        rows = store.query()
        assert len(rows) == 6
        by_id = {row.id: row for row in rows}
        assert (by_id[1].latency_ms, by_id[1].model) == (None, "\ufffdA")
        assert (by_id[3].latency_ms, by_id[3].timestamp) == (79.5, None)
        assert by_id[3].to_gateway()["timestamp"] == 1_750_000_000_000_000
        assert by_id[4].timestamp is None
        assert by_id[6].provider == "ollama"
        assert store.health().mended_by["unreadable_on_read"] > 0
        assert [row.id for row in store.iter_records(page_rows=1)] == [row.id for row in rows]
        assert store.query(RoutingFilter(min_latency_ms=0, max_latency_ms=10**9))[0].id == 4


def test_undecodable_text_is_replaced_for_async_readers_too(path):
    odd_file(path)

    async def names():
        async with AsyncStore(f"sqlite:///{path}") as store:
            return [row.model for row in await store.query() if row.id == 1]

    assert asyncio.run(names()) == ["\ufffdA"]


def test_a_read_only_store_of_an_odd_file_answers_too(path):
    odd_file(path)
    before = path.read_bytes()
    with Store(f"sqlite:///{path}", read_only=True) as store:
        assert store.get_stats(Window(since=0)).total_requests == 4
        assert len(store.query()) == 6
        assert store.missing_columns[0] == "trace_id"
    assert path.read_bytes() == before


def test_the_shapes_here_are_all_different():
    for one, other in itertools.combinations(LOOK_ALIKES.values(), 2):
        assert one[0] != other[0]
