"""Answers questions about rows, as pages and statistics, in a Session of the caller's.

`pages` builds the statements of the lists, `statistics` defines each statistic, and `repository`
runs both and returns values of `schemas`. The package opens no engine, starts no thread and keeps
nothing between calls.
"""
