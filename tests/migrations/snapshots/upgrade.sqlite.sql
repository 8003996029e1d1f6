BEGIN;

CREATE TABLE lynkr_store_alembic_version (
    version_num VARCHAR(32) NOT NULL, 
    CONSTRAINT lynkr_store_alembic_version_pkc PRIMARY KEY (version_num)
);

-- Running upgrade  -> 0001

CREATE TABLE routing_telemetry (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
    request_id TEXT NOT NULL, 
    session_id TEXT, 
    timestamp INTEGER NOT NULL, 
    complexity_score REAL, 
    tier TEXT, 
    agentic_type TEXT, 
    tool_count INTEGER, 
    input_tokens INTEGER, 
    message_count INTEGER, 
    request_type TEXT, 
    provider TEXT NOT NULL, 
    model TEXT, 
    routing_method TEXT, 
    was_fallback INTEGER DEFAULT 0, 
    output_tokens INTEGER, 
    latency_ms INTEGER, 
    status_code INTEGER, 
    error_type TEXT, 
    cost_usd REAL, 
    tool_calls_made INTEGER, 
    retry_count INTEGER DEFAULT 0, 
    circuit_breaker_state TEXT, 
    quality_score REAL, 
    tokens_per_second REAL, 
    cost_efficiency REAL
);

CREATE INDEX idx_telemetry_provider ON routing_telemetry (provider);

CREATE INDEX idx_telemetry_tier ON routing_telemetry (tier);

CREATE INDEX idx_telemetry_timestamp ON routing_telemetry (timestamp);

CREATE INDEX idx_telemetry_session_id ON routing_telemetry (session_id, timestamp);

INSERT INTO lynkr_store_alembic_version (version_num) VALUES ('0001') RETURNING version_num;

-- Running upgrade 0001 -> 0002

ALTER TABLE routing_telemetry ADD COLUMN request_text TEXT;

ALTER TABLE routing_telemetry ADD COLUMN response_text TEXT;

UPDATE lynkr_store_alembic_version SET version_num='0002' WHERE lynkr_store_alembic_version.version_num = '0001';

-- Running upgrade 0002 -> 0003

ALTER TABLE routing_telemetry ADD COLUMN base_tier TEXT;

ALTER TABLE routing_telemetry ADD COLUMN escalation_source TEXT;

ALTER TABLE routing_telemetry ADD COLUMN propensity REAL;

ALTER TABLE routing_telemetry ADD COLUMN candidates TEXT;

ALTER TABLE routing_telemetry ADD COLUMN pinned INTEGER DEFAULT 0;

ALTER TABLE routing_telemetry ADD COLUMN switch_reason TEXT;

ALTER TABLE routing_telemetry ADD COLUMN cache_decision TEXT;

ALTER TABLE routing_telemetry ADD COLUMN cache_read_tokens INTEGER;

ALTER TABLE routing_telemetry ADD COLUMN cache_creation_tokens INTEGER;

UPDATE lynkr_store_alembic_version SET version_num='0003' WHERE lynkr_store_alembic_version.version_num = '0002';

-- Running upgrade 0003 -> 0004

CREATE TABLE savings_events (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
    timestamp INTEGER NOT NULL, 
    category TEXT NOT NULL, 
    tokens_saved INTEGER NOT NULL
);

CREATE INDEX idx_savings_timestamp ON savings_events (timestamp);

UPDATE lynkr_store_alembic_version SET version_num='0004' WHERE lynkr_store_alembic_version.version_num = '0003';

-- Running upgrade 0004 -> 0005

ALTER TABLE routing_telemetry ADD COLUMN trace_id TEXT;

ALTER TABLE routing_telemetry ADD COLUMN attempt_index INTEGER;

ALTER TABLE routing_telemetry ADD COLUMN requested_model TEXT;

ALTER TABLE routing_telemetry ADD COLUMN ttft_ms REAL;

ALTER TABLE routing_telemetry ADD COLUMN stream INTEGER;

ALTER TABLE routing_telemetry ADD COLUMN cache_tokens_included INTEGER;

ALTER TABLE routing_telemetry ADD COLUMN reasoning_tokens INTEGER;

ALTER TABLE routing_telemetry ADD COLUMN finish_reason TEXT;

ALTER TABLE routing_telemetry ADD COLUMN attributes TEXT;

UPDATE lynkr_store_alembic_version SET version_num='0005' WHERE lynkr_store_alembic_version.version_num = '0004';

-- Running upgrade 0005 -> 0006

CREATE TABLE ingest_batches (
    batch_id TEXT NOT NULL, 
    row_count INTEGER NOT NULL, 
    committed_at INTEGER NOT NULL, 
    CONSTRAINT pk_ingest_batches PRIMARY KEY (batch_id)
)
 WITHOUT ROWID;

CREATE INDEX ix_ingest_batches_committed_at ON ingest_batches (committed_at);

UPDATE lynkr_store_alembic_version SET version_num='0006' WHERE lynkr_store_alembic_version.version_num = '0005';

-- Running upgrade 0006 -> 0007

CREATE TABLE lynkr_store_revisions (
    revision TEXT NOT NULL, 
    rolling INTEGER NOT NULL, 
    "after" TEXT NOT NULL, 
    release TEXT NOT NULL, 
    CONSTRAINT pk_lynkr_store_revisions PRIMARY KEY (revision)
)
 WITHOUT ROWID;

UPDATE lynkr_store_alembic_version SET version_num='0007' WHERE lynkr_store_alembic_version.version_num = '0006';

DELETE FROM lynkr_store_revisions WHERE lynkr_store_revisions.revision = '0007';

INSERT INTO lynkr_store_revisions (revision, rolling, "after", release) VALUES ('0007', 1, '0006', '0.1.0');

-- Running upgrade 0007 -> 0008

CREATE INDEX ix_routing_telemetry_tier_timestamp ON routing_telemetry (tier, timestamp);

CREATE INDEX ix_routing_telemetry_model_timestamp ON routing_telemetry (model, timestamp);

CREATE INDEX ix_routing_telemetry_provider_failed_timestamp ON routing_telemetry (provider, CAST((error_type IS NOT NULL) AS INTEGER), timestamp);

UPDATE lynkr_store_alembic_version SET version_num='0008' WHERE lynkr_store_alembic_version.version_num = '0007';

DELETE FROM lynkr_store_revisions WHERE lynkr_store_revisions.revision = '0008';

INSERT INTO lynkr_store_revisions (revision, rolling, "after", release) VALUES ('0008', 1, '0007', '0.1.0');

-- Running upgrade 0008 -> 0009

CREATE TABLE routing_dimensions (
    id INTEGER NOT NULL, 
    provider TEXT NOT NULL, 
    model TEXT, 
    tier TEXT, 
    request_type TEXT, 
    CONSTRAINT pk_routing_dimensions PRIMARY KEY (id)
);

CREATE TABLE routing_rollups (
    span_ms INTEGER NOT NULL, 
    start INTEGER NOT NULL, 
    dimension_id INTEGER NOT NULL, 
    requests INTEGER NOT NULL, 
    errors INTEGER NOT NULL, 
    fallbacks INTEGER NOT NULL, 
    over_provisioned INTEGER NOT NULL, 
    under_provisioned INTEGER NOT NULL, 
    latency_ms_count INTEGER NOT NULL, 
    latency_ms_high INTEGER NOT NULL, 
    latency_ms_low INTEGER NOT NULL, 
    quality_score_count INTEGER NOT NULL, 
    quality_score_high INTEGER NOT NULL, 
    quality_score_low INTEGER NOT NULL, 
    input_tokens_count INTEGER NOT NULL, 
    input_tokens_high INTEGER NOT NULL, 
    input_tokens_low INTEGER NOT NULL, 
    output_tokens_count INTEGER NOT NULL, 
    output_tokens_high INTEGER NOT NULL, 
    output_tokens_low INTEGER NOT NULL, 
    cache_read_tokens_count INTEGER NOT NULL, 
    cache_read_tokens_high INTEGER NOT NULL, 
    cache_read_tokens_low INTEGER NOT NULL, 
    cache_creation_tokens_count INTEGER NOT NULL, 
    cache_creation_tokens_high INTEGER NOT NULL, 
    cache_creation_tokens_low INTEGER NOT NULL, 
    tokens_per_second_count INTEGER NOT NULL, 
    tokens_per_second_high INTEGER NOT NULL, 
    tokens_per_second_low INTEGER NOT NULL, 
    cost_usd_count INTEGER NOT NULL, 
    cost_usd_high INTEGER NOT NULL, 
    cost_usd_low INTEGER NOT NULL, 
    CONSTRAINT pk_routing_rollups PRIMARY KEY (span_ms, start, dimension_id)
)
 WITHOUT ROWID;

CREATE TABLE lynkr_store_progress (
    name TEXT NOT NULL, 
    value INTEGER NOT NULL, 
    CONSTRAINT pk_lynkr_store_progress PRIMARY KEY (name)
)
 WITHOUT ROWID;

UPDATE lynkr_store_alembic_version SET version_num='0009' WHERE lynkr_store_alembic_version.version_num = '0008';

DELETE FROM lynkr_store_revisions WHERE lynkr_store_revisions.revision = '0009';

INSERT INTO lynkr_store_revisions (revision, rolling, "after", release) VALUES ('0009', 1, '0008', '0.1.0');

-- Running upgrade 0009 -> 0010

CREATE TABLE routing_changes (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
    start INTEGER NOT NULL, 
    newest INTEGER
);

CREATE INDEX ix_routing_changes_start ON routing_changes (start);

CREATE TRIGGER IF NOT EXISTS lynkr_store_note_delete AFTER DELETE ON routing_telemetry WHEN OLD.timestamp >= 946684800000 AND OLD.timestamp < 4102444800000 BEGIN UPDATE routing_changes SET newest = CAST(OLD.timestamp AS INTEGER) WHERE start = CAST(OLD.timestamp AS INTEGER) - CAST(OLD.timestamp AS INTEGER) % 900000 AND (newest IS NULL OR newest < CAST(OLD.timestamp AS INTEGER)); INSERT INTO routing_changes (start, newest) SELECT CAST(OLD.timestamp AS INTEGER) - CAST(OLD.timestamp AS INTEGER) % 900000, CAST(OLD.timestamp AS INTEGER) WHERE NOT EXISTS (SELECT 1 FROM routing_changes WHERE start = CAST(OLD.timestamp AS INTEGER) - CAST(OLD.timestamp AS INTEGER) % 900000); END;

CREATE TRIGGER IF NOT EXISTS lynkr_store_note_move AFTER UPDATE OF timestamp ON routing_telemetry WHEN NEW.timestamp >= 946684800000 AND NEW.timestamp < 4102444800000 AND NOT EXISTS (SELECT 1 FROM routing_changes WHERE start = CAST(NEW.timestamp AS INTEGER) - CAST(NEW.timestamp AS INTEGER) % 900000) BEGIN INSERT INTO routing_changes (start) VALUES (CAST(NEW.timestamp AS INTEGER) - CAST(NEW.timestamp AS INTEGER) % 900000); END;

CREATE TRIGGER IF NOT EXISTS lynkr_store_note_update AFTER UPDATE OF id, timestamp, provider, model, tier, request_type, error_type, was_fallback, latency_ms, quality_score, input_tokens, output_tokens, cache_read_tokens, cache_creation_tokens, tokens_per_second, cost_usd ON routing_telemetry WHEN OLD.timestamp >= 946684800000 AND OLD.timestamp < 4102444800000 AND NOT EXISTS (SELECT 1 FROM routing_changes WHERE start = CAST(OLD.timestamp AS INTEGER) - CAST(OLD.timestamp AS INTEGER) % 900000) BEGIN INSERT INTO routing_changes (start) VALUES (CAST(OLD.timestamp AS INTEGER) - CAST(OLD.timestamp AS INTEGER) % 900000); END;

UPDATE lynkr_store_alembic_version SET version_num='0010' WHERE lynkr_store_alembic_version.version_num = '0009';

DELETE FROM lynkr_store_revisions WHERE lynkr_store_revisions.revision = '0010';

INSERT INTO lynkr_store_revisions (revision, rolling, "after", release) VALUES ('0010', 1, '0009', '0.1.0');

COMMIT;

