"""A cut is rolled back though optimizers, averages or modules came to the network since."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from guarded import Run, decide, told
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.recovery.snapshot import Tracked
from leyline import InvalidField

X, Y = torch.randn(24, 6, generator=torch.Generator().manual_seed(5)), torch.arange(24) % 3


class Net(nn.Module):
    """A branch that can go, between layers that can lose channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.act = nn.Linear(6, 10), nn.Linear(10, 10), nn.ReLU()
        self.norm, self.last = nn.BatchNorm1d(10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(self.act(self.norm(x + self.inner(x))))


@dataclass
class Script:
    model: Net
    surgeon: Surgeon
    run: Run
    optimizer: torch.optim.Optimizer

    def train(self) -> None:
        for _ in range(2):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(X), Y).backward()
            self.optimizer.step()

    def outputs(self, model: nn.Module | None = None) -> Tensor:
        was = self.model.training
        model = model or self.model
        with torch.no_grad():
            found: Tensor = model.eval()(X)
        model.train(was)
        return found

    def rolled_back(self) -> list[str]:
        return [outcome.result for outcome in self.run.watch(61, told(0.1))]


def cut_once(layers: tuple[str, ...] = ()) -> tuple[Script, Tensor]:
    """A script that has made a cut, and what its network answered before."""
    torch.manual_seed(2)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    surgeon = Surgeon(model, Recorder(model, X[:4]).architecture, optimizer=optimizer)
    script = Script(model, surgeon, Run(), optimizer)
    script.run.resume(Tracked(surgeon))
    script.train()
    before = script.outputs()
    assert not layers or layers[0] in surgeon.architecture.block
    outcome = script.run.apply(decide(surgeon.architecture, layers=layers), surgeon, told(0.9))
    assert outcome.result == "applied", outcome.detail
    script.train()
    return script, before


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("layers", [(), ("inner",)])
def test_an_average_made_after_the_cut_begins_anew_with_the_weights_of_before(
    named: bool, layers: tuple[str, ...]
) -> None:
    script, before = cut_once(layers)
    average = AveragedModel(script.model, use_buffers=True)
    if named:
        script.surgeon.follow("ema", average)
    script.train()
    average.update_parameters(script.model)
    assert script.rolled_back() == ["rolled_back"]
    assert torch.equal(script.outputs(), before)
    assert torch.equal(script.outputs(average.module), before)
    assert average.module.norm.num_features == 10
    script.train()
    average.update_parameters(script.model)


@pytest.mark.parametrize("layers", [(), ("inner",)])
def test_a_teacher_copied_after_the_cut_and_moved_by_hand_is_brought_along_and_one_at_rest_stays(
    layers: tuple[str, ...],
) -> None:
    script, before = cut_once(layers)
    teacher, best = copy.deepcopy(script.model), copy.deepcopy(script.model)

    def move_teacher() -> None:
        script.train()
        for theirs, ours in zip(teacher.parameters(), script.model.parameters(), strict=True):
            theirs.data.lerp_(ours.data, 0.1)

    move_teacher()
    kept = script.outputs(best)
    assert script.run.watch(60, told(0.9)) == []
    move_teacher()
    assert script.rolled_back() == ["rolled_back"]
    assert torch.equal(script.outputs(), before)
    assert torch.equal(script.outputs(teacher), before)
    assert torch.equal(script.outputs(best), kept)
    move_teacher()


def test_what_another_run_in_this_process_keeps_is_left_alone() -> None:
    """It may have begun with the same weights, and have lost the same."""
    (script, before), (other, _) = cut_once(), cut_once()
    average, teacher = AveragedModel(other.model), copy.deepcopy(other.model)
    other.surgeon.follow("ema", average)
    other.surgeon.follow("teacher", teacher)
    assert script.surgeon.blocked() == ""
    other.train()
    average.update_parameters(other.model)
    for theirs, ours in zip(teacher.parameters(), other.model.parameters(), strict=True):
        theirs.data.lerp_(ours.data, 0.1)
    assert script.surgeon.blocked() == ""
    kept = [other.outputs(each) for each in (average.module, teacher, other.model)]
    assert script.rolled_back() == ["rolled_back"]
    assert torch.equal(script.outputs(), before)
    for each, outputs in zip((average.module, teacher, other.model), kept, strict=True):
        assert torch.equal(other.outputs(each), outputs)


def test_an_optimizer_made_after_the_cut_goes_on_after_its_rollback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    script, before = cut_once()
    script.optimizer = torch.optim.SGD(script.model.parameters(), 0.01, momentum=0.9)
    script.train()
    with caplog.at_level(logging.WARNING):
        assert script.rolled_back() == ["rolled_back"]
    assert "an optimizer that was not named begins its state anew" in caplog.text
    assert torch.equal(script.outputs(), before)
    script.train()
    assert not torch.equal(script.outputs(), before)


def test_another_optimizer_that_the_surgeon_was_given_begins_its_state_anew() -> None:
    script, before = cut_once()
    script.optimizer = torch.optim.SGD(script.model.parameters(), 0.01, momentum=0.9)
    script.surgeon.train_with(script.optimizer)
    script.train()
    assert script.rolled_back() == ["rolled_back"]
    assert torch.equal(script.outputs(), before)
    assert not script.optimizer.state
    script.train()


def test_modules_without_tensors_that_the_script_put_in_since_stay() -> None:
    script, _ = cut_once()
    script.model.act = nn.Sequential(nn.GELU(), nn.Dropout(0.1))
    assert script.rolled_back() == ["rolled_back"]
    assert type(script.model.act) is nn.Sequential
    assert script.model.first.out_features == 10
    script.train()


def wrapped(model: Net) -> None:
    model.last = nn.Sequential(model.last, nn.Identity())


def wider(model: Net) -> None:
    model.last = nn.Linear(model.last.in_features, 5)


def computed(model: Net) -> None:
    nn.utils.parametrizations.weight_norm(model.first)


def hooked(model: Net) -> None:
    mask = torch.ones_like(model.first.weight)
    model.first.weight.register_hook(lambda gradient: gradient * mask)


@pytest.mark.parametrize("change", [wrapped, wider, computed, hooked])
def test_a_network_that_was_changed_since_is_left_as_it_is_and_the_log_says_why(
    change: Callable[[Net], None], caplog: pytest.LogCaptureFixture
) -> None:
    script, _ = cut_once()
    change(script.model)
    state = copy.deepcopy(script.model.state_dict())
    with caplog.at_level(logging.ERROR):
        assert script.rolled_back() == []
    assert "monitored cuts not judged" in caplog.text
    assert "model.last" in caplog.text or "model.first.weight" in caplog.text
    assert all(torch.equal(state[path], now) for path, now in script.model.state_dict().items())
    assert script.outputs().shape[0] == len(X)
    nn.functional.cross_entropy(script.model(X), Y).backward()


class Beside(nn.Module):
    """An adapter of low rank around a layer, of the sizes that the layer has now."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.up(self.down(args[0]))


def joined_by(script: Script, layer: nn.Module) -> None:
    script.optimizer.add_param_group({"params": list(layer.parameters())})
    script.train()


def norm_of_the_width_now(script: Script) -> nn.Module:
    model = script.model
    model.act = nn.Sequential(nn.LayerNorm(model.first.out_features), nn.Tanh())
    return model.act


def adapter_of_the_width_now(script: Script) -> nn.Module:
    script.model.adapter = Beside(script.model.last)
    script.model.last.register_forward_hook(script.model.adapter)
    return script.model.adapter


def scale_of_the_outputs(script: Script) -> nn.Module:
    script.model.scale = nn.Linear(3, 3)
    script.model.register_forward_hook(lambda model, _, output: model.scale(output))
    return script.model.scale


@pytest.mark.parametrize("layer", [norm_of_the_width_now, adapter_of_the_width_now])
def test_a_cut_is_not_taken_back_under_layers_that_have_joined_since_and_would_not_fit(
    layer: Callable[[Script], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    script, _ = cut_once()
    joined_by(script, layer(script))
    state, moments = copy.deepcopy((script.model.state_dict(), script.optimizer.state_dict()))
    before = script.outputs()
    with caplog.at_level(logging.ERROR):
        assert script.rolled_back() == []
    assert "fit the cut network alone" in caplog.text
    assert all(torch.equal(state[path], now) for path, now in script.model.state_dict().items())
    now = script.optimizer.state_dict()["state"]
    for number, kept in moments["state"].items():
        assert all(torch.equal(kept[name], now[number][name]) for name in kept)
    assert torch.equal(script.outputs(), before)
    script.train()


def test_a_cut_is_taken_back_under_layers_that_have_joined_since_and_fit() -> None:
    script, _ = cut_once()
    joined_by(script, scale_of_the_outputs(script))
    assert script.rolled_back() == ["rolled_back"]
    assert script.model.first.out_features == 10
    script.train()


def test_a_run_that_resumes_the_structure_it_has_leaves_averages_of_the_script_alone(
    tmp_path: Path,
) -> None:
    def built() -> tuple[Net, Surgeon, AveragedModel]:
        torch.manual_seed(2)
        model = Net()
        return model, Surgeon(model, Recorder(model, X[:4]).architecture), AveragedModel(model)

    model, surgeon, _ = built()
    (run := Run(tmp_path)).resume(Tracked(surgeon))
    with torch.no_grad():
        model.last.weight += 1
    run.save(7)
    run.close()
    model, surgeon, average = built()
    kept = average.module.last.weight.clone()
    again = Run(tmp_path)
    assert again.resume(Tracked(surgeon)) == 7
    assert not torch.equal(model.last.weight, kept)
    assert torch.equal(average.module.last.weight, kept)
    again.close()


def beside(width: int = 3) -> tuple[Net, nn.Linear, Surgeon, Callable[[], None]]:
    """A network that is trained together with another one, which nobody named."""
    torch.manual_seed(2)
    model, other = Net(), nn.Linear(6, width)
    optimizer = torch.optim.Adam([*other.parameters(), *model.parameters()], 1e-2)
    surgeon = Surgeon(model, Recorder(model, X[:4]).architecture, optimizer=optimizer)

    def train() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X) + other(X), Y).backward()
        optimizer.step()

    return model, other, surgeon, train


def test_what_an_optimizer_trains_beside_the_network_goes_back_and_comes_back_with_it(
    tmp_path: Path,
) -> None:
    _, other, surgeon, train = beside()
    (run := Run(tmp_path)).resume(Tracked(surgeon))
    train()
    before = other.weight.detach().clone()
    run.apply(decide(surgeon.architecture), surgeon, told(0.9))
    train()
    assert [o.result for o in run.watch(61, told(0.1))] == ["rolled_back"]
    assert torch.equal(other.weight, before)
    train()
    assert run.save(62)
    train()
    run.close()
    _, again, surgeon, train = beside()
    (resumed := Run(tmp_path)).resume(Tracked(surgeon))
    assert not torch.equal(again.weight, other.weight)
    train()
    assert torch.equal(again.weight, other.weight)
    resumed.close()


def test_a_run_whose_optimizer_trains_something_else_beside_the_network_is_refused_by_shape(
    tmp_path: Path,
) -> None:
    _, _, surgeon, train = beside()
    (run := Run(tmp_path)).resume(Tracked(surgeon))
    train()
    run.save(1)
    run.close()
    model, _, surgeon, _ = beside(width=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidField, match=r"beside the network's.*\(3, 6\).*\(1, 6\)"):
        Run(tmp_path).resume(Tracked(surgeon))
    assert all(torch.equal(before[path], now) for path, now in model.state_dict().items())
