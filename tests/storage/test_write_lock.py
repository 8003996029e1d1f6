"""When a write may begin, in numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynkr_store.storage.write_lock import GAP_S, PERIOD_S, pause_s, retry_s

NOW = 1_750_000_000.0  # a whole number of periods


@pytest.mark.parametrize(
    ("into", "expected", "pause"),
    [
        (0.0, 0.0, GAP_S),  # the lock is left alone
        (0.1, 0.5, GAP_S - 0.1),
        (GAP_S, 0.5, 0.0),
        (0.5, 0.4, 0.0),
        (PERIOD_S - 0.4, 0.5, 0.4 + GAP_S),  # it would reach into the next gap
        (0.4, 60.0, 0.0),  # what takes longer than any period gets its turn all the same
        (PERIOD_S - 0.3, 60.0, 0.3 + GAP_S),
    ],
)
def test_writes_keep_out_of_the_gaps(into, expected, pause):
    assert pause_s(NOW + into, expected) == pytest.approx(pause, abs=1e-6)


@given(now=st.floats(0, 4e9), expected=st.floats(0, PERIOD_S / 2))
def test_a_waiting_writer_finds_the_lock_free_once_a_period(now, expected):
    pause = pause_s(now, expected)
    assert 0 <= pause <= PERIOD_S / 2 + GAP_S
    into = (now + pause + 1e-6) % PERIOD_S
    assert into >= GAP_S - 1e-5
    assert into + expected <= PERIOD_S + 1e-5


def test_processes_do_not_keep_step():
    assert len({retry_s() for _ in range(10)}) > 1
