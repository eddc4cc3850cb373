"""A parameter that code multiplies by is a layer: its channels go, masked and cut alike, counts are
exact, a cut is undone bit for bit, and the network trains on; nothing is left in the network."""

from __future__ import annotations

from collections.abc import Callable

import matrix_nets
import pytest
import torch
from cut_check import cut_and_checked, cut_and_counted
from test_export import check
from torch import Tensor, nn
from torch.nn import functional

import elesh
from elesh.trainer import Recorder
from elesh.trainer.network.kinds.matrices import layer_at


@pytest.mark.parametrize("name", matrix_nets.NETS)
def test_a_parameter_that_code_multiplies_by_loses_its_channels(name: str) -> None:
    cut_and_counted(*matrix_nets.NETS[name])


@pytest.mark.parametrize("name", ["perceptron", "einsum"])
def test_bare_parameters_are_masked_in_the_exported_network_too(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, _ = matrix_nets.NETS[name]
    model = nn.Sequential(make(), nn.Flatten()) if inputs.ndim == 2 else make()
    more = torch.cat([inputs, inputs])[:5]
    check(model, more, inputs)


def test_a_network_of_bare_parameters_is_pruned_to_a_budget() -> None:
    torch.manual_seed(0)
    make, *_ = matrix_nets.NETS["perceptron"]
    model = make()
    model.w1.data[:, 8:] = 0  # These send nothing.
    x = torch.randn(128, 10)
    elesh.prune(model, [(x, model(x).argmax(1))], budget={"macs": 0.75})
    assert 8 <= model.w1.shape[1] == model.w2.shape[1] < 16


def test_a_parameter_that_is_read_in_two_ways_says_so() -> None:
    torch.manual_seed(0)
    architecture = Recorder(matrix_nets.TwoWays(), torch.randn(3, 10)).architecture
    group = architecture.group["enter"]
    assert group.reason == "products read the parameter in several ways (tied())"


class _Named(nn.Module):
    """One product, made in a way of its own, between two layers: [B, 8] to [B, 5]."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 12), nn.Linear(16, 5)
        self.w = nn.Parameter(torch.randn(12, 16) * 0.3)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.leave(torch.relu(self.product(torch.relu(self.enter(x)), self.w)))
        return made + torch.matmul(made, other=torch.ones(5, 5))


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: torch.matmul(x, other=w),
        lambda x, w: x.matmul(other=w),
        lambda x, w: torch.mm(input=x, mat2=w),
        lambda x, w: x.mm(mat2=w),
        lambda x, w: functional.linear(x, weight=w.T),
        lambda x, w: functional.linear(input=x, weight=w.T, bias=None),
        lambda x, w: torch.einsum("bi,io->bo", [x, w]),
    ],
)
def test_operands_may_be_given_by_name(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    surgeon = cut_and_checked(_Named(product), torch.randn(4, 8))
    groups = surgeon.architecture.group
    assert {name: groups[name].size for name in ("enter", "w")} == {"enter": 12, "w": 16}
    assert groups["enter"].prunable
    assert groups["w"].prunable


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: torch.addmm(x.new_zeros(1), x, mat2=w),
        lambda x, w: torch.addmm(x.new_zeros(1), x, w, beta=0.5),
        lambda x, w: torch.bmm(x[None], mat2=w[None])[0],
        lambda x, w: torch.einsum(x, [0, 1], w, [1, 2], [0, 2]),
    ],
)
def test_a_product_that_is_not_told_apart_does_not_stop_the_network(
    product: Callable[[Tensor, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    architecture = Recorder(_Named(product).eval(), torch.randn(4, 8)).architecture
    assert any(group.name == "w" or "w" in group.layers for group in architecture.groups)


def test_what_is_neither_a_module_nor_a_parameter_is_no_layer() -> None:
    model = matrix_nets.TwoWays()
    with pytest.raises(AttributeError, match="other is no parameter"):
        layer_at(model, "other()")
