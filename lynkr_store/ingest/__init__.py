"""From `record()` to batches that are handed over: no record is lost without being counted.

A record is packed into a string (`codec`) and waits in a bounded `queue`; one thread checks it and
makes columns of it (`validation`, `preparer`, `batch`), another hands batches to a sink and repeats
what fails (`writer`), and what cannot be delivered waits on disk (`spool`). The sink is a
parameter, so nothing here may import SQLAlchemy or know a database.
"""
