"""Random small convolutional networks: residual, concatenated, depthwise and gated wiring."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

Step = tuple[str, int, int, int]
"""An operation, two earlier values (counted back from the newest), and a width."""

OPERATIONS = ("conv", "conv", "residual", "add", "concat", "depthwise", "gate", "transposed")


class RandomNet(nn.Module):
    """Follows a plan; every value is a feature map of the same height and width."""

    def __init__(self, plan: list[Step]) -> None:
        super().__init__()
        self.plan = plan
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.steps = nn.ModuleList()
        widths = [4]
        for operation, a, b, width in plan:
            left, right = widths[-1 - a % len(widths)], widths[-1 - b % len(widths)]
            modules, out = _modules(operation, left, right, width)
            self.steps.append(nn.ModuleList(modules))
            widths.append(out)
        self.leaves = sorted(set(range(len(widths))) - _consumed(plan))
        self.fc = nn.ModuleList(nn.Linear(widths[leaf] * 4, 3) for leaf in self.leaves)

    def forward(self, x: Tensor) -> Tensor:
        values = [self.stem(x)]
        for (operation, a, b, _), modules in zip(self.plan, self.steps, strict=True):
            left, right = values[-1 - a % len(values)], values[-1 - b % len(values)]
            values.append(_apply(operation, modules, left, right))
        pooled = [nn.functional.adaptive_avg_pool2d(values[leaf], 2) for leaf in self.leaves]
        return sum(fc(x.flatten(1)) for fc, x in zip(self.fc, pooled, strict=True))


def _consumed(plan: list[Step]) -> set[int]:
    """The values that some step reads: dead ends would not be part of the network."""
    read: set[int] = set()
    for count, (operation, a, b, _) in enumerate(plan, start=1):
        read.add(count - 1 - a % count)
        if operation in ("add", "concat"):
            read.add(count - 1 - b % count)
    return read


def _modules(operation: str, left: int, right: int, width: int) -> tuple[list[nn.Module], int]:
    if operation == "conv":
        return [nn.Conv2d(left, width, 3, padding=1), nn.BatchNorm2d(width)], width
    if operation == "residual":
        return [nn.Conv2d(left, left, 1, bias=False), nn.BatchNorm2d(left)], left
    if operation == "add":
        return [nn.Conv2d(left, right, 1)], right
    if operation == "concat":
        return [], left + right
    if operation == "depthwise":
        return [nn.Conv2d(left, left, 3, padding=1, groups=left)], left
    if operation == "gate":
        return [nn.Conv2d(left, 2 * width, 1)], width
    return [nn.ConvTranspose2d(left, width, 3, padding=1)], width


def _apply(operation: str, modules: nn.ModuleList, left: Tensor, right: Tensor) -> Tensor:
    if operation == "conv":
        return torch.relu(modules[1](modules[0](left)))
    if operation == "residual":
        return left + torch.relu(modules[1](modules[0](left)))
    if operation == "add":
        return modules[0](left) + right
    if operation == "concat":
        return torch.cat([left, right], 1)
    if operation == "gate":
        a, b = modules[0](left).chunk(2, 1)
        return a * torch.sigmoid(b)
    return torch.tanh(modules[0](left))


plans = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 5), st.integers(0, 5), st.integers(2, 6)),
    min_size=1,
    max_size=7,
)
