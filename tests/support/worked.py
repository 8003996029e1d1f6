"""A Celery application that records one row in each task; see tests/faults/test_celery.py."""

import os
from pathlib import Path

from celery import Celery

from lynkr_store import Store

folder = Path(os.environ["CELERY_FOLDER"])
app = Celery(
    "worked",
    broker="filesystem://",
    broker_transport_options={
        "data_folder_in": str(folder / "queue"),
        "data_folder_out": str(folder / "queue"),
        "control_folder": str(folder / "control"),
        "polling_interval": 0.05,
    },
    task_ignore_result=True,
    worker_enable_remote_control=False,
)
store = Store()  # LYNKR_STORE_URL


@app.task
def work(number: int) -> None:
    """Record, and say so."""
    assert store.record(provider="celery", request_id=str(number))
    (folder / "made" / str(number)).touch()
