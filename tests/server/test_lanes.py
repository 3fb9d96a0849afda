from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from numpy.typing import NDArray

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
