"""The ``lynkr-store`` command: `commands` says what to do, `render` prints the answers.

It calls what a service could call; no rule about rows or schemas may come in.
"""
