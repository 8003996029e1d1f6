"""Programs that fork, end and are killed, for more than one file of tests."""

import os
import re
import subprocess
import sys
import textwrap

import pytest

from tests.support.recorded import ROOT

COMMON = """
    import asyncio
    import faulthandler
    import gc
    import itertools
    import os
    import signal
    import sys
    import threading
    import time
    from pathlib import Path

    from sqlalchemy import text

    from lynkr_store import AsyncStore, Store, StoreSettings, create_store_engine
    from tests.support.stores import Asynchronous

    class Looped(Asynchronous):
        '''Its loop is the process's own: a child begins with another.'''

        @property
        def _runner(self):
            if self._of != os.getpid():
                self._of, self._own = os.getpid(), asyncio.Runner()
                abandoned.append(self._own)
            return self._own

        @_runner.setter
        def _runner(self, runner):
            self._of = 0

    abandoned = []

    def watch():
        '''Say where the threads are when it takes too long.'''
        faulthandler.dump_traceback_later(120, exit=True)

    if "no watch" not in sys.argv:
        watch()
        os.register_at_fork(
            before=faulthandler.cancel_dump_traceback_later,
            after_in_parent=watch,
            after_in_child=watch,
        )

    def opened(kind, url, **options):
        options = {"flush_interval_s": 3600, "upgrade_on_open": True} | options
        settings = StoreSettings(url=url, **options)
        if kind == "async":
            return Looped(AsyncStore(settings=settings), None)
        if kind == "host":
            return Store(engine=create_store_engine(url), settings=settings)
        return Store(settings=settings)

    def checked(store):
        h = store.health()
        places = h.written + h.rejected + h.dropped + h.spooled + h.pending
        assert h.submitted + h.recovered == places, h
        return h

    def record(store, name, count, first=0):
        for n in range(first, first + count):
            assert store.record(provider="p", request_id=f"{name}-{n}")

    def reaped(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def say(*words):
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""


@pytest.fixture
def program(tmp_path):
    """Run a program in a process of its own, from a file so that its children can import it."""
    (tmp_path / "common.py").write_text(textwrap.dedent(COMMON))

    def command(code, arguments):
        path = tmp_path / "program.py"
        path.write_text("from common import *\n" + textwrap.dedent(code))
        warnings = ["-W", "error"]
        if {"host", "async"} & set(arguments):  # an engine or a loop is left open, as hosts do
            warnings += ["-W", "ignore::ResourceWarning"]
        return [sys.executable, *warnings, str(path), *map(str, arguments)]

    def run(code, *arguments, expect=0, noise="", timeout=180):
        done = subprocess.run(
            command(code, arguments),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=environment(),
        )
        # as one text, which pytest shows whole: it has where the threads were
        assert done.returncode == expect, f"{done.returncode}: {done.stdout}\n{done.stderr}"
        assert re.fullmatch(noise, done.stderr, re.DOTALL), done.stderr
        return done.stdout.split("\n")[:-1]

    def start(code, *arguments):
        return subprocess.Popen(
            command(code, arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    run.start = start
    return run


def environment():
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LYNKR_STORE_", "COV_"))}
    return kept | {"PYTHONPATH": str(ROOT)}
