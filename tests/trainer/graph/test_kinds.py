"""Kinds of layers with ties of their own: masking is cutting, counts are exact, a cut is undone bit
for bit, and the network trains on."""

from __future__ import annotations

import kind_nets
import torch
import trainer_nets
from torch import Tensor, nn

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.network.standardised import standardised

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cut_and_checked(model: nn.Module, x: Tensor) -> Surgeon:
    """Some units of every group that may go were masked, cut, and undone."""
    model.eval()
    surgeon = Surgeon(model, Recorder(model, x).architecture)
    units, before = trainer_nets.units(surgeon.architecture), model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    surgeon.mask(units)
    masked = model(x)
    surgeon.unmask()
    after = surgeon.cut(units)
    assert (model(x) - masked).abs().max() <= 1e-5 * masked.abs().max()
    assert after.parameters == sum(p.numel() for p in model.parameters())
    model.train()(x).square().mean().backward()
    surgeon.undo()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    return surgeon


def prunable(surgeon: Surgeon) -> list[str]:
    return [group.name for group in surgeon.architecture.groups if group.prunable]


def test_inputs_of_convolutions_with_standardised_weights_can_go() -> None:
    torch.manual_seed(0)
    surgeon = cut_and_checked(kind_nets.standardised(), IMAGES)
    assert prunable(surgeon) == ["0", "2", "6"]


def test_standardised_weights_are_told_by_what_they_compute() -> None:
    found = standardised(kind_nets.StandardisedConv(4, 6, 3))
    assert found is not None
    assert (found.kind, found.dim, found.eps) == ("weights", -3, 1e-6)
    assert standardised(nn.Conv2d(4, 6, 3)) is None
    assert standardised(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))) is None


def test_the_width_of_pytorchs_own_attention_can_go_with_its_heads() -> None:
    torch.manual_seed(0)
    model = kind_nets.Native()
    surgeon = cut_and_checked(model, IMAGES)
    assert prunable(surgeon) == ["embed", "attention"]
    surgeon.cut({"embed": [0, 5]})
    assert model.attention.embed_dim == 10
    surgeon.cut({"embed": [0, 1], "attention": [1]})
    assert type(model.attention) is nn.MultiheadAttention
    model.double()(IMAGES.double())
    assert prunable(Surgeon(model, Recorder(model.float(), IMAGES).architecture))[0] == "embed"


def test_channels_that_are_merged_with_those_of_neighbours_can_go() -> None:
    torch.manual_seed(0)
    surgeon = cut_and_checked(kind_nets.Merging(), IMAGES)
    assert prunable(surgeon) == ["embed", "reduce"]
    widths = {part.tensor: part.width for part in surgeon.architecture.group["reduce"].slices}
    assert widths["out.weight"] == 16


def test_an_activation_in_place_hides_no_linear_layer_of_sequences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(inplace=True), nn.Linear(12, 5))
    assert prunable(cut_and_checked(model, IMAGES)) == ["0"]
    assert model[1].inplace
