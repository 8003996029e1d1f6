"""Arguments of the stores' methods: numbers and durations of any library, and named where bad."""

from datetime import timedelta
from decimal import Decimal

import numpy as np
import pendulum
import pytest

from lynkr_store.exceptions import BadArgument
from lynkr_store.schemas.filters import (
    checked_age,
    checked_limit,
    checked_provider,
    checked_seconds,
)
from tests.support.values import HOSTILE, Number, OwnDuration, Tier, noon


def test_durations_of_other_libraries_are_ages():
    assert checked_age(pendulum.duration(days=2)) == timedelta(days=2)
    assert checked_age(pendulum.interval(noon(), noon() + timedelta(3))) == timedelta(days=3)
    age = checked_age(OwnDuration(days=1))
    assert (type(age), age) == (timedelta, timedelta(days=1))
    assert checked_age(timedelta.max) == timedelta.max
    for bad in (pendulum.duration(days=-1), OwnDuration(-1), 5, np.timedelta64(5, "D"), None):
        with pytest.raises(BadArgument, match=r"older_than.*days=30"):
            checked_age(bad)


def test_limits_and_times_are_numbers_of_any_library():
    assert [checked_limit(n) for n in (np.int64(5), 5.0, Number.SEVEN, Decimal(5))] == [5, 5, 7, 5]
    for bad in (2**63, 10**30, 1.5, True, "5", None, float("nan"), np.True_, Decimal("1e99")):
        with pytest.raises(BadArgument, match="limit: give a whole number of rows"):
            checked_limit(bad)
    found = [checked_seconds(n, "t") for n in (1, 0.5, Decimal("0.1"), np.float32(2), float("inf"))]
    assert found == [1.0, 0.5, 0.1, 2.0, float("inf")]
    for bad in (-1, float("nan"), "5", None, True, 10**400, timedelta(seconds=5)):
        with pytest.raises(BadArgument, match="budget_s: give seconds"):
            checked_seconds(bad, "budget_s")


def test_a_provider_is_a_text_of_any_library():
    assert checked_provider(Tier.SIMPLE) == "SIMPLE"
    assert type(checked_provider(np.str_("p"))) is str
    for bad in (None, 5, b"p", ["p"], True):
        with pytest.raises(BadArgument, match="provider: give the provider's name as a text"):
            checked_provider(bad)


@pytest.mark.parametrize("kind", HOSTILE, ids=lambda kind: kind.__name__)
def test_an_argument_whose_methods_raise_or_lie_is_refused(kind):
    for check in (checked_provider, checked_limit, checked_age):
        with pytest.raises(BadArgument):
            check(kind())
    with pytest.raises(BadArgument, match="timeout_s"):
        checked_seconds(kind(), "timeout_s")
