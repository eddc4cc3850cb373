"""A parameter that code multiplies by is a layer: its channels go, masked and cut alike, counts are
exact, a cut is undone bit for bit, and the network trains on; nothing is left in the network."""

from __future__ import annotations

import matrix_nets
import pytest
import torch
from cut_check import counted_macs, cut_and_checked
from test_export import check
from torch import nn

import elesh
from elesh.trainer import Recorder
from elesh.trainer.network.kinds.matrices import layer_at


@pytest.mark.parametrize("name", matrix_nets.NETS)
def test_a_parameter_that_code_multiplies_by_loses_its_channels(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, sizes = matrix_nets.NETS[name]
    model = make()
    surgeon = cut_and_checked(model, inputs)
    groups = surgeon.architecture.groups
    assert {group.name: group.size for group in groups if group.prunable} == sizes
    assert surgeon.architecture.macs == counted_macs(model, inputs)
    after = surgeon.cut({group.name: [0, 2] for group in groups if group.prunable})
    assert after.macs == counted_macs(model, inputs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


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


def test_what_is_neither_a_module_nor_a_parameter_is_no_layer() -> None:
    model = matrix_nets.TwoWays()
    with pytest.raises(AttributeError, match="other is no parameter"):
        layer_at(model, "other()")
