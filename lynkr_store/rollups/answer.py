"""Answers a question about a window from roll-ups and raw rows; exact while the rows exist."""

from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

from sqlalchemy import Row
from sqlalchemy.orm import Session

from lynkr_store.db.citus import is_distributed
from lynkr_store.rollups import answer_sql
from lynkr_store.rollups.answer_sql import LONG_BACKLOG, Question, StatementKey, statement_key
from lynkr_store.rollups.buckets import floor_to, split_window
from lynkr_store.rollups.state import RollupState, connection_of, read_state, removed_before
from lynkr_store.schemas.units import INSTANT_MIN_MS, QUARTER_MS


class Part(NamedTuple):
    """What one group of a window's rows adds to an answer, or subtracts from it.

    Attributes:
        by: The values of the question's dimensions.
        sums: The measures, in the order of `lynkr_store.db.models.measure_columns`.
    """

    by: tuple[Any, ...]
    sums: tuple[int, ...]


class Answer(NamedTuple):
    """The parts of an answer.

    Attributes:
        parts: The caller adds them up.
        raw_from: None if the answer is exact. Otherwise rows of the window were removed, all of
            them before this instant, and that part of the answer consists of whole quarters of an
            hour.
    """

    parts: list[Part]
    raw_from: int | None


def ask(
    session: Session, question: Question, since: int, until: int, now: int, **of: str
) -> Answer:
    """Answer a question about the window ``[since, until)``, in epoch milliseconds.

    Args:
        session: In a transaction of any isolation level.
        question: What is asked.
        since: The window's first millisecond.
        until: The first millisecond after the window.
        now: The present; hardly any rows are later.
        of: ``provider``, if the question is about one provider.
    """
    incomplete = None
    changed = by_rows = False
    while True:
        current = read_state(session)
        backlog = 0 if current.newest is None else current.newest - current.watermark
        removed = None
        if _may_reach_removed_rows(since, current):
            removed = removed_before(connection_of(session), current)
        # even if the window does not reach removed rows, the quarter in which it begins may
        kept_from = current.raw_from if removed is None else removed
        parts = split_window(since, until, now, kept_from, edges_from_rows=by_rows)
        kept_from = INSTANT_MIN_MS if kept_from is None else kept_from
        values = answer_sql.parameters(
            parts, since, until, current.watermark, kept_from, changed=changed
        )
        found = _found(
            session,
            question,
            statement_key(parts, changed=changed),
            values | of,
            long_backlog=backlog > LONG_BACKLOG,
        )
        if found is None:
            continue
        facts = _facts(found)
        if facts["watermark"] != current.watermark:
            continue  # a fold committed in between: its rows would count twice or not at all
        if facts["changed"]:
            changed = True
            continue
        missing = [  # rows that are gone, without a change entry that explains it
            (edge, facts[f"missing_{number}"])
            for number, edge in enumerate(parts.edges)
            if not (changed and facts[f"changed_{number}"] and edge[0] >= kept_from)
        ]
        gone = [edge for edge, rows in missing if rows > 0]
        if gone:
            # rows at an edge of the window were removed: extend that edge to whole quarters
            since, until = min(since, gone[0][0]), max(until, gone[-1][1])
            incomplete = gone[-1][1]
            continue
        if not by_rows and any(rows < 0 for _, rows in missing):
            by_rows = True  # rows below the watermark that maintenance has yet to count
            continue
        trusted = changed or (removed is not None and since >= removed)
        if trusted and _removal_went_on(session, current):
            continue  # rows were removed in between, and nothing in the answer would show it
        if removed is None or since >= removed:
            removed = incomplete
        return Answer([_part(question, row) for row in found if row.sign], removed)


def _found(
    session: Session,
    question: Question,
    key: StatementKey,
    values: dict[str, Any],
    *,
    long_backlog: bool,
) -> list[Row[*tuple[Any, ...]]] | None:
    """The rows of `answer_sql.answer`; None if changes were applied while they were read."""
    if not is_distributed(connection_of(session)):
        statement = answer_sql.answer(question, key, long_backlog=long_backlog)
        return [*session.execute(statement, values)]
    statements = answer_sql.answer_in_turn(question, key, long_backlog=long_backlog)
    stored, *rows = (session.execute(each, values).all() for each in statements)
    # changed rows are read by the entries that are left when they are read
    if key.changed and {*session.execute(statements[0], values)} != {*stored}:
        return None
    return list(chain(stored, *rows))


def _facts(found: Iterable[Row[*tuple[Any, ...]]]) -> Counter[str]:
    facts: Counter[str] = Counter()
    for row in found:
        if not row.sign:
            facts[row.part] += row.requests
    return facts


def _part(question: Question, row: Row[*tuple[Any, ...]]) -> Part:
    _, sign, *values = row
    sums = values[len(question.by) :]
    return Part(
        tuple(values[: len(question.by)]),
        tuple([sign * int(value) if value else 0 for value in sums]),
    )


def _removal_went_on(session: Session, before: RollupState) -> bool:
    now = read_state(session)
    return (now.oldest_row, now.raw_from) != (before.oldest_row, before.raw_from)


def _may_reach_removed_rows(since: int, current: RollupState) -> bool:
    """Whether a window that begins at ``since`` may include rows that were removed."""
    if current.first_bucket is None:
        return False
    if current.oldest_row is None or (current.raw_from is not None and since < current.raw_from):
        return True
    return since < floor_to(QUARTER_MS, current.oldest_row) + QUARTER_MS
