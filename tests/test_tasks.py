"Blocking work beside an event loop: what is cancelled has ended, and nothing is left over"
import asyncio
import gc
import threading

import pytest

from wan_avatar.tasks import in_thread, one_at_a_time, together


class Work:
    "A blocking call that ends when it is told to, a while later and with an error"
    def __init__(self):
        self.began = threading.Event()
        self.ended = threading.Event()

    def __call__(self, cancelled) -> None:
        self.began.set()
        while not cancelled(): pass
        threading.Event().wait(0.1) # as a request that is on its way
        self.ended.set()
        raise OSError('the connection was closed')

async def alone(work: Work) -> None: await in_thread(work)
async def beside_another(work: Work) -> None: await together(in_thread(work), asyncio.Event().wait())
async def beside_a_failure(work: Work) -> None:
    async def fail() -> None:
        await asyncio.to_thread(work.began.wait, 10)
        raise RuntimeError('the other one failed')
    await together(in_thread(work), fail())
async def nested(work: Work) -> None: await together(beside_another(work), asyncio.Event().wait())
async def in_turn(work: Work) -> None:
    async with one_at_a_time() as start:
        await start(work)
        await asyncio.Event().wait()
async def waited_for(work: Work) -> None:
    async with one_at_a_time() as start: await start(work)

@pytest.mark.parametrize('way', [alone, beside_another, beside_a_failure, nested, in_turn, waited_for])
def test_a_thread_has_ended_when_its_task_has(way):
    "However it was started, and whoever ends it; its own error is nobody's news"
    work = Work()
    reported = []
    async def job() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context['message']))
        task = asyncio.create_task(way(work))
        await asyncio.to_thread(work.began.wait, 10)
        if way is not beside_a_failure: task.cancel()
        with pytest.raises((asyncio.CancelledError, RuntimeError)): await task
        assert work.ended.is_set()
    asyncio.run(job())
    gc.collect()
    assert reported == []

@pytest.mark.parametrize('turns', range(6))
def test_a_task_that_is_cancelled_before_it_begins_leaves_nothing(turns, recwarn):
    "At whatever turn of the loop: no coroutine is forgotten, and no thread runs on"
    before = set(threading.enumerate())
    async def job() -> None:
        task = asyncio.create_task(beside_another(Work()))
        for _ in range(turns): await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
    asyncio.run(job())
    gc.collect()
    assert set(threading.enumerate()) <= before
    assert [str(w.message) for w in recwarn] == []
