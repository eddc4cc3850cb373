"""Modules that keep what they have worked out of their parameters while they evaluate (LeViT's
biases of positions) lose heads as others do, whether they have kept anything yet or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from elesh.trainer import Recorder, Surgeon

STEPS = 7


class Biased(nn.Module):
    """Attention with a table of relative positions, looked up once in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table, self.kept = nn.Parameter(torch.randn(4, 2 * STEPS - 1)), dict[str, Tensor]()
        steps = torch.arange(STEPS)
        places = steps[:, None] - steps[None] + STEPS - 1
        self.register_buffer("places", places, persistent=False)

    def train(self, mode: bool = True) -> Biased:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def biases(self) -> Tensor:
        if self.training:
            return self.table[:, self.places]
        if "all" not in self.kept:
            self.kept["all"] = self.table[:, self.places]
        return self.kept["all"]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) + self.biases()).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.attention, self.leave = nn.Linear(6, 16), Biased(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.attention(x))


@pytest.mark.parametrize("kept", [False, True])
def test_what_a_module_keeps_while_it_evaluates_is_worked_out_anew(kept: bool) -> None:
    torch.manual_seed(0)
    model, x = Network().eval(), torch.randn(2, STEPS, 6)
    frozen = nn.BatchNorm1d(3)
    model.attention.add_module("frozen", frozen.train())  # Its mode is its own.
    with torch.no_grad():
        before = model(x) if kept else None
        surgeon = Surgeon(model, Recorder(model, x).architecture)
        assert surgeon.architecture.group["attention"].prunable
        surgeon.mask({"attention": [1]})
        masked = model(x)
        surgeon.unmask()
        surgeon.cut({"attention": [1]})
        assert model(x).sub(masked).abs().max() <= 1e-5 * masked.abs().max()
        surgeon.undo()
        assert model(x).shape == masked.shape
        assert before is None or torch.equal(model(x), before)
    assert frozen.training
    assert not model.training
    assert not model.attention.training
