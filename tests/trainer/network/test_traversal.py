"""Lists of modules and parameters are PyTorch's own, and modes reach every module."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elesh.trainer.network.traversal import (
    deep_copied,
    listed_once,
    modules_in,
    parameters_in,
    quick_modes,
    standing_still,
)


class Keeping(nn.Module):
    """Does more than to set its flag when it is put into a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.modes = nn.Sequential(nn.Linear(2, 2), nn.Dropout()), list[bool]()

    def train(self, mode: bool = True) -> Keeping:
        self.modes.append(mode)
        return super().train(mode)


def _network() -> nn.Sequential:
    shared = nn.Linear(3, 3)
    tied = nn.Linear(3, 3)
    tied.weight = shared.weight
    parts = nn.ModuleDict({"a": shared, "b": tied, "again": shared})
    parts.register_module("none", None)
    return nn.Sequential(nn.Sequential(parts, nn.BatchNorm1d(3)), Keeping(), shared)


def test_modules_and_parameters_are_listed_as_pytorch_lists_them() -> None:
    network = _network()
    assert list(modules_in(network).items()) == list(network.named_modules())
    expected = [(path, id(one)) for path, one in network.named_parameters()]
    assert [(path, id(one)) for path, one in parameters_in(network).items()] == expected
    with standing_still(network):
        assert list(modules_in(network).items()) == list(network.named_modules())
    assert "named_modules" not in vars(network)


def test_a_quick_mode_reaches_every_module_and_calls_those_that_do_more() -> None:
    network = _network()
    keeping = network[1]
    assert isinstance(keeping, Keeping)
    with quick_modes(network):
        network.eval()
        assert not any(module.training for module in network.modules())
        network[0] = nn.Sequential(nn.Dropout())  # Nothing of what it replaces is on it.
        network.train()
        assert all(module.training for module in network.modules())
    assert keeping.modes == [False, True]
    assert not any("train" in vars(module) for module in network.modules())


def test_what_is_listed_once_is_listed_anew_afterwards_and_other_networks_always() -> None:
    network, other = _network(), _network()
    with listed_once(network):
        assert list(modules_in(network).items()) == list(network.named_modules())
        assert modules_in(network) is modules_in(network)
        assert parameters_in(network) is parameters_in(network)
        assert list(modules_in(other).items()) == list(other.named_modules())
        assert "named_modules" not in vars(network)
    network.add_module("more", nn.Linear(3, 3))
    assert "more.weight" in parameters_in(network)


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def called(x: Tensor, times: Any = function) -> Any:
        return (function(x) + times(x)) / 2

    return called


@pytest.mark.parametrize(
    "wrap",
    [
        decorated,
        pytest.param(torch.compile, marks=pytest.mark.slow),
        functools.partial,
        torch.no_grad(),
    ],
    ids=["closure and default", "compiled", "partial", "context"],
)
def test_a_function_in_place_of_a_copied_networks_method_calls_the_copy(wrap: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(5, 4)
    with torch.compiler.set_stance("force_eager"):
        expected = model(x)
        model.forward = wrap(model.forward)  # type: ignore[method-assign]
        copied = deep_copied(model)
        with torch.no_grad():
            model[0].weight.zero_()
        assert torch.allclose(copied(x), expected)
        assert torch.allclose(model(x), model[2](torch.relu(model[0].bias)).expand(5, -1))
