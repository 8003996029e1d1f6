"""How rows reach the driver: one statement for many on SQLite, COPY on PostgreSQL."""

import asyncio

import pytest
from sqlalchemy import String, func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from lynkr_store import (
    AsyncStore,
    RoutingRepository,
    RowRejected,
    StoreUnavailable,
    create_store_engine,
    writing,
)
from lynkr_store.db.models import TELEMETRY
from lynkr_store.ingest.validation import TextPolicy, row_of
from lynkr_store.migrate.upgrade import upgrade
from lynkr_store.storage.bulk import send
from lynkr_store.storage.inserts import insert_all, insert_isolating
from lynkr_store.testing import RecordFactory
from tests.conftest import BACKENDS, POSTGRES

NOW = 1_750_000_000_000

ODD_TEXTS = [
    "",
    "\\N",
    "\\.",
    "\\",
    "a\tb\nc\rd\\te\vf\bg\fh",
    "'\"%s ?:name",
    "é🚀\ufffd\uffff\x7f\x01",
    "NULL",
    "x" * 200_000,
]


@pytest.fixture(params=BACKENDS)
def engine(request, new_url):
    engine = create_store_engine(new_url(request.param))
    upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def postgres_engine(postgres_url):
    engine = create_store_engine(postgres_url)
    upgrade(engine)
    yield engine
    engine.dispose()


def row(**fields):
    return row_of(RecordFactory(**fields), NOW, TextPolicy())[0]


def execute(engine, *statements):
    with writing(engine).begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def sent(engine, rows):
    with writing(engine).begin() as connection:
        send(connection, rows)


def stored(engine, *columns):
    with engine.connect() as connection:
        asked = select(*(TELEMETRY.c[name] for name in columns)).order_by(TELEMETRY.c.id)
        return connection.execute(asked).all()


@pytest.mark.parametrize(
    ("count", "wide"),
    [(1, False), (2, False), (127, False), (129, False), (1_001, False), (1_001, True)],
)
def test_any_number_of_rows_is_stored_in_order(engine, count, wide):
    one = row()
    if wide:
        texts = [name for name in one if isinstance(TELEMETRY.c[name].type, String)]
        some = dict.fromkeys(one, 1) | dict.fromkeys(texts, "1")
        one = some | {name: value for name, value in one.items() if value is not None}
    sent(engine, [one | {"request_id": str(n)} for n in range(count)])
    assert stored(engine, "request_id") == [(str(n),) for n in range(count)]


def test_every_value_is_stored_as_it_is(engine):
    numbers = [0.1 + 0.2, -0.5, 1e-5, 1e6, 5e-324, None]
    counts = [0, -(10**12), 10**12, None]
    flags = [True, False, None]
    rows = [row(request_text=words, provider=words[:512]) for words in ODD_TEXTS]
    rows += [row(cost_usd=number, quality_score=number, latency_ms=number) for number in numbers]
    rows += [row(input_tokens=n, retry_count=n, status_code=n) for n in counts]
    rows += [row(stream=f, cache_tokens_included=f, was_fallback=f, pinned=f) for f in flags]
    rows += [row(attributes={"a": [1, None, "\t\\"]}, timestamp=946_684_800_000)]
    sent(engine, rows)
    columns = [name for name in rows[0] if name != "timestamp"]
    assert stored(engine, *columns) == [tuple(r[name] for name in columns) for r in rows]
    with engine.connect() as connection:
        found = connection.execute(
            text("SELECT timestamp, was_fallback FROM routing_telemetry ORDER BY id")
        ).all()
    assert found == [(r["timestamp"], int(r["was_fallback"])) for r in rows]


def test_columns_that_the_rows_lack_have_their_defaults(engine):
    """Rows that an older release left in a spool, in whatever order it wrote their columns."""
    sent(engine, [{"provider": "p", "timestamp": NOW, "request_id": str(n)} for n in range(3)])
    assert stored(engine, "request_id", "provider", "tier", "was_fallback") == [
        (str(n), "p", None, False) for n in range(3)
    ]


def test_columns_come_into_use_and_stay_null_elsewhere(engine):
    """Those of which no row has a value are NULL, also where the table has a default."""
    bare = dict.fromkeys(row()) | {"provider": "p", "timestamp": NOW, "request_id": "r"}
    with writing(engine).begin() as connection:
        send(connection, [bare])
        send(connection, [bare, bare | {"tier": "T", "stream": False}])
        send(connection, [bare | {"error_type": ""}, bare])
        send(connection, [bare | {"was_fallback": True, "input_tokens": 0}])
    found = stored(engine, "tier", "stream", "error_type", "input_tokens", "was_fallback", "pinned")
    nothing = (None,) * 6
    assert found == [
        nothing,
        nothing,
        ("T", False, *(None,) * 4),
        (None, None, "", *(None,) * 3),
        nothing,
        (None, None, None, 0, True, None),
    ]


def test_a_row_that_is_refused_leaves_none_and_the_transaction_whole(engine):
    execute(engine, "CREATE UNIQUE INDEX once ON routing_telemetry (request_id)")
    with writing(engine).begin() as connection:
        insert_all(connection, [row(request_id="before")])
        with pytest.raises(IntegrityError):
            insert_all(connection, [row(request_id=name) for name in ("a", "b", "a")])
        insert_all(connection, [row(request_id="after")])
    assert stored(engine, "request_id") == [("before",), ("after",)]


def test_a_trigger_of_sqlites_deals_with_conflicts_in_its_own_way(new_url):
    """The conflict clause of an INSERT would hold for the statements of its triggers, too."""
    engine = create_store_engine(new_url("sqlite-file", at_head=True))
    rows = [row(request_id=str(n), model="same") for n in range(5)]
    trigger = (
        "CREATE TRIGGER sees AFTER INSERT ON routing_telemetry "
        "BEGIN INSERT OR IGNORE INTO seen VALUES (NEW.model); END"
    )
    with writing(engine).begin() as connection:
        send(connection, rows)
        connection.exec_driver_sql("CREATE TABLE seen (model TEXT PRIMARY KEY)")
        connection.exec_driver_sql(trigger)
        send(connection, rows)
        assert insert_isolating(connection, rows) == {}
        assert connection.exec_driver_sql("SELECT * FROM seen").all() == [("same",)]
    assert stored(engine, "request_id") == [(str(n),) for n in [*range(5)] * 3]
    engine.dispose()


def test_the_error_of_many_rows_shows_a_short_statement(engine):
    execute(engine, "CREATE UNIQUE INDEX once ON routing_telemetry (request_id)")
    with pytest.raises(IntegrityError) as caught, writing(engine).begin() as connection:
        insert_all(connection, [row(request_id="same") for _ in range(128)])
    assert len(str(caught.value.statement)) < 2_000


def test_a_view_that_takes_no_copy_takes_the_rows(postgres_engine):
    execute(
        postgres_engine,
        "ALTER TABLE routing_telemetry RENAME TO base",
        "CREATE VIEW routing_telemetry AS SELECT * FROM base",
    )
    with writing(postgres_engine).begin() as connection:
        insert_all(connection, [row(request_id=str(n)) for n in range(3)])
    assert stored(postgres_engine, "request_id") == [("0",), ("1",), ("2",)]


def test_a_connection_that_breaks_in_the_middle_is_not_used_again(postgres_engine):
    execute(
        postgres_engine,
        "CREATE FUNCTION ends() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.tier = 'END' "
        "THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; RETURN NEW; END $$",
        "CREATE TRIGGER ends BEFORE INSERT ON routing_telemetry "
        "FOR EACH ROW EXECUTE FUNCTION ends()",
    )
    rows = [row(tier="END" if n == 500 else "SIMPLE") for n in range(1_000)]
    with (
        pytest.raises(DBAPIError) as caught,
        writing(postgres_engine).connect() as connection,
        connection.begin(),
    ):
        insert_all(connection, rows)
    assert caught.value.connection_invalidated
    assert postgres_engine.pool.checkedout() == 0
    sent(postgres_engine, [row(request_id="next")])
    assert stored(postgres_engine, "request_id") == [("next",)]


@pytest.mark.parametrize("backend", POSTGRES)
def test_an_asynchronous_connection_has_its_own_way(new_url, backend):
    url = new_url(backend, at_head=True)
    records = [RecordFactory(request_id=str(n), stream=n == 1) for n in range(3)]

    async def run():
        async with AsyncStore(url) as store:
            assert await store.add_many(records) == 3
            engine = create_store_engine(url)
            execute(engine, "CREATE UNIQUE INDEX once ON routing_telemetry (request_id)")
            with pytest.raises(RowRejected):
                await store.add_many([RecordFactory(request_id="new"), records[0]])
            return engine

    engine = asyncio.run(run())
    assert stored(engine, "request_id", "stream") == [("0", False), ("1", True), ("2", False)]
    engine.dispose()


def test_a_fault_of_copy_says_nothing_of_the_rows(postgres_engine):
    """The server repeats the line in its context, and whatever a trigger says in its message."""
    execute(
        postgres_engine,
        "CREATE FUNCTION tells() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION 'heard %', NEW.request_text USING ERRCODE = '53100'; END $$",
        "CREATE TRIGGER tells BEFORE INSERT ON routing_telemetry "
        "FOR EACH ROW EXECUTE FUNCTION tells()",
    )
    with (
        pytest.raises(StoreUnavailable) as caught,
        Session(writing(postgres_engine)) as session,
    ):
        RoutingRepository(session).add_many([RecordFactory(request_text="secret")])
    error = caught.value
    assert error.__cause__ is None
    assert "secret" not in str(error)
    with postgres_engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(TELEMETRY)) == 0
