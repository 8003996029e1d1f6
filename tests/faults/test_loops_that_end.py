"""Event loops that end, and processes: at exit, in the middle of a read, by a fork."""

import pytest

from tests.faults.test_life_cycle import (  # noqa: F401 - fixtures
    backend,
    once,
    stored,
    url,
)

AT_EXIT = """
    import atexit
    from sqlalchemy.ext.asyncio import create_async_engine
    from lynkr_store.db.engines import create_store_async_engine

    url, order, what, kind = sys.argv[1:]

    def end():
        asyncio.run(store.close())
        h = asyncio.run(store.health())
        assert h.submitted == h.written and not h.pending, h
        say("closed", h.written)

    async def main():
        record(store, "r", 50)
        if what == "read":
            await store.get_stats()
        elif what == "flushed":
            assert await store.flush(60)

    if order == "before":
        atexit.register(end)
    settings = StoreSettings(flush_interval_s=3600)
    if kind == "host":
        store = AsyncStore(
            engine=create_async_engine(create_store_async_engine(url).url), settings=settings
        )
    else:
        store = AsyncStore(url, settings=settings)
    if order == "after":
        atexit.register(end)
    asyncio.run(main())
"""


@pytest.mark.sample(5)
@pytest.mark.parametrize("kind", ["url", "host"])
@pytest.mark.parametrize("what", ["recorded", "read", "flushed"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_an_exit_handler_closes_it(program, url, order, what, kind):  # noqa: F811
    """Threads of an executor are refused by then, and the loop of the reads is over."""
    assert program(AT_EXIT, url, order, what, kind) == ["closed 50"]
    assert stored(url) == once(r=50)


def test_a_loop_is_closed_in_the_middle_of_a_read(program, url):  # noqa: F811
    """Without cancelling its tasks first, as asyncio.run does: asyncio complains, others go on."""
    lines = program(
        """
        url = sys.argv[1]
        store = AsyncStore(url)
        record(store, "r", 10)
        assert asyncio.run(store.flush(60))

        loop = asyncio.new_event_loop()
        tasks = []

        async def begin():
            for _ in range(3):
                tasks.append(asyncio.create_task(store.query()))
                tasks.append(asyncio.create_task(store.get_stats()))
                tasks.append(asyncio.create_task(store.flush(60)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)

        loop.run_until_complete(begin())
        loop.close()
        del tasks[:]
        gc.collect()

        async def go_on():
            record(store, "later", 10)
            assert await store.flush(60)
            found = await asyncio.gather(*(store.query() for _ in range(30)))
            assert {len(rows) for rows in found} == {20}
            assert (await store.get_stats()).total_requests == 20
            await store.close()
            say("closed", (await store.health()).written)

        asyncio.run(go_on())
        gc.collect()
        assert not [f for f in store._cache._flights if f[0].is_closed()]
        """,
        url,
        noise=".*",
    )
    assert lines == ["closed 20"]
    assert stored(url) == once(r=10, later=10)


@pytest.mark.parametrize("where", ["between loops", "inside a loop"])
def test_a_child_has_loops_of_its_own(program, url, where):  # noqa: F811
    """Parent and child go on reading, each on connections of its own."""
    lines = program(
        """
        url, where = sys.argv[1:]
        store = AsyncStore(url, settings=StoreSettings(flush_interval_s=3600, cache_ttl_s=0))

        async def read(count):
            found = await asyncio.gather(*(store.query() for _ in range(4)))
            assert {len(rows) for rows in found} == {count}, found

        async def child():
            record(store, "child", 5)
            assert await store.flush(60)
            await read(15)
            await store.close()
            h = await store.health()
            assert h.written == 5, h

        def fork():
            pid = os.fork()
            if not pid:
                asyncio.run(child())
                say("child")
                os._exit(0)
            return pid

        async def main():
            record(store, "parent", 10)
            assert await store.flush(60)
            await read(10)
            if where == "inside a loop":
                pid = fork()
                assert reaped(pid) == 0
                await read(15)

        asyncio.run(main())
        if where == "between loops":
            assert reaped(fork()) == 0
        asyncio.run(read(15))
        asyncio.run(store.close())
        say("parent")
        """,
        url,
        where,
    )
    assert lines == ["child", "parent"]
    assert stored(url) == once(parent=10, child=5)
