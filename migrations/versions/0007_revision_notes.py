"""Create lynkr_store_revisions, where each later revision says whether older code can still work.

Why: in a rolling deploy an older and a newer release use one schema.  The older one does not know
the newer revision, and reads here: ``rolling``, or else the release that must be installed.
Backfill: none; every release that reads this knows the older revisions.  Locks: none, the table
is new and small.  Older code: does not know it and refuses the schema as ahead, as it did before.
Undo: downgrade drops the table, which holds nothing of the user's.
"""

import sqlalchemy as sa
from alembic import op

from lynkr_store.migrate import operations

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None
rolling = True

_whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    operations.refuse_foreign("lynkr_store_revisions")
    op.create_table(
        "lynkr_store_revisions",
        sa.Column("revision", _text, nullable=False),
        sa.Column("rolling", _whole, nullable=False),
        sa.Column("after", _text, nullable=False),
        sa.Column("release", _text, nullable=False),
        sa.PrimaryKeyConstraint("revision", name="pk_lynkr_store_revisions"),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("lynkr_store_revisions")
