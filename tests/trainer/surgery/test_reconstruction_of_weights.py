"""Weight reconstruction keeps what the kept channels predict, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from trainer_nets import NETS, batches, build, close, example, same, units

from elesh.analysis import analyze
from elesh.program.refit import predict_lost
from elesh.settings import Settings
from elesh.trainer import Evaluation, InputCovariance, Recorder, Surgeon, apply_decision
from leyline import (
    CheckpointBundle,
    IdentityMismatch,
    InvalidField,
    Reconstructed,
    StructuralPruningDecision,
)

CONSUMERS = {
    "conv": lambda: nn.Conv2d(6, 4, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 4, 3, 2, bias=False),
    "dilated": lambda: nn.Conv2d(6, 4, (1, 3), dilation=2, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1),
    "pointwise": lambda: nn.Conv2d(6, 4, 1),
}


class Duplicated(nn.Module):
    """Channel 3 of the first layer is twice channel 1, whoever consumes it."""

    def __init__(self, consumer: nn.Module) -> None:
        super().__init__()
        self.first, self.consumer = nn.Conv2d(3, 6, 3, padding=1), consumer
        self.fc = nn.Linear(4, 5)
        with torch.no_grad():
            self.first.weight[3] = 2 * self.first.weight[1]
            self.first.bias[3] = 2 * self.first.bias[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.consumer(torch.relu(self.first(x))).mean((2, 3)))


class Flattened(nn.Module):
    """The same in front of a linear layer that owns four inputs of every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.fc = nn.Linear(24, 5)
        with torch.no_grad():
            self.first.weight[3] = 2 * self.first.weight[1]
            self.first.bias[3] = 2 * self.first.bias[1]

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(torch.relu(self.first(x)), 2)
        return self.fc(x.flatten(1))


def cut(model: nn.Module, lost: dict[str, list[int]], *, redistribute: bool) -> Tensor:
    """The outputs of a copy after the cut."""
    copied = copy.deepcopy(model)
    recorder = Recorder(copied, example())
    surgeon = Surgeon(copied, recorder.architecture)
    surgeon.cut(lost, redistribute=recorder.moments(batches(30), lost) if redistribute else None)
    return copied(example())


@pytest.mark.parametrize("kind", [*CONSUMERS, "flatten"])
@pytest.mark.sampled
def test_a_scaled_copy_is_not_missed(kind: str) -> None:
    torch.manual_seed(0)
    model = Flattened() if kind == "flatten" else Duplicated(CONSUMERS[kind]())
    model.eval()
    whole = model(example())
    assert not close(cut(model, {"first": [3]}, redistribute=False), whole)
    assert close(cut(model, {"first": [3]}, redistribute=True), whole)
    # The other one of the pair serves as well.
    assert close(cut(model, {"first": [1]}, redistribute=True), whole)


def test_a_constant_channel_becomes_a_bias() -> None:
    torch.manual_seed(0)
    model = Duplicated(nn.Conv2d(6, 4, 3)).eval()
    with torch.no_grad():
        model.first.weight[2] = 0
        model.first.bias[2] = 3
    assert close(cut(model, {"first": [2]}, redistribute=True), model(example()))


def test_a_constant_is_left_alone_where_zeros_are_padded() -> None:
    torch.manual_seed(0)
    model = Duplicated(nn.Conv2d(6, 4, 3, padding=1)).eval()
    recorder = Recorder(model, example())
    bias = model.consumer.bias.detach().clone()
    moments = recorder.moments(batches(), ["first"])
    Surgeon(model, recorder.architecture).cut({"first": [2]}, redistribute=moments)
    assert torch.equal(model.consumer.bias, bias)


@given(
    seed=st.integers(0, 2**32 - 1),
    channels=st.integers(2, 12),
    rank=st.integers(1, 12),
    share=st.floats(0, 1),
    constant=st.booleans(),
    ridge=st.sampled_from([1e-6, 1e-4, 1e-1]),
)
def test_predicted_inputs_are_never_worse_than_zeros(
    seed: int, channels: int, rank: int, share: float, constant: bool, ridge: float
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((40, rank)) @ rng.standard_normal((rank, channels))
    x = torch.from_numpy(rows + rng.standard_normal(channels))
    lost = rng.permutation(channels)[: max(1, int(share * channels))].tolist()
    solved = predict_lost(x.mean(0), x.T @ x / len(x), lost, constant, ridge)
    predicted = x[:, solved.kept] @ solved.coefficients.T + solved.constant
    left = x[:, solved.lost]
    assert (left - predicted).square().sum() <= left.square().sum() * (1 + 1e-9)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_every_network_runs_on_with_the_same_counts(name: str) -> None:
    model, plain = build(name), build(name)
    recorder = Recorder(model, example())
    architecture = recorder.architecture
    chosen = units(architecture)
    moments = recorder.moments(batches(), chosen)
    after = Surgeon(model, architecture).cut(chosen, redistribute=moments)
    assert after.parameters == sum(p.numel() for p in model.parameters())
    assert after == Surgeon(plain, architecture).cut(chosen)
    assert torch.isfinite(model(example())).all()
    changed = [
        not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    ]
    assert any(changed)


@pytest.mark.parametrize("name", ["Vgg", "ResNet", "Dense", "Unet"])
def test_the_inputs_of_the_first_consumer_are_nearer_to_what_they_were(name: str) -> None:
    model = build(name)
    architecture = Recorder(model, example()).architecture
    group = next(g for g in architecture.groups if g.prunable and len(g.sites) == 1)
    consumer = group.sites[0].module
    data = torch.cat([x for x, _ in batches()])

    def output(net: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        handle = net.get_submodule(consumer).register_forward_hook(
            lambda module, args, out: seen.append(out.detach())
        )
        net(data)
        handle.remove()
        return seen[0]

    errors = []
    for redistribute in (False, True):
        copied = copy.deepcopy(model)
        recorder = Recorder(copied, example(), architecture=architecture)
        lost = {group.name: [0, 2]}
        moments = recorder.moments(batches(), lost) if redistribute else None
        Surgeon(copied, architecture).cut(lost, redistribute=moments)
        errors.append(float((output(copied) - output(model)).square().mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", ["Vgg", "ResNet", "Unet"])
@pytest.mark.sampled
def test_undo_is_exact_and_moments_of_the_optimizer_are_cut_as_without(name: str) -> None:
    states = []
    for redistribute in (False, True):
        model = build(name)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        model(example()).square().sum().backward()
        optimizer.step()
        recorder = Recorder(model, example())
        surgeon = Surgeon(model, recorder.architecture, optimizer=optimizer)
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        identities = [id(p) for p in model.parameters()]
        chosen = units(recorder.architecture)
        moments = recorder.moments(batches(), chosen) if redistribute else None
        surgeon.cut(chosen, redistribute=moments)
        assert [id(p) for p in model.parameters()] == identities
        states.append(copy.deepcopy(optimizer.state_dict()["state"]))
        surgeon.undo()
        assert same(before, (dict(model.state_dict()), optimizer.state_dict()["state"]))
    assert same(*states)


def test_measuring_moments_leaves_the_network_as_it_was() -> None:
    model = build("ResNet").train()
    recorder = Recorder(model, example())
    before = copy.deepcopy(model.state_dict())
    recorder.moments(batches(), [g.name for g in recorder.architecture.groups])
    assert same(before, dict(model.state_dict()))
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_moments_of_another_structure_are_refused_and_nothing_is_changed() -> None:
    model = build("Vgg")
    recorder = Recorder(model, example())
    surgeon = Surgeon(model, recorder.architecture)
    name = recorder.architecture.groups[0].name
    old = recorder.moments(batches(), [name])
    surgeon.cut({name: [0]})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IdentityMismatch):
        surgeon.cut({name: [0]}, redistribute=old)
    assert same(before, dict(model.state_dict()))
    surgeon.undo()
    partial = InputCovariance(old.model_hash, {}, {})
    with pytest.raises(InvalidField, match="moments"):
        surgeon.cut({name: [0]}, redistribute=partial)


def test_moments_of_an_unknown_group_or_of_no_samples_are_refused() -> None:
    recorder = Recorder(build("Vgg"), example())
    with pytest.raises(InvalidField, match="nowhere"):
        recorder.moments(batches(), ["nowhere"])
    with pytest.raises(InvalidField, match="reach"):
        recorder.moments([], [recorder.architecture.groups[0].name])


class SharedWeight(nn.Module):
    """Two layers with one weight read the same units, each in another form: [B, 10] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.one, self.two = nn.Linear(10, 14), nn.Linear(14, 12), nn.Linear(14, 12)
        self.two.weight, self.leave = self.one.weight, nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        return torch.as_tensor(self.leave(torch.relu(self.one(x)) + torch.tanh(self.two(2 * x))))


def test_a_weight_that_layers_share_is_refitted_for_none_of_them() -> None:
    torch.manual_seed(0)
    model = SharedWeight()
    recorder = Recorder(model, torch.randn(4, 10))
    data = [(torch.randn(64, 10), torch.zeros(64, dtype=torch.long))]
    moments = recorder.moments(data, ["enter", "one"])
    kept, read = model.one.weight[:, 2:].clone(), model.leave.weight[:, 1:].clone()
    Surgeon(model, recorder.architecture).cut({"enter": [0, 1], "one": [0]}, reconstruct=moments)
    assert torch.equal(model.one.weight, kept[1:])
    assert model.two.weight is model.one.weight
    assert not torch.equal(model.leave.weight, read)


def test_moments_are_averages_over_all_batches() -> None:
    recorder = Recorder(build("ResNet"), example())
    names = [g.name for g in recorder.architecture.groups if g.prunable]
    data = batches(3)
    whole = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    parts, once = recorder.moments(data, names), recorder.moments(whole, names)
    for axis in once.squares:
        torch.testing.assert_close(parts.squares[axis], once.squares[axis], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(parts.means[axis], once.means[axis], rtol=1e-4, atol=1e-6)


def decided(recorder: Recorder, bundle: CheckpointBundle) -> StructuralPruningDecision:
    """An approved decision on a network that nobody trained."""
    options = {"min_channels_per_layer": 2, "max_predicted_shift": 1e9}
    settings = Settings(structured_pruning={"channel_analysis": options})
    return analyze(bundle, settings).model_copy(
        update={
            "approved_for_application": True,
            "rejection_reason": "",
            "reconstruction": Reconstructed(applied=True),
        }
    )


def test_mask_and_cut_are_both_of_the_reconstructed_network() -> None:
    model = build("Vgg")
    recorder = Recorder(model, example())
    surgeon = Surgeon(model, recorder.architecture)
    bundle = recorder.measure(batches(), epoch=120)
    decision = decided(recorder, bundle)
    assert decision.units
    seen: list[Tensor] = []

    def evaluate(figures: Iterator[float]) -> Evaluation:
        seen.append(model(example()).detach())
        return Evaluation(next(figures), float(seen[-1].square().mean()))

    before, plain = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    bad, good = iter([0.9, 0.5]), iter([0.9, 0.9, 0.9])
    covariance = bundle.covariance
    outcome = apply_decision(decision, surgeon, lambda: evaluate(bad), reconstruct=covariance)
    assert outcome.result == "rolled_back"
    assert same(before, dict(model.state_dict())), "the refitted weights stayed behind"
    outcome = apply_decision(decision, surgeon, lambda: evaluate(good), reconstruct=covariance)
    assert (outcome.result, outcome.detail) == ("applied", "")
    assert close(seen[1], seen[3]), "two masks differ"
    assert close(seen[3], seen[4]), "mask and cut differ"
    Surgeon(plain, recorder.architecture).cut(decision.units)
    assert not close(plain(example()), seen[4]), "nothing was reconstructed"


def test_a_decision_without_input_covariance_says_that_it_is_not_reconstructed() -> None:
    model = build("Vgg")
    recorder = Recorder(model, example())
    decision = decided(recorder, recorder.measure(batches(), epoch=120))
    surgeon = Surgeon(model, recorder.architecture)
    outcome = apply_decision(
        decision, surgeon, lambda: Evaluation(0.9, float(model(example()).square().mean()))
    )
    assert outcome.result == "applied"
    assert "not reconstructed" in outcome.detail
    assert outcome.fallbacks == ("not_reconstructed",)


def test_input_covariance_is_measured_where_none_is_at_hand_and_the_outcome_says_so() -> None:
    model = build("Vgg")
    recorder = Recorder(model, example())
    bundle = recorder.measure(batches(), epoch=120)
    decision, plain = decided(recorder, bundle), copy.deepcopy(model)
    Surgeon(plain, recorder.architecture).cut(decision.units, reconstruct=bundle.covariance)
    outcome = apply_decision(
        decision,
        Surgeon(model, recorder.architecture),
        lambda: Evaluation(0.9, float(model(example()).square().mean())),
        reconstruct=lambda: recorder.moments(batches(), decision.units),
    )
    assert (outcome.result, outcome.detail) == ("applied", "input covariance measured again")
    assert close(model(example()), plain(example()))


def test_the_covariance_of_the_calibration_pass_is_that_of_a_pass_of_its_own() -> None:
    model = build("Vgg")
    recorder = Recorder(model, example())
    measured = recorder.measure(batches(), epoch=1).covariance
    assert measured is not None
    names = [group.name for group in recorder.architecture.groups if group.prunable]
    alone = recorder.moments(batches(), names)
    assert measured.squares.keys() == alone.squares.keys()
    for axis, squares in alone.squares.items():
        torch.testing.assert_close(measured.squares[axis], squares, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(measured.means[axis], alone.means[axis], rtol=1e-5, atol=1e-7)
    assert recorder.measure(batches(), epoch=1, reconstruct=False).covariance is None


def test_a_consumer_that_is_to_be_skipped_keeps_its_weights() -> None:
    torch.manual_seed(0)
    model = Duplicated(CONSUMERS["pointwise"]()).eval()
    recorder = Recorder(model, example())
    covariance = recorder.measure(batches(30), epoch=1).covariance
    weight = model.consumer.weight.detach().clone()
    surgeon = Surgeon(model, recorder.architecture)
    surgeon.mask({"first": [3]}, reconstruct=covariance)
    assert not torch.equal(model.consumer.weight, weight)
    surgeon.unmask()
    assert torch.equal(model.consumer.weight, weight)
    surgeon.cut({"first": [3]}, reconstruct=covariance, skip=["consumer"])
    assert torch.equal(model.consumer.weight, weight[:, [0, 1, 2, 4, 5]])


class Recurrent(nn.Module):
    """Channel 3 of the first layer is twice channel 1, and a recurrent layer reads it."""

    def __init__(self, kind: type[nn.RNNBase], bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.reads = kind(6, 5, batch_first=True, bias=bias)  # type: ignore[call-arg, arg-type]
        self.fc = nn.Linear(5, 4)
        with torch.no_grad():
            self.first.weight[3] = 2 * self.first.weight[1]
            self.first.bias[3] = 2 * self.first.bias[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.reads(torch.relu(self.first(x)))[0].mean(1))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("bias", [True, False])
def test_a_recurrent_layer_that_reads_what_is_cut_is_refitted(
    kind: type[nn.RNNBase], bias: bool
) -> None:
    torch.manual_seed(1)
    model, x = Recurrent(kind, bias), torch.randn(64, 5, 3)
    recorder = Recorder(model, x)
    covariance = recorder.moments([(x, torch.zeros(64, dtype=torch.long))], ["first"])
    before, surgeon = model(x), Surgeon(model, recorder.architecture)
    surgeon.mask({"first": [3]}, reconstruct=covariance)
    assert torch.allclose(model(x), before, atol=1e-2 * float(before.std()))
    surgeon.unmask()
    assert torch.equal(model(x), before)
    surgeon.cut({"first": [3]}, reconstruct=covariance)
    assert torch.allclose(model(x), before, atol=1e-2 * float(before.std()))
