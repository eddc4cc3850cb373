"""A kind of layer that Elesh does not know is taught in a few lines, and proved like any other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from elesh.trainer import ChannelAxes, Recorder, Surgeon, teach_layer
from elesh.trainer.network import layers


class Mix(nn.Module):
    """A linear layer of another making."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel, self.inputs = nn.Parameter(torch.randn(inputs, outputs)), inputs

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.inputs
        return torch.einsum("...i,io->...o", x, self.kernel)


def refit(module: Mix) -> None:
    module.inputs = len(module.kernel)


@pytest.fixture
def taught() -> Iterator[None]:
    axes = ChannelAxes((("kernel", 1),), (("kernel", 0),), site_dim=-1, produces=True)
    teach_layer(Mix, lambda module: axes, refit)
    yield
    layers._TAUGHT.pop()


@pytest.mark.usefixtures("taught")
def test_a_layer_that_was_taught_is_pruned_like_any_other() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Mix(4, 8), nn.ReLU(), Mix(8, 6), nn.Linear(6, 2)), torch.randn(3, 4)
    surgeon = Surgeon(model, Recorder(model, x).architecture)
    assert [g.name for g in surgeon.architecture.groups if g.prunable] == ["0", "2"]
    surgeon.mask({"0": [1, 5], "2": [0]})
    masked = model(x)
    surgeon.unmask()
    surgeon.cut({"0": [1, 5], "2": [0]})
    torch.testing.assert_close(model(x), masked)
    assert model[2].inputs == 6
    surgeon.undo()
    assert (model[2].inputs, tuple(model[2].kernel.shape)) == (8, (8, 6))
    model(x)
