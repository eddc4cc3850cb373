"""What is found without another pass: a training step that would fail, layers that cannot go, masks
that have an effect although no gradient says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elesh.trainer import Recorder
from elesh.trainer.graph.hazards import train_once, trainable_example
from leyline import PrunedArchitecture


class Step(nn.Module):
    """Two layers, and between them what a test puts there."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(5, 7), nn.Linear(7, 2), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


class Own(torch.autograd.Function):
    """Fails on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ArithmeticError("backwards")


def test_what_training_reaches_is_read_off_the_graph() -> None:
    model, backwards = Step(torch.relu), list[Any]()
    model.unused = nn.Linear(3, 3)
    model.first.weight.register_hook(backwards.append)
    example = torch.randn(4, 5)
    found, reached = trainable_example(model, example)
    assert found is example
    assert reached == {"first.weight", "first.bias", "last.weight", "last.bias"}
    assert not backwards
    assert not model.training


def test_what_was_overwritten_before_the_way_back_is_found() -> None:
    with pytest.raises(RuntimeError, match="inplace"):
        train_once(Step(lambda x: x.sigmoid().mul_(2)), torch.randn(4, 5))


def test_functions_of_ones_own_are_run_backwards() -> None:
    with pytest.raises(ArithmeticError, match="backwards"):
        train_once(Step(Own.apply), torch.randn(4, 5))


def test_a_network_that_goes_backward_itself_trains() -> None:
    def slope(x: Tensor) -> Tensor:
        made = x.sigmoid().sum()
        return torch.autograd.grad(made, x, create_graph=True)[0]

    model = Step(slope)
    fed = train_once(model, torch.randn(4, 5))
    assert fed is not None
    assert id(model.first.weight) in fed


class Residual(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Asking(nn.Module):
    """Its code asks for a weight inside its block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.inner(x.to(self.inner.down.weight.dtype))


class Counted(nn.Module):
    """Blocks that cannot go, and one that can."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Asking() for _ in range(depth)))
        self.enter, self.free, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.enter(x))
        return self.out(x + self.free(x).relu())


def found(depth: int) -> tuple[PrunedArchitecture, int]:
    """The architecture, and how often the network ran for it."""
    calls = list[nn.Module]()
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: calls.append(module) if isinstance(module, Counted) else None
    )
    try:
        return Recorder(Counted(depth), torch.randn(4, 4)).architecture, len(calls)
    finally:
        handle.remove()


def test_layers_that_cannot_go_are_found_in_one_run() -> None:
    few, at_first = found(2)
    many, later = found(9)
    assert at_first == later
    for architecture, depth in ((few, 2), (many, 9)):
        blocks = [block for block in architecture.blocks if "inner" in block.name]
        assert len(blocks) == depth
        assert not any(block.prunable for block in blocks)
        assert all("does not run without it" in block.reason for block in blocks)


class Saturated(nn.Module):
    """What one layer makes passes a sigmoid that is one wherever nothing is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out = nn.Linear(4, 8), nn.Linear(9, 3)
        self.hidden = nn.Linear(8, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sigmoid(5e4 * self.hidden(self.enter(x)).abs()))


def test_a_mask_counts_where_only_saturation_hides_it() -> None:
    torch.manual_seed(0)
    architecture = Recorder(Saturated(), torch.randn(6, 4)).architecture
    assert architecture.group["enter"].prunable
    dead = nn.Sequential(nn.Linear(4, 8), nn.Threshold(1e9, 0.0), nn.Linear(8, 3))
    group = Recorder(dead, torch.randn(6, 4)).architecture.group["0"]
    assert "masking it changes no output" in group.reason
