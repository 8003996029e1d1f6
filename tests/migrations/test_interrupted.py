"""An upgrade that is killed is one that did not happen, or one that did; never half of one."""

import contextlib
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from io import StringIO

import psycopg
import pytest
from sqlalchemy import event, text

from lynkr_store import create_store_engine
from lynkr_store.db.models import INDEXES, Base
from lynkr_store.maintenance.indexes import build_missing_indexes
from lynkr_store.migrate import adoption, revisions
from lynkr_store.migrate.comparison import drift, missing_indexes
from lynkr_store.migrate.upgrade import upgrade, write_script
from tests.conftest import ON_DISK, POSTGRES
from tests.support import recorded
from tests.support.recorded import ADDITIVE, OWN_INDEXES, SAVINGS, gateway_file
from tests.support.stores import eventually
from tests.support.upgrading import launch, run, snapshot

ROWS = [
    {"request_id": f"r{n}", "timestamp": 1_750_000_000_000 + n, "provider": "p" * 200}
    for n in range(100)
]
ODD_ROW = {"request_id": "odd", "timestamp": 1, "provider": "p", "latency_ms": 12.5}


def insert_sql(rows):
    values = ", ".join(f"('{r['request_id']}', {r['timestamp']}, '{r['provider']}')" for r in rows)
    return f"INSERT INTO routing_telemetry (request_id, timestamp, provider) VALUES {values};"


def drop_indexes(indexes=INDEXES):
    return "; ".join(f"DROP INDEX {index.name}" for index in indexes)


def gateway(path, journal="wal", rows=(*ROWS, ODD_ROW)):
    """A gateway's file of 26 columns."""
    gateway_file(path, 0, rows=[*rows])
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute(f"PRAGMA journal_mode = {journal}").fetchone() == (journal,)
    return path


def made(path, revision, more):
    """A file of ours with rows."""
    engine = create_store_engine(f"sqlite:///{path}")
    upgrade(engine, revision)
    engine.dispose()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"{insert_sql(ROWS)} {more};")
    return path


def script(url, revision, more):
    """The statements that make a PostgreSQL database with rows."""
    written = StringIO()
    write_script(url, revision, written)
    return f"{written.getvalue()} {insert_sql(ROWS)} {more};"


@pytest.fixture
def start(tmp_path, new_url):
    """Say how a database begins: its URL, and what makes it."""

    def options(backend, which):
        revision, more = ("head", drop_indexes()) if which == "without indexes" else (which, "")
        if backend != "sqlite-file":
            url = new_url(backend)
            return {
                "url": url,
                "script": "" if which == "nothing" else script(url, revision, more),
            }
        template = tmp_path / "template.db"
        if which == "nothing":
            template = None
        elif which.startswith("gateway"):
            gateway(template, which.partition(" ")[2])
        else:
            made(template, revision, more)
        url = f"sqlite:///{tmp_path}/killed.db"
        return {"url": url, "template": template and str(template)}

    return options


def check(death, first):
    at = f"killed at {death.get('killed', 'some time')}"
    assert death["again"]["status"] == 0, f"{at}: not upgraded without more ado"
    assert death["again"]["revision"] == revisions.head(), at
    assert death["again"]["drift"] == [], at
    assert {*death["again"]["missing"]} <= {*OWN_INDEXES}, at  # those of a table with rows
    assert death["after"] == "new", f"{at}: another schema, or other rows, than without"
    assert death["layout"] == first["layout"], at


UPGRADES = [
    *((backend, "nothing") for backend in ON_DISK),
    ("sqlite-file", "gateway wal"),
    ("sqlite-file", "gateway delete"),
    *(
        pytest.param(backend, "0003", marks=pytest.mark.slow)
        for backend in ("sqlite-file", POSTGRES[-1])
    ),
]
each_upgrade = pytest.mark.parametrize(("backend", "which"), UPGRADES, ids=str)


@pytest.mark.slow
@each_upgrade
def test_an_upgrade_killed_at_any_statement_is_whole_or_was_not(start, backend, which, capsys):
    step = 1 if backend == "sqlite-file" else 3  # where a database is made for each
    options = start(backend, which)
    first, *deaths = run("killed", options | {"body": "upgrade", "step": step}, 900)
    assert first["old"] != first["new"]
    for death in deaths:
        assert death["status"] == -9
        # only what comes after the COMMIT finds it done
        done = death["fatal"] > first["moments"].index("before COMMIT") + 1
        assert death["between"] == ("new" if done else "old"), death
        check(death, first)
    assert {death["between"] for death in deaths} == {"old", "new"}
    with capsys.disabled():
        print(f"\n{backend}, {which}: {len(first['moments'])} moments, killed at {len(deaths)}")
    assert len(first["moments"]) >= 80
    assert len(deaths) >= (40 if step == 1 else 20)
    if which == "gateway delete":
        assert ["-journal"] in [death["left"] for death in deaths], "nothing had to be taken back"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ON_DISK)
def test_a_build_of_indexes_killed_at_any_statement_is_resumed(start, backend, capsys):
    step = 5 if backend == "sqlite-file" else 1  # which pauses for other writers between them
    options = start(backend, "without indexes")
    first, *deaths = run("killed", options | {"body": "indexes", "step": step}, 900)
    assert len([line for line in first["new"] if line not in first["old"]]) == len(INDEXES)
    built = set()
    for death in deaths:
        assert death["status"] == -9
        assert death["left"] == [] or backend == "sqlite-file"
        if death["between"] not in ("old", "new"):
            assert death["between"]["gone"] == []
            assert set(death["between"]["come"]) < set(first["new"]), "an index that is not whole"
            built.add(len(death["between"]["come"]))
        check(death, first)
    assert built, "none was killed between two indexes"
    with capsys.disabled():
        print(f"\n{backend}: {len(first['moments'])} moments, killed at {len(deaths)}")
    assert len(first["moments"]) >= 30


@pytest.mark.slow
@each_upgrade
def test_an_upgrade_killed_at_any_time_is_whole_or_was_not(start, backend, which, capsys):
    options = start(backend, which) | {"body": "upgrade", "deaths": 30, "seed": 7}
    first, *deaths = run("killed_anytime", options, 900)
    for death in deaths:
        assert death["between"] in ("old", "new"), death
        check(death, first)
    killed = [death["between"] for death in deaths if death["status"]]
    with capsys.disabled():
        print(f"\n{backend}, {which}: {len(killed)} killed, {killed.count('new')} after its COMMIT")
    assert len(killed) >= 9


# -- builds of indexes that go on, or fail, without their process ---------------------------------


def writing(url):
    """A transaction that changed the table: a build waits for it when it has made its index."""
    writer = psycopg.connect(url)
    writer.execute("UPDATE routing_telemetry SET model = 'm'")
    return writer


def reading(url):
    """A transaction that sees an older moment: a build waits for it at its end."""
    reader = psycopg.connect(url)
    reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    reader.execute("SELECT count(*) FROM routing_telemetry")
    return reader


def indexes(url):
    return [line for line in snapshot(url) if line.startswith("('index'")]


def waiting(connection, statement):
    """The backend that waits in such a statement for who holds a lock."""
    return connection.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
        "AND wait_event_type = 'Lock' AND query LIKE %s",
        [f"%{statement}%"],
    ).fetchone()


TELEMETRYS = [index for index in INDEXES if index.table.name == "routing_telemetry"]


@pytest.fixture
def unindexed(postgres_url):
    """A database whose table with rows lacks its indexes."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(script(postgres_url, "head", drop_indexes(TELEMETRYS)))
    return postgres_url


def build(url):
    engine = create_store_engine(url)
    try:
        return build_missing_indexes(engine).names
    finally:
        engine.dispose()


def check_indexes(url):
    engine = create_store_engine(url)
    with engine.connect() as connection:
        assert missing_indexes(connection) == []
        assert drift(connection) == []
    engine.dispose()
    assert "'false'" not in str(indexes(url)), "an index that is not whole"
    keys = len(Base.metadata.tables) + 1  # one of each table, Alembic's own too
    assert len(indexes(url)) == len(INDEXES) + keys


@pytest.mark.slow
@pytest.mark.parametrize("other", [writing, reading])
def test_an_index_that_a_killed_build_left_invalid_is_built_again(unindexed, other):
    """Killed again and again, in the making and in the removal of what the last one left."""
    with psycopg.connect(unindexed, autocommit=True) as looking, closing(other(unindexed)):
        for statement in ("CREATE INDEX", "DROP INDEX", "DROP INDEX"):
            with launch("maintainer", url=unindexed) as killed:
                killed.tell()
                eventually(lambda statement=statement: waiting(looking, statement))
                [pid] = waiting(looking, statement)
                killed.kill()
                # a backend that is busy sees its client's death at the end; its machine's never
                looking.execute("SELECT pg_terminate_backend(%s)", [pid])
                eventually(lambda statement=statement: not waiting(looking, statement))
            assert len([line for line in indexes(unindexed) if "'false'" in line]) == 1
    assert set(build(unindexed)) == {index.name for index in TELEMETRYS}
    check_indexes(unindexed)


@pytest.mark.slow
@pytest.mark.parametrize("other", [writing, reading])
def test_a_build_waits_for_one_that_the_server_continues_without_its_process(unindexed, other):
    with (
        psycopg.connect(unindexed, autocommit=True) as looking,
        closing(other(unindexed)) as holder,
    ):
        with launch("maintainer", url=unindexed) as killed:
            killed.tell()
            eventually(lambda: waiting(looking, "CREATE INDEX"))
            killed.kill()
        with launch("maintainer", url=unindexed) as after:
            after.tell()
            deadline = time.monotonic() + 1.0  # it may wait without a lock
            eventually(lambda: waiting(looking, "DROP INDEX") or time.monotonic() > deadline)
            holder.close()
            after.heard_of("built")
    check_indexes(unindexed)


# -- the gateway's own steps, one by one ----------------------------------------------------------


class Gateway:
    """Adds its columns one by one, each a transaction of its own, and writes its rows."""

    def __init__(self, path, timeout_s=3.0):
        self._connection = sqlite3.connect(
            path, timeout=timeout_s, isolation_level=None, check_same_thread=False
        )

    def adds(self, column):
        """Whether it did; a column that is there already is none of its errors."""
        try:
            self._connection.execute(f"ALTER TABLE routing_telemetry ADD COLUMN {column}")
        except sqlite3.OperationalError as error:
            if "duplicate column name" not in str(error):
                raise
            return False
        return True

    def opens_and_writes(self, request_id):
        """Do what comes after the columns, and a row of all that it knows."""
        for name, columns in recorded.INDEXES.items():
            self._connection.execute(
                f"CREATE INDEX IF NOT EXISTS {name} ON routing_telemetry{columns}"
            )
        self._connection.execute(SAVINGS.replace("TABLE", "TABLE IF NOT EXISTS"))
        row = {column.split()[0]: None for column in ADDITIVE} | {
            "request_id": request_id,
            "timestamp": 2,
            "provider": "p",
            "cache_read_tokens": 3,
        }
        recorded.insert_rows(self._connection, [row])

    def close(self):
        self._connection.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "telemetry.db"


@contextlib.contextmanager
def engine_of(path):
    engine = create_store_engine(f"sqlite:///{path}")
    yield engine
    engine.dispose()


def check_adopted(path, floor, request_ids):
    with engine_of(path) as engine, engine.connect() as connection:
        assert revisions.current(connection) == revisions.head()
        assert drift(connection) == []
        assert {*missing_indexes(connection)} <= {*OWN_INDEXES}  # those of a table with rows
        assert adoption.adopted_revision(connection) == floor
        query = "SELECT request_id FROM routing_telemetry WHERE provider = 'p' ORDER BY id"
        assert list(connection.scalars(text(query))) == request_ids
        assert connection.scalar(text("SELECT max(latency_ms) FROM routing_telemetry")) == 12.5


def floor_of(columns):
    """The revision below which something of the gateway's lies, by how many columns it added."""
    return "0001" if columns == 0 else "0002" if columns <= 2 else "0003"


each_prefix = pytest.mark.parametrize("count", range(len(ADDITIVE) + 1))


@pytest.mark.sample(5)
@each_prefix
@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_an_upgrade_between_two_of_the_gateways_steps_does_no_harm(path, count, journal):
    gateway(path, journal, [ODD_ROW])
    with closing(Gateway(path)) as other, engine_of(path) as engine:
        assert all(other.adds(column) for column in ADDITIVE[:count])
        upgrade(engine)
        assert not any(other.adds(column) for column in ADDITIVE), "each is there, once"
        other.opens_and_writes("after")
        upgrade(engine)
    check_adopted(path, floor_of(count), ["odd", "after"])


@pytest.mark.sample(5)
@pytest.mark.parametrize("count", range(len(ADDITIVE)))
def test_a_step_of_the_gateways_just_before_an_upgrade_takes_the_lock_is_seen(path, count):
    gateway(path, rows=[ODD_ROW])
    with closing(Gateway(path)) as other, engine_of(path) as engine:
        assert all(other.adds(column) for column in ADDITIVE[:count])
        came = []

        def race(*given):
            if given[2] == "BEGIN IMMEDIATE":
                came.append(other.adds(ADDITIVE[count]))

        event.listen(engine, "before_cursor_execute", race)
        upgrade(engine)
        assert came == [True], "the step came when the upgrade had begun, and before its lock"
        assert not any(other.adds(column) for column in ADDITIVE)
        other.opens_and_writes("after")
    check_adopted(path, floor_of(count + 1), ["odd", "after"])


def test_a_step_of_the_gateways_in_the_middle_of_an_upgrade_waits_for_its_end(path):
    gateway(path, rows=[ODD_ROW])
    refused = []
    with (
        closing(Gateway(path, timeout_s=0)) as hasty,
        closing(Gateway(path, timeout_s=30)) as patient,
        engine_of(path) as engine,
        ThreadPoolExecutor(1) as threads,
    ):
        steps = []

        def meet(*given):
            if given[2].startswith("ALTER"):
                with pytest.raises(sqlite3.OperationalError, match="database is locked"):
                    hasty.adds(ADDITIVE[-1])
                refused.append(given[2])
                if not steps:
                    steps.append(threads.submit(patient.adds, ADDITIVE[-1]))

        event.listen(engine, "after_cursor_execute", meet)
        upgrade(engine)
        assert len(refused) >= len(ADDITIVE)
        assert steps[0].result(30) is False, "it found the column there"
    check_adopted(path, "0001", ["odd"])
