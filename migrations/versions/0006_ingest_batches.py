"""Create ingest_batches, the ledger by which each batch of records is stored exactly once.

Why: when the answer to a COMMIT is lost, the writer cannot know whether its batch is stored.  Each
batch's transaction inserts its id here first; a second try finds it and stores nothing twice.
Locks: none that matters, the table is new and small.  Older code: does not know it and keeps
working; its own batches are guarded by nothing, as before.  Undo: downgrade drops the table, which
holds nothing of the user's; a batch in a spool whose answer was lost could then be stored twice.
"""

import sqlalchemy as sa
from alembic import op

from lynkr_store.migrate import operations

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None
rolling = True

_whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    operations.refuse_foreign("ingest_batches")
    op.create_table(
        "ingest_batches",
        sa.Column("batch_id", _text, nullable=False),
        sa.Column("row_count", _whole, nullable=False),
        sa.Column("committed_at", _whole, nullable=False),
        sa.PrimaryKeyConstraint("batch_id", name="pk_ingest_batches"),
        sqlite_with_rowid=False,
    )
    operations.create_indexes(
        "ingest_batches", {"ix_ingest_batches_committed_at": ["committed_at"]}
    )


def downgrade() -> None:
    op.drop_table("ingest_batches")
