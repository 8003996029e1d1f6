"""The two stores that a service uses: `Store` for threads, `AsyncStore` for coroutines.

`base` creates their parts from the settings and closes them; `sync` and `aio` differ in how they
wait; `health` probes the database in a thread of its own. The work itself is in lower packages.
"""
