"""The modules and parameters of a network whose structure stands still, listed once.

Promises: whoever asks the network is answered as before, other people's code included; afterwards
nothing is left on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["standing_still"]


@contextlib.contextmanager
def standing_still(model: nn.Module) -> Iterator[None]:
    """While entered, no module or parameter of ``model`` may come, go or be replaced: traversals
    from its root, and its modes, take one list that was made before."""
    kind: Any = type(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())

    def named_modules(*args: Any, **others: Any) -> Any:
        if args or others:
            return kind.named_modules(model, *args, **others)
        return iter(modules.items())

    def named_parameters(*args: Any, **others: Any) -> Any:
        if args or others not in ({}, {"recurse": True}):
            return kind.named_parameters(model, *args, **others)
        return iter(parameters.items())

    def get_submodule(target: str) -> Any:
        found = modules.get(target)
        return kind.get_submodule(model, target) if found is None else found

    def train(mode: bool = True) -> nn.Module:
        for module in modules.values():
            module.__dict__["training"] = mode
        return model

    answers: list[Any] = [named_modules, named_parameters, get_submodule]
    answers += [train] if all(map(_has_plain_modes, modules.values())) else []
    answering = {one.__name__: one for one in answers}
    answering = {name: one for name, one in answering.items() if name not in vars(model)}
    vars(model).update(answering)
    try:
        yield
    finally:
        for name in answering:
            del vars(model)[name]


def _has_plain_modes(module: nn.Module) -> bool:
    """Whether a mode is nothing but the module's own flag."""
    kind = type(module)
    own = "train" in vars(module) or "eval" in vars(module) or "training" not in vars(module)
    return not own and kind.train is nn.Module.train and kind.eval is nn.Module.eval
