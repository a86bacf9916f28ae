"""The queue, in a time of its own: the event loop's clock jumps to the next timer, so nothing waits and nothing is timed."""

import asyncio
import contextlib
import itertools
import selectors
from collections.abc import Awaitable, Callable

import pytest

from finetune_operator.port import ApiError, JobKey
from finetune_operator.queue import BACKOFF_MAX_SECONDS, CLOCK_PATIENCE_SECONDS, LISTED_PATIENCE_SECONDS, Queue

A, B = JobKey("team-a", "a"), JobKey("team-a", "b")


class _Jump(selectors.SelectSelector):
    """Never waits: what would be waited for is added to the clock."""

    now = 0.0

    def select(self, timeout: float | None = None):
        self.now += timeout or 0.0
        return super().select(0)


def in_virtual_time(scenario: Callable[[], Awaitable[None]]) -> None:
    selector = _Jump()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(scenario())


def now() -> float:
    return asyncio.get_running_loop().time()


async def run_for(queue: Queue, seconds: float) -> None:
    task = asyncio.create_task(queue.run())
    await asyncio.sleep(seconds)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def test_a_key_has_one_turn_at_a_time_and_another_if_it_is_added_meanwhile() -> None:
    async def scenario() -> None:
        turns, active = [], 0

        async def work(key: JobKey) -> None:
            nonlocal active
            active += 1
            assert active == 1
            turns.append(now())
            for _ in range(3):
                queue.add(key) if len(turns) == 1 else None
            await asyncio.sleep(5)
            active -= 1

        queue = Queue(work, max_concurrent=4)
        queue.add(A)
        queue.add(A)
        await run_for(queue, 100)
        assert turns == [0, 5]

    in_virtual_time(scenario)


def test_as_many_keys_have_their_turn_at_once_as_the_queue_has_workers() -> None:
    async def scenario() -> None:
        begun: list[tuple[float, str]] = []

        async def work(key: JobKey) -> None:
            begun.append((now(), key.name))
            await asyncio.sleep(10)

        queue = Queue(work, max_concurrent=2)
        for name in "abcde":
            queue.add(JobKey("team-a", name))
        assert len(queue) == 5
        await run_for(queue, 100)
        assert begun == [(0, "a"), (0, "b"), (10, "c"), (10, "d"), (20, "e")]
        assert len(queue) == 0

    in_virtual_time(scenario)


def test_the_next_turn_comes_after_the_time_that_the_work_returns() -> None:
    async def scenario() -> None:
        turns, delays = [], iter([10.0, 2.5, None])

        async def work(key: JobKey) -> float | None:
            turns.append(now())
            return next(delays)

        queue = Queue(work, max_concurrent=1)
        queue.add(A)
        await run_for(queue, 1000)
        assert turns == [0, 10, 12.5]

    in_virtual_time(scenario)


def test_an_event_brings_the_next_turn_forward_and_the_old_appointment_is_off() -> None:
    async def scenario() -> None:
        turns = []

        async def work(key: JobKey) -> float | None:
            turns.append(now())
            return 100.0 if len(turns) == 1 else None

        queue = Queue(work, max_concurrent=1)
        queue.add(A)
        asyncio.get_running_loop().call_later(7, queue.add, A)
        await run_for(queue, 1000)
        assert turns == [0, 7]

    in_virtual_time(scenario)


@pytest.mark.parametrize("delays", [(30.0, 5.0), (5.0, 30.0)], ids=["later first", "sooner first"])
def test_of_two_appointments_the_earlier_is_kept(delays) -> None:
    async def scenario() -> None:
        turns = []

        async def work(key: JobKey) -> None:
            turns.append(now())

        queue = Queue(work, max_concurrent=1)
        for delay in delays:
            queue.add(A, delay)
        await run_for(queue, 1000)
        assert turns == [5]

    in_virtual_time(scenario)


def test_errors_are_tried_again_ever_more_slowly_and_said(caplog) -> None:
    async def scenario() -> None:
        turns = []

        async def work(key: JobKey) -> None:
            turns.append(now())
            if len(turns) <= 10:
                queue.add(key)  # an event during the turn does not get around the wait
                raise OSError("no route to the API server")

        queue = Queue(work, max_concurrent=1)
        queue.add(A)
        await run_for(queue, 10_000)
        waits = [later - sooner for sooner, later in itertools.pairwise(turns)]
        assert waits == [1, 2, 4, 8, 16, 32, 64, BACKOFF_MAX_SECONDS, BACKOFF_MAX_SECONDS, BACKOFF_MAX_SECONDS]

    in_virtual_time(scenario)
    assert "team-a/a failed and is tried again in 1 s: no route to the API server" in caplog.text


@pytest.mark.parametrize(
    ("error", "traced"), [(ApiError(500, "InternalError", "etcd is gone"), False), (KeyError("uid"), True)], ids=["the server's", "ours"]
)
def test_only_a_defect_leaves_a_traceback_in_the_log(caplog, error, traced) -> None:
    async def scenario() -> None:
        async def work(key: JobKey) -> None:
            raise error

        queue = Queue(work, max_concurrent=1)
        queue.add(A)
        await run_for(queue, 0.5)

    in_virtual_time(scenario)
    assert [bool(record.exc_info) for record in caplog.records] == [traced]
    assert "team-a/a failed and is tried again in 1 s" in caplog.text


def test_events_do_not_shorten_the_wait_after_an_error() -> None:
    async def scenario() -> None:
        turns = []

        async def work(key: JobKey) -> None:
            turns.append(now())
            raise RuntimeError("no")

        queue = Queue(work, 2)
        queue.add(A)
        for time in range(1, 20):
            asyncio.get_running_loop().call_later(0.5 * time, queue.add, A)
        await run_for(queue, 10)
        assert turns == [0, 1, 3, 7], "1, 2 and 4 seconds apart, whatever happens in between"

    in_virtual_time(scenario)


def test_what_the_api_server_calls_invalid_waits_long_at_once() -> None:
    async def scenario() -> None:
        turns = []

        async def work(key: JobKey) -> None:
            turns.append(now())
            raise ApiError(422, "Invalid", "status.phase: Unsupported value")

        queue = Queue(work, 1)
        queue.add(A)
        await run_for(queue, 2 * BACKOFF_MAX_SECONDS + 1)
        assert turns == [0, BACKOFF_MAX_SECONDS, 2 * BACKOFF_MAX_SECONDS]

    in_virtual_time(scenario)


def test_the_errors_of_one_job_do_not_hold_up_another() -> None:
    async def scenario() -> None:
        turns = []

        async def work(key: JobKey) -> None:
            if key == A:
                raise RuntimeError("defect")
            turns.append(now())

        queue = Queue(work, max_concurrent=1)
        queue.add(A)
        queue.add(B)
        await run_for(queue, 50)
        assert turns == [0]

    in_virtual_time(scenario)


def test_the_wait_after_an_error_begins_anew_after_a_success() -> None:
    async def scenario() -> None:
        turns, fails = [], iter([True, True, False, True, False])

        async def work(key: JobKey) -> float | None:
            turns.append(now())
            if next(fails):
                raise OSError
            return 10.0 if len(turns) == 3 else None

        queue = Queue(work, max_concurrent=1)
        queue.add(A)
        await run_for(queue, 1000)
        assert turns == [0, 1, 3, 13, 14]

    in_virtual_time(scenario)


def test_the_end_cuts_turns_short_and_leaves_no_timer() -> None:
    async def scenario() -> None:
        ended = []

        async def work(key: JobKey) -> float | None:
            try:
                await asyncio.sleep(1000 if key == A else 0)
            except asyncio.CancelledError:
                ended.append(key)
                raise
            return 20.0

        queue = Queue(work, max_concurrent=2)
        queue.add(A)
        queue.add(B)
        await run_for(queue, 10)
        assert ended == [A]
        await asyncio.sleep(100)
        assert len(queue) == 0

    in_virtual_time(scenario)


def test_what_has_happened_goes_first_then_what_is_due_then_what_was_only_listed() -> None:
    async def scenario() -> None:
        begun: list[tuple[float, str]] = []

        async def work(key: JobKey) -> None:
            begun.append((now(), key.name))
            await asyncio.sleep(1)

        def add(name: str, *, delay: float = 0.0, patience: float = 0.0) -> None:
            queue.add(JobKey("team-a", name), delay, patience)

        queue = Queue(work, max_concurrent=1)
        add("first")
        for name in "listed", "listed and changed":
            add(name, patience=LISTED_PATIENCE_SECONDS)
        add("due", delay=0.25)
        asyncio.get_running_loop().call_later(0.5, add, "changed")
        asyncio.get_running_loop().call_later(0.75, add, "listed and changed")
        await run_for(queue, 20)
        assert begun == [(0, "first"), (1, "changed"), (2, "listed and changed"), (3, "due"), (4, "listed")]

    in_virtual_time(scenario)


@pytest.mark.parametrize("patience", [CLOCK_PATIENCE_SECONDS, LISTED_PATIENCE_SECONDS])
def test_a_flood_of_events_goes_before_others_for_no_longer_than_their_patience(patience: float) -> None:
    async def scenario() -> None:
        begun: dict[str, float] = {}

        async def work(key: JobKey) -> None:
            begun[key.name] = now()
            await asyncio.sleep(1)

        async def flood() -> None:
            for number in range(400):
                queue.add(JobKey("team-a", f"changed-{number}"))
                await asyncio.sleep(0.5)  # twice as many as can be worked on

        queue = Queue(work, max_concurrent=1)
        flooding = asyncio.create_task(flood())
        await asyncio.sleep(0.75)
        queue.add(A, patience=patience)
        await run_for(queue, 400)
        await flooding
        # 0.75 s after the flood began, A was added; until its patience ends 2 events a second go before it, each of which takes a second.
        ahead = 2 * (patience + 0.75)
        assert ahead - 1 <= begun[A.name] <= ahead + 3

    in_virtual_time(scenario)
