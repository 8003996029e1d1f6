"""Objects of every kind that other applications keep in a database."""

from typing import Final

POSTGRESQL: Final = (
    "CREATE SCHEMA elsewhere",
    "CREATE TYPE mood AS ENUM ('sad', 'so so', 'happy')",
    "CREATE DOMAIN percent AS integer DEFAULT 5 CHECK (VALUE BETWEEN 0 AND 100)",
    "CREATE TYPE pair AS (one integer, other mood)",
    "CREATE SEQUENCE tickets START 100 INCREMENT 7",
    """CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.changed_at = now(); RETURN NEW; END $$""",
    "CREATE FUNCTION provider(of integer) RETURNS text LANGUAGE sql AS $$ SELECT 'x' $$",
    """CREATE TABLE "Notes of theirs" (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        feeling mood NOT NULL DEFAULT 'happy', share percent, "Two Words" pair,
        ticket bigint UNIQUE DEFAULT nextval('tickets'), changed_at timestamptz,
        provider text COLLATE "C" CHECK (provider <> 'nobody'))""",
    """CREATE INDEX notes_by_feeling ON "Notes of theirs" (feeling DESC, lower(provider))
        WHERE share > 50""",
    """CREATE TRIGGER stamped BEFORE UPDATE ON "Notes of theirs"
        FOR EACH ROW EXECUTE FUNCTION stamp()""",
    """INSERT INTO "Notes of theirs" (feeling, share, "Two Words", provider)
        VALUES ('sad', 60, ROW(1, 'happy'), 'p'), ('happy', NULL, NULL, NULL)""",
    """CREATE VIEW telemetry AS SELECT feeling, count(*) AS n FROM "Notes of theirs" GROUP BY 1""",
    """CREATE MATERIALIZED VIEW kept AS SELECT share FROM "Notes of theirs" WITH DATA""",
    """CREATE RULE never AS ON DELETE TO "Notes of theirs" DO INSTEAD NOTHING""",
    """ALTER TABLE "Notes of theirs" ENABLE ROW LEVEL SECURITY""",
    """CREATE POLICY to_all ON "Notes of theirs" USING (share > 1)""",
    """COMMENT ON TABLE "Notes of theirs" IS 'not to be touched'""",
    """GRANT SELECT (share), UPDATE (provider) ON "Notes of theirs" TO pg_monitor""",
    "GRANT USAGE ON SCHEMA elsewhere TO pg_monitor",
    "GRANT USAGE ON SEQUENCE tickets TO PUBLIC",
    "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO pg_monitor",
    # of our names, in a schema of theirs
    "CREATE TABLE elsewhere.routing_telemetry (provider integer, note text)",
    "CREATE INDEX idx_telemetry_provider ON elsewhere.routing_telemetry (provider)",
    "INSERT INTO elsewhere.routing_telemetry VALUES (1, 'theirs')",
    "CREATE TABLE elsewhere.savings_events AS SELECT 1 AS one",
    "CREATE TABLE elsewhere.ingest_batches (batch_id integer PRIMARY KEY)",
    "CREATE TABLE elsewhere.lynkr_store_revisions (revision text, rolling text)",
    "INSERT INTO elsewhere.lynkr_store_revisions VALUES ('9999', 'no')",
    "CREATE TABLE elsewhere.lynkr_store_alembic_version (version_num text)",
    "INSERT INTO elsewhere.lynkr_store_alembic_version VALUES ('9999')",
)
OF_OUR_NAMES_IN_PUBLIC: Final = (
    "CREATE TABLE routing_telemetry (provider integer NOT NULL, timestamp date)",
    "INSERT INTO routing_telemetry VALUES (7, '2020-02-02')",
    "CREATE INDEX idx_telemetry_tier ON routing_telemetry (provider)",
    "CREATE VIEW savings_events AS SELECT 1 AS id",
    "CREATE TABLE ingest_batches (batch_id integer)",
    "CREATE TABLE lynkr_store_revisions (revision text)",
)
SQLITE: Final = (
    "PRAGMA application_id = 4711",
    "PRAGMA user_version = 12",
    "CREATE TABLE 'Notes of theirs' (id INTEGER PRIMARY KEY AUTOINCREMENT, provider TEXT)",
    "INSERT INTO 'Notes of theirs' (provider) VALUES ('p'), (NULL)",
    "CREATE INDEX notes_by_provider ON 'Notes of theirs' (provider DESC) WHERE id > 1",
    "CREATE VIEW telemetry AS SELECT count(*) AS n FROM 'Notes of theirs'",
    "CREATE TRIGGER stamped AFTER UPDATE ON 'Notes of theirs' BEGIN SELECT 1; END",
    "CREATE TABLE words (word TEXT PRIMARY KEY) WITHOUT ROWID",
)


def furnish(engine, *statements: str) -> None:
    """Put them there, as somebody else."""
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
