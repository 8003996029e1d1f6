"""Alembic is imported when a schema is upgraded, compared or checked, and not before."""

import subprocess
import sys
import textwrap

import pytest

from lynkr_store.migrate import revisions, scripts

LATE = ("alembic", "mako", "typer", "rich")


def run(code, *arguments, expect=0):
    """Run a program of its own; return the lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == expect, (done.returncode, done.stderr)
    return done.stdout.splitlines()


def test_the_constant_names_the_revisions_of_the_scripts():
    line = [script.revision for script in scripts.script_directory().walk_revisions()]
    assert list(revisions.REVISIONS) == line[::-1]
    assert revisions.head() == scripts.script_directory().get_current_head()


def test_importing_the_library_loads_neither_alembic_nor_the_command():
    loaded = run("import lynkr_store, sys; print(*sys.modules, sep='\\n')")
    assert "lynkr_store.store.aio" in loaded
    assert not {name for name in loaded if name.partition(".")[0] in LATE}
    assert "lynkr_store.cli" not in loaded
    assert "sqlalchemy.dialects.postgresql" not in loaded, "a store on SQLite needs none of it"


SYNC = """
    import sys
    from lynkr_store import Store

    with Store(sys.argv[1]) as store:
        assert store.record(provider="p")
        assert store.flush(30)
        assert len(store.query()) == store.get_stats().total_requests == 1
        store.maintain()
        while store.health().probe_age_s is None:
            pass
        assert store.health().revision == store.health().head
    print(*sys.modules, sep="\\n")
"""
ASYNC = """
    import asyncio, sys
    from lynkr_store import AsyncStore

    async def main():
        async with AsyncStore(sys.argv[1]) as store:
            assert store.record(provider="p")
            assert await store.flush(30)
            assert len(await store.query()) == (await store.get_stats()).total_requests == 1
            await store.maintain()
            while (await store.health()).probe_age_s is None:
                pass
            assert (await store.health()).revision == (await store.health()).head

    asyncio.run(main())
    print(*sys.modules, sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [SYNC, ASYNC], ids=["sync", "async"])
def test_a_store_on_a_database_at_the_head_loads_no_alembic(url, program):
    loaded = run(program, url)
    assert not {name for name in loaded if name.partition(".")[0] in LATE}


def test_a_store_on_an_empty_file_loads_alembic_when_it_upgrades(tmp_path):
    assert "alembic" in run(SYNC, f"sqlite:///{tmp_path}/new.db")


@pytest.mark.slow
def test_a_child_that_is_forked_while_alembic_is_imported_can_upgrade(tmp_path):
    """Python never releases the import lock of a thread that the child does not have."""
    code = """
        import os, signal, sys, threading
        from lynkr_store import upgrade
        from lynkr_store.process.lifecycle import Forkable, on_fork

        begun, forking = threading.Event(), threading.Event()

        class Fork(Forkable):
            def before_fork(self):  # told first
                forking.set()

        class Finder:
            def find_spec(self, name, *_):
                if name == "alembic.command":
                    begun.set()
                    assert forking.wait(30)

        on_fork(fork := Fork())
        sys.meta_path.insert(0, Finder())
        thread = threading.Thread(target=upgrade, args=[sys.argv[1]])
        thread.start()
        assert begun.wait(30)
        if not (pid := os.fork()):
            signal.alarm(30)
            upgrade(sys.argv[2])
            os._exit(0)
        thread.join()
        print(os.waitpid(pid, 0)[1])
    """
    urls = [f"sqlite:///{tmp_path}/{name}.db" for name in ("parent", "child")]
    assert run(code, *urls) == ["0"]


def test_where_alembic_cannot_be_imported_the_error_says_what_to_do_and_no_row_is_lost(tmp_path):
    code = """
        import sys
        from lynkr_store import Store, StoreUnavailable, upgrade

        sys.modules["alembic"] = None  # as for a process that may not read it
        with Store(sys.argv[1]) as store:
            assert store.record(provider="p")
            for ask in (store.query, lambda: upgrade(sys.argv[1])):
                try:
                    ask()
                except StoreUnavailable as error:
                    print(error)
            del sys.modules["alembic"]
            assert store.flush(60)
            print(store.health().written)
    """
    *said, written = run(code, f"sqlite:///{tmp_path}/new.db")
    assert len(said) == 2
    for words in said:
        assert "Alembic" in words
        assert "lynkr-store upgrade as a user who may read the installed packages" in words
    assert written == "1"
