"""Add one more column.

Why: what is harmless may come after what is not.  Locks: as those of 0002.  Older code: keeps
working.  Undo: downgrade drops it.
"""

import sqlalchemy as sa

from lynkr_store.migrate import operations

revision = "9999"
down_revision = "9998"
branch_labels = None
depends_on = None
rolling = True


def upgrade() -> None:
    operations.add_columns("routing_telemetry", [sa.Column("data_centre", sa.Text())])


def downgrade() -> None:
    operations.drop_columns("routing_telemetry", ["data_centre"])
