"""A server of models, and a store for what it is asked."""

import pytest

from lynkr_store import Store, StoreSettings
from tests.support.model_server import serving


@pytest.fixture(scope="module")
def server():
    with serving() as url:
        yield url


@pytest.fixture
def store(new_url):
    settings = StoreSettings(flush_interval_s=0.01)
    with Store(new_url("sqlite-file", at_head=True), settings=settings) as store:
        yield store
