"""Channels over which a product of two activations sums go from both of its operands: masked and
cut alike, counts are exact, a cut is undone bit for bit, and the network trains on."""

from __future__ import annotations

import product_nets
import pytest
import torch
from cut_check import cut_and_counted
from test_export import check
from torch import nn

import elesh
from elesh.trainer import Recorder, Surgeon
from elesh.trainer.network.gates import GateMeter
from elesh.trainer.network.kinds.matrices import is_behind


@pytest.mark.parametrize("name", product_nets.NETS)
def test_channels_that_a_product_sums_over_go_from_both_operands(name: str) -> None:
    cut_and_counted(*product_nets.NETS[name])


@pytest.mark.parametrize("name", ["a module for each head", "attention of maps", "interactions"])
def test_products_are_masked_in_the_exported_network_too(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, _ = product_nets.NETS[name]
    model = nn.Sequential(make(), nn.Flatten())
    check(model, torch.cat([inputs, inputs])[:5], inputs)


@pytest.mark.parametrize("name", ["a module for each head", "two towers"])
def test_the_gate_of_a_product_shows_how_outputs_move_if_one_operand_goes(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, _ = product_nets.NETS[name]
    model, x = make().double(), inputs.double()
    groups = Recorder(model, x).architecture.groups
    site = next(s for group in groups for s in group.sites if is_behind(model, s.module))
    with GateMeter(model, [site.axis], lambda axis, x: None) as meter:
        meter.expect(len(x))
        sums, _ = meter.backward(model(x).sin().sum())

    def scaled(level: float) -> float:
        levels = torch.ones(model.get_submodule(site.module.removesuffix("()")).out_features)
        levels = levels.double().index_fill(0, torch.tensor(0), level)
        layer = model.get_submodule(site.module.removesuffix("()"))
        handle = layer.register_forward_hook(lambda module, args, made: made * levels)
        found = float(model(x).sin().sum())
        handle.remove()
        return found

    slope = (scaled(1 + 1e-5) - scaled(1 - 1e-5)) / 2e-5
    assert float(sums[site.axis][:, 0].sum()) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_a_network_with_a_module_for_each_head_is_pruned_to_a_budget() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(product_nets.ModuleForEachHead(), nn.Flatten(), nn.Linear(35, 5))
    x = torch.randn(64, 7, 16)
    elesh.prune(model, [(x, model(x).argmax(1))], budget={"macs": 0.7})
    assert (
        model[0].attention.heads[0].query.weight.shape
        == model[0].attention.heads[0].key.weight.shape
    )
    assert (
        sum(head.query.out_features + head.value.out_features for head in model[0].attention.heads)
        < 48
    )


def test_a_product_with_what_no_layer_makes_says_so() -> None:
    torch.manual_seed(0)
    architecture = Recorder(product_nets.Uneven(), torch.randn(3, 7, 10)).architecture
    reason = architecture.group["enter"].reason
    assert reason == "a product outside of any layer sums over its channels (Bmm after enter)"


def test_a_layer_that_goes_takes_the_place_behind_it_along() -> None:
    torch.manual_seed(0)
    model = product_nets.ModuleForEachHead()
    surgeon = Surgeon(model, Recorder(model, torch.randn(3, 7, 16)).architecture)
    blocks = [block.name for block in surgeon.architecture.blocks if block.prunable]
    assert blocks
    left = surgeon.cut_layers(blocks)
    assert not any(group.sites for group in left.groups if group.name.startswith("attention"))
    assert model(torch.randn(2, 7, 16)).shape == (2, 7, 5)
