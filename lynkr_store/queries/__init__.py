"""Questions of rows: lists in pages and the statistics, for a Session of whoever asks.

`pages` builds the statements of the lists, `repository` asks them and the statistics and gives
back values of `schemas`. It opens no engine, starts no thread and keeps nothing between calls.
"""
