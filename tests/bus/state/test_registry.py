"""The fleet's register: who is there, what each does, and how much is left to do."""

from __future__ import annotations

from typing import Any

from bus_messages import publish
from hypothesis import given
from hypothesis import strategies as st

from elesh.bus import Bus, WorkerState
from elesh.bus.state.registry import _read
from leyline.streams import OUTCOMES, TELEMETRY, WORKERS

STATE = WorkerState(
    worker_id="w1", host="node", pid=7, doing="busy", child="busy", ready=True, key="60:ab:ck:head"
)


def test_a_worker_is_there_while_it_is_heard_of_and_gone_afterwards(with_bus: Any) -> None:
    async def scenario(bus: Bus) -> None:
        await bus.registry.heartbeat(STATE, seconds=60)
        await bus.registry.heartbeat(STATE.model_copy(update={"worker_id": "w0"}), seconds=60)
        first, second = await bus.registry.workers()
        assert (first.worker_id, second.worker_id) == ("w0", "w1")
        assert second.heard_at > 1e9
        assert second == STATE.model_copy(update={"heard_at": second.heard_at})
        await bus.registry.forget("w0")
        await bus.registry.heartbeat(STATE, seconds=0.001)
        while await bus.registry.workers():
            pass

    with_bus(scenario)


def test_a_heartbeat_that_says_less_leaves_nothing_of_the_one_before(with_bus: Any) -> None:
    async def scenario(bus: Bus) -> None:
        await bus.registry.heartbeat(STATE, seconds=60)
        await bus.registry.heartbeat(WorkerState(worker_id="w1"), seconds=60)
        (state,) = await bus.registry.workers()
        assert (state.key, state.doing, state.ready) == ("", "starting", False)

    with_bus(scenario)


def test_the_backlog_tells_waiting_pending_and_their_age(with_bus: Any) -> None:
    async def scenario(bus: Bus) -> None:
        nothing = await bus.registry.backlog()
        assert nothing["outcomes"].oldest_seconds is None
        await publish(bus, 1, 2, 3)
        before = (await bus.registry.backlog([OUTCOMES]))["outcomes"]
        assert (before.length, before.waiting, before.pending) == (3, 3, 0)
        assert before.oldest_seconds is not None
        assert before.lease_seconds is None
        await bus.groups.claim(WORKERS, "w1", [OUTCOMES], count=2, block_seconds=0)
        held = (await bus.registry.backlog([OUTCOMES]))["outcomes"]
        assert (held.length, held.waiting, held.pending) == (3, 1, 2)
        assert held.lease_seconds is not None
        assert (await bus.registry.backlog([TELEMETRY]))["telemetry"].waiting == 0

    with_bus(scenario)


@given(st.dictionaries(st.binary(max_size=12), st.binary(max_size=12), max_size=8))
def test_a_hash_that_no_worker_wrote_is_passed_over(values: dict[bytes, bytes]) -> None:
    state = _read(values)
    assert state is None or state.worker_id
