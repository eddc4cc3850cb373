"""Whole layers: what counts as one, mask is cut, counts are exact, and undo is too."""

from __future__ import annotations

import copy
import random
from itertools import count

import pytest
import torch
from layer_nets import (
    REMOVABLE,
    WITH_LAYERS,
    GatedInline,
    Residual,
    architecture_of,
    conv,
    made,
    random_net,
    removable,
)
from test_surgeon import OPTIMIZERS, everything, train
from torch import Tensor, nn
from trainer_nets import batches, close, example, same

from elesh import analyze
from elesh.demo.network import DigitsNet
from elesh.settings import Settings
from elesh.trainer import Evaluation, Recorder, Surgeon, apply_decision
from leyline import InvalidField, Level, PrunedArchitecture


def operate(
    name: str, optimizer: str | None = None
) -> tuple[nn.Module, PrunedArchitecture, Surgeon, torch.optim.Optimizer | None]:
    model = made(name)
    used = OPTIMIZERS[optimizer](model.parameters()) if optimizer else None
    architecture = architecture_of(name)
    return model, architecture, Surgeon(model, architecture, optimizer=used), used


@pytest.mark.parametrize("name", REMOVABLE)
@pytest.mark.sampled
def test_only_residual_branches_can_go_and_all_others_say_why_not(name: str) -> None:
    architecture = architecture_of(name)
    assert removable(architecture) == REMOVABLE[name]
    assert all(block.reason for block in architecture.blocks if not block.prunable)
    covered = {path for block in architecture.blocks for path in block.tensors}
    weights = {layer.weight for layer in architecture.layers if layer.weight}
    assert weights <= covered


def reason(architecture: PrunedArchitecture, name: str) -> str:
    return architecture.block[name].reason


def test_the_reason_is_the_right_one() -> None:
    resnet = architecture_of("ResNet")
    assert "no identity path but a layer of its own" in reason(resnet, "blocks.1")
    assert resnet.block["blocks.1"].strategy == "conv_projection"
    assert "no residual addition" in reason(resnet, "fc")
    twice = architecture_of("Twice")
    assert "called 2 times in one forward pass" in reason(twice, "again")
    nested = architecture_of("Nested")
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
    block = architecture_of("Nested").block["net.1.0"]
    assert (block.strategy, block.skip_potential) == ("identity", 1.0)
    assert [(s.module, s.kind) for s in block.stand_ins] == [("net.1.0", "identity")]


@pytest.mark.parametrize("name", WITH_LAYERS)
@pytest.mark.slow
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
@pytest.mark.sampled
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
@pytest.mark.sampled
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
    assert surgeon.masked == {"stem": (2,)}


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


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.sampled
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
    losses = count(0.1, 1e-9)  # A mask moves real ones.
    outcome = apply_decision(decision, surgeon, lambda: Evaluation(0.9, next(losses)))
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
