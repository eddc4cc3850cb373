"""Batch statistics and the outputs' scale after a cut: what is set, and that nothing else is."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from trainer_nets import batches, build, same

from elesh.trainer.surgery.reconstruction.after_cut import (
    reestimate_batch_statistics,
    soften_outputs,
)


def test_batch_statistics_are_the_means_over_the_batches_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm, nn.Dropout(0.5), nn.Linear(3, 2)).eval()
    model[1].train()
    parts = [torch.randn(50, 3) * 3 + 1 for _ in range(4)]
    weights = copy.deepcopy([p.detach() for p in model.parameters()])
    state = torch.get_rng_state()
    assert reestimate_batch_statistics(model, [(x, None) for x in parts]) == 1
    assert torch.equal(state, torch.get_rng_state())
    mean = torch.stack([x.mean(0) for x in parts]).mean(0)
    variance = torch.stack([x.var(0) for x in parts]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert (norm.momentum, int(norm.num_batches_tracked)) == (0.1, 0)
    assert (model.training, norm.training, model[1].training) == (False, False, True)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_batch_statistics_that_would_not_be_finite_stay() -> None:
    norm = nn.BatchNorm1d(3).eval()
    before = copy.deepcopy(norm.state_dict())
    reestimate_batch_statistics(norm, [(torch.full((4, 3), math.nan), None)])
    assert same(before, dict(norm.state_dict()))
    assert reestimate_batch_statistics(nn.Linear(2, 2), []) == 0


def test_outputs_are_softened_until_the_loss_is_that_of_the_accuracy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(200, 4)
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.mul_(200)
    answers = model(x).argmax(1)
    data = [(x[:100], answers[:100]), (x[100:], answers[100:])]
    first = copy.deepcopy(model[0].state_dict())
    scale = soften_outputs(model, data, accuracy=0.9)
    assert 0.05 <= scale < 1
    loss = nn.functional.cross_entropy(model(x), answers)
    assert abs(float(loss) + math.log(0.9)) < 1e-4
    assert torch.equal(model(x).argmax(1), answers)
    assert same(first, dict(model[0].state_dict()))
    assert soften_outputs(model, data, accuracy=0.9) > 0.999, "it is soft enough"


def test_outputs_that_no_layer_of_their_own_makes_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x) * 100)

    model, x = Tied(), torch.arange(5)
    before = copy.deepcopy(model.state_dict())
    assert soften_outputs(model, [(x, x)], accuracy=0.5) == 1.0
    assert same(before, dict(model.state_dict()))
    vgg = build("Vgg")
    assert soften_outputs(vgg, batches(), accuracy=0.999) == 1.0
