"""Add the store's own columns to routing_telemetry.

Why: attempts of one request can be joined (trace_id, attempt_index), streams measured (ttft_ms),
and token counts of different conventions told apart (cache_tokens_included).  Backfill: none; NULL
means not measured.  Locks: SQLite, one short write; PostgreSQL, ACCESS EXCLUSIVE for a catalogue
change.  Older code: keeps working, it names its columns; the gateway does too, and shows them in
its list of rows.  Undo: downgrade drops the columns and their values.
"""

import sqlalchemy as sa

from lynkr_store.migrate import operations

revision = "0005"
down_revision = "0004"
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
            sa.Column("trace_id", _text),
            sa.Column("attempt_index", _whole),
            sa.Column("requested_model", _text),
            sa.Column("ttft_ms", _real),
            sa.Column("stream", _whole),
            sa.Column("cache_tokens_included", _whole),
            sa.Column("reasoning_tokens", _whole),
            sa.Column("finish_reason", _text),
            sa.Column("attributes", _text),
        ],
    )


def downgrade() -> None:
    operations.keep_adopted(revision)
    operations.drop_columns(
        "routing_telemetry",
        [
            "attributes",
            "finish_reason",
            "reasoning_tokens",
            "cache_tokens_included",
            "stream",
            "ttft_ms",
            "requested_model",
            "attempt_index",
            "trace_id",
        ],
    )
