"""Keeps a database in order: work that no request waits for.

`run` is one run of maintenance, in short steps: it builds missing `indexes`, folds new rows into
the roll-ups, repairs roll-ups, and applies the configured `retention` once the clock can be trusted
(`clock_check`). `background` is the store's own thread, which does part of this at intervals
without being asked: it folds, repairs, and retains what the settings say. `restoration` recreates
dropped tables. The package answers no questions about rows.
"""
