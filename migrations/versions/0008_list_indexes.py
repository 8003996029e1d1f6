"""Create the indexes that the first page of a list is read from, on a table without rows.

Why: the newest rows of one provider, tier or model, and the newest errors, without reading all
others.  Backfill: none.  Locks: none that matters, the table is empty; on a table with rows
``maintain()`` builds them afterwards.  Older code: need not know them, its answers are the same.
Undo: downgrade drops them.
"""

import sqlalchemy as sa
from alembic import op

from lynkr_store.migrate import operations

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None
rolling = True

_INDEXES: dict[str, list[str | sa.TextClause]] = {
    "ix_routing_telemetry_tier_timestamp": ["tier", "timestamp"],
    "ix_routing_telemetry_model_timestamp": ["model", "timestamp"],
    "ix_routing_telemetry_provider_failed_timestamp": [
        "provider",
        sa.text("CAST((error_type IS NOT NULL) AS INTEGER)"),
        "timestamp",
    ],
}


def upgrade() -> None:
    operations.create_indexes("routing_telemetry", _INDEXES)


def downgrade() -> None:
    for name in _INDEXES:
        op.drop_index(name, "routing_telemetry", if_exists=True)
