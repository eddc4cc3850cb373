"""Replacing the content of tensors, and points in time to go back to.

Promises: parameters stay the same objects, so that optimizers keep pointing at them; a restore
point brings modules, weights, buffers, optimizer state, size attributes and masks back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elesh.trainer.network.headcounts import HEAD_SIZES
from elesh.trainer.network.layers import SIZES, named_tensors
from elesh.trainer.network.multihead import commit
from leyline import PrunedArchitecture, ShapeMismatch

_SIZES = (*SIZES, *HEAD_SIZES)

Cutter = Callable[[Tensor], Tensor]
"""What a cut makes of one tensor."""


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor other data of any shape; its ``grad`` is dropped.

    Autograd keeps a node for each parameter while an old graph is alive (for example through a
    ``loss`` that the training loop still holds) and with it the old shape; it forgets that node
    only when the type of the data changes, hence the step through another dtype.
    """
    if tensor.shape == data.shape:
        tensor.data.copy_(data)
        return
    tensor.grad = None
    other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def cut_state(
    optimizer: torch.optim.Optimizer, cutters: Mapping[str, Cutter], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """The optimizer's state of every tensor that is cut, cut likewise; nothing is changed yet.

    Raises:
        ShapeMismatch: if an optimizer keeps state of another shape than its parameter (a factored
            second moment, for example), which cannot be cut along with it.
    """
    states: dict[str, dict[str, Any]] = {}
    for path, cutter in cutters.items():
        tensor = tensors[path]
        state = optimizer.state.get(tensor)
        if not state:
            continue
        states[path] = {}
        for key, value in state.items():
            follows = isinstance(value, Tensor) and value.ndim > 0
            if follows and value.shape != tensor.shape:
                raise ShapeMismatch(
                    f"optimizer.state.{path}.{key}",
                    f"the parameter's shape {tuple(tensor.shape)} or a scalar",
                    f"shape {tuple(value.shape)}",
                    hint=f"{type(optimizer).__name__} cannot be cut along with its parameters",
                )
            states[path][key] = cutter(value) if follows else value
    return states


def forget(optimizer: torch.optim.Optimizer | None, gone: Iterable[Tensor]) -> None:
    """Take parameters, and the state kept of them, out of an optimizer."""
    if optimizer is None:
        return
    numbers = {id(tensor) for tensor in gone}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in numbers:
                optimizer.state.pop(parameter, None)
        group["params"] = [p for p in group["params"] if id(p) not in numbers]


@dataclass(frozen=True)
class Skeleton:
    """The structure of a network, without the contents of its tensors: which modules are where,
    their sizes, and which parameters are trained. It holds references only."""

    architecture: PrunedArchitecture
    modules: tuple[tuple[nn.Module, dict[str, nn.Module | None]], ...]
    """The children of every module: removed layers are replaced there."""
    sizes: tuple[tuple[nn.Module, dict[str, Any]], ...]
    trained: tuple[list[Tensor], ...]
    """The parameters of each of the optimizer's groups."""

    @classmethod
    def take(
        cls,
        model: nn.Module,
        architecture: PrunedArchitecture,
        optimizer: torch.optim.Optimizer | None,
    ) -> Skeleton:
        """The present structure."""
        return cls(
            architecture,
            tuple((module, dict(module._modules)) for module in model.modules()),
            tuple(
                (module, {name: vars(module)[name] for name in _SIZES if name in vars(module)})
                for module in model.modules()
            ),
            tuple(list(group["params"]) for group in optimizer.param_groups) if optimizer else (),
        )

    def put_in(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Make modules and trained parameters what they were; tensors are to follow."""
        for module, children in self.modules:
            module._modules.update(children)
        for number, parameters in enumerate(self.trained):
            assert optimizer is not None
            optimizer.param_groups[number]["params"] = list(parameters)

    def commit(self) -> None:
        """Set size attributes, once the tensors have their shapes."""
        for module, sizes in self.sizes:
            vars(module).update(sizes)
            commit(module)


@dataclass(frozen=True)
class RestorePoint:
    """Everything that a cut can change, as it was before."""

    skeleton: Skeleton
    masked: Mapping[str, frozenset[int]]
    masked_layers: frozenset[str]
    tensors: tuple[tuple[Tensor, Tensor], ...]
    states: tuple[tuple[nn.Parameter, dict[str, Any] | None], ...]

    @classmethod
    def take(
        cls,
        model: nn.Module,
        skeleton: Skeleton,
        masked: Mapping[str, frozenset[int]],
        masked_layers: frozenset[str],
        optimizer: torch.optim.Optimizer | None,
    ) -> RestorePoint:
        """A copy of the present, whose structure is ``skeleton``."""
        tensors = named_tensors(model).values()
        parameters = [p for p in tensors if isinstance(p, nn.Parameter)] if optimizer else []
        return cls(
            skeleton,
            dict(masked),
            masked_layers,
            tuple((tensor, tensor.detach().clone()) for tensor in tensors),
            tuple((p, _copied(optimizer.state.get(p))) for p in parameters) if optimizer else (),
        )

    def bring_back(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Make the copy the present again; gradients, being of another network, are dropped."""
        self.skeleton.put_in(optimizer)
        for tensor, saved in self.tensors:
            replace_data(tensor, saved)
            tensor.grad = None
        for parameter, state in self.states:
            assert optimizer is not None
            if state is None:
                optimizer.state.pop(parameter, None)
            else:
                optimizer.state[parameter] = state
        self.skeleton.commit()


def _copied(state: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not state:
        return None
    return {
        key: value.detach().clone() if isinstance(value, Tensor) else value
        for key, value in state.items()
    }
