"""Converts queued records to columns: most of them together, the others one by one."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from pydantic import ValidationError

from lynkr_store.ingest.batch import BatchBuilder, Columns, Row
from lynkr_store.ingest.codec import plain_columns
from lynkr_store.ingest.queue import Queued, as_packed, as_submitted
from lynkr_store.ingest.validation import TextPolicy, checked, complete, rejection_of
from lynkr_store.schemas import Rejection, RoutingEvent

FAILED: Final = "failed"
"""The cause for a record that could not be checked, for example because memory ran out."""


_WITHOUT_FIELD: Final = {
    cause: Rejection(cause=cause, field=None, value_type=None) for cause in (FAILED, "wrong_type")
}


class Prepared(NamedTuple):
    """The outcome for several records.

    Attributes:
        rejected: Why records were rejected, and how many for each reason.
        mended: The number of changed values by cause.
    """

    rejected: Counter[Rejection]
    mended: Counter[str]


def prepare(
    queued: Sequence[Queued], batch: BatchBuilder, policy: TextPolicy, new_id: Callable[[], str]
) -> Prepared:
    """Add the rows of several records to a batch, in order.

    If that raises any exception, each record is tried alone, so that a record that cannot be
    checked affects no other.

    Args:
        queued: The records, one or more.
        batch: Gets the rows.
        policy: Decides what is kept of the texts.
        new_id: Returns an id for a record without ``request_id``.
    """
    try:
        return _added(queued, batch, policy, new_id)
    except BaseException:  # noqa: BLE001 - a record's own methods may raise anything
        all_of_them = Prepared(Counter(), Counter())
        for one in queued:
            try:
                rejected, mended = _added([one], batch, policy, new_id)
            except BaseException:  # noqa: BLE001
                all_of_them.rejected[_WITHOUT_FIELD[FAILED]] += 1
            else:
                all_of_them.rejected.update(rejected)
                all_of_them.mended.update(mended)
        return all_of_them


def _added(
    queued: Sequence[Queued], batch: BatchBuilder, policy: TextPolicy, new_id: Callable[[], str]
) -> Prepared:
    found = Prepared(Counter(), Counter())
    batch.add(columns_of(queued, policy, new_id, *found))
    return found


def columns_of(
    queued: Sequence[Queued],
    policy: TextPolicy,
    new_id: Callable[[], str],
    rejected: Counter[Rejection],
    mended: Counter[str],
) -> Columns:
    """The columns of the valid records, in order.

    Args:
        queued: One or more; one that must be sanitized takes the time of ten others.
        policy: Decides what is kept of the texts.
        new_id: Returns an id for a record without ``request_id``.
        rejected: Why records were rejected; this function adds to it.
        mended: The number of changed values by cause; this function adds to it.
    """
    columns, others = plain_columns([as_packed(one) for one in queued])
    if others:
        lists = {name: list(columns.get(name, ())) for name in RoutingEvent.model_fields}
        columns = {**lists}
        gone = 0
        for at in others:
            row = _checked(queued[at], rejected, mended)
            if row is None:
                gone += 1
                continue
            for name, column in lists.items():
                column.insert(at - gone, row[name])
        if gone == len(queued):
            return {}
    mended.update(complete(columns, policy, new_id))
    return columns


def _checked(queued: Queued, rejected: Counter[Rejection], mended: Counter[str]) -> Row | None:
    record = None
    try:
        record, stamp_ms = as_submitted(queued)
        row, causes = checked(record, stamp_ms)
    except ValidationError as error:
        rejected[rejection_of(error, record)] += 1
    except MemoryError:
        rejected[_WITHOUT_FIELD[FAILED]] += 1
    except Exception:  # noqa: BLE001 - a value's own methods failed; only this row is lost
        rejected[_WITHOUT_FIELD["wrong_type"]] += 1
    except BaseException:  # noqa: BLE001 - a value's method raised SystemExit, for example
        rejected[_WITHOUT_FIELD[FAILED]] += 1
    else:
        mended.update(causes)
        return row
    return None
