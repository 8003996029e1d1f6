"""Create routing_telemetry with the gateway's 26 columns, or adopt a gateway's own.

Why: the baseline that every historic gateway file reaches.  Adoption: a table that is there is
compared column by column and kept as it is, or refused untouched; see ``migrate.adoption``.
Locks: none that matters, the table is new; an adopted one is only read.
Older code: none.  Undo: downgrade drops the table when it is empty (or ``-x drop-data=yes``), and
never one that was adopted.
"""

import sqlalchemy as sa
from alembic import op

from lynkr_store.migrate import operations

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None
rolling = True

_whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_real: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")
_text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_latency = sa.Integer().with_variant(sa.Double(), "postgresql")


def upgrade() -> None:
    operations.adopt()
    if not operations.has_table("routing_telemetry"):
        op.create_table(
            "routing_telemetry",
            sa.Column("id", _whole, sa.Identity(), nullable=False),
            sa.Column("request_id", _text, nullable=False),
            sa.Column("session_id", _text),
            sa.Column("timestamp", _whole, nullable=False),
            sa.Column("complexity_score", _real),
            sa.Column("tier", _text),
            sa.Column("agentic_type", _text),
            sa.Column("tool_count", _whole),
            sa.Column("input_tokens", _whole),
            sa.Column("message_count", _whole),
            sa.Column("request_type", _text),
            sa.Column("provider", _text, nullable=False),
            sa.Column("model", _text),
            sa.Column("routing_method", _text),
            sa.Column("was_fallback", _whole, server_default=sa.text("0")),
            sa.Column("output_tokens", _whole),
            sa.Column("latency_ms", _latency),
            sa.Column("status_code", _whole),
            sa.Column("error_type", _text),
            sa.Column("cost_usd", _real),
            sa.Column("tool_calls_made", _whole),
            sa.Column("retry_count", _whole, server_default=sa.text("0")),
            sa.Column("circuit_breaker_state", _text),
            sa.Column("quality_score", _real),
            sa.Column("tokens_per_second", _real),
            sa.Column("cost_efficiency", _real),
            sa.PrimaryKeyConstraint("id", name="pk_routing_telemetry"),
            sqlite_autoincrement=True,
        )
    operations.create_indexes(
        "routing_telemetry",
        {
            "idx_telemetry_provider": ["provider"],
            "idx_telemetry_tier": ["tier"],
            "idx_telemetry_timestamp": ["timestamp"],
            "idx_telemetry_session_id": ["session_id", "timestamp"],
        },
    )


def downgrade() -> None:
    operations.keep_adopted(revision)
    operations.drop_table("routing_telemetry")
