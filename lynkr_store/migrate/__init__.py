"""Brings a schema to this release's revision, or says why not.

`revisions` says where a database stands, and `adoption` recognises the gateway's files. `upgrade`
applies revisions in one transaction, under a lock that no other migration holds (`lock`), after a
copy if one was asked for (`backup`). `comparison` finds what differs from this release's tables.
`scripts` runs the revisions' scripts by Alembic, which `late` imports when it is first needed, and
`operations` has the steps that the scripts are made of. The scripts themselves are in
``migrations/``. No store, batch or statistic may come in.
"""
