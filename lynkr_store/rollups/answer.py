"""Answers about a window, made up of roll-ups and rows: exact, as long as the rows are there."""

from typing import Any, NamedTuple

from sqlalchemy import Connection, Row
from sqlalchemy.orm import Session

from lynkr_store.db.models import TELEMETRY
from lynkr_store.rollups import answer_sql, state
from lynkr_store.rollups.answer_sql import LONG_BACKLOG, Question, shape
from lynkr_store.rollups.buckets import cover, floor_to
from lynkr_store.rollups.state import Standing
from lynkr_store.schemas.units import INSTANT_MIN_MS, QUARTER_MS


class Part(NamedTuple):
    """What some of a window's rows add to an answer, or what is taken away again.

    Attributes:
        by: The values of the question's dimensions.
        sums: The measures, in the order of `lynkr_store.rollups.measures.columns_of`.
    """

    by: tuple[Any, ...]
    sums: tuple[int, ...]


class Answer(NamedTuple):
    """The parts of an answer.

    Attributes:
        parts: They are to be added up.
        raw_from: None for the exact answer. Else rows of the window were removed, all of them
            before this instant, and it was made up of whole quarters of an hour there.
    """

    parts: list[Part]
    raw_from: int | None


def ask(
    session: Session, question: Question, since: int, until: int, now: int, **given: Any
) -> Answer:
    """Answer a question about the window ``[since, until)``, in epoch milliseconds.

    Args:
        session: In a transaction, of any isolation.
        question: What is asked.
        since: The window's first millisecond.
        until: The first one after it.
        now: The present: there are hardly any rows after it.
        given: ``provider``, if the question is of one.
    """
    incomplete = None
    changed = by_rows = False
    while True:
        stands = look(session)
        backlog = 0 if stands.newest is None else stands.newest - stands.folded
        removed = None
        if _reaches(since, stands):
            connection = session.connection(bind_arguments={"clause": TELEMETRY})
            removed = removed_before(connection, stands)
        # where the window does not reach so far, the quarter in which it begins may
        kept_from = stands.raw_from if removed is None else removed
        asked = cover(since, until, now, kept_from, ends_by_rows=by_rows)
        kept_from = INSTANT_MIN_MS if kept_from is None else kept_from
        found = session.execute(
            answer_sql.answer(
                question, shape(asked, changed=changed), long_backlog=backlog > LONG_BACKLOG
            ),
            answer_sql.parameters(asked, since, until, stands.folded, kept_from, changed=changed)
            | given,
        ).all()
        about = {row.part: row.requests for row in found if not row.sign}
        if about["folded"] != stands.folded:
            continue  # a fold came between, and its rows would count twice or not at all
        if about.get("changed"):
            changed = True
            continue
        missing = [  # without a change that says why
            (end, about[f"missing_{number}"])
            for number, end in enumerate(asked.ends)
            if not (changed and about[f"changed_{number}"] and end[0] >= kept_from)
        ]
        gone = [end for end, rows in missing if rows > 0]
        if gone:
            # rows at an end of the window were removed: there it becomes one of whole quarters
            since, until = min(since, gone[0][0]), max(until, gone[-1][1])
            incomplete = gone[-1][1]
            continue
        if not by_rows and any(rows < 0 for _, rows in missing):
            by_rows = True  # rows of ids that were passed already, which maintenance will count
            continue
        trusted = changed or (removed is not None and since >= removed)
        if trusted and _were_removed(session, stands):
            continue  # meanwhile, perhaps of the window, and nothing in the answer would tell
        if removed is None or since >= removed:
            removed = incomplete
        return Answer([_part(question, row) for row in found if row.sign], removed)


def look(connection: Session | Connection) -> Standing:
    """How the roll-ups stand to the rows now."""
    return Standing(*connection.execute(state.standing()).one())


def _part(question: Question, row: Row[*tuple[Any, ...]]) -> Part:
    _, sign, *values = row
    sums = values[len(question.by) :]
    return Part(
        tuple(values[: len(question.by)]),
        tuple([sign * int(value) if value else 0 for value in sums]),
    )


def _were_removed(session: Session, stands: Standing) -> bool:
    now = look(session)
    return (now.oldest_row, now.raw_from) != (stands.oldest_row, stands.raw_from)


def _reaches(since: int, stands: Standing) -> bool:
    """Whether a window may begin before rows that were removed."""
    if stands.first_bucket is None:
        return False
    if stands.oldest_row is None or (stands.raw_from is not None and since < stands.raw_from):
        return True
    return since < floor_to(QUARTER_MS, stands.oldest_row) + QUARTER_MS


def removed_before(connection: Connection, stands: Standing) -> int | None:
    """The instant before which rows were removed that the roll-ups know; None if none were.

    By retention, ours or another's, which takes the oldest first: so the oldest that is left tells.
    Rows that were changed, or deleted from among others that stay, are not removed in this sense:
    their quarters are counted again.
    """
    found = None
    if stands.first_bucket is not None and stands.last_bucket is not None:
        if stands.oldest_row is None:
            found = stands.last_bucket + QUARTER_MS
        else:
            start = floor_to(QUARTER_MS, stands.oldest_row)
            earlier = stands.first_kept is not None and stands.first_kept < start
            if earlier or _lost_its_first(connection, start, stands):
                found = stands.oldest_row
    return max((i for i in (found, stands.raw_from) if i is not None), default=None)


def _lost_its_first(connection: Connection, start: int, stands: Standing) -> bool:
    """Whether the quarter of the oldest row has lost rows, and only such as were older."""
    assert stands.oldest_row is not None  # noqa: S101 - it is what the quarter was found by
    known, there, changed, deleted = connection.execute(
        state.counts_of_quarter(), state.quarter(start, stands.folded)
    ).one()
    if known <= there:
        return False
    return not changed or (deleted is not None and deleted < stands.oldest_row)
