"""Create savings_events and its index, or keep the gateway's own.

Why: to record the tokens that compression and caches saved.  Locks: none that matters, the table is
new; an existing one was compared with the gateway's schema when the database was adopted.
Older code: does not know it.  Undo: downgrade drops the table when it is empty (or
``-x drop-data=yes``), and never one that was adopted.
"""

import sqlalchemy as sa
from alembic import op

from lynkr_store.migrate import operations

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None
rolling = True

_whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    if not operations.has_table("savings_events"):
        op.create_table(
            "savings_events",
            sa.Column("id", _whole, sa.Identity(), nullable=False),
            sa.Column("timestamp", _whole, nullable=False),
            sa.Column("category", _text, nullable=False),
            sa.Column("tokens_saved", _whole, nullable=False),
            sa.PrimaryKeyConstraint("id", name="pk_savings_events"),
            sqlite_autoincrement=True,
        )
    operations.create_indexes("savings_events", {"idx_savings_timestamp": ["timestamp"]})


def downgrade() -> None:
    operations.keep_adopted(revision)
    operations.drop_table("savings_events")
