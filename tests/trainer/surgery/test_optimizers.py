"""Whatever optimizer trains the network: its state is cut along, or begun anew and said so, or the
surgeon refuses it when it is made. Undoing a cut brings all of it back bit for bit."""

from __future__ import annotations

import copy
import gc
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.recovery.snapshot import Snapshot, Tracked
from elesh.trainer.surgery.optimizers import other_optimizers
from leyline import InvalidField, PrunedArchitecture

X, Y = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 4


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )


@pytest.fixture(scope="module")
def architecture() -> PrunedArchitecture:
    return Recorder(build(), X[:4]).architecture


def train(model: nn.Module, optimizers: Iterable[Any], steps: int = 3) -> None:
    optimizers = list(optimizers)

    def closure() -> Tensor:
        model.zero_grad()
        loss = functional.cross_entropy(model(X), Y)
        torch.autograd.backward(loss)
        return loss

    for _ in range(steps):
        for optimizer in optimizers:
            closure()
            optimizer.step(closure)


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for part in value.values() for t in tensors_of(part)]
    return (
        [t for part in value for t in tensors_of(part)] if isinstance(value, (list, tuple)) else []
    )


def everything(model: nn.Module, optimizers: Iterable[Optimizer]) -> list[Tensor]:
    found = [p.detach().clone() for p in model.parameters()]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found += [t.clone() for t in tensors_of(dict(optimizer.state.get(parameter, {})))]
    return found


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


class Shampoo(Optimizer):
    """A preconditioner for every axis, as Gupta et al. 2018, without the roots."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                for dim, size in enumerate(p.shape):
                    if f"statistics_{dim}" not in state:
                        state[f"statistics_{dim}"] = torch.eye(size)
                    rows = p.grad.movedim(dim, 0).reshape(size, -1)
                    state[f"statistics_{dim}"] += rows @ rows.T
                    inverse = torch.linalg.inv(state[f"statistics_{dim}"])
                    p.grad = torch.tensordot(inverse, p.grad.movedim(dim, 0), 1).movedim(0, dim)
                p -= group["lr"] * p.grad


class EagerShampoo(Shampoo):
    """Makes its state once, when it is made: what is dropped never comes back."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"matrix": torch.eye(p.shape[0])}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure and closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p -= group["lr"] * torch.tensordot(self.state[p]["matrix"], p.grad, 1)


class Sam(Optimizer):
    """Sharpness-aware minimisation around another optimizer (Foret et al. 2021)."""

    def __init__(self, params: Any, base: Callable[..., Optimizer], **settings: Any) -> None:
        super().__init__(params, {"rho": 0.05, **settings})
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["e_w"] = p.grad * 0.01
                    p.add_(self.state[p]["e_w"])
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(self.state[p]["e_w"])
        self.base_optimizer.step()


class Lookahead(Optimizer):
    """Slow weights beside those of another optimizer (Zhang et al. 2019)."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, defaultdict(dict)
        self.defaults: dict[str, Any] = {}
        self.count = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                if self.count % 2 == 0:
                    slow.add_(p.detach() - slow, alpha=0.5)
                    p.data.copy_(slow)


class SlowLists(Optimizer):
    """The same, with the slow weights in lists of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.defaults: dict[str, Any] = {}
        self.slow = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)
        for group, kept in zip(self.param_groups, self.slow, strict=True):
            for p, slow in zip(group["params"], kept, strict=True):
                slow.add_(p.detach() - slow, alpha=0.5)
                p.data.copy_(slow)


class Plain:
    """The same, and no Optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.inner, self.steps = SlowLists(optimizer), 0
        self.slow, self.optimizer = self.inner.slow, optimizer

    def step(self, closure: Any = None) -> None:
        self.inner.step(closure)
        self.steps += 1


def muon(model: nn.Module) -> list[Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [torch.optim.Muon(matrices, 1e-3), torch.optim.AdamW(others, 1e-3)]


def of_torch(name: str, model: nn.Module) -> list[Optimizer]:
    return [getattr(torch.optim, name)(model.parameters(), 1e-3)]


OF_TORCH: dict[str, Callable[[nn.Module], list[Optimizer]]] = {
    name: partial(of_torch, name)
    for name in (
        "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "LBFGS", "NAdam",
        "RAdam", "RMSprop", "Rprop", "SGD",
    )
}  # fmt: skip
KINDS: dict[str, Callable[[nn.Module], list[Optimizer]]] = {
    **OF_TORCH,
    "SGD with momentum": lambda m: [torch.optim.SGD(m.parameters(), 1e-2, momentum=0.9)],
    "Adam, fused": lambda m: [torch.optim.Adam(m.parameters(), 1e-3, fused=True)],
    "AdamW, foreach": lambda m: [torch.optim.AdamW(m.parameters(), 1e-3, foreach=True)],
    "Adam, amsgrad": lambda m: [torch.optim.Adam(m.parameters(), 1e-3, amsgrad=True)],
    "RMSprop, centred": lambda m: [torch.optim.RMSprop(m.parameters(), 1e-3, 0.9, centered=True)],
    "Muon beside AdamW": muon,
    "one for each parameter": lambda m: [torch.optim.Adam([p], 1e-3) for p in m.parameters()],
    "Shampoo": lambda m: [Shampoo(m.parameters())],
    "SAM": lambda m: [Sam(m.parameters(), torch.optim.SGD, lr=1e-2, momentum=0.9)],
    "Lookahead": lambda m: [Lookahead(torch.optim.AdamW(m.parameters(), 1e-3))],
}
ANEW = ("LBFGS", "Shampoo")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled
def test_every_optimizer_goes_on_after_a_cut_and_comes_back_with_it(
    kind: str, architecture: PrunedArchitecture
) -> None:
    model = build()
    optimizers = KINDS[kind](model)
    train(model, optimizers)
    surgeon = Surgeon(model, architecture, optimizer=optimizers)
    before = everything(model, surgeon.optimizers.all)
    surgeon.cut({"0": [1, 5, 6], "2": [0, 9]})
    assert bool(surgeon.notes) == (kind in ANEW), surgeon.notes
    for optimizer in () if kind in ANEW else surgeon.optimizers.all:
        for parameter, state in optimizer.state.items():
            for tensor in tensors_of(dict(state)):
                fits = tensor.numel() == 1 or all(
                    ours in (1, size)
                    for ours, size in zip(tensor.shape, parameter.shape, strict=True)
                )
                assert fits
    train(model, optimizers)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    surgeon.undo()
    assert same(before, everything(model, surgeon.optimizers.all))
    train(model, optimizers)


@pytest.mark.parametrize("wrapper", [SlowLists, Plain])
def test_slow_weights_of_a_wrapper_are_cut_and_come_back_with_the_network(
    wrapper: Any, architecture: PrunedArchitecture
) -> None:
    model = build()
    optimizer = wrapper(torch.optim.AdamW(model.parameters(), 1e-2))
    train(model, [optimizer])
    tracked = Tracked(Surgeon(model, architecture, optimizer=optimizer))
    surgeon, slow = tracked.surgeon, [t.clone() for t in tensors_of(optimizer.slow)]
    snapshot, counters = Snapshot.take(tracked), {"steps": getattr(optimizer, "steps", 0)}
    surgeon.cut({"0": [1, 5, 6]})
    assert torch.equal(optimizer.slow[0][1], slow[1][[u for u in range(16) if u not in (1, 5, 6)]])
    train(model, [optimizer])
    surgeon.undo()
    assert same(slow, tensors_of(optimizer.slow))
    surgeon.cut({"0": [1, 5, 6]})
    train(model, [optimizer])
    snapshot.put_back(tracked)
    assert same(slow, tensors_of(optimizer.slow))
    assert {"steps": getattr(optimizer, "steps", 0)} == counters
    train(model, [optimizer])


def test_every_optimizer_of_torch_is_tried() -> None:
    known = {name for name in torch.optim.__all__ if name[0].isupper()}
    assert known - set(OF_TORCH) - {"Muon", "Optimizer"} == {"SparseAdam"}  # for sparse gradients


def test_factored_moments_are_those_of_the_kept_units(architecture: PrunedArchitecture) -> None:
    model = build()
    optimizer = torch.optim.Adafactor(model.parameters(), 1e-3)
    train(model, [optimizer])
    state = copy.deepcopy(optimizer.state[model[2].get_parameter("weight")])
    Surgeon(model, architecture, optimizer=optimizer).cut({"0": [3], "2": [0, 1]})
    after = optimizer.state[model[2].get_parameter("weight")]
    assert torch.equal(after["row_var"], state["row_var"][2:])
    kept = [unit for unit in range(16) if unit != 3]
    assert torch.equal(after["col_var"], state["col_var"][:, kept])


def test_masters_in_single_precision_are_cut_like_the_parameters_they_stand_for(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    masters = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(masters, 1e-2)

    def step() -> None:
        torch.autograd.backward(functional.cross_entropy(model(X), Y))
        for parameter, master in zip(model.parameters(), masters, strict=True):
            master.grad, parameter.grad = parameter.grad, None
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(model.parameters(), masters, strict=True):
                parameter.copy_(master)

    step()
    surgeon = Surgeon(model, architecture, optimizer=optimizer)
    surgeon.cut({"0": [1, 5]})
    assert all(map(torch.equal, masters, model.parameters()))
    step()
    assert model[0].out_features == 14
    surgeon.undo()
    assert masters[0].shape == (16, 8)
    assert all(map(torch.equal, masters, model.parameters()))
    step()


def test_an_optimizer_that_does_not_survive_a_cut_is_refused_when_the_surgeon_is_made(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    optimizer = EagerShampoo(model.parameters())
    before = everything(model, [optimizer])
    drawn = torch.get_rng_state()
    with pytest.raises(InvalidField, match="EagerShampoo: KeyError when it steps after a cut"):
        Surgeon(model, architecture, optimizer=optimizer)
    assert same(before, everything(model, [optimizer]))
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_an_optimizer_that_cannot_be_tried_is_named_in_a_log_line(
    architecture: PrunedArchitecture, caplog: pytest.LogCaptureFixture
) -> None:
    class Asking(torch.optim.SGD):
        def step(self, closure: Any = None, *, sharpness: float = math.nan) -> Any:
            if math.isnan(sharpness):
                raise TypeError("step() needs the sharpness")
            return super().step(closure)

    Asking.__module__ = "somewhere"
    model = build()
    Surgeon(model, architecture, optimizer=Asking(model.parameters(), lr=0.1))
    assert "optimizer not tried" in caplog.text
    assert "needs the sharpness" in caplog.text


def test_trying_an_optimizer_touches_neither_it_nor_its_scheduler(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    optimizer = Sam(model.parameters(), torch.optim.Adam, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, [optimizer], 1)
    before, rates = everything(model, [optimizer, optimizer.base_optimizer]), scheduler.state_dict()
    Surgeon(model, architecture, optimizer=optimizer)
    assert same(before, everything(model, [optimizer, optimizer.base_optimizer]))
    assert scheduler.state_dict() == rates


@pytest.mark.slow
def test_a_second_optimizer_of_the_network_that_was_not_named_is_refused(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    first = torch.optim.Adam(model[:2].parameters())
    second = torch.optim.SGD(model[2:].parameters(), 1e-2, momentum=0.9)
    with pytest.raises(InvalidField, match="another one is alive: SGD"):
        Surgeon(model, architecture, optimizer=first)
    surgeon = Surgeon(model, architecture, optimizer={"first": first, "second": second})
    assert not surgeon.blocked()
    late = torch.optim.Adam(model.parameters())
    assert not surgeon.blocked(), "it has no state that a cut could leave behind"
    train(model, [late])
    assert "not named: Adam" in surgeon.blocked()
    del late
    gc.collect()
    assert not surgeon.blocked()


def test_a_gradient_hook_with_a_mask_of_its_own_shape_is_refused_before_the_cut(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    weight = model[0].get_parameter("weight")
    surgeon = Surgeon(model, architecture)
    weight.register_hook(lambda grad: grad * (weight != 0))
    assert surgeon.blocked() == ""
    mask = torch.ones_like(weight)
    for hook in (lambda grad: grad * mask, partial(torch.mul, mask), Masked(mask).masked):
        handle = weight.register_hook(hook)
        assert "0.weight holds a tensor of its shape" in surgeon.blocked()
        handle.remove()
    assert surgeon.blocked() == ""


class Masked:
    def __init__(self, mask: Tensor) -> None:
        self.masks = {"weight": mask}

    def masked(self, grad: Tensor) -> Tensor:
        return grad * self.masks["weight"]


def test_optimizers_of_other_networks_are_no_concern(architecture: PrunedArchitecture) -> None:
    model, other = build(), build()
    theirs = torch.optim.Adam(other.parameters())
    ours = torch.optim.Adam(model.parameters())
    assert other_optimizers(model, [ours]) == []
    with pytest.raises(InvalidField, match="none of its parameters is the network's"):
        Surgeon(model, architecture, optimizer=theirs)


def test_what_is_no_optimizer_is_refused_with_what_to_make_of_it(
    architecture: PrunedArchitecture,
) -> None:
    with pytest.raises(InvalidField, match=r"torch\.optim\.Optimizer and keep .* self\.state"):
        Surgeon(build(), architecture, optimizer=object())


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


class Flat(Optimizer):
    """Momentum of all parameters of a group in one tensor."""

    def __init__(self, parameters: Any, inside: bool) -> None:
        super().__init__(parameters, {"lr": 0.01})
        sizes = [p.numel() for group in self.param_groups for p in group["params"]]
        holder = self.param_groups[0] if inside else vars(self)
        holder["momentum"] = torch.zeros(sum(sizes))
        self.sizes = sizes


@pytest.mark.parametrize("inside", [True, False], ids=["in the group", "beside it"])
def test_one_tensor_for_several_parameters_is_refused_since_a_cut_would_mix_them_up(
    architecture: PrunedArchitecture, inside: bool
) -> None:
    model = build()
    with pytest.raises(InvalidField, match="'momentum' is one tensor for several parameters"):
        Surgeon(model, architecture, optimizer=Flat(model.parameters(), inside))


class ById(Optimizer):
    """Momentum by the parameters' identity, in the state or beside it."""

    def __init__(self, parameters: Any, beside: bool) -> None:
        super().__init__(parameters, {"lr": 0.01})
        self.momentum: dict[Any, Any] = {}
        self.kept = self.momentum if beside else self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        kept = self.momentum if self.kept is not self.state else self.state
        for group in self.param_groups:
            for parameter in group["params"]:
                kept.setdefault(id(parameter), {"m": torch.zeros_like(parameter)})


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("beside", [True, False])
def test_state_by_the_identity_of_parameters_is_refused_before_or_after_the_first_step(
    architecture: PrunedArchitecture, beside: bool, steps: int
) -> None:
    model = build()
    optimizer = ById(model.parameters(), beside)
    for _ in range(steps):
        optimizer.step()
    name = "momentum" if beside else "state"
    with pytest.raises(InvalidField, match=rf"ById: '{name}' is by id\(parameter\)"):
        Surgeon(model, architecture, optimizer=optimizer)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("Lookahead", "Shampoo")])
@pytest.mark.sampled
def test_state_of_another_structure_is_not_loaded_into_an_optimizer(
    kind: str, architecture: PrunedArchitecture
) -> None:
    """PyTorch compares no shapes, and fused kernels would read past the end of the moments."""
    model = build()
    optimizers = KINDS[kind](model)
    train(model, optimizers)
    surgeon = Surgeon(model, architecture, optimizer=optimizers)
    whole = [copy.deepcopy(each.state_dict()) for each in optimizers]
    surgeon.cut({"0": [1, 5, 6]})
    train(model, optimizers)
    cut = [copy.deepcopy(each.state_dict()) for each in optimizers]
    for each, state in zip(optimizers, cut, strict=True):
        each.load_state_dict(state)
    shaped = any(state["state"] for state in whole)  # SGD without momentum keeps nothing
    assert bool(refused(optimizers, whole)) is shaped
    train(model, optimizers)
    surgeon.undo()
    assert bool(refused(optimizers, cut)) is shaped
    for each, state in zip(optimizers, whole, strict=True):
        each.load_state_dict(state)
    del surgeon
    gc.collect()
    train(model, optimizers)


def test_state_of_before_a_layer_was_removed_is_not_loaded_into_an_optimizer() -> None:
    model = Residual()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    train(model, [optimizer])
    surgeon = Surgeon(model, Recorder(model, X[:4]).architecture, optimizer=optimizer)
    whole = copy.deepcopy(optimizer.state_dict())
    surgeon.cut_layers(["blocks.1"])
    assert refused([optimizer], [whole])
    train(model, [optimizer])


def refused(optimizers: list[Optimizer], states: list[dict[str, Any]]) -> int:
    """How many refuse to load their state."""
    count = 0
    for each, state in zip(optimizers, states, strict=True):
        try:
            each.load_state_dict(state)
        except InvalidField:
            count += 1
    return count


class Residual(nn.Module):
    """Three residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        answer: Tensor = self.last(x)
        return answer
