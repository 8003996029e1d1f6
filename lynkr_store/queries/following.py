"""Reads the rows after an id, in the order of their ids; one that is stored late is not left out.

SQLite's writers take turns, so each new row has a greater id than all before it. PostgreSQL assigns
ids before their transactions commit, so a row may appear below one that was already read. That can
happen only where a number is missing. So rows are given as far as no number is missing. At a gap,
the transactions that may have written are looked up once; when they have ended, no row can appear
any more in the gap, nor in any other below the greatest id of that moment.
"""

import logging
import time
from typing import Final, NamedTuple, assert_never

from sqlalchemy import Connection, select
from sqlalchemy.orm import Session
from sqlalchemy.sql import func

from lynkr_store.backend import Backend
from lynkr_store.db.citus import ids_of_workers
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.errors import translated
from lynkr_store.db.models import TELEMETRY
from lynkr_store.exceptions import BadArgument, UnsupportedDatabase
from lynkr_store.process.log import say
from lynkr_store.queries import pages
from lynkr_store.schemas import Reading, RoutingRow, RoutingRowBrief
from lynkr_store.schemas.filters import RoutingFilter
from lynkr_store.schemas.values import INT64_MIN
from lynkr_store.storage import identities, settled
from lynkr_store.storage.settled import Writers

PAGE_ROWS: Final = 1_000  # rows that are read at a time, matching or not
_FIRST_LOOK_S: Final = 0.01  # most transactions that store rows take less
_SAY_AFTER_S: Final = 30.0


class _Wait(NamedTuple):
    """Transactions that are waited for.

    Attributes:
        upto: The greatest id when they were looked up: settled when they have ended.
        writers: Those that are still open.
        since: When they were looked up, on the monotonic clock.
        said: Whether the log says that rows wait.
    """

    upto: int
    writers: Writers
    since: float
    said: bool = False


class Tail(NamedTuple):
    """How far a reader has come.

    Attributes:
        after: The rows up to this id were read.
        settled: No further row can appear up to this id.
        wait: What it waits for, at a gap.
    """

    after: int
    settled: int = INT64_MIN
    wait: _Wait | None = None


class Page(NamedTuple):
    """What one transaction read.

    Attributes:
        rows: The matching rows.
        tail: Where the next page begins.
        pause_s: Seconds after which it is worth reading.
        unreadable: How many stored values could not be interpreted.
    """

    rows: list[RoutingRowBrief] | list[RoutingRow]
    tail: Tail
    pause_s: float
    unreadable: int


class Follower(NamedTuple):
    """Reads page after page, each in a transaction of its own, and keeps nothing between them.

    Attributes:
        criteria: Which rows.
        after: The id after which to begin; None for the greatest one.
        poll_s: Seconds between two reads while no rows are stored.
        include_text: Whether rows have their two texts.
    """

    criteria: RoutingFilter
    after: int | None
    poll_s: float
    include_text: bool

    def read(self, session: Session, tail: Tail | None) -> Page:
        """Read the rows that follow, as far as none can appear between them any more.

        Args:
            session: In a transaction of its own.
            tail: How far the previous page came; None to begin, which reads no rows.

        Raises:
            BadArgument: The database assigns ids again that were read.
            UnsupportedDatabase: A standby, or a database whose ids do not ascend. It is found out
                at the beginning and at a gap.
            StoreUnavailable: The database cannot be reached.
        """
        with translated():
            connection = session.connection(bind_arguments={"clause": TELEMETRY})
            if tail is None:
                return Page([], self._begin(connection), 0.0, 0)
            last, joined, newest = connection.execute(*pages.next_ids(tail.after, PAGE_ROWS)).one()
            if last is None:
                if (newest or 0) < tail.after and identities.gives_upto(connection, tail.after):
                    raise BadArgument(
                        f"after: the next row's id will be {tail.after} or lower, so ids were "
                        "reset, or this is another database: begin with after=0, or with None for "
                        "new rows alone"
                    )
                return Page([], Tail(tail.after), self.poll_s, 0)
            # where the rows are distributed, the greatest id may be from a moment before
            newest = last if newest is None else max(last, newest)
            upto = _safe(backend_of(connection), tail, last, joined)
            reading = Reading()
            rows = self._rows(session, tail.after, upto, reading)
            tail, pause_s = tail._replace(after=upto), 0.0
            if upto == newest:
                pause_s = self.poll_s
            elif upto < last:
                tail = _look(connection, tail, newest)
                if tail.wait:
                    waited_s = time.monotonic() - tail.wait.since
                    pause_s = min(self.poll_s, max(_FIRST_LOOK_S, waited_s))
        return Page(rows, tail, pause_s, reading.unreadable)

    def _begin(self, connection: Connection) -> Tail:
        _require_order(connection)
        if self.after is not None:
            return Tail(self.after)
        newest: int | None = connection.scalar(select(func.max(TELEMETRY.c.id)))
        return Tail(newest or 0)

    def _rows(
        self, session: Session, after: int, upto: int, reading: Reading
    ) -> list[RoutingRowBrief] | list[RoutingRow]:
        if upto == after:
            return []
        model = RoutingRow if self.include_text else RoutingRowBrief
        statement, values = pages.rows_between(
            self.criteria, after, upto, include_text=self.include_text
        )
        stored = session.execute(statement, values)
        return model.from_stored(tuple(stored.keys()), stored.all(), reading)


def _safe(backend: Backend, tail: Tail, last: int, joined: int | None) -> int:
    """The id up to which no further row can appear, of those that were seen."""
    match backend:
        case Backend.SQLITE:
            return last
        case Backend.POSTGRESQL:
            return min(last, max(tail.after if joined is None else joined, tail.settled))
        case _:
            assert_never(backend)


def _look(connection: Connection, tail: Tail, newest: int) -> Tail:
    """Look whether the transactions that may fill the next gap have ended.

    What this finds is used in the next transaction: in this one a host's isolation level may hide
    what has been committed meanwhile.
    """
    wait = tail.wait
    if wait and wait.upto > tail.after:
        wait = wait._replace(writers=settled.still_open(connection, wait.writers))
    else:
        _require_order(connection)
        wait = _Wait(newest, settled.writers(connection), time.monotonic())
    if not wait.writers:
        return tail._replace(settled=wait.upto, wait=None)
    if not wait.said and time.monotonic() - wait.since > _SAY_AFTER_S:
        wait = wait._replace(said=True)
        say(
            logging.WARNING,
            "follow: rows after id %d wait for a transaction that has written to %s and is open "
            "(server processes: %s)",
            tail.after,
            TELEMETRY.name,
            ", ".join(sorted(str(pid or "none, prepared") for pid in wait.writers.values())),
        )
    return tail._replace(wait=wait)


def _require_order(connection: Connection) -> None:
    """Refuse a database whose late rows cannot be told.

    Raises:
        UnsupportedDatabase: A standby, or a sequence whose numbers are not used in order.
    """
    if backend_of(connection) is Backend.SQLITE:
        return
    if connection.scalar(select(func.pg_catalog.pg_is_in_recovery())):
        raise UnsupportedDatabase(
            "follow: this server is a standby, which does not know the primary's open "
            "transactions, so a row could be left out: give the primary's URL"
        )
    if words := identities.not_in_order(connection) or ids_of_workers(connection):
        raise UnsupportedDatabase(f"follow: {words}")
