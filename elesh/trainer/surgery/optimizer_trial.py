"""Tries optimizers on copies: a step before a cut, and steps after it.

Promises: nothing of the originals is touched, nor any random state; an optimizer that fails after a
cut is refused before there is one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elesh.observe import get_logger
from leyline import InvalidField
from leyline.errors import brief

from .averages import WeightCopy
from .optimizers import FRAMEWORKS, Optimizers, require_apart, wrapped
from .tensors import Cutter, replace_data

_log = get_logger(__name__)
_KNOWN = ("torch.optim.", *FRAMEWORKS)


def require_cuttable(
    optimizers: Optimizers,
    tensors: Mapping[str, Tensor],
    cutters: Mapping[str, Cutter],
    copies: Iterable[WeightCopy] = (),
) -> None:
    """Refuse optimizers that do not survive a cut, before there is one.

    Those of PyTorch are known to. Of others, copies take a step with gradients made up, are cut,
    and take two more; nothing of the originals is touched. One that cannot be copied, or needs
    more for a step than gradients and a closure, is not tried, and a log line says so.

    Args:
        copies: second sets of the weights, which optimizers may keep.

    Raises:
        InvalidField: saying what fails.
    """
    if all(type(o).__module__.startswith(_KNOWN) for o in optimizers.all) or not cutters:
        return
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        failed = _failure(optimizers, tensors, cutters, copies)
    if failed:
        raise InvalidField(
            "optimizer",
            "one that goes on after its parameters have changed their shapes",
            f"{', '.join(optimizers.names)}: {failed}",
            hint="train with an optimizer of torch.optim, or prune without optimizer state: "
            "give none to the Surgeon and make a new one after every cut",
        )


def copied_optimizers(optimizers: Optimizers, memo: dict[int, Any]) -> list[Any]:
    """What was given, again, sharing nothing with the originals but what ``memo`` has copies of
    (as ``copy.deepcopy``); of wrappers of frameworks, the optimizers inside.

    Raises:
        Exception: if something of it cannot be copied.
    """
    found: dict[int, Any] = {}
    for given in optimizers.given:
        inner = list(wrapped(given))
        framework = type(given).__module__.startswith(FRAMEWORKS)
        for one in inner if framework else [given]:
            if not type(one).__module__.startswith(FRAMEWORKS):
                found[id(one)] = _copied(one, memo)
    return list(found.values())


def _copied(one: Any, memo: dict[int, Any]) -> Any:
    """A copy that can step without the original, in ``memo``, with all that it wraps."""
    if id(one) in memo:
        return memo[id(one)]
    if not isinstance(one, Optimizer):
        for inner in wrapped(one):
            _copied(inner, memo)
        return copy.deepcopy(one, memo)
    # Not by copy.deepcopy: that leaves out all attributes but state and groups.
    made: Optimizer = object.__new__(type(one))
    memo[id(one)] = made
    for inner in wrapped(one, 1):
        _copied(inner, memo)
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    for name, value in list(vars(one).items()):
        if name != "step":  # schedulers put one there that steps the original
            vars(made)[name] = type(value)() if name in hooks else copy.deepcopy(value, memo)
    return made


def _leaf(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    leaf = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        leaf = nn.Parameter(leaf, requires_grad=tensor.requires_grad)
    memo[id(tensor)] = leaf
    return leaf


def _failure(
    optimizers: Optimizers,
    tensors: Mapping[str, Tensor],
    cutters: Mapping[str, Cutter],
    copies: Iterable[WeightCopy],
) -> str:
    memo: dict[int, Any] = {}
    try:
        ours = {path: _leaf(tensor, memo) for path, tensor in tensors.items()}
        made = Optimizers(copied_optimizers(optimizers, memo), ours)
        made.masters = {path: memo[id(tensor)] for path, tensor in optimizers.masters.items()}
        _step(made)
    except Exception as error:  # It cannot be copied, or needs more for a step.
        _log.warning(
            "optimizer not tried: whether it goes on after a cut is not known",
            optimizer=", ".join(optimizers.names),
            error=f"{type(error).__name__}: {brief(str(error))}",
        )
        return ""
    seconds = [made.masters, *(each.tensors() for each in copies)]
    for optimizer in made.all:
        require_apart(optimizer)
    when = "its state is cut"
    try:
        cuts = made.cut(cutters, ours)
        for path, cutter in cutters.items():
            others = [memo.get(id(each[path])) for each in seconds[1:] if path in each]
            for tensor in (ours[path], made.masters.get(path), *others):
                if tensor is not None:
                    replace_data(tensor, cutter(tensor.detach()))
        made.put(cuts)
        when = "it steps after a cut"
        _step(made)
        _step(made)
    except Exception as error:
        return f"{type(error).__name__} when {when}: {brief(str(error))}"
    return ""


def _step(ours: Optimizers) -> None:
    """One step of everything that was given, with random gradients."""
    parameters = [p for group in ours.groups() for p in group["params"]]

    def closure() -> Tensor:
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return torch.zeros(())

    inside = {id(inner) for o in ours.given for inner in wrapped(o) if inner is not o}
    for optimizer in ours.given:
        if id(optimizer) not in inside:
            closure()
            optimizer.step(closure)
