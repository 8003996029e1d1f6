"""A downgrade takes nothing that a gateway needs, and refuses before it has done anything."""

import sqlite3
from contextlib import closing
from datetime import timedelta

import pytest
from sqlalchemy import event, text

from lynkr_store import DowngradeRefused, Store, create_store_engine
from lynkr_store.migrate import revisions
from lynkr_store.migrate.comparison import drift
from lynkr_store.migrate.upgrade import downgrade, upgrade
from tests.support.gateway import RELEASES, connect, open_as
from tests.support.recorded import INDEXES, SAVINGS, gateway_file

ROW = {"request_id": "r", "timestamp": 1_750_000_000_000, "provider": "ollama"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "telemetry.db"


@pytest.fixture
def adopted(path):
    """A file of 26 columns and one row, adopted and upgraded."""
    gateway_file(path, 0, tuple(INDEXES), [ROW])
    engine = create_store_engine(f"sqlite:///{path}")
    upgrade(engine)
    yield engine
    engine.dispose()


def revision_of(engine):
    with engine.connect() as connection:
        return revisions.current(connection)


def columns_of(path):
    with closing(sqlite3.connect(path)) as connection:
        return {row[1] for row in connection.execute("PRAGMA table_info(routing_telemetry)")}


@pytest.fixture
def changes():
    """The statements that change something, as an engine sends them."""
    seen = []

    def listen(engine):
        @event.listens_for(engine, "before_cursor_execute")
        def note(_connection, _cursor, statement, *_):
            if statement.split()[0] not in ("SELECT", "PRAGMA", "BEGIN", "SET"):
                seen.append(statement)

        return seen

    return listen


def test_the_columns_of_an_adopted_file_stay_where_nobody_said_otherwise(path, adopted, changes):
    before = columns_of(path)
    done = changes(adopted)
    downgrade(adopted, "0001")
    assert revision_of(adopted) == "0001"
    assert columns_of(path) == before
    assert not any("ALTER" in statement for statement in done), "each rewrites the whole table"
    for release in RELEASES.values():
        with closing(open_as(release, path)) as gateway:
            gateway.execute(release.insert(), release.record("r"))
    upgrade(adopted)
    with adopted.connect() as connection:
        assert drift(connection) == []


def test_the_columns_go_when_the_user_says_so(path, adopted):
    downgrade(adopted, "0001", drop_data=True)
    assert len(columns_of(path)) == 26
    upgrade(adopted)
    with adopted.connect() as connection:
        assert drift(connection) == []


def write(path, statement):
    with closing(connect(path)) as gateway:
        gateway.execute(statement)


@pytest.mark.parametrize(
    ("statement", "stays"),
    [
        ("UPDATE routing_telemetry SET request_text = 'asked'", "0002"),
        ("UPDATE routing_telemetry SET pinned = 1", "0003"),
        ("UPDATE routing_telemetry SET cache_read_tokens = 5", "0003"),
        ("CREATE TABLE session_pins (session_id TEXT PRIMARY KEY)", "0004"),
    ],
)
def test_what_the_gateway_seems_to_write_is_not_taken_back(
    path, adopted, changes, statement, stays
):
    write(path, statement)
    done = changes(adopted)
    below = f"{int(stays) - 1:04}"
    with pytest.raises(DowngradeRefused, match=f"write columns that revision {stays} added"):
        downgrade(adopted, below)
    assert done == []
    assert revision_of(adopted) == revisions.head()
    downgrade(adopted, stays)
    downgrade(adopted, below, drop_data=True)  # it was stopped
    assert revision_of(adopted) == below


def test_the_latest_rows_decide_what_the_gateway_writes(path, adopted):
    write(path, "UPDATE routing_telemetry SET base_tier = 'SIMPLE'")
    insert = "INSERT INTO routing_telemetry (request_id, timestamp, provider) VALUES ('r', 1, 'p')"
    with closing(connect(path)) as gateway:
        for _ in range(1_000):
            gateway.execute(insert)
    downgrade(adopted, "0002")


def test_a_refused_downgrade_has_changed_nothing_on_the_way(empty_engine, changes):
    upgrade(empty_engine)
    with empty_engine.begin() as connection:
        connection.execute(
            text("INSERT INTO savings_events (timestamp, category, tokens_saved) VALUES (1,'c',2)")
        )
    done = changes(empty_engine)
    for revision in ("base", "0001", "0003", "-7"):
        with pytest.raises(DowngradeRefused, match="savings_events has rows"):
            downgrade(empty_engine, revision)
    assert [statement for statement in done if not statement.startswith("ROLLBACK")] == []


def test_a_downgrade_may_be_given_as_a_number_of_steps(empty_engine):
    upgrade(empty_engine)
    downgrade(empty_engine, "-1")
    assert revision_of(empty_engine) == "0009"
    downgrade(empty_engine, "0005-2")
    assert revision_of(empty_engine) == "0003"
    downgrade(empty_engine, "base")
    assert revision_of(empty_engine) is None
    downgrade(empty_engine, "base")


def test_savings_of_an_adopted_file_go_with_its_rows_alone(path):
    gateway_file(path, 11, tuple(INDEXES), [ROW], SAVINGS)
    engine = create_store_engine(f"sqlite:///{path}")
    upgrade(engine)
    with pytest.raises(DowngradeRefused, match="adopted at revision 0004"):
        downgrade(engine, "0003", drop_data=True)
    engine.dispose()


@pytest.mark.parametrize("backend", ["sqlite-file", "postgres18"])
def test_statistics_of_rows_that_are_gone_are_not_dropped_unasked(backend, new_url):
    url = new_url(backend, at_head=True)
    day = 86_400_000
    now = 1_750_000_000_000
    with Store(url, clock=lambda: now) as store:
        store.add_many([{"provider": "p", "timestamp": now - n * day} for n in range(5)])
        store.maintain()
        downgrade(store.engine, "0009")
        upgrade(store.engine)
    engine = create_store_engine(url)
    downgrade(engine, "0008")  # every row is still there
    upgrade(engine)
    with Store(url, clock=lambda: now) as store:
        store.maintain()
        assert store.cleanup(timedelta(days=2), trust_clock=True) == 2
    for revision in ("0008", "0003", "base"):
        with pytest.raises(DowngradeRefused, match=r"rows that retention removed|has rows"):
            downgrade(engine, revision)
        assert revision_of(engine) == revisions.head()
    downgrade(engine, "0009")
    downgrade(engine, "0008", drop_data=True)
    assert revision_of(engine) == "0008"
    upgrade(engine)
    engine.dispose()
