"""A run's history in Redis: each epoch once, the newest ones, within number and size."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elesh.bus import Bus, HistoryStore


def store(bus: Bus, epochs: int = 500, nbytes: int = 10**9) -> HistoryStore:
    return bus.history(epochs, nbytes)


def test_an_epoch_is_kept_once_and_never_overwritten(with_bus: Any) -> None:
    async def scenario(bus: Bus) -> None:
        history = store(bus)
        assert await history.remember("run", 7, b"seven") == "kept"
        assert await history.remember("run", 7, b"seven") == "known"
        assert await history.remember("run", 7, b"other") == "conflict"
        assert await history.recall("run", [7, 8]) == {7: b"seven"}

    with_bus(scenario)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    order=st.permutations(range(12)),
    most=st.integers(1, 8),
    nbytes=st.integers(1, 60),
)
def test_whatever_the_order_the_newest_epochs_stay_within_number_and_size(
    with_bus: Any, order: list[int], most: int, nbytes: int
) -> None:
    async def scenario(bus: Bus) -> None:
        history = store(bus, most, nbytes)
        for epoch in order:
            await history.remember("run", epoch, b"%05d" % epoch)
        kept = await history.epochs("run")
        assert len(kept) == min(most, nbytes // 5, 12)
        assert kept == list(range(12))[12 - len(kept) :]
        await history.forget("run")

    with_bus(scenario)


def test_writers_side_by_side_agree(with_bus: Any) -> None:
    async def scenario(bus: Bus) -> None:
        history = store(bus)
        answers = await asyncio.gather(
            *(history.remember("run", epoch % 5, b"%d" % (epoch % 5)) for epoch in range(50))
        )
        assert sorted(answers) == ["kept"] * 5 + ["known"] * 45
        assert await history.epochs("run") == [0, 1, 2, 3, 4]

    with_bus(scenario)


def test_runs_do_not_mix(with_bus: Any) -> None:
    async def scenario(bus: Bus) -> None:
        history = store(bus)
        await history.remember("a", 1, b"a")
        assert await history.epochs("b") == []
        assert await history.recall("b", [1]) == {}

    with_bus(scenario)
