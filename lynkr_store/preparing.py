"""From what waits in the queue to columns of rows: most records together, and each other alone."""

from collections import Counter
from collections.abc import Callable, Sequence

from pydantic import ValidationError

from lynkr_store.ingest import TextPolicy, cause_of, checked, complete
from lynkr_store.intake import Queued, as_packed, as_submitted
from lynkr_store.packing import plain_columns
from lynkr_store.rows import Columns, Row
from lynkr_store.schemas import RoutingEvent


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
    except Exception:  # noqa: BLE001 - a value whose own methods fail; it costs its row
        rejected["wrong_type"] += 1
    else:
        mended.update(causes)
        return row
    return None
