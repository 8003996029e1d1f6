"""Give a column another name.

Why: a contraction, which older releases cannot live with.  Locks: ACCESS EXCLUSIVE for a catalogue
change.  Older code: names a column that is gone.  Undo: downgrade gives it its name back.
"""

from alembic import op

revision = "9998"
down_revision = "9997"
branch_labels = None
depends_on = None
rolling = False


def upgrade() -> None:
    op.execute("ALTER TABLE routing_telemetry RENAME COLUMN finish_reason TO stop_reason")


def downgrade() -> None:
    op.execute("ALTER TABLE routing_telemetry RENAME COLUMN stop_reason TO finish_reason")
