"""An open database: its connections when the engine is disposed in the middle of a transaction."""

import os

import pytest
from sqlalchemy import event, text

from lynkr_store import Store
from lynkr_store.db.dialect import driver_of


@pytest.fixture
def closed(engine):
    """The driver's connections that the engine's pools have closed."""
    found = []
    event.listen(engine, "close", lambda connection, _: found.append(connection))
    return found


@pytest.mark.parametrize("work", ["read", "write_transaction"])
def test_a_connection_in_use_when_its_host_disposes_the_engine_is_closed(engine, closed, work):
    with Store(engine=engine) as store:
        store.add_many([{"provider": "p"}])
        with getattr(store._database, work)() as connection:
            engine.dispose()
            assert connection.scalar(text("SELECT count(*) FROM routing_telemetry")) == 1
            driver = driver_of(connection)
            assert driver not in closed
        assert driver in closed
        assert store.get_stats().total_requests == 1, "the host's engine goes on"
        assert engine.pool.checkedin() == 1


def test_a_connection_that_is_made_after_the_dispose_is_closed_too(url):
    store = Store(url)
    store.add_many([{"provider": "p"}])
    database = store._database
    closed = []
    event.listen(database.engine, "close", lambda connection, _: closed.append(connection))
    with database.closed_if_disposed():
        store.close()
        with database.engine.connect() as connection:
            driver = driver_of(connection)
    assert driver in closed
    assert database.engine.pool.checkedin() == 0


def test_what_is_not_disposed_keeps_its_connections(engine, closed):
    with Store(engine=engine) as store:
        for _ in range(3):
            with store._database.read():
                pass
        assert closed == []
    assert closed == []


def test_in_a_child_the_parents_connections_stay_open(engine, closed):
    with Store(engine=engine) as store:
        with store._database.closed_if_disposed():
            with engine.connect() as connection:
                connection.scalar(text("SELECT 1"))
            pid = os.fork()
            before = len(closed)  # SQLite's are closed before a fork, in the parent
        if not pid:
            os._exit(len(closed) - before)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert store.query() == []
