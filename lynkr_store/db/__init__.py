"""How the library uses SQLAlchemy, SQLite and PostgreSQL, without the queries themselves.

URLs and engines (`urls`, `engines`), what each backend needs (`sqlite`, `postgresql`, `catalogue`,
`psycopg_async`), forks and event loops (`forking`, `event_loops`), what a driver's error means
(`errors`), and the tables: `models`, `column_types`, `triggers` and SQL `functions`. Migrations,
open stores and statements about the meaning of records do not belong here.
"""
