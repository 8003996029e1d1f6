"""Add request_text and response_text to routing_telemetry.

Why: to keep question and answer, so that routes can be judged later.  Backfill: none; NULL means
not captured.  Locks: SQLite, one short write; PostgreSQL, ACCESS EXCLUSIVE for a catalogue change.
Older code: keeps working, it names its columns.  Undo: downgrade drops both columns and their
values, unless the gateway created them.
"""

import sqlalchemy as sa

from lynkr_store.migrate import operations

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None
rolling = True

_text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    operations.add_columns(
        "routing_telemetry",
        [sa.Column("request_text", _text), sa.Column("response_text", _text)],
    )


def downgrade() -> None:
    operations.keep_adopted(revision)
    operations.drop_columns("routing_telemetry", ["response_text", "request_text"])
