"""What keeps a database in order: nothing that a request waits for.

`run` is one run of maintenance in short steps: missing `indexes`, new rows into the roll-ups, and
the configured `retention` once the clock can be trusted (`clock_check`). `background` is the
store's own thread that does part of it regularly, and `restoration` makes dropped tables again. It
answers no question.
"""
