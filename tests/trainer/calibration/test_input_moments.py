"""What is measured for whoever redistributes is what a cut with redistribution then does."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from attention_nets import NETS as FAMILIES
from attention_nets import TOKENS, WIDTH, Own, build, inputs
from torch import Tensor, nn

from elesh.analysis.candidates import Candidates
from elesh.analysis.levels.heads import HEADS
from elesh.analysis.selection.reconstruction_order import ReconstructionOrder
from elesh.trainer import Recorder, Surgeon
from elesh.trainer.calibration.accumulators import InputTally, inner_products
from elesh.trainer.calibration.behind_norms import _left_over
from elesh.trainer.network.calling import main_output
from leyline import CheckpointBundle, GateSite, GateStatistics, Level
from leyline.network.statistics import INPUT_FIELDS

SAMPLES = 2048


class Merged(nn.Module):
    """Attention whose code takes the width of all heads from its input's, on a stream that is read
    again with two tokens side by side: a head owns twice as many channels there."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.qkv = nn.Linear(6, 12), nn.Linear(12, 36)
        self.out, self.merge = nn.Linear(12, 12), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        samples, tokens, width = x.shape
        parts = self.qkv(x).reshape(samples, tokens, 3, -1, 4).permute(2, 0, 3, 1, 4)
        weights = (parts[0] @ parts[1].transpose(-1, -2) / 2).softmax(-1)
        x = x + self.out((weights @ parts[2]).transpose(1, 2).reshape(samples, tokens, width))
        return self.merge(x.reshape(samples, tokens // 2, 2 * width)).mean(1)


class Attended(nn.Module):
    """Attention, the mean over tokens, and a linear readout: heads act on the outputs linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.attention = nn.Linear(WIDTH, WIDTH), Own()
        self.leave = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.attention(self.enter(x)).mean(1))


class Convolved(nn.Module):
    """A convolution whose consumer is 1 x 1, then the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 6, 1)
        self.leave = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.second(torch.relu(self.first(x))).mean((2, 3)))


class Mixed(nn.Module):
    """Hidden units that a linear layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.leave = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.first(x)))


CONSUMERS = {"heads": "attention.out", "maps": "second", "units": "leave"}
NETS = {
    "heads": (Attended, (TOKENS, WIDTH)),
    "maps": (Convolved, (2, 6, 6)),
    "units": (Mixed, (6,)),
}


def measured(
    kind: str, *, constant: bool = False
) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], CheckpointBundle]:
    net, shape = NETS[kind]
    torch.manual_seed(3)
    model = net().eval()
    x = torch.randn(SAMPLES, *shape)
    if constant:
        x = (x[:, :1] if kind == "heads" else x[:, :, :1, :1]).expand(SAMPLES, *shape)
    else:  # A sample's positions have something in common.
        x = x + 0.3 * torch.randn(SAMPLES, *[1] * len(shape))
    batches = [(x, torch.randint(0, 3, (SAMPLES,)))]
    recorder = Recorder(model, x[:2])
    return model, batches, recorder.measure(batches, epoch=1, ahead=0, redistribute=True)


def gate_of(kind: str, bundle: CheckpointBundle) -> GateStatistics:
    """Of the group that the kind's consumer reads."""
    groups = bundle.architecture.groups
    (name,) = [g.name for g in groups if g.sites and g.sites[0].module == CONSUMERS[kind]]
    return bundle.gates[name]


def moved(
    model: nn.Module, x: Tensor, bundle: CheckpointBundle, units: dict[str, list[int]]
) -> float:
    """Mean over samples of the squared movement of the centred outputs after such a cut."""
    cut = copy.deepcopy(model)
    recorder = Recorder(cut, x[:2], architecture=bundle.architecture)
    batches = [(x, torch.zeros(len(x), dtype=torch.long))]
    Surgeon(cut, bundle.architecture).cut(units, redistribute=recorder.moments(batches, units))
    with torch.no_grad():
        change = cut(x) - model(x)
    return float((change - change.mean(1, keepdim=True)).square().sum(1).mean())


@pytest.mark.parametrize(("kind", "constant"), [("units", False), ("heads", True), ("maps", True)])
@pytest.mark.sampled
def test_what_is_predicted_for_a_set_is_what_its_cut_moves(kind: str, constant: bool) -> None:
    """Exact where slopes are the same for all samples, and inputs at all positions: but for the
    drawn directions and the ridge."""
    model, batches, bundle = measured(kind, constant=constant)
    gate = gate_of(kind, bundle)
    units = gate.projections.shape[1]
    name = gate.layer_name
    candidates = Candidates(names=(name,), sizes=(units,), capacities=(units,), multiples=(1,))
    predicted, found = [], []
    for chosen in list(combinations(range(units), 2))[:12]:
        order = ReconstructionOrder(candidates, {name: gate})
        first = float(order.costs[chosen[0]])
        order.take(chosen[:1])
        predicted.append(first + float(order.costs[chosen[1]]))
        found.append(moved(model, batches[0][0], bundle, {name: list(chosen)}))
    np.testing.assert_allclose(predicted, found, rtol=0.2)


@pytest.mark.parametrize("kind", NETS)
def test_moments_are_those_of_the_consumers_inputs(kind: str) -> None:
    model, batches, bundle = measured(kind)
    gate, seen = gate_of(kind, bundle), list[Tensor]()
    handle = model.get_submodule(CONSUMERS[kind]).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach())
    )
    with torch.no_grad():
        model(batches[0][0])
    handle.remove()
    x = seen[0].movedim(1, -1) if kind == "maps" else seen[0]
    rows = x.reshape(SAMPLES, -1, x.shape[-1]).double()
    # The attention's projection has no bias that could take up a constant.
    means = rows.mean((0, 1)) * (kind != "heads")
    left = (rows - means).reshape(-1, rows.shape[-1])
    close = {"rtol": 1e-3, "atol": 1e-4}
    np.testing.assert_allclose(gate.input_means[0], means, **close)
    np.testing.assert_allclose(gate.input_moments[0], left.T @ left / len(left), **close)
    steady = (rows.mean(1) - means).square().mean(0)
    np.testing.assert_allclose(gate.sample_moments[0], steady, **close)


def test_moments_are_taken_of_attentions_that_never_call_their_projection() -> None:
    """And of a network under autocast in its own precision."""
    model, x = build("native"), inputs("native", 64)
    recorder = Recorder(model, inputs("native", 4))
    heads = [g.name for g in recorder.architecture.groups if g.prunable and g.level is Level.HEAD]
    found = recorder.moments([(x, torch.zeros(64))], heads)
    measured = recorder.measure([(x, torch.zeros(64, dtype=torch.long))], epoch=1)
    with torch.autocast("cpu", torch.bfloat16):
        again = recorder.moments([(x, torch.zeros(64))], heads)
    assert found.squares
    assert measured.covariance is not None
    for axis, squares in found.squares.items():
        assert torch.equal(squares, again.squares[axis])
        np.testing.assert_allclose(squares, measured.covariance.squares[axis], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["heads", "maps"])
def test_slopes_that_are_the_same_at_all_positions_are_all_in_the_sum(kind: str) -> None:
    _, _, bundle = measured(kind)
    summed, left = gate_of(kind, bundle).input_slopes[0]
    assert np.abs(left).max() < 1e-4 * np.abs(summed).max()
    assert np.abs(summed).max() > 0


def test_the_order_reads_nothing_of_what_few_samples_derivatives_leave_out() -> None:
    torch.manual_seed(3)
    model, x = Convolved().eval(), torch.randn(96, 2, 6, 6)
    batches = [(part, torch.zeros(32, dtype=torch.long)) for part in x.split(32)]
    recorder = Recorder(model, x[:2])
    whole = recorder.measure(batches, epoch=1)
    few = recorder.measure(batches, epoch=1, loss_samples=1)
    assert few.metadata.samples == 96
    for name, gate in whole.gates.items():
        for field in ("projections", *INPUT_FIELDS):
            np.testing.assert_array_equal(getattr(few.gates[name], field), getattr(gate, field))
        assert gate.margins is not None
        of_few = few.gates[name].margins
        assert of_few is not None
        assert len(of_few) == len(few.gates[name].moves) == 32
        np.testing.assert_array_equal(of_few, gate.margins[:32])
        first = recorder.measure(batches[:1], epoch=1).gates[name]
        np.testing.assert_array_equal(few.gates[name].second_order, first.second_order)


def test_only_the_samples_asked_for_have_the_losss_derivatives_however_large_batches_are() -> None:
    torch.manual_seed(4)
    model, x = Convolved().eval(), torch.randn(72, 2, 6, 6)
    labels = torch.randint(2, (72,))
    batches = [(x[:40], labels[:40]), (x[40:], labels[40:])]
    recorder = Recorder(model, x[:2])
    whole = recorder.measure(batches, epoch=1)
    few = recorder.measure(batches, epoch=1, loss_samples=16)
    first = recorder.measure([(x[:16], labels[:16])], epoch=1)
    assert few.metadata.samples == 72
    for name, gate in few.gates.items():
        assert gate.margins is not None
        assert gate.moves is not None
        assert len(gate.margins) == len(gate.moves) == 16
        for field in ("margins", "first_order", "second_order"):
            np.testing.assert_allclose(
                getattr(gate, field), getattr(first.gates[name], field), rtol=1e-4, atol=1e-6
            )
        for field in ("projections", *INPUT_FIELDS):
            np.testing.assert_allclose(
                getattr(gate, field), getattr(whole.gates[name], field), rtol=1e-3, atol=1e-5
            )
    for gate in recorder.measure(batches, epoch=1, loss_samples=30).gates.values():
        assert gate.margins is not None
        assert len(gate.margins) == 40  # 10 by themselves are too few


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.sampled
def test_heads_of_every_family_are_measured_element_by_element(name: str) -> None:
    model, samples = build(name), 6
    recorder = Recorder(
        model, inputs(name), loss=lambda output, _: main_output(output).square().flatten(1).mean(1)
    )
    batches = [(inputs(name, samples), torch.arange(samples) % 2)]
    bundle = recorder.measure(batches, epoch=1, redistribute=True)
    heads = [g for g in bundle.architecture.groups if g.prunable and g.level is Level.HEAD]
    assert heads
    for group in heads:
        gate = bundle.gates[group.name]
        assert gate.input_means is not None
        inputs_of = {group.size * site.width for site in group.sites}
        assert gate.input_means.shape == (len(group.sites), *inputs_of)
        assert all(site.width > 1 for site in group.sites)
    scorer, fallbacks = HEADS.choose_scorer(bundle, "auto", reconstructs=True)
    assert scorer == "reconstruction"
    assert "moments_failure" not in [taken.rung for taken in fallbacks]


def test_a_head_with_more_channels_at_one_reader_than_at_another_has_no_input_moments() -> None:
    torch.manual_seed(0)
    recorder = Recorder(Merged(), torch.randn(2, 4, 6))
    (group,) = [g for g in recorder.architecture.groups if g.level is Level.HEAD]
    assert group.prunable
    assert len({site.width for site in group.sites}) > 1
    bundle = recorder.measure([(torch.randn(8, 4, 6), torch.arange(8) % 3)], epoch=1)
    assert bundle.gates[group.name].input_moments is None
    _, fallbacks = HEADS.choose_scorer(bundle, "auto", reconstructs=True)
    assert any("no input moments" in taken.reason for taken in fallbacks)


def test_sums_of_one_batch_become_the_slopes_and_are_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared: list[bool] = []
    put = InputTally.put

    def noted(tally: InputTally, into: Any, *others: Any) -> None:
        shared.append(tally.both is not None and np.shares_memory(tally.both, into["input_slopes"]))
        put(tally, into, *others)

    monkeypatch.setattr(InputTally, "put", noted)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    recorder, x = Recorder(model, torch.randn(2, 6)), torch.randn(16, 6)
    labels = torch.arange(16) % 3
    whole = recorder.measure([(x, labels)], epoch=0).gates["0"]
    parts = recorder.measure([(x[:8], labels[:8]), (x[8:], labels[8:])], epoch=0).gates["0"]
    assert shared == [True, False]
    for name in ("input_moments", "sample_moments"):
        np.testing.assert_allclose(getattr(whole, name), getattr(parts, name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("indices", [None, (0, 4, 1, 5, 2, 6)])
def test_inner_products_of_units_are_summed_over_their_channels(
    indices: tuple[int, ...] | None,
) -> None:
    x = torch.randn(20, 7)
    site = GateSite(module="reader", dim=1, start=0 if indices else 1, width=2, indices=indices)
    owned = torch.tensor([site.of(unit) for unit in range(3)])
    units = x[:, owned].double()  # [rows, unit, width]
    second = x.T @ x
    summed = torch.einsum("nuw,nvw->uv", units, units)
    found = inner_products(second, site, 3, by_element=False)
    torch.testing.assert_close(found, summed, rtol=1e-5, atol=1e-5)
    flat = units.flatten(1).float()
    by_element = inner_products(second, site, 3, by_element=True)
    torch.testing.assert_close(by_element, flat.T @ flat)


def test_what_is_left_of_slopes_behind_a_norm_is_without_the_mean_over_all_channels() -> None:
    generator = np.random.default_rng(0)
    slopes, gain = generator.normal(size=(5, 5)), generator.uniform(0.5, 2, size=5)
    left = np.eye(5) - np.outer(gain, 1 / gain) / 5
    np.testing.assert_allclose(_left_over(slopes, gain), left.T @ slopes @ left, atol=1e-12)
