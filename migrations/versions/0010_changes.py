"""Create routing_changes, which notes the rows that an UPDATE or DELETE touched, by triggers.

Why: roll-ups hold counts and sums of rows that were folded.  Where somebody changed or deleted such
rows by SQL, nothing told so, and statistics went on saying what had been there.  Each entry names a
quarter of an hour; maintenance makes its roll-ups again.  An INSERT has no trigger.
Backfill: none; what was changed before is found by maintenance, which compares old quarters with
their rows.  Locks: SQLite, one short write; PostgreSQL, SHARE ROW EXCLUSIVE on routing_telemetry
for a change of the catalogue: it waits for those who write, and they for it, as with ADD COLUMN.
Citus takes no triggers on a distributed table; there the revision makes the table alone.
Older code: neither reads nor removes entries; what it writes, changes and deletes is noted.
Undo: downgrade drops the triggers, their function and the table.
"""

import sqlalchemy as sa
from alembic import op

from lynkr_store.migrate import operations

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None
rolling = True

_whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    operations.refuse_foreign("routing_changes")
    op.create_table(
        "routing_changes",
        sa.Column("id", _whole, sa.Identity(), nullable=False),
        sa.Column("start", _whole, nullable=False),
        sa.Column("newest", _whole),
        sa.PrimaryKeyConstraint("id", name="pk_routing_changes"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_routing_changes_start", "routing_changes", ["start"])
    operations.create_triggers()


def downgrade() -> None:
    operations.drop_triggers()
    op.drop_table("routing_changes")
