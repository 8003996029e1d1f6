"""An open database, and a batch that is stored in it once.

The engine that is opened on first use (`database`), the rows of a batch and the ledger that keeps
it from being stored twice (`inserts`, `bulk`), whose fault a refused row is (`diagnosis`,
`identities`), and when a write to a shared SQLite file may begin (`write_lock`). No statistic,
list or retention may come in.
"""
