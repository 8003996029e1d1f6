"""What `follow` reads, statement by statement, where other transactions come between."""

import time

import psycopg
import pytest
from sqlalchemy import create_engine, event, insert, make_url

from lynkr_store import (
    BadArgument,
    Store,
    StoreSettings,
    UnsupportedDatabase,
    create_store_engine,
)
from lynkr_store.db.models import TELEMETRY
from lynkr_store.store.base import new_follower
from tests.conftest import POSTGRES
from tests.support.children import MortalServer
from tests.support.postgres import available_servers

NOW = 1_750_000_000_000


def records(count):
    return [{"provider": "p", "timestamp": NOW, "request_id": str(n)} for n in range(count)]


def put(connection):
    connection.execute(insert(TELEMETRY), records(1))


class Reader:
    """Reads what `follow` reads, one transaction at each call."""

    def __init__(self, store, after=0):
        self._store = store
        self._follower = new_follower(None, after, 60.0, include_text=False)
        self._tail = store._do_follow(self._follower, None).tail

    def read(self):
        page = self._store._do_follow(self._follower, self._tail)
        self._tail = page.tail
        return [row.id for row in page.rows]

    def upto(self, row_id):
        found = []
        deadline = time.monotonic() + 60
        while not found or found[-1] < row_id:
            assert time.monotonic() < deadline, found
            found += self.read()
        return found


def test_a_file_that_replaces_the_followed_one_is_an_error(new_url):
    url = new_url("sqlite-file", at_head=True)
    other = new_url("sqlite-file", at_head=True)
    with Store(url) as store:
        store.add_many(records(3))
        rows = store.follow(after=0)
        [next(rows) for _ in range(3)]
        path = store._database._file.path
        other_file = make_url(other).database
        for end in ("-wal", "-shm"):
            path.with_name(path.name + end).unlink(missing_ok=True)
        path.unlink()
        path.hardlink_to(other_file)
        with pytest.raises(BadArgument, match="another database"):
            next(rows)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "AUTOCOMMIT"])
def test_a_commit_between_any_two_of_its_statements_loses_no_row(isolation, new_url):
    """On a host's engine too, whose transactions may see the rows of their beginning alone."""
    url = new_url(POSTGRES[-1], at_head=True)
    writers = create_store_engine(url)
    host = create_engine(
        make_url(url).set(drivername="postgresql+psycopg"), isolation_level=isolation
    )
    at = None

    def before_statement(*_):
        nonlocal at
        if at is not None and (at := at - 1) < 0:
            at = None
            early.commit()

    try:
        with Store(engine=host) as store:
            event.listen(host, "before_cursor_execute", before_statement)
            last = 0
            for moment in range(12):
                reader = Reader(store, after=last)
                with writers.connect() as early, writers.connect() as late:
                    put(early)
                    put(late)
                    late.commit()
                    at = moment
                    found = reader.upto(last + 2)
                    assert found == [last + 1, last + 2], moment
                    early.commit()
                last += 2
    finally:
        at = None
        host.dispose()
        writers.dispose()


@pytest.fixture(params=available_servers(), ids=lambda installation: installation.name)
def own_server(request):
    """A server that may be configured and started again."""
    with MortalServer(request.param) as server:
        yield server


def restarted(server):
    server.kill()
    server.start_again()


@pytest.mark.slow
def test_a_transaction_that_was_prepared_is_waited_for(own_server):
    with psycopg.connect(own_server.url("postgres"), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET max_prepared_transactions = 5")
    restarted(own_server)
    url = own_server.create_database("prepared")
    with Store(url, settings=StoreSettings(upgrade_on_open=True)) as store:
        reader = Reader(store)
        with psycopg.connect(own_server.url("prepared"), autocommit=True) as early:
            early.execute("BEGIN")
            early.execute(
                "INSERT INTO routing_telemetry (request_id, provider, timestamp) "
                f"VALUES ('early', 'p', {NOW})"
            )
            store.add_many(records(1))
            assert [reader.read(), reader.read()] == [[], []]
            early.execute("PREPARE TRANSACTION 'one'")
            assert [reader.read(), reader.read()] == [[], []]
        restarted(own_server)
        assert [reader.read(), reader.read()] == [[], []]
        with psycopg.connect(own_server.url("prepared"), autocommit=True) as other:
            other.execute("COMMIT PREPARED 'one'")
        assert reader.upto(2) == [1, 2]


@pytest.mark.slow
def test_a_standby_is_refused(own_server):
    url = own_server.create_database("standby")
    with Store(url, settings=StoreSettings(upgrade_on_open=True)) as store:
        store.add_many(records(3))
        rows = store.follow(after=0)
        next(rows)
    own_server.become_standby()
    with (
        Store(url, read_only=True) as store,
        pytest.raises(UnsupportedDatabase, match=r"is a standby.*the primary's URL"),
    ):
        store.follow()
