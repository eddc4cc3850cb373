"""Averages of the weights, whatever keeps them, are cut, masked and brought back with the network;
what cannot follow is refused before anything is cut."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from layer_nets import made, removable
from test_optimizers import X, Y, architecture, build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel
from trainer_nets import example

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.recovery.recovery import Recovery
from elesh.trainer.recovery.snapshot import Snapshot, Tracked
from leyline import InvalidField, PrunedArchitecture

__all__ = ["architecture"]  # a fixture
CUT = {"0": [1, 5, 6], "2": [0, 9]}


def train(model: nn.Module, update: Callable[[], object]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(X), Y))
        optimizer.step()
        update()


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


class Shadow:
    """The way most scripts write an average: a dictionary by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(self) -> None:
        for name, p in self.model.named_parameters():
            self.shadow[name].lerp_(p.detach(), 0.1)

    def tensors(self) -> list[Tensor]:
        return list(self.shadow.values())


class Renewed(Shadow):
    """A dictionary with new tensors after every update, and after a load."""

    def update(self) -> None:
        shadow = self.shadow
        self.shadow = {n: 0.9 * shadow[n] + 0.1 * p.detach() for n, p in named(self.model)}


class Buffers(nn.Module):
    """Buffers under names without dots, with counters beside them, as latent diffusion has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = [model]
        self.register_buffer("updates", torch.tensor(0))
        for name, p in named(model):
            self.register_buffer(name.replace(".", ""), p.detach().clone())

    def update(self) -> None:
        for slow, (_, p) in zip(self.tensors(), named(self.model[0]), strict=True):
            slow.sub_(0.1 * (slow - p.detach()))

    def tensors(self) -> list[Tensor]:
        return list(self.buffers())[1:]


class ShadowList:
    """The way of torch_ema and Diffusers: a list in the order of the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shadow_params = [p.detach().clone() for p in model.parameters()]

    def update(self) -> None:
        for shadow, p in zip(self.shadow_params, self.model.parameters(), strict=True):
            shadow.sub_(0.1 * (shadow - p.detach()))

    def tensors(self) -> list[Tensor]:
        return self.shadow_params

    def state_dict(self) -> dict[str, Any]:
        return {"shadow_params": self.shadow_params}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow_params = [tensor.clone() for tensor in state["shadow_params"]]


class Averaged:
    def __init__(self, model: nn.Module, **how: Any) -> None:
        self.model, self.average = model, AveragedModel(model, **how)

    def update(self) -> None:
        self.average.update_parameters(self.model)

    def tensors(self) -> list[Tensor]:
        return list(self.average.parameters())


class Teacher:
    """A copied module, moved by hand."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.teacher = model, copy.deepcopy(model).requires_grad_(False)

    def update(self) -> None:
        for slow, p in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            slow.mul_(0.9).add_(p.detach(), alpha=0.1)

    def tensors(self) -> list[Tensor]:
        return list(self.teacher.parameters())


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "SWA": Averaged,
    "EMA": lambda model: Averaged(
        model, avg_fn=lambda slow, p, _: slow.lerp(p, 0.1), use_buffers=True
    ),
    "by name": Shadow,
    "by name, made anew": Renewed,
    "buffers": Buffers,
    "in order": ShadowList,
    "teacher": Teacher,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled
def test_an_average_is_cut_and_brought_back_with_the_network(
    kind: str, architecture: PrunedArchitecture
) -> None:
    model = build()
    average = KINDS[kind](model)
    train(model, average.update)
    surgeon = Surgeon(model, architecture)
    tracked = Tracked(surgeon, {"ema": average})
    assert len(surgeon.copies) == 1
    before = [tensor.clone() for tensor in average.tensors()]
    snapshot = Snapshot.take(tracked)
    surgeon.cut(CUT)
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert [tuple(tensor.shape) for tensor in average.tensors()] == shapes
    kept = [unit for unit in range(16) if unit not in CUT["0"]]
    assert torch.equal(average.tensors()[0], before[0][kept])
    train(model, average.update)
    surgeon.undo()
    assert all(map(torch.equal, before, average.tensors()))
    surgeon.cut(CUT)
    train(model, average.update)
    snapshot.put_back(tracked)
    assert all(map(torch.equal, before, average.tensors()))
    train(model, average.update)


@pytest.mark.parametrize("kind", ["SWA", "teacher"])
def test_an_average_is_evaluated_under_the_mask(
    kind: str, architecture: PrunedArchitecture
) -> None:
    model = build()
    holder = KINDS[kind](model)
    average = holder.average if kind == "SWA" else holder.teacher
    surgeon = Surgeon(model, architecture)
    surgeon.follow("ema", holder)
    with torch.no_grad():
        whole = average(X)
        surgeon.mask(CUT)
        masked = average(X)
        surgeon.unmask()
        assert torch.equal(average(X), whole)
        surgeon.cut(CUT)
        assert not torch.equal(masked, whole)
        assert torch.allclose(average(X), masked, atol=1e-6)


def test_reconstruction_moves_an_average_by_as_much_as_the_network(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    average = AveragedModel(model)
    surgeon = Surgeon(model, architecture)
    surgeon.follow("ema", average)
    recorder = Recorder(model, X[:4], architecture=architecture)
    surgeon.cut(CUT, redistribute=recorder.moments([(X, Y)], CUT))
    with torch.no_grad():
        assert torch.allclose(average(X), model(X), atol=1e-5)


@pytest.mark.slow
def test_an_average_that_nobody_named_is_a_refused_outcome(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    surgeon = Surgeon(model, architecture)
    assert surgeon.blocked() == ""
    average = AveragedModel(model)
    assert "AveragedModel" in surgeon.blocked()
    surgeon.follow("ema", average)
    assert surgeon.blocked() == ""


def test_an_average_of_another_network_of_the_same_structure_is_left_alone(
    architecture: PrunedArchitecture,
) -> None:
    model, other = build(), build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    average = AveragedModel(other)
    surgeon = Surgeon(model, architecture)
    assert surgeon.blocked() == ""
    assert surgeon.follow("other", other) == ()
    surgeon.cut(CUT)
    assert [p.shape for p in average.parameters()] == [p.shape for p in other.parameters()]


def test_an_average_of_a_part_of_the_network_is_found() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = build(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(x))
            return out

    model = Parts()
    average = AveragedModel(model.body)
    surgeon = Surgeon(model, Recorder(model, X[:4]).architecture)
    (found,) = surgeon.follow("ema", average)
    assert found.prefix == "body"
    surgeon.cut({"body.0": [1, 5]})
    assert [p.shape for p in average.parameters()] == [p.shape for p in model.body.parameters()]


def test_a_list_in_the_order_of_parameters_cannot_lose_a_layer_and_says_so() -> None:
    model = made("Nested")
    architecture = Recorder(model, example()).architecture
    block = removable(architecture)[0]
    surgeon = Surgeon(model, architecture)
    surgeon.follow("ema", ShadowList(model))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InvalidField, match="list in the order of the parameters"):
        surgeon.cut_layers([block])
    assert all(map(torch.equal, before, model.parameters()))
    average = AveragedModel(model)
    surgeon.follow("ema", average)
    surgeon.cut_layers([block])
    average.update_parameters(model)
    assert len(list(average.parameters())) == len(list(model.parameters()))
    surgeon.undo()
    assert all(map(torch.equal, before, model.parameters()))
    average.update_parameters(model)


def test_what_keeps_neither_state_nor_copies_is_refused_when_it_is_named(
    architecture: PrunedArchitecture,
) -> None:
    recovery = Recovery()
    with pytest.raises(InvalidField, match=r"resume\.thing"):
        recovery.resume(Tracked(Surgeon(build(), architecture), {"thing": object()}))


def test_an_average_in_another_process_takes_its_shapes_from_the_restore_point(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    average = AveragedModel(model)
    tracked = Tracked(Surgeon(model, architecture), {"ema": average})
    train(model, lambda: average.update_parameters(model))
    tracked.surgeon.cut(CUT)
    snapshot = Snapshot.take(tracked)
    fresh = build()
    anew = AveragedModel(fresh)
    snapshot.put_back(Tracked(Surgeon(fresh, architecture), {"ema": anew}))
    assert all(map(torch.equal, average.parameters(), anew.parameters()))
    assert torch.equal(average.n_averaged, anew.n_averaged)
    anew.update_parameters(fresh)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


class Distilled(nn.Module):
    """A student and its teacher, as self-supervised methods keep them."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.student, self.both = build(), both
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        out = self.head(self.student(x))
        return (out, self.teacher(x)) if self.both else out

    def update(self) -> None:
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for slow, p in pairs:
            slow.mul_(0.9).add_(p.detach(), alpha=0.1)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.sampled
def test_a_teacher_inside_the_network_loses_what_its_student_loses(both: bool) -> None:
    model = Distilled(both)
    architecture = Recorder(model, X[:4]).architecture
    assert not [name for name in architecture.group if name.startswith("teacher")]
    surgeon = Surgeon(model, architecture)
    units = {"student.0": [1, 5], "student.2": [0]}
    with torch.no_grad():
        before = model.teacher(X)
        surgeon.mask(units)
        masked = model.teacher(X)
        surgeon.unmask()
    after = surgeon.cut(units)
    assert after.parameters == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert not torch.equal(masked, before)
        assert torch.allclose(model.teacher(X), masked, atol=1e-6)
    model.update()
    surgeon.undo()
    model.update()
    fresh = Distilled(both)
    again = Surgeon(fresh, Recorder(fresh, X[:4]).architecture)
    assert again.replay(after.history).model_hash == after.model_hash


def test_frozen_parts_with_weights_of_their_own_are_no_teachers() -> None:
    model = nn.Sequential(build(), nn.ReLU(), nn.Linear(4, 8), build())
    with torch.no_grad():
        for parameter in model[3].parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model[0].requires_grad_(False)
    architecture = Recorder(model, X[:4]).architecture
    assert {"0.0", "3.0"} <= architecture.group.keys()


def test_what_a_network_keeps_of_its_weights_in_plain_attributes_follows_it() -> None:
    class Anchored(nn.Module):
        """Pulled back to the weights that it began with."""

        def __init__(self) -> None:
            super().__init__()
            self.body = build()
            self.start = {name: p.detach().clone() for name, p in named(self.body)}
            self.hidden = [copy.deepcopy(self.body)]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return out

    model = Anchored()
    surgeon = Surgeon(model, Recorder(model, X[:4]).architecture)
    tracked = Tracked(surgeon)
    kept = [tensor.clone() for tensor in model.start.values()]
    snapshot = Snapshot.take(tracked)
    surgeon.cut({"body.0": [1, 5]})
    shapes = [p.shape for p in model.body.parameters()]
    assert [tensor.shape for tensor in model.start.values()] == shapes
    assert [p.shape for p in model.hidden[0].parameters()] == shapes
    assert torch.equal(model.start["0.weight"], kept[0][[u for u in range(16) if u not in (1, 5)]])
    snapshot.put_back(tracked)
    assert all(map(torch.equal, kept, model.start.values()))
    assert all(map(torch.equal, kept, model.hidden[0].parameters()))


def test_a_copy_that_the_script_updates_is_to_be_named_and_others_are_not(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    teacher, best, twin = (copy.deepcopy(model) for _ in range(3))
    twins = torch.optim.SGD(twin.parameters(), 0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    surgeon = Surgeon(model, architecture, optimizer=optimizer)

    def train_both() -> None:
        for network, steps in ((model, optimizer), (twin, twins)):
            torch.autograd.backward(functional.cross_entropy(network(X), Y))
            steps.step()

    def update(teacher: nn.Module) -> None:
        for ours, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
            ours.data.lerp_(theirs.detach(), 0.1)

    train_both()
    assert surgeon.blocked() == ""
    update(teacher)
    for _ in range(2):
        assert "copy of the network that the script updates" in surgeon.blocked()
    surgeon.follow("teacher", teacher)
    assert surgeon.blocked() == ""
    surgeon.cut(CUT)
    update(teacher)  # fits
    assert [p.shape for p in best.parameters()] == [p.shape for p in twin.parameters()]


@pytest.mark.parametrize("kind", [dict, list])
def test_tensors_that_the_script_averages_by_hand_are_to_be_named_and_best_weights_are_not(
    kind: type, architecture: PrunedArchitecture
) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)

    def now() -> Any:
        copied = {path: p.detach().clone() for path, p in model.named_parameters()}
        return copied if kind is dict else list(copied.values())

    def tensors(kept: Any) -> list[Tensor]:
        return list(kept.values()) if kind is dict else kept

    def train() -> None:
        torch.autograd.backward(functional.cross_entropy(model(X), Y))
        optimizer.step()

    surgeon = Surgeon(model, architecture, optimizer=optimizer)
    best = []
    for _ in range(3):  # made anew every time
        train()
        best = [now()]
        assert surgeon.blocked() == ""
    average = now()
    for _ in range(2):
        train()
        surgeon.updated_copies()
        for ours, theirs in zip(tensors(average), model.parameters(), strict=True):
            ours.lerp_(theirs.detach(), 0.1)
    assert f"the script updates was not named: {kind.__name__}" in surgeon.blocked()
    surgeon.follow("ema", average)
    assert surgeon.blocked() == ""
    surgeon.cut(CUT)
    for ours, theirs in zip(tensors(average), model.parameters(), strict=True):
        ours.lerp_(theirs.detach(), 0.1)  # fits
    assert [t.shape for t in tensors(best[0])] == [p.shape for p in build().parameters()]


@pytest.mark.parametrize("kept_by", ["session", "surgeon", "script"])
def test_restore_points_are_no_copies_that_the_script_updates(
    kept_by: str, architecture: PrunedArchitecture
) -> None:
    model = build()
    surgeon = Surgeon(model, architecture)
    copied = {path: tensor.detach().clone() for path, tensor in model.named_parameters()}
    point = surgeon.restore_point()
    snapshot = Snapshot.take(Tracked(surgeon))
    of_surgeon = [saved for _, saved in point.tensors]
    of_session = list(snapshot.state["tensors"].values())
    own = {"surgeon": of_surgeon, "session": of_session, "script": list(copied.values())}
    for _ in range(2):
        found = surgeon.updated_copies()
        for tensor in own[kept_by]:
            tensor.add_(1e-3 * torch.randn_like(tensor))
    assert bool(found) == (kept_by == "script")


def test_tensors_of_unknown_sizes_that_the_compiler_keeps_are_passed_over(
    architecture: PrunedArchitecture,
) -> None:
    """Those are alive once a compiled network has seen batches of two sizes."""
    model = build()
    sizes = ShapeEnv()
    with FakeTensorMode(shape_env=sizes):
        fake = torch.empty(sizes.create_unbacked_symint(), 4)
    assert not all(isinstance(size, int) for size in fake.shape)
    assert Surgeon(model, architecture).blocked() == ""


def test_an_average_that_is_one_vector_is_not_cut_along_and_nothing_is_cut(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    surgeon = Surgeon(model, architecture, optimizer=optimizer)
    best = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    average = best.clone()
    assert surgeon.blocked() == ""
    torch.autograd.backward(functional.cross_entropy(model(X), Y))
    optimizer.step()
    assert surgeon.blocked() == "", "what holds still does not have to fit"
    average.lerp_(torch.nn.utils.parameters_to_vector(model.parameters()).detach(), 0.1)
    assert "kept as one vector" in surgeon.blocked()
    del average
    assert surgeon.blocked() == ""
    assert best.numel()
