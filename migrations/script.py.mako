"""${message}.

Why:   Backfill:   Locks:   Older code:   Undo:
"""

import sqlalchemy as sa
from alembic import op

from lynkr_store.migrate import operations

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}
rolling = True


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    operations.keep_adopted(revision)
    ${downgrades if downgrades else "pass"}
