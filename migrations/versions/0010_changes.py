"""Create routing_changes, which notes the rows that an UPDATE or DELETE touched, by triggers.

Why: roll-ups hold counts and sums of folded rows.  If a program changed or deleted these rows by
SQL, the store did not notice, and statistics still counted the old values.  Each entry names a
quarter of an hour; maintenance recomputes its roll-ups.  INSERT has no trigger.
Backfill: none; maintenance finds earlier changes by comparing old quarters with their rows.
Locks: SQLite, one short write; PostgreSQL, SHARE ROW EXCLUSIVE on routing_telemetry for a change of
the catalogue: it waits for writers, and they wait for it, as with ADD COLUMN.
Citus supports no triggers on a distributed table; there the revision only creates the table.
Older code: neither reads nor removes entries; the triggers record what it changes and deletes.
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
