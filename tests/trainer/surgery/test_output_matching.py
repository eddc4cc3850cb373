"""A cut network comes nearer to its outputs before, or stays as it was bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elesh.trainer.surgery.reconstruction import output_matching
from elesh.trainer.surgery.reconstruction.output_matching import match_outputs


class Narrow(nn.Module):
    """Convolutions, batch normalisation, a frozen layer and one that nothing calls."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.frozen = nn.Conv2d(width, width, 1).requires_grad_(False)
        self.head = nn.Linear(width, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.norm(self.first(x)))
        return {"features": y, "logits": self.head(self.frozen(y).relu().mean((2, 3)))}


def networks() -> tuple[nn.Module, nn.Module]:
    """One that knows, and a narrower one."""
    torch.manual_seed(0)
    return Narrow(12).eval(), Narrow(6).eval()


def images(seed: int, count: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 2, 2, generator=generator)
    return nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")


@torch.no_grad()
def apart(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    return float((model(x)["logits"] - other(x)["logits"]).square().mean())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_outputs_of_samples_that_it_never_saw_come_nearer() -> None:
    teacher, model = networks()
    before, kept = apart(model, teacher, images(2)), state(model)
    with torch.no_grad():
        wanted = teacher(images(1))["logits"]
    model.train()
    model.first.weight.grad = torch.ones_like(model.first.weight)  # type: ignore[union-attr, arg-type]
    found = match_outputs(model, images(1), wanted)
    assert found is not None
    assert found.after < 0.5 * found.before
    assert model.training
    assert bool((model.first.weight.grad == 1).all())  # type: ignore[union-attr]
    now = state(model)
    for name in ("frozen.weight", "idle.weight", "norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(now[name], kept[name]), name
    assert apart(model.eval(), teacher, images(2)) < 0.5 * before


def test_what_does_not_end_nearer_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, model = networks()
    kept = state(model)
    with torch.no_grad():
        wanted = teacher(images(1))["logits"]
    monkeypatch.setattr(output_matching, "_STEP", 1e4)
    found = match_outputs(model, images(1), wanted)
    assert found is not None
    assert found.after == found.before
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_outputs_that_cannot_or_need_not_be_matched_are_left_alone() -> None:
    teacher, model = networks()
    kept = state(teacher)
    with torch.no_grad():
        wanted = teacher(images(1))["logits"]
    found = match_outputs(teacher, images(1), wanted)
    assert found is not None
    assert found.after == found.before < 1e-3
    assert all(torch.equal(kept[name], tensor) for name, tensor in teacher.state_dict().items())
    assert match_outputs(model, images(1), wanted[:, :2]) is None
    assert match_outputs(model, images(1), torch.zeros_like(wanted)) is None
    assert match_outputs(copy.deepcopy(model).requires_grad_(False), images(1), wanted) is None
    elsewhere = copy.deepcopy(model).requires_grad_(False)
    elsewhere.idle.requires_grad_(True)  # type: ignore[union-attr]
    found = match_outputs(elsewhere, images(1), wanted)
    assert found is not None
    assert found.after == found.before


def test_it_is_trained_on_all_samples_and_judged_by_some(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, model = networks()
    with torch.no_grad():
        wanted = teacher(images(1))["logits"]
    seen = {True: 0, False: 0}

    def counted(network: nn.Module, inputs: Any) -> Any:
        seen[torch.is_grad_enabled()] += len(inputs)
        return network(inputs)

    monkeypatch.setattr(output_matching, "call", counted)
    match_outputs(model, images(1), wanted)
    assert seen == {True: 2 * 512, False: 3 * 256}
