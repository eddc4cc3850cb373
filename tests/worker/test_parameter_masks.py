"""Parameter masks over the bus: two ranks measured, one worker marks, the trainer applies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from station import Station, faulty
from torch import nn

from elesh.bus import Bus
from elesh.trainer.weight_masks import ParameterTracker, apply_masks, ask_for_masks
from leyline import AnalysisReport, AnalysisRequest, DeadLetter, PruningMasks, decode
from leyline.messages.legacy import ImportanceData
from leyline.streams import DEAD, DECISIONS, REQUESTS

HASH = "0123456789abcdef"


def network() -> nn.Sequential:
    """Ten inputs of which the last five are always zero."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 3))


def tracked(model: nn.Module, seed: int) -> ParameterTracker:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, 10, generator=generator)
    inputs[:, 5:] = 0
    tracker = ParameterTracker(model)
    tracker.observe([(inputs, torch.randint(0, 3, (64,), generator=generator))])
    return tracker


def ask(station: Station, model: nn.Module, **more: Any) -> AnalysisRequest:
    ranks = [tracked(model, seed).export() for seed in (1, 2)]

    async def action(bus: Bus) -> AnalysisRequest:
        return await ask_for_masks(
            bus, ranks, request_id="rq-1", epoch=40, model_hash=HASH, run_id="run", **more
        )

    return station.on_bus(action)


def answers(station: Station) -> tuple[PruningMasks, AnalysisReport]:
    def both() -> list[Any]:
        found = [m for m in station.messages(DECISIONS) if isinstance(m, PruningMasks)]
        reports = [m for m in station.messages(DECISIONS) if isinstance(m, AnalysisReport)]
        return [found, reports] if found and reports else []

    (masks,), (report,) = station.wait_for(both, "masks and their report")
    return masks, report


def test_two_ranks_become_one_mask_that_changes_no_output(station: Station) -> None:
    station.worker()
    model = network()
    ask(station, model)
    masks, report = answers(station)
    assert masks.idempotency_key == report.idempotency_key == f"40:{HASH}:rq-1:parameter"
    assert report.analysed == sum(p.numel() for p in model.parameters())
    assert report.samples > 0
    inputs = torch.randn(20, 10)
    inputs[:, 5:] = 0
    before = model(inputs)
    assert apply_masks(model, masks) == report.marked >= 5 * 64
    torch.testing.assert_close(model(inputs), before)


@pytest.mark.slow
def test_asking_again_commits_nothing_new(station: Station) -> None:
    station.worker()
    model = network()
    request = ask(station, model)
    answers(station)

    async def again(bus: Bus) -> None:
        await bus.publish(REQUESTS, request, source="test")
        await bus.publish(REQUESTS, request, source="test")

    station.on_bus(again)
    station.wait_for(
        lambda: station.on_bus(lambda bus: bus.pending("elesh-workers", REQUESTS)).waiting == 0,
        "the requests to be taken",
    )
    masks = [m for m in station.messages(DECISIONS) if isinstance(m, PruningMasks)]
    assert len(masks) == 1


@pytest.mark.slow
def test_importance_of_another_checkpoint_is_a_dead_letter(station: Station) -> None:
    station.worker()
    request = ask(station, network())

    async def other(bus: Bus) -> None:
        data = decode(ImportanceData, await bus.blobs.get(request.importance))
        assert data.epoch == 40
        changed = request.model_copy(update={"epoch": 41, "request_id": "rq-2"})
        await bus.publish(REQUESTS, changed, source="test")

    station.on_bus(other)
    dead_letters = station.wait_for(
        lambda: [m for m in station.messages(DEAD) if isinstance(m, DeadLetter)], "a dead letter"
    )
    assert dead_letters[0].error_code == "identity_mismatch"
    assert "importance of rank 0" in dead_letters[0].field


@pytest.mark.slow
def test_masks_too_large_for_a_message_travel_as_a_blob(station: Station) -> None:
    model = nn.Linear(200, 200)
    with torch.no_grad():
        model.weight.zero_()
    inputs = torch.zeros(4, 200)
    tracker = ParameterTracker(model)
    tracker.observe([(inputs, torch.zeros(4, dtype=torch.long))])
    rank = tracker.export()
    faulty(station, "inline:4000")

    async def action(bus: Bus) -> AnalysisRequest:
        return await ask_for_masks(bus, [rank], request_id="big", epoch=1, model_hash=HASH)

    station.on_bus(action)
    masks, report = answers(station)
    assert masks.packed is not None
    packed = station.on_bus(lambda bus: bus.blobs.get(masks.packed))
    assert apply_masks(model, masks, packed) == report.marked
