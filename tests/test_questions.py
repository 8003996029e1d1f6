"""Statements of statistics: what is sent for one."""

import pytest

from lynkr_store import questions, repository
from lynkr_store.rollups import NOTHING
from lynkr_store.spans import HOUR_MS, cover

NOW = 1_750_000_000_000
QUESTIONS = [getattr(repository, name) for name in ("_STATS", "_PROVIDER_STATS", "_ACCURACY")]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("hours", [0, 1, 24, 24 * 40])
def test_only_what_tells_two_windows_apart_is_sent_beside_the_text(engine, question, hours):
    since = NOW - hours * HOUR_MS - 1
    asked = cover(since, NOW, NOW)
    given = questions.parameters(asked, since, NOW, NOTHING)
    if question.one_provider:
        given |= {"provider": "a"}
    statement = questions.answer(question, questions.shape(asked), long_backlog=False)
    sent = statement.compile(engine).params
    assert {name for name, value in sent.items() if value is None} == set(given)
    if engine.dialect.name == "postgresql":  # SQLite's OFFSET needs a LIMIT, which is sent
        assert set(sent) == set(given)
