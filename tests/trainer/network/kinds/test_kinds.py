"""Kinds of layers with ties of their own: masking is cutting, counts are exact, a cut is undone bit
for bit, and the network trains on."""

from __future__ import annotations

import kind_nets
import pytest
import torch
from cut_check import cut_and_checked, prunable
from torch import nn

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.network.kinds.norms import standardised

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


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


def test_grouped_convolutions_lose_the_same_places_of_every_group_on_either_side() -> None:
    torch.manual_seed(0)
    model = kind_nets.grouped(nn.Conv2d(36, 27, 3, padding=1, groups=3))
    surgeon = cut_and_checked(model, IMAGES)
    sizes = {group.name: group.size for group in surgeon.architecture.groups if group.prunable}
    assert sizes == {"0": 12, "3": 9}
    surgeon.cut({"0": [1, 7, 11]})
    surgeon.cut({"3": [0, 2, 3, 4]})  # Fewer places now than groups would be cut whole for.
    surgeon.cut({"0": [0], "3": [4]})
    conv = model[3]
    assert (conv.groups, conv.in_channels, conv.out_channels) == (3, 24, 12)
    assert model(IMAGES).isfinite().all()
    surgeon.undo()
    assert (conv.groups, conv.in_channels, conv.out_channels) == (3, 27, 15)


def test_transposed_grouped_convolutions_lose_places_too() -> None:
    torch.manual_seed(0)
    model = kind_nets.grouped(nn.ConvTranspose2d(36, 27, 3, groups=3))
    surgeon = cut_and_checked(model, IMAGES)
    surgeon.cut({"0": [2], "3": [5, 6]})
    assert (model[3].groups, model[3].in_channels, model[3].out_channels) == (3, 33, 21)


def test_standardised_weights_of_grouped_convolutions_are_over_the_inputs_that_stay() -> None:
    torch.manual_seed(0)
    model = kind_nets.grouped(kind_nets.StandardisedConv(36, 27, 3, groups=3))
    assert prunable(cut_and_checked(model, IMAGES)) == ["0", "3"]


def test_groups_go_whole_where_places_would_hang_together() -> None:
    torch.manual_seed(0)
    model = kind_nets.grouped(nn.Conv2d(36, 40, 3, groups=4), nn.GroupNorm(8, 40))
    surgeon = cut_and_checked(model, IMAGES)
    assert [g.size for g in surgeon.architecture.groups if g.prunable] == [4]
    surgeon.cut({"0": [1]})
    assert (model[3].groups, model[3].in_channels, model[3].out_channels) == (3, 27, 30)


def test_a_grouped_convolution_is_refitted_group_by_group() -> None:
    torch.manual_seed(0)
    model = kind_nets.grouped(nn.Conv2d(16, 24, 3, groups=2), act=nn.Identity()).eval()
    with torch.no_grad():  # Place 3 of every group says what place 5 does.
        for place in (3, 11):
            model[0].weight[place], model[0].bias[place] = model[0].weight[place + 2] * 2, 1.0
    recorder = Recorder(model, IMAGES)
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    moments = recorder.moments([(x, torch.zeros(64))], groups=["0"])
    plain, surgeon = model(x), Surgeon(model, recorder.architecture)
    surgeon.cut({"0": [3]}, reconstruct=moments)
    assert (model(x) - plain).abs().max() < 1e-3 * plain.abs().max()


def test_scales_of_a_stream_go_with_it_although_tokens_were_mixed_in_between() -> None:
    torch.manual_seed(0)
    surgeon = cut_and_checked(kind_nets.Scaled(), IMAGES)
    assert "embed" in prunable(surgeon)
    assert "scale" in {part.tensor for part in surgeon.architecture.group["embed"].slices}


def test_the_inner_width_of_a_state_space_block_can_go() -> None:
    torch.manual_seed(0)
    model = kind_nets.StateSpace()
    surgeon = cut_and_checked(model, IMAGES)
    assert prunable(surgeon) == ["embed", "enter"]
    parts = surgeon.architecture.group["enter"].slices
    assert {part.tensor: part.width for part in parts}["enter.weight"] == 2
    inner = {("decay", 0), ("conv.weight", 0), ("step.weight", 0), ("select.weight", 1)}
    assert inner <= {(part.tensor, part.dim) for part in parts}
    surgeon.cut({"enter": [0, 9]})
    assert (model.conv.groups, model.conv.out_channels) == (8, 8)


def test_what_an_attention_reads_in_two_streams_goes_in_both() -> None:
    torch.manual_seed(0)
    surgeon = cut_and_checked(kind_nets.CrossNative(), IMAGES)
    width, heads = (surgeon.architecture.group[name] for name in prunable(surgeon))
    assert {"here", "there"} <= set(width.layers)
    assert heads.size == 3


@pytest.mark.parametrize("whole", [False, True])
def test_halves_go_alike_where_a_module_keeps_the_size_of_one_or_of_both(whole: bool) -> None:
    torch.manual_seed(0)
    model = kind_nets.CrossStage(whole=whole)
    surgeon = cut_and_checked(model, IMAGES)
    sizes = [g.size for g in surgeon.architecture.groups if "enter" in g.layers and g.prunable]
    assert sizes == [9]
    surgeon.cut({g.name: [1, 4] for g in surgeon.architecture.groups if "enter" in g.layers})
    assert (model.c, model.expand_chs) == ((0, 14) if whole else (7, 0))
    surgeon.undo()
    assert (model.c, model.expand_chs) == ((0, 18) if whole else (9, 0))


def test_what_is_stacked_and_averaged_goes_together() -> None:
    torch.manual_seed(0)
    surgeon = cut_and_checked(kind_nets.Stacked(), IMAGES)
    layers = {group.name: group.layers for group in surgeon.architecture.groups}
    assert layers["left"] == ("left", "right")
    assert prunable(surgeon) == ["left"]
    assert surgeon.architecture.group["heads.0"].reason == "network output"


def test_the_width_of_pytorchs_own_transformer_can_go() -> None:
    torch.manual_seed(0)
    model = kind_nets.EncoderDecoder()
    surgeon = cut_and_checked(model, IMAGES)
    assert surgeon.architecture.group["source"].prunable
    assert model.both.d_model == 12
    labelled = [(IMAGES, torch.zeros(len(IMAGES), 5, dtype=torch.int64))]
    measured = Recorder(model, IMAGES).measure(labelled, epoch=0)
    assert measured.gates["source"].first_order.all()
    surgeon.cut({"source": [3, 4]})
    assert model.both.d_model == 10
