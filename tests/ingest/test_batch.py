"""Rows kept as values, one after the other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynkr_store.ingest.batch import BatchBuilder, RowBatch, by_column

_rows = st.lists(
    st.dictionaries(st.sampled_from("abcd"), st.none() | st.integers(0, 9), max_size=4)
    .filter(lambda row: any(value is not None for value in row.values()))
    .map(lambda row: {"id": 0, **row}),
    max_size=6,
)


def whole(row):
    return {name: value for name, value in row.items() if value is not None}


@given(_rows)
def test_rows_are_what_they_were_made_of(given_rows):
    rows = RowBatch.of(given_rows)
    assert len(rows) == len(given_rows)
    assert [whole(row) for row in rows] == [whole(row) for row in given_rows]
    assert [dict(zip(rows.columns, one, strict=True)) for one in rows.tuples()] == list(rows)
    assert RowBatch.of(rows) is rows


@given(_rows, st.slices(6))
def test_a_part_of_rows_is_rows(given_rows, part):
    rows = RowBatch.of(given_rows)
    assert list(rows[part]) == list(rows)[part]
    assert rows[part].columns == rows.columns


def test_a_row_that_is_not_there():
    rows = RowBatch.of([{"a": 1}, {"b": 2}])
    assert rows[-1] == {"a": None, "b": 2}
    for at in (2, -3):
        with pytest.raises(IndexError):
            rows[at]
    assert len(RowBatch.of([])) == 0 and not list(RowBatch.of([]).tuples())


@given(st.lists(st.lists(_rows, max_size=4), max_size=3))
def test_batches_hold_what_was_added(batches):
    gathering = BatchBuilder()
    seen = set()
    for batch in batches:
        for some in batch:
            gathering.add(by_column(some))
        rows = gathering.take()
        added = [whole(row) for some in batch for row in some]
        assert [whole(row) for row in rows] == added
        seen.update(*added)
        assert set(rows.columns) == seen, "those that had a value at any time, and no others"


def test_columns_stay_where_they_are():
    gathering = BatchBuilder()
    gathering.add({"b": [1], "c": [None]})
    assert gathering.take().columns == ("b",)
    gathering.add({"c": [1, None], "a": [None, 2]})
    gathering.add({"b": (3,)})
    rows = gathering.take()
    assert rows.columns == ("b", "a", "c")
    assert list(rows.tuples()) == [(None, None, 1), (None, 2, None), (3, None, None)]
