"""What happens to a process: forks, signals, its end; and its files, log lines and threads.

`lifecycle` handles forks, signals and the end of the interpreter. `files` identifies files and
creates private ones, `log` writes log lines without values, and `waiting` lets coroutines wait for
threads. Every other package may import this one; it knows no database and no record.
"""
