"""What the library knows of SQLAlchemy, SQLite and PostgreSQL, apart from any question it asks.

URLs and engines (`urls`, `engines`), what each backend needs (`postgresql`, `catalogue`,
`psycopg_async`), forks and event loops (`forking`, `event_loops`), what a driver's error means
(`errors`), and the tables: `models`, `column_types`, `triggers` and SQL `functions`. No migration,
no open store and no statement about a record's meaning may come in.
"""
