"""A schema that changes under a running store: records wait, are reported once, and are written."""

import logging
from collections import Counter
from types import SimpleNamespace

import pytest
from sqlalchemy import text

from lynkr_store import Store, StoreSettings, create_store_engine, writing
from lynkr_store.db.models import LEDGER, TELEMETRY
from lynkr_store.migrate import revisions
from lynkr_store.migrate import upgrade as migrate
from tests.conftest import EXTERNAL, POSTGRES
from tests.support.stores import adds_up, eventually

pytestmark = pytest.mark.usefixtures("_quick_retries")


@pytest.fixture
def _quick_retries(monkeypatch):
    monkeypatch.setattr("lynkr_store.ingest.deliverer._FIRST_RETRY_S", 0.01)
    monkeypatch.setattr("lynkr_store.ingest.deliverer._LAST_RETRY_S", 0.1)


@pytest.fixture
def changing(url):
    """An engine beside the store's, by which somebody changes the schema."""
    engine = create_store_engine(url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(url):
    with Store(settings=StoreSettings(url=url, batch_max_rows=7)) as store:
        yield store


def execute(engine, *statements):
    with writing(engine).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def names(engine):
    with engine.connect() as connection:
        return list(
            connection.scalars(text("SELECT request_id FROM routing_telemetry ORDER BY id"))
        )


def record(store, prefix, count=20):
    recorded = [f"{prefix}-{n}" for n in range(count)]
    for name in recorded:
        assert store.record(provider="p", request_id=name, attributes={"n": name})
    return recorded


def drop_table(engine):
    execute(engine, "DROP TABLE routing_telemetry")


def make_table(engine):
    with writing(engine).begin() as connection:
        TELEMETRY.create(connection)


def drop_ledger(engine):
    execute(engine, "DROP TABLE ingest_batches")


def make_ledger(engine):
    with writing(engine).begin() as connection:
        LEDGER.create(connection)


def rename_away(engine):
    execute(engine, "ALTER TABLE routing_telemetry RENAME TO elsewhere")


def rename_back(engine):
    execute(engine, "ALTER TABLE elsewhere RENAME TO routing_telemetry")


def drop_column(engine):
    execute(engine, "ALTER TABLE routing_telemetry DROP COLUMN attributes")


def add_column(engine):
    execute(engine, "ALTER TABLE routing_telemetry ADD COLUMN attributes TEXT")


def rename_column(engine):
    execute(engine, "ALTER TABLE routing_telemetry RENAME COLUMN attributes TO extra")


def rename_column_back(engine):
    execute(engine, "ALTER TABLE routing_telemetry RENAME COLUMN extra TO attributes")


def take_revisions_back(engine):
    migrate.downgrade(engine, "0004")


def upgrade(engine):
    migrate.upgrade(engine)


def get_ahead(engine):
    rename_away(engine)
    execute(engine, "UPDATE lynkr_store_alembic_version SET version_num = '9999'")


def come_back(engine):
    execute(engine, f"UPDATE lynkr_store_alembic_version SET version_num = '{revisions.head()}'")
    rename_back(engine)


def forget_the_version(engine):
    rename_away(engine)
    execute(engine, "DELETE FROM lynkr_store_alembic_version")


def note_the_version(engine):
    execute(engine, f"INSERT INTO lynkr_store_alembic_version VALUES ('{revisions.head()}')")
    rename_back(engine)


CHANGES = {
    "the table is dropped and made again": SimpleNamespace(
        away=drop_table, back=make_table, keeps=False, error="StoreUnavailable: "
    ),
    "the table is renamed": SimpleNamespace(
        away=rename_away, back=rename_back, keeps=True, error="StoreUnavailable: "
    ),
    "the ledger is dropped and made again": SimpleNamespace(
        away=drop_ledger, back=make_ledger, keeps=True, error="StoreUnavailable: "
    ),
    "a column is dropped": SimpleNamespace(
        away=drop_column, back=add_column, keeps=True, error="StoreUnavailable: "
    ),
    "a column is renamed": SimpleNamespace(
        away=rename_column, back=rename_column_back, keeps=True, error="StoreUnavailable: "
    ),
    "revisions are taken back": SimpleNamespace(
        away=take_revisions_back,
        back=upgrade,
        keeps=True,
        error="SchemaBehind: the schema is at revision 0004, this release needs "
        f"{revisions.head()}: run lynkr-store upgrade",
    ),
    "the version is forgotten": SimpleNamespace(
        away=forget_the_version,
        back=note_the_version,
        keeps=True,
        error="SchemaBehind: the schema has no revision, this release needs "
        f"{revisions.head()}: run lynkr-store upgrade",
    ),
    "the schema gets ahead": SimpleNamespace(
        away=get_ahead,
        back=come_back,
        keeps=True,
        error="SchemaAhead: the schema's revision 9999 is newer than this release (head "
        f"{revisions.head()}): install a newer lynkr-store",
    ),
}


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "lynkr_store"]


def check_one_outage(store, caplog, changing, change, *, number=0):
    """Records wait while the schema is another, and are written when it is back."""
    caplog.clear()
    faults_before, written_before = store.health().faults_by, store.health().written
    change.away(changing)
    waiting = record(store, f"during {number}")
    kind = change.error.partition(":")[0]

    def faults():
        return Counter(store.health().faults_by) - Counter(faults_before)

    eventually(lambda: faults()[kind] >= 5)
    eventually(lambda: store.health().last_error.startswith(change.error))
    health = store.health()
    assert adds_up(health)
    assert (health.pending, health.written) == (len(waiting), written_before)
    assert (health.rejected, health.dropped) == (0, 0)
    tries = faults().total()
    lines = said(caplog)
    assert all(line.startswith("records wait to be written: ") for line in lines)
    assert len(lines) == len(set(lines)) <= 2 < tries, "one line a fault, not one a try"
    assert any(change.error in line for line in lines)
    change.back(changing)
    assert store.flush(60)
    health = store.health()
    assert adds_up(health)
    assert (health.pending, health.rejected, health.dropped) == (0, 0, 0)
    assert health.written == written_before + len(waiting)
    eventually(lambda: said(caplog)[-1] == "records are written again")
    print(f"\n{tries} tries ended by {dict(faults())}, in {len(lines)} lines")
    return waiting


@pytest.mark.sample(3)
@pytest.mark.parametrize("what", CHANGES)
def test_records_wait_while_the_schema_is_another(store, changing, caplog, what):
    change = CHANGES[what]
    caplog.set_level(logging.INFO, "lynkr_store")
    before = record(store, "before")
    assert store.flush(30)
    waited = check_one_outage(store, caplog, changing, change)
    after = record(store, "after")
    assert store.flush(30)
    assert names(changing) == [*(before if change.keeps else []), *waited, *after]
    assert adds_up(store.health())


def test_a_file_that_another_thread_opens_again_is_not_taken_for_another_file(url, monkeypatch):
    """A store that took it for one began anew, and made a table again that was dropped."""
    with Store(url) as store:
        store.query()
        file = store._database._file
        named = file._named

        def meanwhile():
            file._opened = None  # as `open` does in the other thread
            return named()

        monkeypatch.setattr(file, "_named", meanwhile)
        assert not file.is_other()
        store._database.require_file()


def test_a_column_that_no_record_uses_holds_none_up(store, changing):
    """Statements name the columns that have values."""
    expected = record(store, "before")
    assert store.flush(30)
    execute(changing, "ALTER TABLE routing_telemetry RENAME COLUMN finish_reason TO reason")
    expected += record(store, "meanwhile")
    assert store.flush(30)
    assert names(changing) == expected
    waiting = record(store, "reasoned", 1)
    assert store.record(provider="p", request_id="reasoned", finish_reason="stop")
    eventually(lambda: store.health().last_error)
    assert store.health().pending == 2
    execute(changing, "ALTER TABLE routing_telemetry RENAME COLUMN reason TO finish_reason")
    assert store.flush(60)
    assert names(changing) == [*expected, *waiting, "reasoned"]


@pytest.mark.parametrize("what", ["the table is renamed", "revisions are taken back"])
def test_a_second_outage_is_reported_again(store, changing, caplog, what):
    caplog.set_level(logging.INFO, "lynkr_store")
    expected = record(store, "before")
    assert store.flush(30)
    for number in range(2):
        expected += check_one_outage(store, caplog, changing, CHANGES[what], number=number)
    assert names(changing) == expected


def test_a_schema_that_is_ahead_when_the_store_opens_is_waited_for(url, changing, caplog):
    execute(changing, "UPDATE lynkr_store_alembic_version SET version_num = '9999'")
    with Store(url) as store:
        expected = record(store, "r")
        eventually(lambda: store.health().faults_by.get("SchemaAhead", 0) >= 3)
        assert "install a newer lynkr-store" in store.health().last_error
        assert store.health().pending == len(expected)
        [line] = said(caplog)
        assert "SchemaAhead" in line
        execute(
            changing, f"UPDATE lynkr_store_alembic_version SET version_num = '{revisions.head()}'"
        )
        assert store.flush(60)
        assert names(changing) == expected
        assert adds_up(store.health())


def test_a_newer_revision_that_takes_the_rows_does_not_stop_a_running_store(store, changing):
    expected = record(store, "before")
    assert store.flush(30)
    execute(
        changing,
        "UPDATE lynkr_store_alembic_version SET version_num = '9999'",
        "ALTER TABLE routing_telemetry ADD COLUMN newer TEXT",
    )
    expected += record(store, "after")
    assert store.flush(30)
    assert names(changing) == expected
    assert not store.health().faults_by
    assert adds_up(store.health())


@pytest.mark.parametrize("backend", POSTGRES)
def test_a_schema_that_is_behind_when_the_store_opens_is_waited_for(backend, new_url, caplog):
    url = new_url(backend)
    with Store(url) as store:
        expected = record(store, "r")
        eventually(lambda: store.health().faults_by.get("SchemaBehind", 0) >= 3)
        assert "run lynkr-store upgrade" in store.health().last_error
        [line] = said(caplog)
        assert "SchemaBehind" in line
        engine = create_store_engine(url)
        migrate.upgrade(engine)
        assert store.flush(60)
        assert names(engine) == expected
        assert adds_up(store.health())
        engine.dispose()


# -- permissions -------------------------------------------------------------------------------

PERMISSIONS = {
    "INSERT on the table": "INSERT ON routing_telemetry",
    "INSERT on the ledger": "INSERT ON ingest_batches",
    "everything on both": "ALL ON routing_telemetry, ingest_batches",
    "USAGE of the schema": "USAGE ON SCHEMA public",
}


@pytest.mark.skipif(bool(EXTERNAL), reason="needs a role of its own")
@pytest.mark.parametrize("backend", POSTGRES)
@pytest.mark.parametrize("what", PERMISSIONS)
def test_records_wait_while_a_permission_is_missing(backend, new_url, caplog, what):
    caplog.set_level(logging.INFO, "lynkr_store")
    url = new_url(backend, at_head=True)
    owner = create_store_engine(url)
    execute(
        owner,
        "CREATE ROLE clerk LOGIN",
        "REVOKE ALL ON SCHEMA public FROM PUBLIC",
        "GRANT USAGE ON SCHEMA public TO clerk",
        "GRANT SELECT ON lynkr_store_alembic_version TO clerk",
        "GRANT ALL ON routing_telemetry, ingest_batches TO clerk",
    )
    permission = PERMISSIONS[what]
    change = SimpleNamespace(
        away=lambda engine: execute(engine, f"REVOKE {permission} FROM clerk"),
        back=lambda engine: execute(engine, f"GRANT {permission} TO clerk"),
        error="SchemaBehind: " if "SCHEMA" in permission else "StoreUnavailable: ",
    )
    try:
        clerk = url.replace("postgres@", "clerk@")
        with Store(settings=StoreSettings(url=clerk, batch_max_rows=7)) as store:
            before = record(store, "before")
            assert store.flush(30)
            waited = check_one_outage(store, caplog, owner, change)
            assert names(owner) == [*before, *waited]
    finally:
        execute(owner, "DROP OWNED BY clerk", "DROP ROLE clerk")
        owner.dispose()
