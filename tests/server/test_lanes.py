from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.waiting import comes_true
from tokenflow_sdk.server.lanes import Lanes, Operation
from tokenflow_sdk.server.metrics import Metrics


def recorded(calls: list[list[int]], gate: threading.Event | None = None) -> Operation:
    def run(items: list[int]) -> list[int]:
        calls.append(items)
        if gate is not None:
            gate.wait(60)
        return [10 * item for item in items]

    return Operation("double", run)


def test_items_that_wait_share_a_call() -> None:
    async def main() -> None:
        calls: list[list[int]] = []
        gate = threading.Event()
        operation = recorded(calls, gate)
        lanes = Lanes(1, 4, 0.0, Metrics())
        tasks = [asyncio.create_task(lanes.run(operation, i)) for i in range(7)]
        await asyncio.sleep(0.05)
        gate.set()
        assert await asyncio.gather(*tasks) == [10 * i for i in range(7)]
        assert [item for call in calls for item in call] == list(range(7))
        assert max(map(len, calls)) == 4
        lanes.close()

    asyncio.run(main())


def test_an_item_waits_for_others_no_longer_than_it_should() -> None:
    async def main() -> None:
        calls: list[list[int]] = []
        operation = recorded(calls)
        patient, hasty = Lanes(1, 2, 3600.0, Metrics()), Lanes(1, 2, 0.01, Metrics())
        first = asyncio.create_task(patient.run(operation, 1))
        await asyncio.sleep(0.01)
        both = asyncio.gather(first, patient.run(operation, 2))  # a call is full, and does not wait for the rest of the hour
        assert await asyncio.wait_for(both, 60) == [10, 20]
        assert await hasty.run(operation, 3) == 30
        assert calls == [[1, 2], [3]]
        patient.close()
        hasty.close()

    asyncio.run(main())


def test_calls_of_one_item_run_side_by_side() -> None:
    async def main() -> None:
        both = threading.Barrier(2)

        def run(items: list[int]) -> list[int]:
            both.wait(60)
            return items

        lanes = Lanes(2, 1, 1.0, Metrics())
        operation = Operation("barrier", run)
        assert await asyncio.gather(*(lanes.run(operation, i) for i in range(2))) == [0, 1]
        lanes.close()

    asyncio.run(main())


def test_operations_do_not_mix_and_take_turns() -> None:
    async def main() -> None:
        calls: list[list[int]] = []
        gate = threading.Event()
        one, other = recorded(calls, gate), recorded(calls, gate)
        lanes = Lanes(1, 8, 0.0, Metrics())
        tasks = [asyncio.create_task(lanes.run(one if i % 2 else other, i)) for i in range(6)]
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(*tasks)
        assert all(len({i % 2 for i in call}) == 1 for call in calls)
        lanes.close()

    asyncio.run(main())


def test_a_failing_item_fails_alone() -> None:
    async def main() -> None:
        def run(items: list[int]) -> list[int]:
            if 3 in items:
                raise ValueError("three")
            return items

        lanes = Lanes(1, 8, 0.05, Metrics())
        operation = Operation("picky", run)
        found = await asyncio.gather(*(lanes.run(operation, i) for i in range(6)), return_exceptions=True)
        assert [each for each in found if not isinstance(each, ValueError)] == [0, 1, 2, 4, 5]
        assert isinstance(found[3], ValueError)
        lanes.close()

    asyncio.run(main())


def test_an_item_that_is_taken_back_is_not_run() -> None:
    async def main() -> None:
        calls: list[list[int]] = []
        gate = threading.Event()

        def run(items: list[NDArray[np.int32]]) -> list[NDArray[np.int32]]:
            calls.append([int(item[0]) for item in items])
            gate.wait(10)
            return items

        operation = Operation("same", run)
        lanes = Lanes(1, 1, 0.0, Metrics())
        tasks = [asyncio.create_task(lanes.run(operation, np.full(2, i, np.int32))) for i in range(4)]
        await asyncio.sleep(0.05)
        tasks[2].cancel()
        tasks[0].cancel()  # its call runs already, and nobody waits for it
        gate.set()
        assert [int((await tasks[i])[0]) for i in (1, 3)] == [1, 3]
        for task in (tasks[0], tasks[2]):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert calls == [[0], [1], [3]]
        lanes.close()

    asyncio.run(main())


def test_a_thread_runs_its_own_item_where_a_lane_is_free() -> None:
    async def main() -> None:
        loop, calls, gate = asyncio.get_running_loop(), list[list[int]](), threading.Event()
        lanes, operation = Lanes(1, 1, 0.0, Metrics()), recorded(calls, gate)

        def here(item: int) -> asyncio.Task[object]:
            return asyncio.create_task(asyncio.to_thread(lanes.run_here, operation, item, loop))

        first = here(1)
        assert await asyncio.to_thread(comes_true, lambda: bool(calls))
        assert await here(2) is None, "the only lane is taken"
        waiting = asyncio.create_task(lanes.run(operation, 3))
        await asyncio.sleep(0.01)
        gate.set()
        assert (await first, await waiting) == (10, 30)
        assert await here(4) == 40
        assert calls == [[1], [3], [4]]
        lanes.close()

    asyncio.run(main())


def test_a_lane_is_free_again_after_a_thread_has_failed_in_it() -> None:
    def fail(items: list[int]) -> list[int]:
        raise ValueError(str(items))

    async def main() -> None:
        loop, lanes = asyncio.get_running_loop(), Lanes(1, 1, 0.0, Metrics())
        for _ in range(2):
            with pytest.raises(ValueError, match=r"\[1\]"):
                await asyncio.to_thread(lanes.run_here, Operation("fail", fail), 1, loop)
        assert await lanes.run(recorded([]), 2) == 20
        lanes.close()

    asyncio.run(main())


def test_a_thread_leaves_its_item_to_others_where_calls_take_several() -> None:
    async def main() -> None:
        lanes = Lanes(1, 2, 0.0, Metrics())
        assert lanes.run_here(recorded([]), 1, asyncio.get_running_loop()) is None
        lanes.close()

    asyncio.run(main())


def test_who_waits_when_lanes_are_closed_is_told_so() -> None:
    async def main() -> None:
        gate = threading.Event()
        operation, lanes = recorded([], gate), Lanes(1, 1, 0.0, Metrics())
        tasks = [asyncio.create_task(lanes.run(operation, i)) for i in range(1500)]
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(asyncio.to_thread(lanes.close))
        await asyncio.sleep(0.01)
        gate.set()
        found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert found[0] == 0 and all(isinstance(each, RuntimeError) for each in found[1:])
        await closing

    asyncio.run(main())


def test_an_operation_that_loses_results_fails_all_its_items() -> None:
    async def main() -> None:
        lanes = Lanes(1, 3, 0.01, Metrics())
        lost = Operation("lost", lambda items: [])
        found = await asyncio.wait_for(asyncio.gather(*(lanes.run(lost, i) for i in range(3)), return_exceptions=True), 60)
        assert all(isinstance(each, RuntimeError) for each in found)
        with pytest.raises(ValueError, match="unpack"):
            await asyncio.to_thread(Lanes(1, 1, 0.0, Metrics()).run_here, lost, 1, asyncio.get_running_loop())
        lanes.close()

    asyncio.run(main())
