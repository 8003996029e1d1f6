"""Forks, ends of workers and SIGTERM, without a store."""

import gc
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from contextlib import closing

import pytest

from lynkr_store import BadArgument
from lynkr_store.process.lifecycle import SigtermHandler, on_exit_of_worker
from tests.support.programs import WITHOUT_DATABASE


def run(code, *, expect=0, folder=None):
    """Run a program of its own; multiprocessing's children need it to be a file."""
    source = WITHOUT_DATABASE + textwrap.dedent(code)
    if folder is None:
        arguments = ["-c", source]
    else:
        (folder / "program.py").write_text(source)
        arguments = [str(folder / "program.py")]
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == expect, (done.returncode, done.stderr)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture
def sigterm():
    """Put SIGTERM's handler back; a child of the suite's own would be told as well."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


# -- forks -------------------------------------------------------------------------------------


FORKS = """
    import gc
    import os
    from lynkr_store.process.lifecycle import Forkable, on_fork

    class Part(Forkable):
        def __init__(self, name):
            self.name = name

        def _say(self, what):
            os.write(1, f"{what}:{self.name} ".encode())

        def before_fork(self):
            self._say("before")

        def after_fork_in_parent(self):
            self._say("parent")

        def after_fork_in_child(self):
            self._say("child")

    def fork():
        pid = os.fork()
        if not pid:
            os.write(1, b"| ")
            os._exit(0)
        os.waitpid(pid, 0)
        os.write(1, b"/ ")
"""


def said(code):
    return run(textwrap.dedent(FORKS) + textwrap.dedent(code))


def test_each_hook_runs_once_on_each_side_of_a_fork():
    words = said("""
        part = Part("a")
        on_fork(part)
        on_fork(part)
        fork()
        fork()
    """)
    assert sorted(words) == sorted(["before:a", "parent:a", "child:a", "|", "/"] * 2)
    assert words.index("before:a") == 0


def test_the_hooks_of_a_collected_part_are_not_called():
    words = said("""
        part, other = Part("a"), Part("b")
        on_fork(part)
        on_fork(other)
        del part
        gc.collect()
        fork()
    """)
    assert {word.partition(":")[2] for word in words} == {"b", ""}


def test_hooks_run_in_order_before_a_fork_and_in_reverse_after_it():
    words = said("""
        parts = [Part(name) for name in "abc"]
        for part in parts:
            on_fork(part)
        fork()
    """)
    told = {when: [w[-1] for w in words if w.startswith(when)] for when in ("before", "parent")}
    assert sorted(told["before"]) == ["a", "b", "c"]
    assert told["parent"] == told["before"][::-1]
    assert [w[:6] for w in words[:3]] == ["before"] * 3


def test_a_part_made_in_the_child_is_the_childs_alone():
    words = said("""
        on_fork(Part("gone"))
        pid = os.fork()
        if not pid:
            part = Part("child's")
            on_fork(part)
            fork()
            os._exit(0)
        os.waitpid(pid, 0)
        fork()
    """)
    assert words.count("before:child's") == 1
    assert words.count("child:child's") == 1


def test_a_default_part_needs_to_do_nothing():
    assert said("""
        part = Forkable()
        on_fork(part)
        fork()
    """) == ["|", "/"]


def test_two_threads_fork_one_after_the_other():
    """The second would free in the parent what the first has brought to rest, and the reverse."""
    words = said("""
        import threading

        inside = threading.Event()

        class Slow(Part):
            def before_fork(self):
                super().before_fork()
                inside.set()
                if threading.current_thread() is not second:
                    second.join(0.2)  # it does not get here before the first is done

        part = Slow("a")
        on_fork(part)
        second = threading.Thread(target=lambda: inside.wait() and fork())
        second.start()
        fork()
        second.join()
        fork()
    """)
    ours = [word for word in words if word in ("before:a", "parent:a")]
    assert ours == ["before:a", "parent:a"] * 3
    assert words.count("child:a") == 3


def test_a_thread_that_forks_while_it_forks_waits_for_nobody():
    words = said("""
        class Handler(Part):
            def before_fork(self):
                super().before_fork()
                if self.name:
                    self.name = ""
                    fork()  # a signal handler may

        part = Handler("a")
        on_fork(part)
        fork()
    """)
    assert words.count("child:") == 2
    assert words.count("parent:") == 2


@pytest.mark.sample(4)
@pytest.mark.parametrize("when", ["before_fork", "after_fork_in_parent", "after_fork_in_child"])
@pytest.mark.parametrize("kind", ["ValueError", "KeyboardInterrupt", "SystemExit"])
def test_a_part_whose_hook_fails_does_not_stop_the_others_hooks(when, kind):
    words = said(f"""
        import logging
        logging.disable()

        class Failing(Part):
            def {when}(self):
                raise {kind}("of a signal handler")

        parts = [Part("a"), Failing("b"), Part("c")]
        for part in parts:
            on_fork(part)
        fork()
        fork()
    """)
    for name in "ac":
        assert [words.count(f"{w}:{name}") for w in ("before", "parent", "child")] == [2, 2, 2]


def test_an_interrupt_while_a_fork_waits_for_another_leaves_nothing_held():
    words = said("""
        import logging
        import signal
        import threading

        logging.disable()
        inside, interrupted = threading.Event(), threading.Event()

        class Slow(Part):
            def before_fork(self):
                super().before_fork()
                inside.set()
                interrupted.wait(10)

        def interrupt(*_):
            interrupted.set()
            raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, interrupt)
        part = Slow("a")
        on_fork(part)
        other = threading.Thread(target=fork)
        other.start()
        inside.wait()
        signal.setitimer(signal.ITIMER_REAL, 0.1)  # while this thread waits for its turn
        fork()
        other.join()
        fork()
    """)
    assert [words.count(f"{w}:a") for w in ("before", "parent", "child")] == [3, 3, 3]


# -- the end of a worker -----------------------------------------------------------------------


WORKERS = """
    import gc
    import multiprocessing
    import os
    import sys
    import weakref
    from lynkr_store.process.lifecycle import on_exit_of_worker

    class Owner:
        pass

    def end():
        os.write(1, b"ended ")

    def work(forget=False, code=None):
        global owner
        owner = Owner()
        on_exit_of_worker(owner, end)
        if forget:
            owner = None
            gc.collect()
            os.write(1, b"forgotten ")
        if code is not None:
            sys.exit(code)

    if __name__ == "__main__":
        method, *arguments = {arguments}
        context = multiprocessing.get_context(method)
        process = context.Process(target=work, args=arguments)
        process.start()
        process.join()
        print(process.exitcode)
"""


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_calls_it_once_when_it_ends(method, tmp_path):
    code = textwrap.dedent(WORKERS).replace("{arguments}", repr([method]))
    assert run(code, folder=tmp_path) == ["ended", "0"]


def test_a_worker_that_exits_calls_it(tmp_path):
    code = textwrap.dedent(WORKERS).replace("{arguments}", repr(["fork", False, 3]))
    assert run(code, folder=tmp_path) == ["ended", "3"]


def test_an_owner_that_is_gone_ended_itself_at_once(tmp_path):
    code = textwrap.dedent(WORKERS).replace("{arguments}", repr(["fork", True]))
    words = run(code, folder=tmp_path)
    assert words.count("ended") == 1
    assert words.index("ended") < words.index("forgotten")


def test_it_comes_before_multiprocessing_closes_what_it_has(tmp_path):
    code = """
        import multiprocessing
        import multiprocessing.util
        import os
        from lynkr_store.process.lifecycle import on_exit_of_worker

        class Owner:
            pass

        def work(owner=Owner()):
            multiprocessing.util.Finalize(
                None, os.write, args=(1, b"others "), exitpriority=10
            )
            on_exit_of_worker(owner, lambda: os.write(1, b"ours "))

        if __name__ == "__main__":
            process = multiprocessing.get_context("fork").Process(target=work)
            process.start()
            process.join()
    """
    assert run(code, folder=tmp_path) == ["ours", "others"]


def test_another_process_is_left_to_atexit():
    assert run("""
        import os, sys
        from lynkr_store.process.lifecycle import on_exit_of_worker

        on_exit_of_worker(on_exit_of_worker, lambda: os.write(1, b"ended "))
        print("multiprocessing.util" in sys.modules)
        import multiprocessing.util
        on_exit_of_worker(on_exit_of_worker, lambda: os.write(1, b"ended "))
    """) == ["False"]


def test_nothing_is_registered_in_this_process():
    class Owner:
        pass

    calls, owner = [], Owner()
    on_exit_of_worker(owner, lambda: calls.append(1))
    del owner
    gc.collect()
    assert calls == []


# -- SIGTERM -----------------------------------------------------------------------------------


def test_it_ends_and_then_the_handler_runs_that_was_there_before(sigterm):
    order = []
    signal.signal(signal.SIGTERM, lambda number, frame: order.append((number, frame is not None)))
    SigtermHandler(lambda _: order.append("ended"))
    signal.raise_signal(signal.SIGTERM)
    assert order == ["ended", (signal.SIGTERM, True)]


def test_a_second_signal_does_not_end_twice(sigterm):
    order = []

    def end(_):
        order.append("ending")
        signal.raise_signal(signal.SIGTERM)
        order.append("ended")

    signal.signal(signal.SIGTERM, lambda *_: order.append("previous"))
    SigtermHandler(end)
    signal.raise_signal(signal.SIGTERM)
    assert order == ["ending", "previous", "ended", "previous"]


def test_without_one_before_the_process_dies_of_the_signal():
    assert run(
        """
        import os, signal
        from lynkr_store.process.lifecycle import SigtermHandler

        SigtermHandler(lambda _: os.write(1, b"ended"))
        signal.raise_signal(signal.SIGTERM)
        os.write(1, b"never")
        """,
        expect=-signal.SIGTERM,
    ) == ["ended"]


def test_where_it_was_ignored_the_process_lives_on(sigterm):
    ended = []
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    SigtermHandler(lambda _: ended.append(1))
    signal.raise_signal(signal.SIGTERM)
    assert ended == [1]


def test_two_handlers_both_end_the_newer_first(sigterm):
    order = []
    signal.signal(signal.SIGTERM, lambda *_: order.append("host"))
    SigtermHandler(lambda _: order.append("first"))
    SigtermHandler(lambda _: order.append("second"))
    signal.raise_signal(signal.SIGTERM)
    assert order == ["second", "first", "host"]


def test_a_host_that_comes_later_calls_it_as_its_previous_one(sigterm):
    order = []
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    SigtermHandler(lambda _: order.append("ended"))
    previous = signal.getsignal(signal.SIGTERM)

    def host(number, frame):
        order.append("host")
        previous(number, frame)

    signal.signal(signal.SIGTERM, host)
    signal.raise_signal(signal.SIGTERM)
    assert order == ["host", "ended"]


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL, lambda *_: None])
def test_removed_it_leaves_the_handler_that_was_there_before(sigterm, before):
    signal.signal(signal.SIGTERM, before)
    handler = SigtermHandler(lambda _: None)
    assert signal.getsignal(signal.SIGTERM) != before
    handler.remove()
    assert signal.getsignal(signal.SIGTERM) == before
    handler.remove()
    assert signal.getsignal(signal.SIGTERM) == before


def test_removed_behind_a_newer_one_it_stays_in_the_chain(sigterm):
    order = []
    signal.signal(signal.SIGTERM, lambda *_: order.append("host"))
    first = SigtermHandler(lambda _: order.append("first"))
    second = SigtermHandler(lambda _: order.append("second"))
    first.remove()
    signal.raise_signal(signal.SIGTERM)
    assert order == ["second", "first", "host"]
    second.remove()
    first.remove()
    order.clear()
    signal.raise_signal(signal.SIGTERM)
    assert order == ["host"]


def test_removed_in_another_thread_it_only_chains(sigterm):
    order = []
    signal.signal(signal.SIGTERM, lambda *_: order.append("host"))
    handler = SigtermHandler(lambda _: order.append("ended"))
    thread = threading.Thread(target=handler.remove)
    thread.start()
    thread.join(60)
    signal.raise_signal(signal.SIGTERM)
    assert order[-1] == "host"


def test_another_thread_gets_an_error_with_the_remedy(sigterm):
    before, told = signal.getsignal(signal.SIGTERM), []

    def make():
        try:
            SigtermHandler(lambda _: None)
        except BadArgument as error:
            told.append(str(error))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join(60)
    assert told == [
        "handle_sigterm: open the store in the main thread, where signals are handled",
    ]
    assert signal.getsignal(signal.SIGTERM) == before


AS_PROCESS_1 = ["unshare", "--pid", "--fork", "--kill-child"]
can_be_process_1 = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*AS_PROCESS_1, "true"], capture_output=True, check=False).returncode != 0,
    reason="this system lets nobody begin a namespace of processes",
)


def run_as_process_1(code, *, first=WITHOUT_DATABASE):
    """Its exit status, and what it said."""
    done = subprocess.run(
        [*AS_PROCESS_1, sys.executable, "-W", "error", "-c", first + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.split()


@pytest.mark.sample(3)
@can_be_process_1
@pytest.mark.parametrize("how", ["os.kill(1, 15)", "subprocess.run(['kill', '1'])"])
@pytest.mark.parametrize("count", [1, 2])
def test_process_1_ends_with_143_where_nothing_was_to_run(how, count):
    assert run_as_process_1(f"""
        import os, subprocess, time
        from lynkr_store.process.lifecycle import SigtermHandler

        assert os.getpid() == 1
        handlers = [SigtermHandler(lambda _: os.write(1, b"ended ")) for _ in range({count})]
        {how}
        time.sleep(30)
        os.write(1, b"never")
    """) == (143, ["ended"] * count)


@can_be_process_1
@pytest.mark.parametrize("before", ["signal.SIG_IGN", "lambda *_: os.write(1, b'host ')"])
def test_process_1_continues_where_its_own_handler_lets_it(before):
    status, words = run_as_process_1(f"""
        import os, signal
        from lynkr_store.process.lifecycle import SigtermHandler

        signal.signal(signal.SIGTERM, {before})
        handler = SigtermHandler(lambda _: os.write(1, b"ended "))
        os.kill(1, 15)
        handler.remove()
        os.kill(1, 15)
        os.write(1, b"alive")
    """)
    assert status == 0
    assert words == (["ended", "alive"] if "IGN" in before else ["ended", "host", "host", "alive"])


@can_be_process_1
def test_a_store_in_process_1_is_closed_and_the_process_ends(tmp_path):
    status, words = run_as_process_1(
        f"""
        import os, time
        from lynkr_store import Store, StoreSettings

        settings = StoreSettings(url="sqlite:///{tmp_path}/t.db", handle_sigterm=True)
        closed = Store(settings=settings)
        store, other = Store(settings=settings), Store(settings=settings)
        for n in range(100):
            store.record(provider="p")
            other.record(provider="p")
        closed.close()
        os.kill(1, 15)
        time.sleep(30)
    """,
        first="",
    )
    assert (status, words) == (143, [])
    with closing(sqlite3.connect(tmp_path / "t.db")) as connection:
        assert connection.execute("SELECT count(*) FROM routing_telemetry").fetchone() == (200,)


FOREIGN = """
    #include <signal.h>
    #include <unistd.h>

    static void told(int number) { write(1, "foreign ", 8); }

    __attribute__((constructor)) static void begin(void) { signal(SIGTERM, told); }
"""


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="it takes a compiler"
)
def test_a_handler_that_is_not_pythons_is_not_overwritten(tmp_path):
    (tmp_path / "foreign.c").write_text(textwrap.dedent(FOREIGN))
    library = tmp_path / "foreign.so"
    make = ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "foreign.c")]
    subprocess.run(make, check=True)
    code = """
        import os, signal
        from lynkr_store import BadArgument, Store, StoreSettings

        try:
            Store(settings=StoreSettings(url="sqlite://", handle_sigterm=True))
        except BadArgument as error:
            print(str(error).partition(":")[0], flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["handle_sigterm", "foreign"]


def test_a_child_ends_for_itself():
    words = run("""
        import os, signal
        from lynkr_store.process.lifecycle import SigtermHandler

        SigtermHandler(lambda _: os.write(1, f"ended:{os.getpid()} ".encode()))
        pid = os.fork()
        if not pid:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(pid, os.waitstatus_to_exitcode(status), os.getpid())
    """)
    ended, child, status, parent = words
    assert ended == f"ended:{child}"
    assert int(status) == -signal.SIGTERM
    assert parent != child


def test_in_a_child_a_handler_that_a_server_replaced_is_installed_again():
    words = run("""
        import os, signal, threading
        from lynkr_store.process.lifecycle import SigtermHandler

        def of_a_worker(number, frame):
            os.write(1, b"worker's ")

        handler = SigtermHandler(lambda goes_on: os.write(1, f"ended:{goes_on} ".encode()))
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGTERM, of_a_worker)
            answers = []
            aside = threading.Thread(target=lambda: answers.append(handler.install_in_child()))
            aside.start()
            aside.join()
            answers += [handler.install_in_child(), handler.install_in_child()]
            signal.raise_signal(signal.SIGTERM)
            os.write(1, f"{answers}".replace(" ", "").encode())
            os._exit(0)
        os.waitpid(pid, 0)
    """)
    assert words == ["ended:True", "worker's", "[False,True,True]"]


def test_in_the_process_of_the_store_a_later_handler_stays():
    words = run("""
        import os, signal
        from lynkr_store.process.lifecycle import SigtermHandler

        handler = SigtermHandler(lambda _: os.write(1, b"ended "))
        signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"later "))
        assert handler.install_in_child()
        signal.raise_signal(signal.SIGTERM)
    """)
    assert words == ["later"]


def test_in_a_child_that_an_embedding_program_handles_nothing_is_installed(monkeypatch):
    handler = SigtermHandler(lambda _: None)
    try:
        monkeypatch.setattr("lynkr_store.process.lifecycle.os.getpid", lambda: 0)
        with monkeypatch.context() as patched:
            patched.setattr(signal, "getsignal", lambda _: None)
            assert handler.install_in_child()
        assert signal.getsignal(signal.SIGTERM) == handler._handle
    finally:
        handler.remove()
