"""What the operating system does to a process, and what the process does to files and threads.

Forks, signals and the end of the interpreter (`lifecycle`), which file a path names and files that
only their owner may read (`files`), log lines without values (`log`), and waiting for threads from
coroutines (`waiting`). Every other package may import it; it knows no database and no record.
"""
