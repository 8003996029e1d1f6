"""Add what older releases need not know: columns, and a table with an index.

Why: what a rolling deploy is for.  Locks: as those of 0003 and 0004.  Older code: keeps working, it
names its columns.  Undo: downgrade drops both.
"""

import sqlalchemy as sa
from alembic import op

from lynkr_store.migrate import operations

revision = "9997"
down_revision = "head"  # of this release; the copy that is run names it
branch_labels = None
depends_on = None
rolling = True

_whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    operations.add_columns(
        "routing_telemetry",
        [
            sa.Column("region", sa.Text()),
            sa.Column("priority", _whole, server_default=sa.text("7")),
        ],
    )
    op.create_table(
        "provider_prices",
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("since", _whole, nullable=False),
        sa.Column("dollars", sa.Double(), nullable=False),
    )
    operations.create_indexes(
        "provider_prices", {"ix_provider_prices_provider": ["provider", "since"]}
    )


def downgrade() -> None:
    op.drop_table("provider_prices")
    operations.drop_columns("routing_telemetry", ["priority", "region"])
