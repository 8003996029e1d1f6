"""The two stores that a service uses: one for threads, one for coroutines.

`base` makes their parts out of settings and closes them, `sync` and `aio` differ in how they wait,
and `health` looks at the database from a thread of its own. What they do is in the packages below.
"""
