"""The ``lynkr-store`` command: `commands` runs the subcommands, `render` prints the answers.

It calls only what a service could call; no rule about rows or schemas may come in.
"""
