"""Processes killed, servers away, answers lost: what the writer makes of it."""
