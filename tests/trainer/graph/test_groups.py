"""What can be removed is found, and what cannot is refused with a reason."""

from __future__ import annotations

import copy

import pytest
import torch
from cut_check import cut_and_checked
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from trainer_nets import NETS, ResNet, architecture_of, build, example

from elesh.trainer import Recorder, Surgeon
from leyline import InvalidField, Level, PrunedArchitecture, PruningGroup


def find(model: nn.Module, inputs: object = None, **options: object) -> PrunedArchitecture:
    return Recorder(model, example() if inputs is None else inputs, **options).architecture  # type: ignore[arg-type]


def prunable(architecture: PrunedArchitecture) -> list[str]:
    return [group.name for group in architecture.groups if group.prunable]


def reason(architecture: PrunedArchitecture, name: str) -> str:
    group = architecture.group[name]
    assert not group.prunable
    return group.reason


def sliced(group: PruningGroup) -> set[tuple[str, int]]:
    return {(part.tensor, part.dim) for part in group.slices}


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("Vgg", ["features.0", "features.4", "classifier.1"]),
        (
            "ResNet",
            ["stem", "blocks.0.conv1", "blocks.1.conv1", "blocks.1.conv2", "blocks.2.conv1",
             "blocks.3.conv1", "blocks.3.conv2"],
        ),
        ("Dense", ["stem", "grow.0.2", "grow.1.2", "grow.2.2", "transition.2"]),
        ("Mobile", ["stem", "expand.0", "squeeze.1", "head"]),
        ("Vit", ["blocks.0.mlp.0", "blocks.1.mlp.0", "blocks.0.attention"]),
        ("Shared", ["stem", "narrow"]),
        ("Unet", ["enter.0", "down.0", "up", "merge.0"]),
        ("Gated", ["up", "mid"]),
    ],
)  # fmt: skip
def test_the_prunable_groups_of_every_kind_of_network_are_found(
    name: str, groups: list[str]
) -> None:
    assert prunable(architecture_of(name)) == groups


@pytest.mark.parametrize("name", NETS)
def test_parameters_are_counted_exactly(name: str) -> None:
    counted = sum(p.numel() for p in build(name).parameters())
    assert architecture_of(name).parameters == counted


def test_macs_are_weights_times_positions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(256, 5))
    assert find(model).macs == 4 * 3 * 9 * 8 * 8 + 256 * 5


def test_a_transposed_convolution_counts_its_input_positions() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.Conv2d(4, 2, 1))
    assert find(model).macs == 3 * 4 * 4 * 16 * 16 + 4 * 2 * 32 * 32


def test_residual_additions_couple_their_layers() -> None:
    group = architecture_of("ResNet").group["blocks.1.conv2"]
    assert group.layers == ("blocks.1.conv2", "blocks.1.shortcut.0", "blocks.2.conv2")
    assert {site.module for site in group.sites} == {
        "blocks.2.conv1", "blocks.3.conv1", "blocks.3.shortcut.0",
    }  # fmt: skip
    assert ("blocks.2.bn2.running_var", 0) in sliced(group)


def test_concatenation_moves_a_groups_place_in_its_consumers() -> None:
    group = architecture_of("Dense").group["grow.1.2"]
    starts = {(part.tensor, part.dim): part.start for part in group.slices}
    assert starts["grow.1.2.weight", 0] == 0
    assert starts["transition.2.weight", 1] == 10


def test_flattening_widens_a_unit() -> None:
    site = architecture_of("Vgg").group["features.4"].sites[0]
    assert (site.module, site.dim, site.start, site.width, site.indices) == (
        "classifier.1", -1, 0, 4, None,
    )  # fmt: skip


def test_depthwise_convolutions_and_gates_of_channels_go_along() -> None:
    group = architecture_of("Mobile").group["expand.0"]
    assert {("depthwise.0.weight", 0), ("squeeze.3.weight", 0)} <= sliced(group)


def test_halves_that_are_multiplied_make_one_unit_of_two_channels() -> None:
    part = architecture_of("Gated").group["up"].slices[0]
    assert (part.width, part.of(0), part.of(7)) == (2, (0, 8), (7, 15))


def test_a_layer_used_twice_shrinks_on_both_sides() -> None:
    group = architecture_of("Shared").group["stem"]
    assert {("again.weight", 0), ("again.weight", 1)} <= sliced(group)


def test_a_parameter_that_is_added_to_a_map_goes_along_the_axis_of_its_channels() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.leave = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1)
            self.places = nn.Parameter(torch.randn(1, 6, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(torch.relu(self.stem(x) + self.places)).mean((2, 3))

    group = find(Placed()).group["stem"]
    assert group.prunable
    assert ("places", 1) in sliced(group)


def test_attention_heads_are_no_channels() -> None:
    group = architecture_of("Vit").group["blocks.0.attention"]
    assert group.level is Level.HEAD
    assert "blocks.0.attention.q" in group.layers


def test_outputs_stay() -> None:
    for name, last in (("Vgg", "classifier.4"), ("Vit", "fc")):
        assert reason(architecture_of(name), last) == "network output"
    summed = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
    assert reason(find(summed), "0") == "network output"


def test_grouped_convolutions_lose_whole_groups_on_both_sides() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1)
    )
    group = find(model).group["0"]
    assert (group.size, group.layers, group.prunable) == (4, ("0", "1"), True)
    widths = {(part.tensor, part.dim): part.width for part in group.slices}
    assert widths["0.weight", 0] == 2
    assert widths["1.weight", 0] == widths["3.weight", 1] == 3
    assert ("1.weight", 1) not in widths


def test_group_norm_loses_whole_groups_and_instance_norm_single_channels() -> None:
    for norm, units in ((nn.GroupNorm(4, 8), 4), (nn.InstanceNorm2d(8, affine=True), 8)):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 2, 1))
        group = find(model).group["0"]
        assert (group.size, group.prunable) == (units, True)


def test_tied_weights_go_along_the_axis_that_all_their_layers_share() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 6)
            self.hidden = nn.Linear(6, 8)
            self.back = nn.Linear(8, 6)
            self.out = nn.Linear(6, 10, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.back(torch.relu(self.hidden(self.embed(tokens)))))

    architecture = find(Tied(), torch.randint(0, 10, (2, 5)))
    assert architecture.group["embed"].layers == ("embed", "back")
    assert prunable(architecture) == ["embed", "hidden"]


def test_an_operation_that_mixes_channels_is_found_out_by_the_proof() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
            self.fc = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.normalize(self.one(x), dim=1)
            return self.fc(torch.relu(self.two(x)).mean((2, 3)))

    architecture = find(Mixing())
    assert "mixes" in reason(architecture, "one")
    assert prunable(architecture) == ["two"]


def test_the_proof_is_not_fooled_by_a_branch_that_starts_at_zero() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Linear(4, 2)
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((self.scale * self.two(self.one(x).softmax(1))).mean((2, 3)))

    assert "mixes" in reason(find(Silent()), "one")


def test_a_size_written_into_the_code_is_found_out_by_the_proof() -> None:
    class Rigid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fc = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.one(x)) + torch.arange(8.0)
            return self.fc(torch.relu(self.two(x)))

    architecture = find(Rigid(), torch.randn(2, 3))
    assert "does not run" in reason(architecture, "one")
    assert prunable(architecture) == ["two"]


class Auxiliary(nn.Module):
    """A head that only training uses."""

    def __init__(self, shuffled: bool) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 2)
        self.aux, self.shuffled = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 2)), shuffled

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        y = self.fc(torch.relu(self.two(x)).mean((2, 3)))
        x = x.flip(1) if self.shuffled else x
        return y + self.aux(x.mean((2, 3))) if self.training else y


def test_a_branch_that_only_training_uses_loses_the_inputs_that_it_reads() -> None:
    surgeon = cut_and_checked(Auxiliary(False), example())
    assert surgeon.architecture.group["aux.1"].reason == "it runs in training mode only"
    surgeon.cut({"one": [1, 5]})
    aux = surgeon.model.get_submodule("aux.1")
    assert isinstance(aux, nn.Linear)
    assert aux.in_features == 6


def test_a_branch_that_only_training_uses_protects_what_it_reads_in_another_order() -> None:
    architecture = find(Auxiliary(True))
    assert "masking and cutting differ in training" in reason(architecture, "one")
    assert "aux.1 reads it" in reason(architecture, "one")
    assert prunable(architecture) == ["two"]


def test_features_that_are_returned_stay() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = torch.relu(self.one(x))
            return {"logits": self.fc(torch.relu(self.two(x)).mean((2, 3))), "features": x}

    architecture = find(Features())
    assert reason(architecture, "one") == "network output"
    assert prunable(architecture) == ["two"]


def test_concatenating_with_the_networks_input_is_followed() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(11, 6, 1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.two(torch.cat([x, torch.relu(self.one(x))], 1))
            return self.fc(torch.relu(x).mean((2, 3)))

    group = find(Skip()).group["one"]
    assert group.prunable
    assert group.sites[0].start == 3


def test_parts_of_a_split_are_followed_in_any_order() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 8, 1)
            self.a, self.b, self.fc = nn.Conv2d(4, 5, 1), nn.Conv2d(4, 6, 1), nn.Linear(11, 2)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.one(x).chunk(2, 1)
            x = torch.cat([torch.relu(self.b(b * b)), torch.relu(self.a(a))], 1)
            return self.fc(x.mean((2, 3)))

    architecture = find(Parts())
    assert prunable(architecture) == ["b", "a"]
    # Half of a layer whose halves go different ways would no longer be what chunk takes.
    halves = {g.sites[0].module: g.slices[0].all_of(range(g.size)) for g in architecture.groups[:2]}
    assert halves == {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7]}
    assert {g.name: g.sites[0].start for g in architecture.groups if g.prunable} == {"b": 0, "a": 6}


def test_a_map_that_weighs_all_channels_alike_is_not_coupled_to_them() -> None:
    class Spatial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.map = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 3, padding=1)
            self.two, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.one(x))
            x = self.two(x * torch.sigmoid(self.map(x)))
            return self.fc(torch.relu(x).mean((2, 3)))

    architecture = find(Spatial())
    assert prunable(architecture) == ["one", "two"]
    assert architecture.group["one"].size == 8
    assert reason(architecture, "map") == "no layer consumes it"


def test_layers_of_sequences_and_of_volumes_are_followed() -> None:
    signal = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    volume = nn.Sequential(nn.Conv3d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    for model, inputs in ((signal, torch.randn(1, 4, 10)), (volume, torch.randn(1, 2, 4, 4, 4))):
        assert find(model, inputs).group["0"].sites[0].width == 8
        assert prunable(find(model, inputs)) == ["0"]


def test_a_transformer_of_torch_has_its_width_hidden_units_and_heads_pruned() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(5, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3))
    architecture = find(model.eval(), torch.randn(2, 6, 5))
    assert prunable(architecture) == [
        "0", "1.layers.0.linear1", "1.layers.1.linear1",
        "1.layers.0.self_attn", "1.layers.1.self_attn",
    ]  # fmt: skip
    projections = 2 * (3 * 16 * 16 + 16 * 16) + 2 * 2 * 16 * 32 + 5 * 16 + 16 * 3
    attended = 2 * (6 * 6 * 16 + 6 * 6 * 16)  # Scores and values, in two layers.
    assert architecture.macs == 6 * projections + attended


def test_other_peoples_operations_are_refused_with_a_reason() -> None:
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.lstm = nn.Linear(4, 8), nn.LSTM(8, 6, batch_first=True)
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            entered = torch.relu(self.enter(x))
            packed = pack_padded_sequence(entered, torch.tensor([7, 5]), batch_first=True)
            return self.fc(self.lstm(packed)[1][0][-1])

    assert "packed sequence" in reason(find(Packing(), torch.randn(2, 7, 4)), "enter")
    normed = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 1)), nn.Conv2d(8, 2, 1)
    )
    assert "parametrisation (SpectralNorm)" in reason(find(normed), "0")
    several = nn.Sequential(nn.Conv1d(3, 8, 1), nn.LayerNorm([8, 6]), nn.Conv1d(8, 2, 1))
    assert "LayerNorm" in reason(find(several, torch.randn(2, 3, 6)), "0")


def test_a_layer_that_does_not_reach_the_outputs_is_listed() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fc = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.one(x))
            self.seen = self.two(x).detach()
            return self.fc(x)

    architecture = find(Detached(), torch.randn(2, 4))
    assert "no path" in reason(architecture, "two")
    # It loses what it reads with the others that read it: else it would not run.
    one = architecture.group["one"]
    assert one.prunable
    assert ("two.weight", 1) in {(part.tensor, part.dim) for part in one.slices}
    assert "two" in {site.module for site in one.sites}


def test_ignored_layers_and_containers_are_left_alone() -> None:
    architecture = find(build("ResNet"), ignored_layers=["stem", "blocks.1"])
    assert reason(architecture, "stem") == "ignored"
    assert reason(architecture, "blocks.1.conv1") == "ignored"
    assert reason(architecture, "blocks.1.conv2") == "ignored"
    assert "blocks.2.conv1" in prunable(architecture)


def test_an_unknown_ignored_layer_is_named() -> None:
    with pytest.raises(InvalidField, match=r"ignored_layers.*nonsense"):
        find(build("Vgg"), ignored_layers=["nonsense"])


def test_a_network_that_the_graph_cannot_follow_still_has_an_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("elesh.trainer.graph.wiring._families", broken)
    model = build("Vgg")
    architecture = find(model)
    assert architecture.parameters == sum(p.numel() for p in model.parameters())
    assert [group.name for group in architecture.groups] == [
        "features.0", "features.4", "classifier.1", "classifier.4",
    ]  # fmt: skip
    assert "list index out of range" in reason(architecture, "features.0")


def test_tracing_changes_nothing() -> None:
    model = build("ResNet").train()
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        find(model)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()][:4] == [False, False, False, True]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("mode", ["frozen", "half", "inference", "autocast"])
@pytest.mark.sampled
def test_groups_do_not_depend_on_how_the_network_is_used(mode: str) -> None:
    expected, model = prunable(architecture_of("ResNet")), build("ResNet")
    inputs = example()
    if mode == "frozen":
        model.requires_grad_(False)
    if mode == "half":
        model, inputs = model.bfloat16(), inputs.bfloat16()
    with (
        torch.inference_mode(mode == "inference"),
        torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"),
    ):
        architecture = find(model, inputs)
    assert prunable(architecture) == expected
    assert architecture.tensors[0].dtype == ("bfloat16" if mode == "half" else "float32")


def test_the_same_network_gives_the_same_hash() -> None:
    assert find(ResNet()).model_hash == find(ResNet()).model_hash


def test_inputs_may_be_positional_or_keywords() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(3, 8), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
            return (self.fc(torch.relu(self.a(x) + self.b(y))),)

    x, y = torch.randn(2, 3), torch.randn(2, 4)
    for inputs in ((x, y), [x, y], {"y": y, "x": x}):
        group = find(Two(), inputs).group["a"]
        assert group.prunable
        assert group.layers == ("a", "b")


class Window(nn.Module):
    """Multiplies by the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 0, 0, 1))
        return self.out(nn.functional.linear(x, self.qkv.weight, bias=self.qkv.bias))


def test_layers_whose_weights_functions_use_are_counted_masked_and_cut() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Window()), torch.randn(2, 5, 4)
    architecture = find(model, x)
    assert architecture.macs == 5 * 4 * 6 + 6 * (6 * 9 + 9 * 2)
    assert prunable(architecture) == ["0", "2.qkv"]
    assert [site.module for site in architecture.group["0"].sites] == ["2"]
    assert sliced(architecture.group["0"]) == {("0.weight", 0), ("0.bias", 0), ("2.qkv.weight", 1)}
    surgeon = Surgeon(model, architecture)
    surgeon.mask({"0": [1, 4], "2.qkv": [0, 7]})
    masked = model(x)
    surgeon.unmask()
    surgeon.cut({"0": [1, 4], "2.qkv": [0, 7]})
    assert torch.allclose(model(x), masked, atol=1e-6)


class Inside(Window):
    """Reads what no module around it was given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * x.sigmoid())


def test_what_only_a_function_reads_is_masked_by_calling_the_layer_instead() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), Inside()), torch.randn(2, 5, 4)
    surgeon = Surgeon(model, find(model, x))
    assert [site.module for site in surgeon.architecture.group["0"].sites] == ["1.qkv"]
    plain = model(x)
    surgeon.mask({"0": [1, 4]})
    masked = model(x)
    surgeon.unmask()
    assert torch.equal(model(x), plain)
    surgeon.cut({"0": [1, 4]})
    assert torch.allclose(model(x), masked, atol=1e-6)
    assert not torch.allclose(masked, plain, atol=1e-2)


def test_what_a_product_reads_that_is_no_layers_is_left_alone() -> None:
    class Product(Window):
        def forward(self, x: Tensor) -> Tensor:
            return self.out((x * x.sigmoid()) @ self.qkv.weight.T)

    model, x = nn.Sequential(nn.Linear(4, 6), Product()), torch.randn(2, 5, 4)
    assert "masking" in reason(find(model, x), "0")


class Jumping(nn.Module):
    """What it returns beside its logits depends on their last digits, or on the hidden width."""

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.hidden = nn.Linear(6, 12), nn.Linear(12, 4), hidden

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.first(x))
        logits = self.last(y)
        return logits, y.mean(1) if self.hidden else (logits * 1e8).round() % 2


def test_what_is_chosen_by_outputs_is_chosen_alike_under_a_mask_and_after_the_cut() -> None:
    architecture = Recorder(Jumping().eval(), torch.randn(64, 6)).architecture
    assert architecture.group["first"].prunable, architecture.group["first"].reason


def test_the_caller_says_which_outputs_are_compared() -> None:
    model, x = Jumping(hidden=True).eval(), torch.randn(64, 6)
    found = Recorder(model, x).architecture.group["first"].reason
    assert found == "the network returns a sum over its channels (Mean after first)"
    architecture = Recorder(model, x, compared=lambda output: output[0]).architecture
    assert architecture.group["first"].prunable, architecture.group["first"].reason


class Mixer(nn.Module):
    """Channels are positions to the layer that mixes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.norm, self.tokens = nn.LayerNorm(12), nn.Linear(16, 16)
        self.channels, self.fc = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.fc((x + self.channels(x)).mean(1))


def test_channels_pass_a_layer_that_mixes_tokens() -> None:
    architecture = Recorder(Mixer().eval(), torch.randn(2, 3, 16, 16)).architecture
    group = architecture.group["patch"]
    assert group.prunable, group.reason
    assert group.layers == ("patch", "channels")
    assert architecture.group["tokens"].reason == "no layer consumes it"


def test_a_list_of_pictures_is_a_batch_of_so_many() -> None:
    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

        def forward(self, pictures: list[Tensor]) -> Tensor:
            return self.last(torch.relu(self.first(torch.stack(pictures))))

    example = ([torch.rand(3, 8, 8), torch.rand(3, 8, 8)],)
    architecture = Recorder(Pictures().eval(), example).architecture
    assert architecture.group["first"].prunable, architecture.group["first"].reason
