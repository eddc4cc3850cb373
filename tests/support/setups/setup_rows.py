"""The rows of docs/setups.md: networks, optimizers and averages as people have them."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from elesh.trainer import Recorder, Surgeon

RANK = [0]
"""Of this process, where several train together."""
TWO = "DistributedDataParallel, two processes"


@dataclass
class Running:
    """What a training script has around its network."""

    model: nn.Module
    """As the script calls it, and gives it to Elesh."""
    inputs: Any
    labels: Tensor
    optimizer: Any = None
    parts: dict[str, Any] = field(default_factory=dict)

    def loss(self) -> Tensor:
        outputs = _logits(call(self.model, self.inputs)).float()
        return nn.functional.cross_entropy(outputs, self.labels)

    def train(self, steps: int) -> None:
        self.model.train()
        for _ in range(steps):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            assert torch.isfinite(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            if "ema" in self.parts:
                self.parts["ema"].update_parameters(self.model)
        self.model.eval()

    def optimizers(self) -> list[Any]:
        found = self.optimizer
        return list(found) if isinstance(found, (list, tuple)) else [found]

    def outputs(self) -> Tensor:
        with torch.no_grad():
            found = [_logits(call(self.model, self.inputs))]
            if isinstance(self.parts.get("ema"), nn.Module):
                found.append(_logits(call(self.parts["ema"], self.inputs)))
        return torch.stack(found)


def call(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs) if isinstance(inputs, tuple) and type(inputs) is tuple else model(inputs)


def _logits(outputs: Any) -> Tensor:
    found: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
    return found


# Networks


class Conv(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True)
        )
        self.second = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(16, 4)
        self.to(dtype)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.second(self.first(x)).mean((2, 3)))


class Checkpointed(Conv):
    def forward(self, x: Tensor) -> Any:
        found = checkpoint(self.second, self.first(x), use_reentrant=False)
        return self.head(found.mean((2, 3)))


Answer = namedtuple("Answer", "logits features")


class Named(Conv):
    def forward(self, x: Tensor) -> Any:
        features = self.second(self.first(x)).mean((2, 3))
        return Answer(self.head(features), features)


class Tied(nn.Module):
    """Two names of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(20, 16), nn.Linear(16, 24)
        self.back, self.out = nn.Linear(24, 16), nn.Linear(16, 20, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.back(torch.relu(self.hidden(self.embedding(x).mean(1)))))


class Padded(nn.Module):
    """PyTorch's encoder with a mask of padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.out(self.encoder(x, src_key_padding_mask=padding)[:, 0])


class Teaching(nn.Module):
    """A student with its slow average inside, as self-distillation has it."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Conv(), Conv()
        self.teacher.load_state_dict(self.student.state_dict())
        for parameter in self.teacher.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x) + 0.1 * self.teacher(x)


# Optimizers and averages as scripts have them


class Shampoo(Optimizer):
    """A preconditioner for every axis, as Gupta et al. 2018, without the roots."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad
                for dim, size in enumerate(p.shape):
                    kept = self.state[p].setdefault(f"statistics_{dim}", torch.eye(size))
                    rows = p.grad.movedim(dim, 0).reshape(size, -1)
                    kept += rows @ rows.T
                    step = torch.tensordot(torch.linalg.inv(kept), step.movedim(dim, 0), 1)
                    step = step.movedim(0, dim)
                p -= group["lr"] * step


class Sam(Optimizer):
    """Sharpness-aware minimisation around another optimizer (Foret et al. 2021)."""

    def __init__(self, params: Any, base: Callable[..., Optimizer], **settings: Any) -> None:
        super().__init__(params, {"rho": 0.05, **settings})
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for p in parameters:
                self.state[p]["before"] = p.detach().clone()
                p.add_(p.grad, alpha=0.01)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p in parameters:
                p.copy_(self.state[p]["before"])
        self.base_optimizer.step()


class Lookahead:
    """Slow weights in lists beside another optimizer (Zhang et al. 2019)."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0
        self.slow = [[p.detach().clone() for p in g["params"]] for g in optimizer.param_groups]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.count += 1
        for group, kept in zip(self.optimizer.param_groups, self.slow, strict=True):
            for p, slow in zip(group["params"], kept, strict=True):
                if self.count % 2 == 0:
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)


class Masters:
    """AdamW on copies of the weights in single precision."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, 1e-2)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self.optimizer.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)


class Shadow:
    """The way most scripts write an average."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update_parameters(self, model: nn.Module) -> None:
        old = self.shadow
        self.shadow = {n: 0.9 * old[n] + 0.1 * p.detach() for n, p in model.named_parameters()}


class LowRank(nn.Module):
    """An adapter as PEFT puts it around a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, 4, bias=False)
        self.b = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.b(self.a(x))
        return out


# Setups


def images(model: nn.Module, make: Callable[..., Any] | None = None, **given: Any) -> Running:
    generator = torch.Generator().manual_seed(1 + RANK[0])
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, 3, 8, 8, generator=generator).to(dtype)
    y = torch.randint(0, 4, (32,), generator=generator)
    optimizer = (make or partial(torch.optim.AdamW, lr=1e-2))(model.parameters())
    return Running(model, x, y, optimizer, **given)


def averaged() -> Running:
    running = images(Conv())
    average = AveragedModel(running.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    running.parts["ema"] = average
    return running


def compiled() -> Running:
    running = images(Conv())
    running.model = torch.compile(running.model, backend="eager")
    return running


def two_optimizers() -> Running:
    running = images(Conv())
    model = running.model
    assert isinstance(model, Conv)
    parameters = [*model.second.parameters(), *model.head.parameters()]
    running.optimizer = [
        torch.optim.SGD(model.first.parameters(), 0.05, momentum=0.9),
        torch.optim.AdamW(parameters, 1e-2),
    ]
    return running


def groups_added() -> Running:
    running = images(Conv())
    model = running.model
    assert isinstance(model, Conv)
    running.optimizer = torch.optim.AdamW(model.second.parameters(), 1e-2)
    running.optimizer.add_param_group({"params": list(model.head.parameters())})
    running.optimizer.add_param_group({"params": list(model.first.parameters()), "lr": 1e-3})
    return running


def scaled() -> Running:
    running = images(Conv())
    running.parts["scaler"] = torch.amp.GradScaler("cpu", init_scale=8.0)
    running.parts["scheduler"] = torch.optim.lr_scheduler.StepLR(running.optimizer, 2)
    running.parts["generator"] = torch.Generator().manual_seed(3)
    return running


def muon() -> Running:
    running = images(Conv())
    model = running.model
    assert isinstance(model, Conv)
    others = [p for n, p in model.named_parameters() if n != "head.weight"]
    first = torch.optim.Muon([model.head.weight], lr=1e-2)
    running.optimizer = [first, torch.optim.AdamW(others, 1e-2)]
    return running


def tied() -> Running:
    generator, model = torch.Generator().manual_seed(1), Tied()
    x = torch.randint(0, 20, (32, 6), generator=generator)
    return Running(model, x, x[:, 0], torch.optim.AdamW(model.parameters(), 1e-2))


def padded() -> Running:
    generator, model = torch.Generator().manual_seed(1), Padded()
    x = torch.randn(16, 5, 16, generator=generator)
    padding = torch.arange(5)[None] >= torch.randint(1, 6, (16, 1), generator=generator)
    y = torch.randint(0, 4, (16,), generator=generator)
    return Running(model, (x, padding), y, torch.optim.AdamW(model.parameters(), 1e-2))


class Stepped(Running):
    """Steps with a closure, which sharpness-aware minimisation and LBFGS call themselves."""

    def train(self, steps: int) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.loss()
            torch.autograd.backward(loss)
            return loss

        self.model.train()
        for _ in range(steps):
            closure()
            self.optimizer.step(closure)
        self.model.eval()


class Economical(Running):
    """Autocast, and two batches a step."""

    def loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().loss()

    def train(self, steps: int) -> None:
        self.model.train()
        for _ in range(steps):
            self.optimizer.zero_grad()
            for _ in range(2):
                torch.autograd.backward(self.loss() / 2)
            self.optimizer.step()
        self.model.eval()


class InBackward(Running):
    """Every parameter has an optimizer of its own, which steps when its gradient is there."""

    def train(self, steps: int) -> None:
        self.model.train()
        for _ in range(steps):
            torch.autograd.backward(self.loss())
        self.model.eval()


def like(kind: type[Running], running: Running) -> Running:
    return kind(**vars(running))


def with_optimizer(make: Callable[[nn.Module], Any], model: nn.Module | None = None) -> Running:
    running = images(model or Conv())
    running.optimizer = make(running.model)
    return running


def sam() -> Running:
    make = partial(Sam, base=torch.optim.SGD, lr=0.02, momentum=0.9)
    return like(Stepped, with_optimizer(lambda model: make(model.parameters())))


def in_backward() -> Running:
    running = like(InBackward, images(Conv()))
    own = {p: torch.optim.SGD([p], 0.01, momentum=0.9) for p in running.model.parameters()}

    def step(parameter: Tensor) -> None:
        own[parameter].step()  # type: ignore[index]
        own[parameter].zero_grad()  # type: ignore[index]

    for parameter in own:
        parameter.register_post_accumulate_grad_hook(step)
    running.optimizer = list(own.values())
    return running


def lbfgs() -> Running:
    make = partial(torch.optim.LBFGS, lr=0.1, max_iter=2, line_search_fn="strong_wolfe")
    return like(Stepped, with_optimizer(lambda model: make(model.parameters())))


def compiled_in_place() -> Running:
    running = images(Conv())
    running.model.compile(backend="eager")
    return running


def compiled_parts() -> Running:
    running = images(Conv())
    assert isinstance(running.model, Conv)
    running.model.second.compile(backend="eager")
    return running


def shadow() -> Running:
    running = images(Conv())
    running.parts["ema"] = Shadow(running.model)
    return running


def frozen() -> Running:
    model = Conv()
    model.first.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    running = images(model)
    running.optimizer = torch.optim.AdamW(trained, 1e-2)
    return running


def parallel(wrapper: Callable[[nn.Module], nn.Module]) -> Running:
    running = images(Conv())
    running.model = wrapper(running.model)
    return running


def adapted() -> Running:
    model = Conv()
    surgeon = Surgeon(model, Recorder(model, torch.zeros(2, 3, 8, 8)).architecture)
    surgeon.cut({"second.0": [0, 3]})
    model.requires_grad_(False)
    model.head = LowRank(model.head)  # type: ignore[assignment, arg-type]
    running = images(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    running.optimizer = torch.optim.AdamW(trained, 1e-2)
    return running


def masked_gradients() -> Running:
    running = images(Conv())
    for parameter in running.model.parameters():
        parameter.register_hook(partial(torch.mul, torch.ones_like(parameter)))
    return running


SETUPS: Mapping[str, Callable[[], Running]] = {
    "one optimizer (AdamW)": lambda: images(Conv()),
    "SGD with momentum": lambda: images(Conv(), partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
    "foreach Adam, amsgrad": lambda: images(
        Conv(), partial(torch.optim.Adam, lr=1e-2, foreach=True, amsgrad=True)
    ),
    "Adafactor (factored moments)": lambda: images(Conv(), partial(torch.optim.Adafactor, lr=1e-2)),
    "fused AdamW": lambda: images(Conv(), partial(torch.optim.AdamW, lr=1e-2, fused=True)),
    "Shampoo (a preconditioner for each axis)": lambda: with_optimizer(
        lambda model: Shampoo(model.parameters())
    ),
    "SAM": sam,
    "Lookahead": lambda: with_optimizer(
        lambda model: Lookahead(torch.optim.AdamW(model.parameters(), 1e-2))
    ),
    "LBFGS": lbfgs,
    "Muon beside AdamW": muon,
    "single precision masters of bfloat16 weights": lambda: with_optimizer(
        Masters, Conv(torch.bfloat16)
    ),
    "one optimizer a parameter, in the backward pass": in_backward,
    "two optimizers": two_optimizers,
    "groups added to the optimizer": groups_added,
    "scaler, scheduler, generator": scaled,
    "average of the weights (EMA), named": averaged,
    "average as a dictionary, made anew in every update": shadow,
    "teacher inside the network": lambda: images(Teaching()),
    "torch.compile(model)": compiled,
    "model.compile()": compiled_in_place,
    "compiled parts": compiled_parts,
    "nn.DataParallel": lambda: parallel(nn.DataParallel),
    TWO: lambda: parallel(DistributedDataParallel),
    "autocast, accumulation, checkpointed activations": lambda: like(
        Economical, images(Checkpointed())
    ),
    "frozen layers": frozen,
    "adapters around a network that was cut": adapted,
    "gradient hooks that hold masks": masked_gradients,
    "bfloat16 weights": lambda: images(Conv(torch.bfloat16)),
    "float64 weights": lambda: images(Conv(torch.float64)),
    "channels_last": lambda: images(Conv().to(memory_format=torch.channels_last)),
    "outputs as a named tuple": lambda: images(Named()),
    "tied weights": tied,
    "padded nn.TransformerEncoder": padded,
}
