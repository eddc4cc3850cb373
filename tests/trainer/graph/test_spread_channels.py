"""Channels that a reshape spreads over several axes go with the axis that stays theirs: masked and
cut alike, counts are exact, a cut is undone bit for bit, and the network trains on."""

from __future__ import annotations

import pytest
import torch
from cut_check import counted_macs, cut_and_checked, prunable
from torch import Tensor, nn

from elesh.trainer import Recorder


class Maxout(nn.Module):
    """The largest of three neighbours: [B, 10] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.leave, self.units = nn.Linear(10, 12 * 3), nn.Linear(12, 5), 12

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.wide(x).view(x.shape[0], self.units, 3)
        return torch.as_tensor(self.leave(pieces.max(-1)[0]))


class SplitAttention(nn.Module):
    """Two shares of a layer's outputs, weighed by a softmax over them: [B, 3, H, W] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.first = nn.Conv2d(3, 2 * 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.second, self.leave = nn.Conv2d(8, 2 * 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.both(x))
        b, wide, h, w = x.shape
        x = x.reshape(b, 2, wide // 2, h, w)
        levels = self.second(torch.relu(self.first(x.sum(1).mean((2, 3), keepdim=True))))
        levels = levels.view(b, 2, -1).softmax(1).reshape(b, 2, wide // 2, 1, 1)
        return torch.as_tensor(self.leave((x * levels).sum(1).mean((2, 3))))


class Torn(nn.Module):
    """Once along one axis, once along the other: [B, 10] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.one, self.two = nn.Linear(10, 36), nn.Linear(12, 5), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.wide(x).view(x.shape[0], 12, 3)
        return torch.as_tensor(self.one(pieces.max(2)[0]) + self.two(pieces.max(1)[0]))


MAPS = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "x", "names"),
    [(Maxout, ROWS, ["wide"]), (SplitAttention, MAPS, ["both", "first"])],
)
def test_channels_go_with_the_axis_that_stays_theirs(
    model: type[nn.Module], x: Tensor, names: list[str]
) -> None:
    torch.manual_seed(0)
    network = model()
    surgeon = cut_and_checked(network, x)
    assert prunable(surgeon) == names
    assert surgeon.architecture.group[names[0]].size == 12
    assert surgeon.architecture.macs == counted_macs(network, x)
    after = surgeon.cut({name: [0, 2] for name in names})
    assert after.macs == counted_macs(network, x)


def test_channels_that_are_read_along_both_axes_stay() -> None:
    torch.manual_seed(0)
    architecture = Recorder(Torn(), ROWS).architecture
    assert not any("wide" in group.layers for group in architecture.groups if group.prunable)
    assert architecture.group["wide"].reason
