"""Every family: channels, heads and layers are cut with optimizer state, and replayed anywhere."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from attention_nets import NETS, architecture_of, build, inputs
from torch import Tensor, nn

from elesh.trainer import Surgeon
from leyline import Level, PrunedArchitecture

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.AdamW(p, lr=0.01),
}
MOMENTS = {"SGD": ("momentum_buffer",), "Adam": ("exp_avg", "exp_avg_sq")}


def output(model: nn.Module, batch: Any) -> Tensor:
    found = model(**batch) if isinstance(batch, dict) else model(batch)
    return found.logits if hasattr(found, "logits") else found


def some_of_everything(architecture: PrunedArchitecture) -> tuple[dict[str, list[int]], list[str]]:
    """A multiple of every prunable group's units, and one layer that can go."""
    units = {}
    for group in architecture.groups:
        count = group.unit_multiple * (1 if group.level is Level.HEAD else 2)
        if group.prunable and group.size > count:
            units[group.name] = list(range(count))
    layers = [block.name for block in architecture.blocks if block.prunable]
    return units, layers[:1]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_moments_are_cut_exactly_like_their_parameters(name: str, kind: str) -> None:
    model, batch = build(name), inputs(name)
    optimizer = OPTIMIZERS[kind](model.parameters())
    architecture = architecture_of(name)
    output(model, batch).square().mean().backward()
    optimizer.step()
    # Moments that hold their parameter's own squares must still do so when both were cut.
    for parameter, state in optimizer.state.items():
        for moment in MOMENTS[kind]:
            state[moment].copy_(parameter.detach().square())
    units, layers = some_of_everything(architecture)
    assert units
    surgeon = Surgeon(model, architecture, optimizer=optimizer)
    surgeon.cut(units)
    if layers:
        surgeon.cut_layers(layers)
    present = set(model.parameters())
    assert {p for group in optimizer.param_groups for p in group["params"]} == present
    assert optimizer.state.keys() <= present
    for parameter, state in optimizer.state.items():
        for moment in MOMENTS[kind]:
            assert torch.equal(state[moment], parameter.detach().square())
    optimizer.zero_grad()
    output(model, batch).square().mean().backward()
    optimizer.step()
    assert torch.isfinite(output(model, batch)).all()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_a_pruned_checkpoint_loads_into_a_fresh_model_by_its_history(name: str) -> None:
    model, batch = build(name), inputs(name)
    surgeon = Surgeon(model, architecture_of(name))
    units, layers = some_of_everything(surgeon.architecture)
    first = dict(list(units.items())[::2])
    surgeon.cut(first, epoch=3)
    if layers:
        surgeon.cut_layers(layers, epoch=4)
    left = surgeon.architecture.group
    again = {n: [0] for n, g in left.items() if n in units and g.prunable and n not in first}
    multiple = all(left[name].unit_multiple == 1 for name in again)
    if multiple:
        surgeon.cut(again, epoch=5)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    history = PrunedArchitecture.model_validate_json(surgeon.architecture.model_dump_json()).history

    fresh = build(name, seed=1)
    replayed = Surgeon(fresh, architecture_of(name))
    assert replayed.replay(history) == surgeon.architecture
    saved.seek(0)
    fresh.load_state_dict(torch.load(saved, weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(output(fresh, batch), output(model, batch))
    assert output(copy.deepcopy(fresh), batch).shape == output(model, batch).shape
