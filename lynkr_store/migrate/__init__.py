"""Brings a schema to this release's revision, or says why not.

Where a database stands (`revisions`), the gateway's files (`adoption`), the upgrade in one
transaction (`upgrade`) under a lock that no other migration holds (`lock`), a copy before it
(`backup`), and the steps that revisions are made of (`operations`). The revisions themselves lie in
``migrations/``. No store, batch or statistic may come in.
"""
