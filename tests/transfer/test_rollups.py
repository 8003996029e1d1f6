"""The roll-ups that a copy brings, while others change the source or maintain the target."""

import threading
from contextlib import contextmanager
from datetime import timedelta

import psycopg
import pytest
from sqlalchemy import delete, func, select

from lynkr_store import Store, StoreSettings, copy, create_store_engine, writing
from lynkr_store.db.models import ROLLUPS, TELEMETRY
from lynkr_store.rollups.fold import fold
from tests.conftest import ON_DISK, POSTGRES
from tests.support.copies import DAY_MS, START, all_rows, answers, filled
from tests.support.stores import eventually

_WAITING = """
SELECT count(*) FROM pg_stat_activity
WHERE wait_event_type = 'Lock' AND datname = current_database()
"""


def opened(url):
    return Store(settings=StoreSettings(url=url), clock=lambda: START + 3 * DAY_MS)


@pytest.mark.slow
@pytest.mark.parametrize("backend", POSTGRES)
def test_rows_that_the_target_folds_at_this_moment_are_counted_once(new_url, backend):
    """A store's maintenance there commits its roll-ups after the copy has begun to write its own.

    On SQLite writers take turns.
    """
    source, target = new_url("sqlite-file", at_head=True), new_url(backend, at_head=True)
    filled(source, 3_000)
    with opened(source) as store:
        assert store.cleanup(timedelta(days=1), trust_clock=True)
    engine = create_store_engine(target)
    folds, goes_on = threading.Event(), threading.Event()

    @contextmanager
    def paused():
        with writing(engine).begin() as connection:
            yield connection
            if connection.scalar(select(func.count()).select_from(ROLLUPS)):
                folds.set()
                assert goes_on.wait(60)

    def release():
        with psycopg.connect(target, autocommit=True) as connection:
            eventually(lambda: connection.execute(_WAITING).fetchone()[0])
        goes_on.set()

    folding = threading.Thread(target=fold, args=(paused,), kwargs={"read": engine.begin})
    releasing = threading.Thread(target=release)

    def on_progress(step):
        if step.stage == "rows" and not folds.is_set():
            folding.start()
            assert folds.wait(60)
            releasing.start()

    copy(source, target, on_progress=on_progress)
    folding.join()
    releasing.join()
    engine.dispose()
    assert answers(target) == answers(source)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ON_DISK)
@pytest.mark.parametrize("other", ON_DISK)
def test_rows_that_were_erased_before_the_roll_ups_were_read_are_counted(new_url, backend, other):
    """They stay in the target, whose roll-ups would lack them."""
    source, target = new_url(backend, at_head=True), new_url(other, at_head=True)
    filled(source, 3_000)
    with opened(source) as store:
        store.maintain()
    erased = []

    def on_progress(step):
        if (step.stage, step.done) == ("rows", 3_000) and not erased:
            erased.append(True)
            engine = create_store_engine(source)
            with writing(engine).begin() as connection:
                connection.execute(delete(TELEMETRY).where(TELEMETRY.c.id.between(1_000, 1_500)))
            engine.dispose()
            with opened(source) as store:
                store.maintain()

    report = copy(source, target, on_progress=on_progress)
    assert report.rows_only_in_target == 501
    assert answers(target)[0].total_requests == len(all_rows(target)) == 3_000
