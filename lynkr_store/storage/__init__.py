"""An open database, and how it stores each batch exactly once.

`database` opens the engine on first use. `sink` stores the writer's batches: `inserts` and `bulk`
insert the rows, and the `ledger` prevents a batch from being stored twice. `diagnosis` and
`identities` find out why rows were refused, and `write_lock` decides when a write to a shared
SQLite file may begin. Statistics, lists and retention do not belong here.
"""
