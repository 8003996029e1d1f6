"""Turns queued records into columns of rows: most of them together, and each other one alone."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from pydantic import ValidationError

from lynkr_store.ingest.batch import BatchBuilder, Columns, Row
from lynkr_store.ingest.codec import plain_columns
from lynkr_store.ingest.queue import Queued, as_packed, as_submitted
from lynkr_store.ingest.validation import TextPolicy, cause_of, checked, complete
from lynkr_store.schemas import RoutingEvent

FAILED: Final = "failed"
"""Why a record was rejected that could not be checked: memory ran out, say."""


class Prepared(NamedTuple):
    """What became of some records.

    Attributes:
        rejected: Cause to number of the records that are none.
        mended: Cause to number of the values that were mended.
    """

    rejected: Counter[str]
    mended: Counter[str]


def prepare(
    queued: Sequence[Queued], batch: BatchBuilder, policy: TextPolicy, new_id: Callable[[], str]
) -> Prepared:
    """Add the rows of some records to a batch, in order.

    Where that fails, whatever was raised, it is done again with each of them alone: so a record
    that cannot be checked costs itself.

    Args:
        queued: The records, one or more.
        batch: Where their rows go.
        policy: What is kept of the texts.
        new_id: Names a record that has no ``request_id``.
    """
    try:
        return _added(queued, batch, policy, new_id)
    except BaseException:  # noqa: BLE001 - a record's fault may be of any kind
        all_of_them = Prepared(Counter(), Counter())
        for one in queued:
            try:
                rejected, mended = _added([one], batch, policy, new_id)
            except BaseException:  # noqa: BLE001
                all_of_them.rejected[FAILED] += 1
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
    rejected: Counter[str],
    mended: Counter[str],
) -> Columns:
    """The columns of those records that are some, in order.

    Args:
        queued: Some, one or more; one that must be mended costs as much as ten others.
        policy: What is kept of the texts.
        new_id: Names a record that has no ``request_id``.
        rejected: Cause to number of the other records, which are added.
        mended: Cause to number of the values that were mended, which are added.
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


def _checked(queued: Queued, rejected: Counter[str], mended: Counter[str]) -> Row | None:
    try:
        row, causes = checked(*as_submitted(queued))
    except ValidationError as error:
        rejected[cause_of(error)] += 1
    except MemoryError:
        rejected[FAILED] += 1
    except Exception:  # noqa: BLE001 - a value whose own methods fail; it costs its row
        rejected["wrong_type"] += 1
    except BaseException:  # noqa: BLE001 - one that raises what no program should
        rejected[FAILED] += 1
    else:
        mended.update(causes)
        return row
    return None
