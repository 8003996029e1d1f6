"""Add customers.note, and a view."""

import sqlalchemy as sa
from alembic import op

revision = "h3"
down_revision = "h2"


def upgrade() -> None:
    op.add_column("customers", sa.Column("note", sa.String(200)))
    op.execute("CREATE VIEW owing AS SELECT name FROM customers WHERE note IS NOT NULL")


def downgrade() -> None:
    op.execute("DROP VIEW owing")
    op.drop_column("customers", "note")
