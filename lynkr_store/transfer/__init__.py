"""Copies all rows from one database or file to another.

`copying` runs a copy: batch after batch in the order of ids, each with the last copied id in one
transaction, so that an interrupted copy continues where it stopped. `tables` reads and writes a
table of a database, `json_lines` and `parquet` are the files. `portable` converts stored values to
the form that each of them takes, and counts what it changed. `history` brings what describes rows:
roll-ups and the ledger. `verification` compares both ends by the sums of `sums`. The package never
changes a source, and creates no schema.
"""
