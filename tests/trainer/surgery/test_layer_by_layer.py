"""Layers are solved one behind the other for what they put out before the cut."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from trainer_nets import NETS, batches, build, example, same, units

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.surgery.reconstruction.after_cut import (
    consumer_axes,
    reestimate_batch_statistics,
)
from elesh.trainer.surgery.reconstruction.layer_by_layer import (
    layer_solutions,
    outputs_before,
    solved_layer_by_layer,
)
from elesh.trainer.surgery.reconstruction.normal_equations import NormalEquations


def inputs(count: int = 12, seed: int = 3) -> Tensor:
    return torch.cat([x for x, _ in batches(count, seed=seed)])


class Shifted(nn.Module):
    """Channel 3 is channel 1 seen a pixel to the left: no other channel at the same place says so,
    but the neighbouring place does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, (1, 3), padding=(0, 1), bias=False)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(6, 3, 1, 3))
            self.first.weight[1] *= torch.tensor([0.0, 1.0, 0.0])
            self.first.weight[3] = self.first.weight[1].roll(1, -1)
            # What reads it looks at the middle column alone.
            self.second.weight[:, 3] *= torch.tensor([0.0, 1.0, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.second(torch.relu(self.first(x))))
        return torch.as_tensor(self.fc(y.mean((2, 3))))


def error_after(model: nn.Module, lost: dict[str, list[int]], *, solved: bool) -> float:
    """How far the outputs for other samples move; refitted, and solved layer by layer or not."""
    cut, fresh = copy.deepcopy(model).eval(), inputs(8, seed=9)
    recorder = Recorder(cut, example())
    architecture = recorder.architecture
    moments = recorder.moments(batches(12), lost)
    before = outputs_before(cut, architecture, [(inputs(), None)])
    Surgeon(cut, architecture).cut(lost, reconstruct=moments)
    if solved:
        assert solved_layer_by_layer(cut, before.without(architecture, lost))
    reestimate_batch_statistics(cut, batches(12))
    with torch.no_grad():
        return float((cut(fresh) - model.eval()(fresh)).square().mean())


def test_what_a_neighbouring_position_says_is_not_lost() -> None:
    torch.manual_seed(0)
    model = Shifted()
    lost = {"first": [3]}
    assert error_after(model, lost, solved=True) < 0.02 * error_after(model, lost, solved=False)


@pytest.mark.parametrize("name", [name for name in NETS if name != "Shared"])
@pytest.mark.sampled
def test_outputs_for_other_samples_are_nearer_to_those_before_the_cut(name: str) -> None:
    model = build(name).eval()
    reestimate_batch_statistics(model, batches(12))
    lost = units(Recorder(model, example()).architecture)
    assert error_after(model, lost, solved=True) < error_after(model, lost, solved=False)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_only_layers_that_read_units_change(name: str) -> None:
    model = build(name).train()
    architecture = Recorder(model, example()).architecture
    torch.manual_seed(1)
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    before = outputs_before(model, architecture, [(inputs(4), None)])
    lost = units(architecture)
    Surgeon(model, architecture).cut(lost)
    tensors = {path: x.clone() for path, x in model.state_dict().items()}
    changed = solved_layer_by_layer(model, before.without(architecture, lost))
    readers = {site.module for group in architecture.groups for site in group.sites}
    assert set(changed) <= readers
    for path, tensor in model.state_dict().items():
        if path.rpartition(".")[0] not in changed:
            assert same(tensor, tensors[path]), path
    assert same(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_layers_before_all_that_changes_are_left_out_and_the_solutions_are_the_same() -> None:
    model = build("ResNet").eval()
    recorder = Recorder(model, example())
    architecture = recorder.architecture
    last = [group for group in architecture.groups if group.prunable][-1]
    lost = {last.name: range(last.size // 2)}
    changing = {path for path, _ in consumer_axes(architecture, lost)}
    moments = recorder.moments(batches(12), lost)
    every = outputs_before(model, architecture, [(inputs(), None)])
    fewer = outputs_before(model, architecture, [(inputs(), None)], changing=changing)
    assert fewer.changing == changing
    assert changing <= fewer.values.keys() < every.values.keys()
    surgeon = Surgeon(model, architecture)
    surgeon.mask(lost, reconstruct=moments)
    found = [layer_solutions(model, before) for before in (every, fewer)]
    assert found[0].parameters
    assert found[0].parameters.keys() == found[1].parameters.keys()
    for path, value in found[0].parameters.items():
        assert same(value, found[1].parameters[path]), path
    skipped = layer_solutions(model, fewer, skip=changing)
    assert not any(path.rpartition(".")[0] in changing for path in skipped.parameters)
    unknown = outputs_before(model, architecture, [(inputs(), None)], changing={"elsewhere"})
    assert (unknown.changing, unknown.values.keys()) == (None, every.values.keys())


@pytest.mark.parametrize(("loudness", "solved"), [(1.0, True), (1e-4, False)])
def test_layers_that_lack_next_to_nothing_are_not_solved(loudness: float, solved: bool) -> None:
    torch.manual_seed(0)
    model = Shifted()
    with torch.no_grad():
        model.first.weight[1] *= loudness
    architecture, lost = Recorder(model, example()).architecture, {"first": [1]}
    before = outputs_before(model, architecture, [(inputs(), None)])
    Surgeon(model, architecture).cut(lost)
    assert bool(solved_layer_by_layer(model, before.without(architecture, lost))) is solved


def test_a_network_that_lost_nothing_stays_as_it_is() -> None:
    model = build("ResNet")
    architecture = Recorder(model, example()).architecture
    before = outputs_before(model, architecture, [(inputs(), None)])
    assert solved_layer_by_layer(model, before) == ()


def test_nothing_is_summed_up_for_layers_that_hear_what_they_heard_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, widths = Shifted().eval(), list[int]()
    see = NormalEquations.see

    def seen(sums: NormalEquations, rows: Tensor, missing: Tensor) -> None:
        widths.append(rows.shape[1])
        see(sums, rows, missing)

    architecture = Recorder(model, example()).architecture
    before, lost = outputs_before(model, architecture, [(inputs(), None)]), {"second": [1]}
    assert set(before.values) == {"second", "fc"}
    Surgeon(model, architecture).cut(lost)
    monkeypatch.setattr(NormalEquations, "see", seen)
    assert solved_layer_by_layer(model, before.without(architecture, lost)) == ("fc",)
    assert set(widths) == {3}, "what enters fc now"


def test_what_only_fits_the_samples_it_was_solved_on_is_not_kept() -> None:
    """Outputs that have nothing to do with the inputs: no coefficients foretell them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 5))
    x = torch.randn(40, 3)
    architecture = Recorder(model, x[:2]).architecture
    before = outputs_before(model, architecture, [(x, None)])
    assert before.values.keys() == {"2"}
    noise = before.values["2"] + 10 * torch.randn_like(before.values["2"])
    odd = replace(before, values={"2": noise})
    assert solved_layer_by_layer(model, odd) == ()


def test_a_layer_that_is_called_twice_or_shares_its_weight_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again = nn.Linear(8, 8), nn.Linear(8, 8)
            self.tied, self.last = nn.Linear(8, 8), nn.Linear(8, 5)
            self.other = nn.Linear(8, 8)
            self.other.weight = self.tied.weight

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.again(torch.relu(self.again(torch.relu(self.first(x))))))
            return self.last(torch.relu(self.other(torch.relu(self.tied(y)))))

    model, x = Twice(), torch.randn(32, 8)
    architecture = Recorder(model, x[:2]).architecture
    assert outputs_before(model, architecture, [(x, None)]).values.keys() <= {"last"}


def test_transposed_linear_layers_are_solved_too() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(conv1d(24, 6), nn.GELU(), conv1d(5, 24))
    x, fresh = torch.randn(200, 6), torch.randn(100, 6)
    architecture = Recorder(model, x[:2]).architecture
    lost = {group.name: list(range(12)) for group in architecture.groups if group.prunable}
    before = outputs_before(model, architecture, [(x, None)])
    cut = copy.deepcopy(model)
    Surgeon(cut, architecture).cut(lost)
    plain = float((cut(fresh) - model(fresh)).square().mean().detach())
    assert solved_layer_by_layer(cut, before.without(architecture, lost)) == ("2",)
    assert float((cut(fresh) - model(fresh)).square().mean().detach()) < 0.5 * plain


def test_convolutions_over_a_line_are_solved_too() -> None:
    torch.manual_seed(0)
    first = nn.Conv1d(2, 16, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), nn.Conv1d(16, 4, 5, stride=2, padding=2, bias=False))
    x, fresh = torch.randn(60, 2, 20), torch.randn(60, 2, 20)
    architecture = Recorder(model, x[:2]).architecture
    lost = {group.name: list(range(6)) for group in architecture.groups if group.prunable}
    before, cut = outputs_before(model, architecture, [(x, None)]), copy.deepcopy(model)
    Surgeon(cut, architecture).cut(lost)
    plain = float((cut(fresh) - model(fresh)).square().mean().detach())
    assert solved_layer_by_layer(cut, before.without(architecture, lost)) == ("2",)
    assert float((cut(fresh) - model(fresh)).square().mean().detach()) < 0.5 * plain
