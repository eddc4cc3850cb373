"""The ways to a smaller network, each as an engineer would write it into the training script.

A method is called with a :class:`Run`; ``run.steps()`` trains and says, three times, what share of
the MACs (or parameters) may be left. Lines of a method are counted as they stand here.
"""

from __future__ import annotations

import inspect
import io
import tempfile
import tokenize
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import elesh
from elesh.demo import local_fleet

from .nets import Attention
from .run import Run, loss_of

__all__ = ["METHODS", "NotApplicable", "lines_of"]


class NotApplicable(Exception):
    """The method cannot be used on this network; says why."""


def unpruned(run: Run) -> None:
    """The script as it is."""
    run.train()


def ours(run: Run, *, at_once: bool = False) -> None:
    """``elesh.prune`` at every step, everything by default."""
    for share in run.steps(at_once):
        elesh.prune(
            run.model,
            run.calibration,
            {run.task.resource: share},
            evaluate=run.evaluate,
            optimizer=run.optimizer,
            progress=False,
        )


def attached(run: Run) -> None:
    """``elesh.attach`` with a worker beside it; phases as long as the run allows."""
    quarter = run.epochs // 4
    names = ("validation", "conservative", "moderate", "aggressive")
    schedule = dict.fromkeys((f"{name}_epochs" for name in names), quarter)
    settings = {"structured_pruning": {"safety_schedule": schedule}}
    with (
        tempfile.TemporaryDirectory() as folder,
        local_fleet(settings) as (url, file),
        elesh.attach(
            run.model,
            run.optimizer,
            run_id="training-run",
            calibration=run.calibration,
            evaluate=run.evaluate,
            budget={run.task.resource: run.share},
            removed_at_most=0.9,
            every=1,
            url=url,
            settings=file,
            restore_dir=folder,
        ) as pruning,
    ):
        for epoch in pruning.epochs(run.epochs):
            run.epoch(epoch)
            pruning.step(epoch)
            pruning.session.wait(30)  # epochs of seconds are shorter than an analysis


def small(run: Run) -> None:
    """A network that is narrow from the start."""
    run.rebuild(narrowest(run, run.share))
    run.train()


def torch_pruning(
    run: Run,
    importance: Callable[[Run], Any],
    *,
    uniform: bool = False,
    at_once: bool = False,
) -> None:
    """torch-pruning's BasePruner, iterative: many small steps until the share is reached."""
    for share in run.steps(at_once):
        heads = {
            layer: module.heads
            for module in run.model.modules()
            if isinstance(module, Attention)
            for layer in (module.query, module.key, module.value)
        }
        pruner = tp.pruner.BasePruner(
            run.model,
            run.example,
            importance(run),
            global_pruning=not uniform,
            pruning_ratio=1.0,
            max_pruning_ratio=0.95,
            iterative_steps=100,
            ignored_layers=[run.model.head],
            num_heads=heads,
        )
        while run.left > share and pruner.current_step < 100:
            pruner.step()
        run.renew()


def magnitude(run: Run) -> Any:
    """Li et al. 2017, summed over a group (Fang et al. 2023)."""
    return tp.importance.GroupMagnitudeImportance(p=2)


def taylor(run: Run) -> Any:
    """Molchanov et al. 2019 on weights, of the calibration samples."""
    run.model.zero_grad()
    for inputs, labels in run.calibration:
        (loss_of(run.model(inputs), labels) / len(run.calibration)).backward()
    return tp.importance.GroupTaylorImportance()


def hessian(run: Run) -> Any:
    """Squared gradients of single samples. Version 1.6.1 keeps only the last one: summed here."""
    squares = [torch.zeros_like(p) for p in run.model.parameters()]
    inputs, labels = run.calibration[0]
    run.model.eval()
    for sample in range(64):
        run.model.zero_grad()
        loss_of(run.model(inputs[sample : sample + 1]), labels[sample : sample + 1]).backward()
        for square, parameter in zip(squares, run.model.parameters(), strict=True):
            square += parameter.grad**2
    for square, parameter in zip(squares, run.model.parameters(), strict=True):
        parameter.grad = square
    return tp.importance.GroupHessianImportance()


def slimming(run: Run, *, at_once: bool = False) -> None:
    """Network Slimming (Liu et al. 2017): L1 on the scales of batch normalisations, then those."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    if not any(isinstance(module, norms) for module in run.model.modules()):
        raise NotApplicable("no batch normalisation")

    def l1(model: nn.Module) -> Tensor:
        scales = [m.weight.abs().sum() for m in model.modules() if isinstance(m, norms)]
        return 1e-3 * torch.stack(scales).sum()

    run.penalty = l1
    torch_pruning(run, lambda _: tp.importance.BNScaleImportance(), at_once=at_once)


def narrowest(run: Run, share: float) -> int:
    """The largest width whose network needs no more than this share."""
    heads = [m.heads for m in run.model.modules() if isinstance(m, Attention)]
    width, step = run.task.width, max(heads, default=1)
    while width > step:
        width -= step
        if run.left_of(run.task.build(width)) <= share:
            break
    return width


METHODS: dict[str, Callable[[Run], None]] = {
    "unpruned": unpruned,
    "ours": ours,
    "ours, at once": partial(ours, at_once=True),
    "ours, attached": attached,
    "torch-pruning magnitude": partial(torch_pruning, importance=magnitude),
    "torch-pruning Taylor": partial(torch_pruning, importance=taylor),
    "torch-pruning Hessian": partial(torch_pruning, importance=hessian),
    "network slimming": slimming,
    "uniform magnitude": partial(torch_pruning, importance=magnitude, uniform=True),
    "torch-pruning magnitude, at once": partial(torch_pruning, importance=magnitude, at_once=True),
    "network slimming, at once": partial(slimming, at_once=True),
    "small from the start": small,
}
"""By the name in tables."""
_PARTS: dict[str, tuple[Callable[..., Any], ...]] = {
    "unpruned": (),
    "ours": (ours,),
    "ours, at once": (ours,),
    "ours, attached": (attached,),
    "torch-pruning magnitude": (torch_pruning, magnitude),
    "torch-pruning Taylor": (torch_pruning, taylor),
    "torch-pruning Hessian": (torch_pruning, hessian),
    "network slimming": (torch_pruning, slimming),
    "uniform magnitude": (torch_pruning, magnitude),
    "torch-pruning magnitude, at once": (torch_pruning, magnitude),
    "network slimming, at once": (torch_pruning, slimming),
    "small from the start": (small, narrowest),
}


def lines_of(method: str) -> int:
    """Lines that the method adds to the script: without signatures, comments and docstrings."""
    return sum(map(_body, _PARTS[method]))


def _body(function: Callable[..., Any]) -> int:
    source = inspect.getsource(function)
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    rows = {t.start[0] for t in tokens if t.type not in silent and t.type != tokenize.ENDMARKER}
    head = source[: source.index('"""', source.index('"""') + 3)].count("\n") + 1
    return sum(row > head for row in rows)
