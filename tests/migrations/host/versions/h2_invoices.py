"""Create invoices, with a row."""

import sqlalchemy as sa
from alembic import op

revision = "h2"
down_revision = "h1"


def upgrade() -> None:
    table = op.create_table(
        "invoices",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("customer_id", sa.Integer, nullable=False),
        sa.Column("amount", sa.Numeric(10, 2), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("id", name="invoices_pk"),
        sa.ForeignKeyConstraint(["customer_id"], ["customers.id"], name="invoices_customer"),
    )
    op.create_index("ix_invoices_customer_id", "invoices", ["customer_id"])
    op.bulk_insert(table, [{"id": 1, "customer_id": 1}])


def downgrade() -> None:
    op.drop_table("invoices")
