"""Where steps through a table end, on both backends."""

import pytest
from sqlalchemy import text

from lynkr_store import create_store_engine
from lynkr_store.db.dialect import disposing
from lynkr_store.db.models import TELEMETRY
from lynkr_store.storage.steps import end_of_step, nth_after
from tests.conftest import POSTGRES


def fill(connection, ids):
    rows = [{"id": row_id, "name": str(row_id)} for row_id in ids]
    into = "INSERT INTO routing_telemetry (id, request_id, timestamp, provider)"
    connection.execute(text(f"{into} VALUES (:id, :name, 1, 'p')"), rows)


@pytest.mark.parametrize(
    ("after", "upto", "rows", "end"),
    [(0, 100, 2, 5), (4, 100, 2, 90), (4, 50, 2, 50), (4, 100, 3, 100), (90, 100, 1, 100)],
)
def test_a_step_ends_with_a_row_or_where_the_work_does(engine, after, upto, rows, end):
    with engine.begin() as connection:
        fill(connection, (1, 5, 90))
        assert end_of_step(connection, TELEMETRY, after, upto, rows) == end


@pytest.mark.parametrize("backend", POSTGRES)
def test_a_table_without_statistics_is_not_sorted(backend, new_url):
    engine = create_store_engine(new_url(backend, at_head=True))
    with disposing(engine), engine.begin() as connection:
        connection.execute(text("ALTER TABLE routing_telemetry SET (autovacuum_enabled = off)"))
        fill(connection, range(1, 20_001))
        statement = nth_after(TELEMETRY, 1_000, 100).compile(
            connection, compile_kwargs={"literal_binds": True}
        )
        plan = connection.exec_driver_sql(f"EXPLAIN {statement}").scalars().all()
    assert any("pk_routing_telemetry" in line for line in plan), plan
    assert not any("Sort" in line for line in plan), plan
