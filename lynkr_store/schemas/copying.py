"""What a copy did, and how far it has come."""

from typing import NamedTuple

from lynkr_store.schemas.base import FrozenMap, FrozenOutput


class CopyStep(NamedTuple):
    """How far a copy has come; see `lynkr_store.copy`.

    Attributes:
        stage: ``rows``, ``savings``, ``roll-ups``, ``folding`` or ``verifying``.
        done: Rows of this stage so far, in this run.
        total: About how many there will be; None if that is not known.
    """

    stage: str
    done: int
    total: int | None


class CopyReport(FrozenOutput):
    """What one copy did; its rows were compared with the source's before it was returned."""

    rows_copied: int
    """Rows that this run wrote; those of earlier runs are not among them."""
    savings_copied: int
    """Savings events that this run wrote."""
    rollups_copied: int
    """Roll-ups that were brought along: sums of rows that retention had removed, among them."""
    rows_verified: int
    """Rows of the target whose counts and sums are those of the source."""
    days_verified: int
    """UTC days of these rows."""
    rows_only_in_target: int
    """Rows of earlier copies that the source has no longer, because of retention or erasure."""
    rows_without_texts: int
    """Rows of earlier copies of which one side lacks a text that the other has, because the source
    removed it, or the target's retention of texts did."""
    coerced: FrozenMap[int]
    """How many values were changed, by ``column: change``. Changes: ``rounded`` to a whole number,
    ``parsed`` from a text, ``unreadable`` and so stored as NULL, ``cut`` to 512 characters, and
    ``nul`` or ``surrogate``: a character that databases cannot store was replaced."""
    left_out: FrozenMap[int]
    """How many rows the target lacks, also of earlier copies, by cause: a required column
    without a usable value, or the target's refusal (``constraint``, ``data`` or ``skipped``)."""
