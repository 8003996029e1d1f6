"""Create the roll-ups, so that a statistic's cost does not grow with the rows.

routing_rollups holds counts and sums by quarter of an hour, hour and day; routing_dimensions the
combinations of provider, model, tier and request type for which they are kept; and
lynkr_store_progress the watermark up to which rows were added to them.

Why: a statistic over a window had to read every row in it.
Backfill: none here; ``maintain()`` and running stores fold the existing rows in short steps, and
until then answers read the rows that are not folded.  Locks: none that matters, the tables are new
and small.  Older code: does not know them and still reads the rows; newer code folds what it
writes.  Undo: downgrade drops the tables; the history of rows that retention removed is lost.
"""

import sqlalchemy as sa
from alembic import op

from lynkr_store.migrate import operations

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None
rolling = True

_whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

_TABLES = ("routing_dimensions", "routing_rollups", "lynkr_store_progress")
_COUNTS = (
    "requests",
    "errors",
    "fallbacks",
    "over_provisioned",
    "under_provisioned",
    "latency_ms_count",
    "latency_ms_high",
    "latency_ms_low",
    "quality_score_count",
    "quality_score_high",
    "quality_score_low",
    "input_tokens_count",
    "input_tokens_high",
    "input_tokens_low",
    "output_tokens_count",
    "output_tokens_high",
    "output_tokens_low",
    "cache_read_tokens_count",
    "cache_read_tokens_high",
    "cache_read_tokens_low",
    "cache_creation_tokens_count",
    "cache_creation_tokens_high",
    "cache_creation_tokens_low",
    "tokens_per_second_count",
    "tokens_per_second_high",
    "tokens_per_second_low",
    "cost_usd_count",
    "cost_usd_high",
    "cost_usd_low",
)


def upgrade() -> None:
    for table in _TABLES:
        operations.refuse_foreign(table)
    op.create_table(
        "routing_dimensions",
        sa.Column("id", _whole, sa.Identity(), nullable=False),
        sa.Column("provider", _text, nullable=False),
        sa.Column("model", _text),
        sa.Column("tier", _text),
        sa.Column("request_type", _text),
        sa.PrimaryKeyConstraint("id", name="pk_routing_dimensions"),
    )
    op.create_table(
        "routing_rollups",
        sa.Column("span_ms", _whole, nullable=False),
        sa.Column("start", _whole, nullable=False),
        sa.Column("dimension_id", _whole, nullable=False),
        *(sa.Column(name, _whole, nullable=False) for name in _COUNTS),
        sa.PrimaryKeyConstraint("span_ms", "start", "dimension_id", name="pk_routing_rollups"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "lynkr_store_progress",
        sa.Column("name", _text, nullable=False),
        sa.Column("value", _whole, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_lynkr_store_progress"),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    for table in reversed(_TABLES):
        op.drop_table(table)
