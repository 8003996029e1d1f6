"""Takes records from `record()` and delivers them in batches; no record is lost uncounted.

A record is packed into a string (`codec`) and waits in a bounded `queue`. The preparing thread
checks it and adds it to a batch (`preparer`, `validation`, `batch`). The delivering thread gives
batches to a sink and repeats failed ones (`deliverer`). Batches that cannot be delivered wait on
disk (`spool`). The `writer` starts and stops the threads. The sink is a parameter, so nothing here
may import SQLAlchemy or know a database.
"""
