"""Masking is the same as cutting, cuts are exact, and undoing is too."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_nets import NETS, architecture_of, batches, build, close, example, same, units

from elesh.trainer import Recorder, Surgeon
from leyline import ContractError, InvalidField, PrunedArchitecture, PruningRecord, ShapeMismatch

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.001, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.001),
}


def operate(
    name: str, optimizer: str | None = None
) -> tuple[nn.Module, PrunedArchitecture, Surgeon, torch.optim.Optimizer | None]:
    model = build(name)
    made = OPTIMIZERS[optimizer](model.parameters()) if optimizer else None
    architecture = architecture_of(name)
    return model, architecture, Surgeon(model, architecture, optimizer=made), made


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> Tensor:
    """Some steps; the last loss, whose graph is still alive."""
    model.train()
    for inputs, labels in batches(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
    model.eval()
    return loss


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    sizes = {name: {k: v for k, v in vars(m).items() if isinstance(v, int)}
             for name, m in model.named_modules()}  # fmt: skip
    moments = copy.deepcopy(optimizer.state_dict()["state"]) if optimizer else {}
    return {"state": state, "sizes": sizes, "moments": moments}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.sampled
def test_masking_and_cutting_agree(name: str, seed: int) -> None:
    model, architecture, surgeon, _ = operate(name)
    x, whole, chosen = example(), model(example()), units(architecture, seed)
    surgeon.mask(chosen)
    masked = model(x)
    surgeon.unmask()
    assert torch.equal(model(x), whole)
    surgeon.cut(chosen)
    assert not close(masked, whole)
    assert close(masked, model(x))
    model.train()
    assert model(x).shape == whole.shape


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_counts_after_a_cut_are_the_predicted_ones(name: str) -> None:
    model, architecture, surgeon, _ = operate(name)
    chosen = units(architecture)
    predicted = architecture.without(chosen)
    after = surgeon.cut(chosen)
    assert after.parameters == predicted.parameters < architecture.parameters
    assert after.parameters == sum(p.numel() for p in model.parameters())
    assert after.macs == predicted.macs == Recorder(model, example()).architecture.macs
    assert after.original_parameters == architecture.parameters


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_a_cut_network_can_be_cut_again_without_tracing(name: str) -> None:
    model, _, surgeon, _ = operate(name)
    for seed in (0, 1):
        chosen = {
            g.name: [g.size - 1 - seed]
            for g in surgeon.architecture.groups
            if g.prunable and g.size > 2
        }
        surgeon.mask(chosen)
        masked = model(example())
        surgeon.cut(chosen)
        assert surgeon.masked == {}
        assert close(masked, model(example()))
    assert surgeon.architecture.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_training_goes_on_after_a_cut(name: str, optimizer: str) -> None:
    model, architecture, surgeon, made = operate(name, optimizer)
    assert made is not None
    parameters = list(model.parameters())
    loss = train(model, made)
    surgeon.cut(units(architecture))
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert all(p.grad is None for p in parameters)
    before = [p.detach().clone() for p in parameters]
    # The old loss is still held here, and with it the graph of the larger network.
    train(model, made, 1)
    assert loss.grad_fn is not None
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_optimizer_state_is_cut_with_its_parameters() -> None:
    model, _, surgeon, made = operate("Vgg", "adam")
    assert made is not None
    train(model, made)
    weight = model.features[4].weight
    moment = made.state[weight]["exp_avg"].clone()
    steps = made.state[weight]["step"].clone()
    surgeon.cut({"features.0": [0, 3], "features.4": [1]})
    kept = moment[[0, *range(2, 12)]][:, [1, 2, 4, 5, 6, 7]]
    assert torch.equal(made.state[weight]["exp_avg"], kept)
    assert torch.equal(made.state[weight]["step"], steps)


@pytest.mark.parametrize("optimizer", [None, *OPTIMIZERS])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_undo_is_bit_exact_even_after_further_training(name: str, optimizer: str | None) -> None:
    model, architecture, surgeon, made = operate(name, optimizer)
    if made is not None:
        train(model, made)
    before, output = everything(model, made), model(example())
    surgeon.cut(units(architecture))
    if made is not None:
        train(model, made)
    assert not same(before, everything(model, made))
    assert surgeon.undo() == architecture
    assert same(before, everything(model, made))
    assert torch.equal(model(example()), output)


def test_undo_forgets_optimizer_state_that_came_after_the_cut() -> None:
    model, architecture, surgeon, made = operate("Vgg", "sgd")
    assert made is not None
    surgeon.cut(units(architecture))
    train(model, made)
    surgeon.undo()
    assert not made.state_dict()["state"]
    train(model, made)


def test_undo_of_a_depthwise_convolution_cut_to_one_channel() -> None:
    model, _, surgeon, _ = operate("Mobile")
    before = everything(model, None)
    surgeon.cut({"expand.0": range(1, 24)})
    model(example())
    surgeon.undo()
    assert same(before, everything(model, None))


def test_the_last_cut_can_be_undone_and_no_other() -> None:
    model = build("Vgg")
    surgeon = Surgeon(model, Recorder(model, example()).architecture)
    hashes = [surgeon.cut({"features.0": [0]}).model_hash for _ in range(2)]
    assert surgeon.can_undo == 1
    assert surgeon.undo().model_hash == hashes[0]
    with pytest.raises(InvalidField, match=r"undo.*session"):
        surgeon.undo()


def test_more_than_one_restore_point_is_not_kept_and_said_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build("Vgg")
    surgeon = Surgeon(model, Recorder(model, example()).architecture, restore_points=3)
    assert "keeps one restore point" in caplog.text
    for _ in range(2):
        surgeon.cut({"features.0": [0]})
    assert surgeon.can_undo == 1


def test_channels_and_layers_of_one_cut_are_undone_together() -> None:
    model, architecture, surgeon, made = operate("ResNet", "sgd")
    before = everything(model, made)
    with surgeon.as_one_cut():
        surgeon.cut({"stem": [0, 1]})
        surgeon.cut_layers(["blocks.2"])
    assert surgeon.undo() == architecture
    assert same(before, everything(model, made))


def test_masks_add_up_and_come_off() -> None:
    model, _, surgeon, _ = operate("ResNet")
    x, whole = example(), model(example())
    surgeon.mask({"stem": [0]})
    one = model(x)
    surgeon.mask({"stem": [2], "blocks.3.conv1": [5]})
    assert surgeon.masked == {"stem": (0, 2), "blocks.3.conv1": (5,)}
    assert not torch.equal(model(x), one)
    surgeon.unmask()
    assert surgeon.masked == {}
    assert torch.equal(model(x), whole)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_masks_of_units_that_stay_move_with_a_cut_and_back() -> None:
    model, _, surgeon, _ = operate("Vgg")
    surgeon.mask({"features.0": [1, 5]})
    masked = model(example())
    surgeon.cut({"features.0": [1]})
    assert surgeon.masked == {"features.0": (4,)}
    assert close(masked, model(example()))
    surgeon.undo()
    assert surgeon.masked == {"features.0": (1, 5)}
    assert torch.equal(masked, model(example()))


def test_masks_follow_to_other_types_and_add_nothing_to_the_state() -> None:
    model, architecture, surgeon, _ = operate("Vgg")
    keys = set(model.state_dict())
    surgeon.mask(units(architecture))
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        assert model.to(dtype)(example().to(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        model(example())
    assert set(model.state_dict()) == keys


def test_masked_units_get_no_gradient_from_their_consumers() -> None:
    model, _, surgeon, _ = operate("Vgg")
    surgeon.mask({"features.0": [3]})
    model(example()).sum().backward()
    assert model.features[4].weight.grad[:, 3].abs().max() == 0
    assert model.features[0].weight.grad[3].abs().max() == 0


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_replaying_the_history_lets_a_pruned_state_dict_load(name: str) -> None:
    model, _, surgeon, _ = operate(name)
    for seed, key in ((0, "first"), (1, "second")):
        chosen = {
            group: listed[: max(1, len(listed) // 3)]
            for group, listed in units(surgeon.architecture, seed).items()
            if surgeon.architecture.group[group].size > 3
        }
        surgeon.cut(chosen, epoch=seed + 1, key=key)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    fresh = build(name, seed=9)
    replayed = Surgeon(fresh, architecture_of(name))
    assert replayed.replay(surgeon.architecture.history) == surgeon.architecture
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(fresh(example()), model(example()))


def test_a_history_that_does_not_fit_is_refused() -> None:
    _, _, surgeon, _ = operate("Vgg")
    history = surgeon.cut({"features.0": [2]}, key="k").history
    with pytest.raises(InvalidField, match=r"history.features\.0.*still there.*2"):
        surgeon.replay(history)
    unknown = PruningRecord(epoch=1, idempotency_key="k", group="no.such", original_indices=(1,))
    with pytest.raises(InvalidField, match=r"no\.such"):
        surgeon.replay([unknown])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"nonsense": [0]}, "group.*nonsense"),
        ({"features.0": [0], "features.4": [99]}, r"groups\.features\.4.*0 to 11.*99"),
        ({"features.0": [-1]}, r"groups\.features\.0.*-1"),
        ({"classifier.4": [0]}, r"classifier\.4.*not prunable: network output"),
        ({"features.0": range(8)}, r"features\.0.*at least one.*0 of 8"),
    ],
)
def test_impossible_cuts_are_refused_and_nothing_is_touched(
    chosen: dict[str, Any], message: str
) -> None:
    model, architecture, surgeon, _ = operate("Vgg")
    before = everything(model, None)
    for attempt in (surgeon.cut, surgeon.mask):
        with pytest.raises(InvalidField, match=message):
            attempt(chosen)
    assert same(before, everything(model, None))
    assert (surgeon.architecture, surgeon.masked, surgeon.can_undo) == (architecture, {}, 0)


def test_a_model_that_was_changed_behind_our_back_is_refused_and_not_touched() -> None:
    model, _, surgeon, _ = operate("Vgg")
    model.classifier[1] = nn.Linear(52, 20)
    before = everything(model, None)
    message = r"model\.classifier\.1\.weight.*\(20, 48\).*\(20, 52\)"
    with pytest.raises(ShapeMismatch, match=message):
        surgeon.cut({"features.0": [0]})
    assert same(before, everything(model, None))


def test_the_architecture_of_another_network_is_refused() -> None:
    with pytest.raises(ShapeMismatch, match="no such tensor"):
        Surgeon(build("ResNet"), Recorder(build("Vgg"), example()).architecture)


def test_refusals_are_contract_errors_that_name_their_field() -> None:
    _, _, surgeon, _ = operate("Vgg")
    with pytest.raises(ContractError) as caught:
        surgeon.cut({"features.4": [99]})
    assert caught.value.field == "groups.features.4"
