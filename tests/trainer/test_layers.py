"""Whole layers: what counts as one, mask is cut, counts are exact, undo is too, and the figures."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from test_surgeon import OPTIMIZERS, everything, train
from torch import Tensor, nn
from trainer_nets import NETS, Vit, batches, build, close, example, same

from elesh import analyze
from elesh.demo.network import DigitsNet
from elesh.settings import Settings
from elesh.trainer import Evaluation, Recorder, Surgeon, apply_decision
from leyline import InvalidField, LayerBlock, Level, PrunedArchitecture


class Residual(nn.Module):
    """``x + body(x)`` for any body."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def conv(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1)


class Nested(nn.Module):
    """Residual blocks in Sequentials, one around two others."""

    def __init__(self) -> None:
        super().__init__()
        inner = [Residual(conv(6), nn.ReLU(), conv(6)) for _ in range(2)]
        self.net = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)),
            nn.Sequential(Residual(conv(6)), nn.Sequential(Residual(*inner, conv(6)))),
        )
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.net(x).mean((2, 3)))


class InPlaceBlock(nn.Module):
    """Adds the way torchvision's ResNet does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.bn = conv(width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        out += x
        return self.relu(out)


class InPlace(nn.Module):
    """One such block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 6, 3, padding=1), InPlaceBlock(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


class Twice(nn.Module):
    """One branch used twice, and one scaled by a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.scaled = nn.Conv2d(3, 6, 3, padding=1), conv(6), conv(6)
        self.gamma = nn.Parameter(torch.ones(6, 1, 1))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.again(x)
        x = torch.relu(x + self.again(x))
        x = x + self.gamma * self.scaled(x)
        return self.fc(x.mean((2, 3)))


class Parallel(nn.Module):
    """Attention and feed-forward side by side; torch's attention returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.fc(x.mean(1))


class Encoder(nn.Module):
    """PyTorch's own transformer layers, which have a fast path past their parts."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class PreNormEncoder(Encoder):
    def __init__(self) -> None:
        super().__init__(norm_first=True)


OTHERS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (Nested, InPlace, Twice, Parallel, Encoder, PreNormEncoder)
}
REMOVABLE = {
    "ResNet": ["blocks.0", "blocks.2"],
    "Mobile": ["project"],
    "Vit": ["blocks.0.attention", "blocks.0.mlp", "blocks.1.attention", "blocks.1.mlp"],
    "Nested": ["net.1.0", "net.1.1.0.body.0", "net.1.1.0.body.1"],
    "InPlace": ["block"],
    "Parallel": ["attention", "mlp"],
    "Encoder": [f"encoder.layers.{part}" for part in ("0.self_attn", "0", "1.self_attn", "1")],
    "PreNormEncoder": [
        f"encoder.layers.{n}.{part}" for n in (0, 1) for part in ("self_attn", "linear2")
    ],
    "Twice": [],
} | {name: [] for name in ("Vgg", "Dense", "Shared", "Unet", "Gated")}
WITH_LAYERS = [name for name, blocks in REMOVABLE.items() if blocks]


def made(name: str, seed: int = 0) -> nn.Module:
    if name in NETS:
        return build(name, seed)
    torch.manual_seed(seed)
    return OTHERS[name]().eval()


def removable(architecture: PrunedArchitecture) -> list[str]:
    return [block.name for block in architecture.blocks if block.prunable and not block.removed]


def operate(
    name: str, optimizer: str | None = None
) -> tuple[nn.Module, PrunedArchitecture, Surgeon, torch.optim.Optimizer | None]:
    model = made(name)
    used = OPTIMIZERS[optimizer](model.parameters()) if optimizer else None
    architecture = Recorder(model, example()).architecture
    return model, architecture, Surgeon(model, architecture, optimizer=used), used


@pytest.mark.parametrize("name", REMOVABLE)
def test_only_residual_branches_can_go_and_all_others_say_why_not(name: str) -> None:
    architecture = Recorder(made(name), example()).architecture
    assert removable(architecture) == REMOVABLE[name]
    assert all(block.reason for block in architecture.blocks if not block.prunable)
    covered = {path for block in architecture.blocks for path in block.tensors}
    weights = {layer.weight for layer in architecture.layers if layer.weight}
    assert weights <= covered


def reason(architecture: PrunedArchitecture, name: str) -> str:
    return architecture.block[name].reason


def test_the_reason_is_the_right_one() -> None:
    resnet = Recorder(made("ResNet"), example()).architecture
    assert "no identity path but a layer of its own" in reason(resnet, "blocks.1")
    assert resnet.block["blocks.1"].strategy == "conv_projection"
    assert "no residual addition" in reason(resnet, "fc")
    twice = Recorder(made("Twice"), example()).architecture
    assert "no residual addition" in reason(twice, "again")
    assert "no residual addition" in reason(twice, "scaled")
    nested = Recorder(made("Nested"), example()).architecture
    outer = [block for block in nested.blocks if "smaller removable" in block.reason]
    assert [block.name for block in outer] == ["net.1.1"]
    ignored = Recorder(made("ResNet"), example(), ignored_layers=["blocks.2.conv1"]).architecture
    assert reason(ignored, "blocks.2") == "ignored: blocks.2.conv1"


def test_the_demos_network_has_its_blocks_and_sublayers() -> None:
    architecture = Recorder(DigitsNet(), torch.randn(2, 1, 8, 8)).architecture
    assert removable(architecture) == [
        "stage1.0", "stage1.1", "stage2.1", "transformer.attention", "transformer.down",
    ]  # fmt: skip
    kinds = [architecture.block[name].kind for name in removable(architecture)]
    assert kinds == ["conv", "conv", "conv", "attention", "linear"]
    depths = [architecture.block[name].depth for name in removable(architecture)]
    assert depths == sorted(depths)
    feed_forward = architecture.block["transformer.down"]
    assert {s.module for s in feed_forward.stand_ins} == {
        "transformer.down", "transformer.up", "transformer.norm2",
    }  # fmt: skip


def test_a_module_that_is_nothing_but_a_residual_block_becomes_an_identity() -> None:
    block = Recorder(made("Nested"), example()).architecture.block["net.1.0"]
    assert (block.strategy, block.skip_potential) == ("identity", 1.0)
    assert [(s.module, s.kind) for s in block.stand_ins] == [("net.1.0", "identity")]


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_masking_and_cutting_layers_agree_one_by_one_and_together(name: str) -> None:
    for chosen in [[block] for block in REMOVABLE[name]] + [REMOVABLE[name]]:
        model, _, surgeon, _ = operate(name)
        x, whole = example(), model(example())
        surgeon.mask_layers(chosen)
        assert surgeon.masked_layers == tuple(sorted(chosen))
        masked = model(x)
        assert not close(masked, whole)
        surgeon.unmask()
        assert torch.equal(model(x), whole)
        surgeon.cut_layers(chosen)
        assert (model(x) - masked).abs().max() <= 1e-5 * masked.abs().max()
        with torch.no_grad():  # PyTorch's transformer layers have another path then.
            assert close(model(x), masked)
        assert model.train()(x).shape == whole.shape


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_counts_after_removing_layers_are_the_predicted_ones(name: str) -> None:
    model, architecture, surgeon, _ = operate(name)
    predicted = architecture.without_layers(REMOVABLE[name], epoch=3, key="k")
    after = surgeon.cut_layers(REMOVABLE[name], epoch=3, key="k")
    assert after == predicted
    assert after.parameters == sum(p.numel() for p in model.parameters()) < architecture.parameters
    # Counted afresh, without any knowledge of the cut:
    fresh = Recorder(model, example()).architecture
    assert (after.macs, after.parameters) == (fresh.macs, fresh.parameters)
    assert {t.path for t in after.tensors} == set(model.state_dict())
    assert after.original_parameters == architecture.parameters
    assert [(r.group, r.level) for r in after.history] == [
        (block, Level.LAYER) for block in REMOVABLE[name]
    ]


@pytest.mark.parametrize("optimizer", [None, *OPTIMIZERS])
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_undo_brings_layers_and_optimizer_back_bit_for_bit(
    name: str, optimizer: str | None
) -> None:
    model, architecture, surgeon, used = operate(name, optimizer)
    if used is not None:
        train(model, used)
    before, modules = everything(model, used), dict(model.named_modules())
    groups = copy.deepcopy(used.state_dict()["param_groups"]) if used else []
    surgeon.mask_layers(REMOVABLE[name][:1])
    surgeon.cut_layers(REMOVABLE[name])
    if used is not None:
        trained = [p for group in used.param_groups for p in group["params"]]
        assert [id(p) for p in trained] == [id(p) for p in model.parameters()]
        assert len(used.state) <= len(trained)
        train(model, used)
    surgeon.unmask()
    assert surgeon.undo() == architecture
    assert surgeon.masked_layers == tuple(REMOVABLE[name][:1])
    surgeon.unmask()
    assert same(everything(model, used), before)
    assert all(a is b for a, b in zip(modules.values(), model.modules(), strict=True))
    if used is not None:
        assert used.state_dict()["param_groups"] == groups
        train(model, used)


def test_an_optimizer_group_that_loses_all_its_parameters_stays_and_steps() -> None:
    model = made("InPlace")
    branch = list(model.block.parameters())
    others = [p for p in model.parameters() if all(p is not q for q in branch)]
    optimizer = torch.optim.Adam([{"params": branch, "lr": 0.5}, {"params": others}], lr=0.1)
    train(model, optimizer)
    surgeon = Surgeon(model, Recorder(model, example()).architecture, optimizer=optimizer)
    surgeon.cut_layers(["block"])
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, len(others)]
    train(model, optimizer)
    surgeon.undo()
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, len(others)]


def test_a_history_of_channels_and_layers_is_replayed_on_a_fresh_model() -> None:
    model, _, surgeon, _ = operate("ResNet")
    surgeon.cut({"stem": [1, 2], "blocks.0.conv1": [0]}, epoch=1)
    surgeon.cut_layers(["blocks.2"], epoch=2, key="k")
    surgeon.cut({"stem": [0]}, epoch=3)
    fresh = made("ResNet", seed=9)
    again = Surgeon(fresh, Recorder(fresh, example()).architecture)
    assert again.replay(surgeon.architecture.history) == surgeon.architecture
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(example()), model(example()))


def test_channels_can_be_cut_after_layers_and_groups_inside_are_gone() -> None:
    model, architecture, surgeon, _ = operate("ResNet")
    surgeon.mask({"blocks.0.conv1": [1], "stem": [2]})
    after = surgeon.cut_layers(["blocks.0"])
    assert architecture.group.keys() - after.group.keys() == {"blocks.0.conv1"}
    assert surgeon.masked == {"stem": (2,)}
    masked = model(example())
    surgeon.cut({"stem": [2]})
    assert close(masked, model(example()))
    assert surgeon.undo() == after
    surgeon.undo()
    assert surgeon.masked == {"stem": (2,), "blocks.0.conv1": (1,)}


def test_what_cannot_be_removed_is_refused_by_name_and_nothing_changes() -> None:
    model, architecture, surgeon, _ = operate("ResNet")
    before = everything(model, None)
    for wrong, told in (("blocks.1", "not prunable"), ("nowhere", "one of")):
        with pytest.raises(InvalidField, match=told):
            surgeon.cut_layers(["blocks.0", wrong])
        with pytest.raises(InvalidField, match=told):
            surgeon.mask_layers([wrong])
    assert (surgeon.architecture, surgeon.can_undo) == (architecture, 0)
    assert same(everything(model, None), before)
    surgeon.cut_layers(["blocks.0"])
    with pytest.raises(InvalidField, match="removed before"):
        surgeon.cut_layers(["blocks.0"])


class PreActivation(nn.Module):
    """Normalises and activates before each convolution; narrows in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width // 2, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width // 2), nn.Conv2d(width // 2, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.bn1(x)))
        return x + self.conv2(torch.relu(self.bn2(y)))


class Inverted(nn.Module):
    """Widens, a depthwise convolution, dropout, and a projection back; the addition comes first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.ReLU6())
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, 1, 1, groups=2 * width)
        self.project = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.depthwise(self.expand(x))) + x


class GatedInline(nn.Module):
    """A gated unit whose halves are split in the block's own code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, 1)
        return torch.relu(x + self.down(a * torch.sigmoid(b)))


def random_net(seed: int) -> nn.Module:
    """Residual blocks of all kinds, some around others, with plain layers in between."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    width = 8

    def piece(depth: int) -> nn.Module:
        kinds = [
            lambda: PreActivation(width),
            lambda: Inverted(width),
            lambda: InPlaceBlock(width),
            lambda: GatedInline(width),
            lambda: Residual(conv(width), nn.ReLU()),
            lambda: nn.Sequential(conv(width), nn.ReLU()),
        ]
        if depth:
            kinds.append(lambda: Residual(*[piece(depth - 1) for _ in range(2)], conv(width)))
        return rng.choice(kinds)()

    body = [piece(2) for _ in range(rng.randrange(3, 6))]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]
    return nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), *body, *head).eval()


@pytest.mark.parametrize("seed", range(16))
def test_random_residual_networks_lose_random_layers_as_predicted(seed: int) -> None:
    model, rng = random_net(seed), random.Random(seed)
    architecture = Recorder(model, example()).architecture
    names = removable(architecture)
    assert all(block.prunable or block.reason for block in architecture.blocks)
    taken = [path for name in names for path in architecture.block[name].tensors]
    assert len(set(taken)) == len(taken)
    chosen = rng.sample(names, rng.randrange(len(names) + 1))
    surgeon, whole = Surgeon(model, architecture), model(example())
    surgeon.mask_layers(chosen)
    masked = model(example())
    surgeon.unmask()
    after = surgeon.cut_layers(chosen)
    assert after == architecture.without_layers(chosen)
    assert (model(example()) - masked).abs().max() <= 1e-5 * masked.abs().max()
    fresh = Recorder(model, example()).architecture
    assert (after.parameters, after.macs) == (fresh.parameters, fresh.macs)
    surgeon.undo()
    assert torch.equal(model(example()), whole)


class Padded(nn.Module):
    """With a padding mask, PyTorch's encoder goes over to nested tensors where it can."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.fc = nn.Linear(6, 16), nn.Linear(16, 5)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.fc(self.encoder(self.enter(x), src_key_padding_mask=padding)[:, 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_padded_encoder_is_traced_and_measured() -> None:
    torch.manual_seed(0)
    model, padding = Padded().eval(), torch.zeros(4, 7, dtype=torch.bool)
    padding[1, 5:] = True
    inputs = {"x": torch.randn(4, 7, 6), "padding": padding}
    recorder = Recorder(model, inputs)
    assert len(removable(recorder.architecture)) == 4
    bundle = recorder.measure([(inputs, torch.tensor([0, 1, 2, 3]))], epoch=1)
    assert all(data.similarity[0] > 0.5 for data in bundle.layers.values())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("how", ["masked", "cut"])
def test_a_padded_encoder_without_heads_computes_the_same_with_and_without_gradients(
    layer: int, how: str
) -> None:
    torch.manual_seed(0)
    model, padding = Padded().eval(), torch.zeros(4, 7, dtype=torch.bool)
    padding[1, 5:], padding[3, 2:] = True, True
    inputs = {"x": torch.randn(4, 7, 6), "padding": padding}
    surgeon = Surgeon(model, Recorder(model, inputs).architecture)
    plain = model(**inputs)
    (surgeon.mask if how == "masked" else surgeon.cut)({f"encoder.layers.{layer}.self_attn": [0]})
    expected = model(**inputs)
    with torch.no_grad():  # Here PyTorch leaves out the padding, layer by layer.
        assert close(model(**inputs), expected)
    assert not close(expected, plain)


def test_a_gated_unit_written_into_its_block_cannot_go_and_says_why() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), GatedInline(8), nn.Flatten(), nn.LazyLinear(5))
    model(example())
    (block,) = [
        b for b in Recorder(model.eval(), example()).architecture.blocks if b.branch == "1.down"
    ]
    assert not block.prunable
    assert "does not run without it" in block.reason


# What is measured, against a gate that is really there.


def gated(model: nn.Module, block: LayerBlock, samples: int) -> tuple[nn.Module, Tensor]:
    """A copy whose branch is multiplied by a gate for each sample."""
    twin, gates = copy.deepcopy(model), torch.ones(samples, requires_grad=True)

    def scale(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        scaled = first * gates.view(-1, *[1] * (first.ndim - 1))
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    twin.get_submodule(block.branch).register_forward_hook(scale)
    return twin, gates


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_gate_gradients_are_those_of_a_real_gate(name: str) -> None:
    model = made(name)
    recorder = Recorder(model, example())
    bundle = recorder.measure(batches(1), epoch=1)
    ((inputs, labels),) = batches(1)
    assert list(bundle.layers) == REMOVABLE[name]
    for block in REMOVABLE[name]:
        twin, gates = gated(model, recorder.architecture.block[block], len(inputs))
        loss = nn.functional.cross_entropy(twin(inputs), labels, reduction="sum")
        (expected,) = torch.autograd.grad(loss, gates)
        measured = bundle.layers[block]
        scale = expected.abs().max().item()
        assert measured.first_order[0] == pytest.approx(expected.mean().item(), abs=1e-4 * scale)
        assert measured.taylor[0] == pytest.approx(expected.abs().mean().item(), rel=1e-3)


class LastIsABlock(nn.Module):
    """Nothing but a linear head follows the block: the outputs are linear in its gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = Residual(conv(6), nn.ReLU(), conv(6))
        self.fc = nn.Linear(6, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(torch.relu(self.stem(x))).mean((2, 3)))


def test_a_layers_predicted_rise_is_exact_where_outputs_are_linear_and_have_two_classes() -> None:
    torch.manual_seed(1)
    model = LastIsABlock().eval()
    with torch.no_grad():
        model.fc.weight.copy_(2 * torch.randn(2, 6))  # beyond where two orders hold
    data = [(5 * x, y % 2) for x, y in batches()]
    bundle = Recorder(model, example()).measure(data, epoch=1)

    def losses() -> Tensor:
        with torch.no_grad():
            found = [nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in data]
        return torch.cat(found).double()

    plain, surgeon = losses(), Surgeon(model, bundle.architecture)
    surgeon.mask_layers(["block"])
    rises = losses() - plain
    measured = bundle.layers["block"]
    assert measured.removal_rise is not None
    assert measured.removal_error is not None
    assert measured.removal_rise[0] == pytest.approx(rises.mean().item(), rel=1e-4)
    error = rises.std(correction=0).item() / len(rises) ** 0.5
    assert measured.removal_error[0] == pytest.approx(error, rel=1e-4)
    second_order = 0.5 * measured.second_order[0] - measured.first_order[0]
    assert abs(second_order - rises.mean().item()) > 1e-3


def test_layers_have_no_predicted_rise_where_samples_have_no_margins() -> None:
    recorder = Recorder(made("ResNet"), example(), loss=nn.functional.cross_entropy)
    layers = recorder.measure(batches(1), epoch=1).layers.values()
    assert [data.removal_rise for data in layers] == [None, None]
    assert [data.removal_error for data in layers] == [None, None]


def test_similarity_and_gradient_flow_are_those_of_the_stream() -> None:
    model = made("Vit")
    recorder = Recorder(model, example())
    bundle = recorder.measure(batches(1), epoch=1)
    ((inputs, labels),) = batches(1)
    assert isinstance(model, Vit)
    x = model.patch(inputs).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls.expand(len(x), -1, -1), x], 1) + model.pos
    streams = [x]
    for block in model.blocks:
        streams.append(streams[-1] + block.attention(block.norm1(streams[-1])))
        streams.append(streams[-1] + block.mlp(block.norm2(streams[-1])))
    logits = model.fc(model.norm(streams[-1])[:, 0])
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    norms = [gradient.norm() for gradient in torch.autograd.grad(loss, streams)]
    for number, block_name in enumerate(REMOVABLE["Vit"]):
        before, after = streams[number], streams[number + 1]
        cosine = nn.functional.cosine_similarity(before, after, dim=-1).mean().item()
        low, high = sorted((norms[number].item(), norms[number + 1].item()))
        measured = bundle.layers[block_name]
        assert measured.similarity[0] == pytest.approx(cosine, abs=1e-5)
        assert measured.gradient_flow[0] == pytest.approx(low / high, rel=1e-4)


@pytest.mark.parametrize("name", ["ResNet", "Vit", "InPlace"])
def test_measuring_leaves_no_hook_and_no_frozen_parameter(name: str) -> None:
    model = made(name)
    frozen = next(model.parameters()).requires_grad_(False)
    recorder = Recorder(model, example())
    recorder.measure(batches(1), epoch=1)
    with pytest.raises(RuntimeError):
        recorder.measure([(torch.zeros(2, 7), torch.zeros(2))], epoch=1)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert [p.requires_grad for p in model.parameters()] == [
        p is not frozen for p in model.parameters()
    ]


def test_projections_do_not_depend_on_how_samples_are_batched() -> None:
    model = made("Vit")
    recorder = Recorder(model, example())
    whole = [(torch.cat([x for x, _ in batches()]), torch.cat([y for _, y in batches()]))]
    one, two = recorder.measure(batches(), epoch=1), recorder.measure(whole, epoch=1)
    for block in REMOVABLE["Vit"]:
        a, b = one.layers[block], two.layers[block]
        for field in ("taylor", "gradient_flow", "similarity", "first_order"):
            assert getattr(a, field)[0] == pytest.approx(getattr(b, field)[0], rel=1e-3, abs=1e-5)


# From measurement to removal.


def deep() -> nn.Module:
    """Six residual blocks, the second with a branch of almost nothing."""
    torch.manual_seed(1)
    body = [Residual(conv(8), nn.ReLU(), conv(8)) for _ in range(6)]
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *body, nn.AdaptiveAvgPool2d(1))
    with torch.no_grad():
        body[1].body[2].weight.mul_(1e-4)
        body[1].body[2].bias.zero_()
    return nn.Sequential(net, nn.Flatten(), nn.Linear(8, 5)).eval()


def test_a_block_whose_branch_is_nearly_zero_is_found_and_no_other() -> None:
    model = deep()
    recorder = Recorder(model, example())
    bundle = recorder.measure(batches(8), epoch=120)
    decision = analyze(bundle, Settings(), level=Level.LAYER)
    assert [target.layer_name for target in decision.layers] == ["0.2"], decision.ignored
    assert decision.approved_for_application, decision.rejection_reason
    assert decision.statistics.predicted_shift == pytest.approx(0, abs=1e-3)
    told = dict(decision.ignored)
    assert all("similarity" in told[f"0.{n}"] or "Taylor" in told[f"0.{n}"] for n in (1, 3, 4))
    surgeon = Surgeon(model, recorder.architecture)
    evaluation = Evaluation(accuracy=0.9, loss=0.1)
    outcome = apply_decision(decision, surgeon, lambda: evaluation)
    assert (outcome.result, surgeon.masked_layers) == ("applied", ())
    assert surgeon.architecture.parameters == decision.statistics.parameters_after
    assert surgeon.architecture.block["0.2"].removed
    recorder.architecture = surgeon.architecture
    later = recorder.measure(batches(8), epoch=120)
    assert "0.2" not in later.layers
    again = analyze(later, Settings(), level=Level.LAYER)
    assert "quota 0 (1 of 6 original layers" in again.rejection_reason


def test_a_decision_that_costs_accuracy_under_the_mask_is_rolled_back() -> None:
    model = deep()
    recorder = Recorder(model, example())
    decision = analyze(recorder.measure(batches(8), epoch=120), level=Level.LAYER)
    surgeon, whole = Surgeon(model, recorder.architecture), model(example())

    def evaluate() -> Evaluation:
        return Evaluation(accuracy=0.8 if surgeon.masked_layers == ("0.2",) else 0.9, loss=0.1)

    outcome = apply_decision(decision, surgeon, evaluate)
    assert (outcome.result, outcome.accuracy_masked) == ("rolled_back", 0.8)
    assert surgeon.masked_layers == ()
    assert torch.equal(model(example()), whole)
