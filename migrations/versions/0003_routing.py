"""Add the routing decision's columns and the prompt cache's to routing_telemetry.

Why: to record why the tier was changed, which models were considered, and what the cache saved.
Backfill: none; NULL means not measured, and ``pinned`` is 0 on older rows, as in gateway files.
Locks: SQLite, one short write; PostgreSQL, ACCESS EXCLUSIVE for a catalogue change (a constant
default is no rewrite).  Older code: keeps working, it names its columns.  Undo: downgrade drops
the columns and their values, unless the gateway had made any of them.
"""

import sqlalchemy as sa

from lynkr_store.migrate import operations

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None
rolling = True

_whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_real: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")
_text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    operations.add_columns(
        "routing_telemetry",
        [
            sa.Column("base_tier", _text),
            sa.Column("escalation_source", _text),
            sa.Column("propensity", _real),
            sa.Column("candidates", _text),
            sa.Column("pinned", _whole, server_default=sa.text("0")),
            sa.Column("switch_reason", _text),
            sa.Column("cache_decision", _text),
            sa.Column("cache_read_tokens", _whole),
            sa.Column("cache_creation_tokens", _whole),
        ],
    )


def downgrade() -> None:
    operations.keep_adopted(revision)
    operations.drop_columns(
        "routing_telemetry",
        [
            "cache_creation_tokens",
            "cache_read_tokens",
            "cache_decision",
            "switch_reason",
            "pinned",
            "candidates",
            "propensity",
            "escalation_source",
            "base_tier",
        ],
    )
