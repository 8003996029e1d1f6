"""Records of a real Celery worker, whose pool's processes end by `os._exit`."""

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from tests.support.recorded import ROOT
from tests.support.stores import eventually

TASKS = 12
SEND = f"from tests.support.worked import work\nfor i in range({TASKS}): work.delay(i)"


def rows(url):
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        return sorted(
            int(i) for (i,) in connection.execute("SELECT request_id FROM routing_telemetry")
        )


@pytest.mark.slow
@pytest.mark.parametrize("tasks_of_a_child", [4, None])
def test_a_process_of_the_pool_stores_what_it_recorded(tasks_of_a_child, new_url, tmp_path):
    """Replaced after four tasks, and at a warm shutdown."""
    url = new_url("sqlite-file", at_head=True)
    for name in ("queue", "control", "made"):
        (tmp_path / name).mkdir()
    env = os.environ | {
        "LYNKR_STORE_URL": url,
        "LYNKR_STORE_FLUSH_INTERVAL_S": "600",  # nothing is written before the end
        "CELERY_FOLDER": str(tmp_path),
    }
    # before the worker: kombu's folder is read while a message is being written
    subprocess.run([sys.executable, "-c", SEND], cwd=ROOT, env=env, check=True)
    options = ["--pool=prefork", "--concurrency=1", "--without-gossip", "--without-mingle"]
    if tasks_of_a_child:
        options += [f"--max-tasks-per-child={tasks_of_a_child}"]
    with (tmp_path / "log").open("w") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "tests.support.worked", "worker", *options],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=log,
        )
    try:
        eventually(lambda: len(list((tmp_path / "made").iterdir())) == TASKS)
        if not tasks_of_a_child:
            worker.send_signal(signal.SIGTERM)
        eventually(lambda: rows(url) == list(range(TASKS)))
    finally:
        worker.kill()  # the system ends the pool's processes with it
        worker.wait()


PLAIN = f"""
import sys
import billiard
from lynkr_store import Store, StoreSettings

store = Store(sys.argv[1], settings=StoreSettings(flush_interval_s=600))


def work():
    for number in range({TASKS}):
        assert store.record(provider="p", request_id=str(number))


process = billiard.Process(target=work)
process.start()
process.join()
"""


def test_a_process_of_billiards_own_stores_what_it_recorded(new_url):
    url = new_url("sqlite-file", at_head=True)
    subprocess.run([sys.executable, "-c", PLAIN, url], cwd=ROOT, check=True)
    assert rows(url) == list(range(TASKS))
