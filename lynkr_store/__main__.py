"""``python -m lynkr_store`` is the ``lynkr-store`` command."""

from lynkr_store.cli.commands import main

if __name__ == "__main__":
    main()
