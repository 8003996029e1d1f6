"""Create customers, with a row, and on PostgreSQL an enum type."""

import sqlalchemy as sa
from alembic import op

revision = "h1"
down_revision = None

_standing = sa.Enum("good", "poor", name="standing")


def upgrade() -> None:
    table = op.create_table(
        "customers",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("standing", _standing, nullable=False),
        sa.PrimaryKeyConstraint("id", name="customers_pk"),
    )
    op.create_index("customers_by_name", "customers", ["name"])
    op.bulk_insert(table, [{"id": 1, "name": "first", "standing": "good"}])


def downgrade() -> None:
    op.drop_table("customers")
    if op.get_bind().dialect.name == "postgresql":
        _standing.drop(op.get_bind())
