"""Which slices of which tensors a cut removes, replacing their content, and restore points in
memory.

Promises: parameters stay the same objects, so that optimizers keep pointing at them; a restore
point brings modules, weights, buffers, optimizer state, size attributes and masks back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elesh.trainer.network.sizes import constants, size_names, sizes_of, take_sizes
from leyline import InvalidField, PrunedArchitecture

from .bypass import Bypass

if TYPE_CHECKING:
    from .optimizers import Optimizers

Cutter = Callable[[Tensor], Tensor]
"""What a cut makes of one tensor."""


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor other data of any shape; its ``grad`` is dropped."""
    if tensor.shape == data.shape:
        tensor.data.copy_(data)
    else:
        point_to(tensor, data)


def point_to(tensor: Tensor, data: Tensor) -> None:
    """Have a tensor's data be ``data``; where its shape is another, the ``grad`` is dropped.

    Autograd keeps a node for each parameter while an old graph is alive (for example through a
    ``loss`` that the training loop still holds) and with it the old shape; it forgets that node
    only when the type of the data changes, hence the step through another dtype.
    """
    if tensor.shape != data.shape:
        tensor.grad = None
        other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    if data.is_inference():
        with torch.inference_mode(False):
            data = data.clone()
    tensor.data = data


_HOME = "elesh_home"
"""An attribute of the copies that restore points hold."""


def kept(tensor: Tensor) -> Tensor:
    """A detached copy on the CPU for a restore point, which remembers its device."""
    home, tensor = tensor.device, tensor.detach()
    return from_home(tensor.clone() if home.type == "cpu" else tensor.cpu(), home)


def from_home(copy: Tensor, home: torch.device) -> Tensor:
    """The copy, from now on one that is kept of a tensor on this device."""
    setattr(copy, _HOME, home)
    return copy


def home_of(tensor: Tensor) -> torch.device:
    """The device that a kept copy is of; a tensor's own where it is none."""
    home: torch.device = getattr(tensor, _HOME, tensor.device)
    return home


def is_kept(tensor: Tensor) -> bool:
    """Whether it is a restore point's: what the script keeps is not."""
    return _HOME in vars(tensor)


def laid_out(data: Tensor, like: Tensor) -> Tensor:
    """``data`` with its axes in memory in the order of those of ``like`` (``channels_last``)."""
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda axis: (-strides[axis], axis))
    back = sorted(range(like.ndim), key=order.__getitem__)
    return data.permute(order).contiguous().permute(back)


def removable(
    architecture: PrunedArchitecture, units: Mapping[str, Iterable[int]]
) -> dict[str, frozenset[int]]:
    """The units by group.

    Raises:
        InvalidField: if one is not there or may not go, or a group would end at no multiple of its.
    """
    checked: dict[str, frozenset[int]] = {}
    for name, listed in units.items():
        group, chosen = architecture.group.get(name), frozenset(listed)
        if group is None:
            raise InvalidField("group", f"one of {sorted(architecture.group)}", name)
        where, outside = f"groups.{name}", sorted(chosen - set(range(group.size)))
        if outside:
            raise InvalidField(where, f"units from 0 to {group.size - 1}", outside)
        if chosen and not group.prunable:
            raise InvalidField(where, "a prunable group", f"not prunable: {group.reason}")
        left = group.size - len(chosen)
        if chosen and (left < 1 or left % group.unit_multiple):
            expected = f"a multiple of {group.unit_multiple}, at least one, to be left"
            raise InvalidField(where, expected, f"{left} of {group.size} left")
        if chosen:
            checked[name] = chosen
    return checked


def cutters_of(
    lost: Mapping[str, Mapping[int, set[int]]], tensors: Mapping[str, Tensor]
) -> dict[str, Cutter]:
    """For every tensor that shrinks (:func:`indices_lost`), the function that takes the removed
    indices out."""

    def cutter(shape: tuple[int, ...], axes: Mapping[int, set[int]]) -> Cutter:
        kept = {
            dim: torch.tensor([i for i in range(shape[dim]) if i not in lost])
            for dim, lost in axes.items()
        }

        def cut(tensor: Tensor) -> Tensor:
            like = tensor
            with torch.inference_mode(False):  # what is made in it cannot be trained
                for dim, indices in kept.items():
                    tensor = tensor.index_select(dim, indices.to(tensor.device))
                return laid_out(tensor, like)

        return cut

    return {path: cutter(tuple(tensors[path].shape), axes) for path, axes in lost.items()}


def indices_lost(
    architecture: PrunedArchitecture, units: Mapping[str, Collection[int]]
) -> dict[str, dict[int, set[int]]]:
    """By tensor and axis, the indices that these units take along."""
    gone: dict[str, dict[int, set[int]]] = {}
    for name, chosen in units.items():
        for part in architecture.group[name].slices:
            axes = gone.setdefault(part.tensor, {})
            axes.setdefault(part.dim, set()).update(part.all_of(chosen))
    return gone


def some_cutters(
    architecture: PrunedArchitecture, tensors: Mapping[str, Tensor]
) -> dict[str, Cutter]:
    """The cutters of a small cut: the first units of three groups."""
    groups = [g for g in architecture.groups if g.prunable and g.size > g.unit_multiple]
    chosen = {group.name: range(group.unit_multiple) for group in groups[:3]}
    return cutters_of(indices_lost(architecture, chosen), tensors)


@dataclass(frozen=True)
class Skeleton:
    """The structure of a network, without the contents of its tensors: which modules are where,
    their sizes, and which parameters are trained. It holds references only."""

    architecture: PrunedArchitecture
    modules: tuple[tuple[nn.Module, dict[str, nn.Module | None]], ...]
    """The children of every module: removed layers are replaced there."""
    sizes: tuple[tuple[nn.Module, dict[str, Any]], ...]
    constants: tuple[tuple[nn.Module, dict[str, Tensor]], ...]
    trained: tuple[list[Tensor], ...]
    """The parameters of each of the optimizers' groups."""

    @classmethod
    def take(
        cls,
        roots: Iterable[nn.Module],
        architecture: PrunedArchitecture,
        optimizers: Optimizers,
    ) -> Skeleton:
        """The present structure of a network and of its copies."""
        modules = [module for root in roots for module in root.modules()]
        names = size_names(architecture)
        return cls(
            architecture,
            tuple((module, dict(module._modules)) for module in modules),
            tuple((module, sizes_of(module, names)) for module in modules),
            tuple((module, found) for module in modules if (found := constants(module))),
            tuple(list(group["params"]) for group in optimizers.groups()),
        )

    def put_in(self, optimizers: Optimizers) -> None:
        """Make removed modules and trained parameters what they were; tensors are to follow.

        Modules that others have put in since, and parameters that have joined the optimizers, stay.
        """
        for module, children in self.modules:
            for name, child in children.items():
                if isinstance(child, Bypass) or isinstance(module._modules.get(name), Bypass):
                    module._modules[name] = child
        known = {id(parameter) for parameters in self.trained for parameter in parameters}
        for group, parameters in zip(optimizers.groups(), self.trained, strict=False):
            joined = [p for p in group["params"] if id(p) not in known]
            group["params"][:] = [*parameters, *joined]
        optimizers.refresh()

    def set_sizes(self) -> None:
        """Set size attributes, once the tensors have their shapes."""
        for module, sizes in self.sizes:
            take_sizes(module, sizes)
        for module, buffers in self.constants:
            for name, old in buffers.items():
                now = module._buffers[name]
                module._buffers[name] = old if now is None else old.to(now.device)


@dataclass(frozen=True)
class RestorePoint:
    """Everything that a cut can change, as it was before."""

    skeleton: Skeleton
    masked: Mapping[str, frozenset[int]]
    masked_layers: frozenset[str]
    tensors: tuple[tuple[Tensor, Tensor], ...]
    copies: tuple[Mapping[str, Tensor], ...]
    """Contents of every second set of the weights, by path: its tensors may be other objects by
    then."""
    states: tuple[tuple[Optimizer, tuple[tuple[Tensor, dict[str, Any]], ...]], ...]

    @classmethod
    def take(
        cls,
        tensors: Iterable[Tensor],
        copies: Iterable[Mapping[str, Tensor]],
        skeleton: Skeleton,
        masked: Mapping[str, frozenset[int]],
        masked_layers: frozenset[str],
        optimizers: Optimizers,
    ) -> RestorePoint:
        """A copy of the present: of these tensors and second sets of them, whose structure is
        ``skeleton``."""
        return cls(
            skeleton,
            dict(masked),
            masked_layers,
            tuple((tensor, _kept_here(tensor)) for tensor in tensors),
            tuple({path: _kept_here(tensor) for path, tensor in each.items()} for each in copies),
            tuple(
                (optimizer, tuple((p, _copied(state)) for p, state in optimizer.state.items()))
                for optimizer in optimizers.stateful()
            ),
        )

    def bring_back(
        self, optimizers: Optimizers, copies: Callable[[], Iterable[Mapping[str, Tensor]]]
    ) -> None:
        """Make the copy the present again; gradients, being of another network, are dropped.

        Args:
            copies: the second sets of the weights, once the modules are back.
        """
        self.skeleton.put_in(optimizers)
        filled = list(self.tensors)
        for tensors, contents in zip(copies(), self.copies, strict=False):
            filled += [(t, contents[path]) for path, t in tensors.items() if path in contents]
        for tensor, saved in filled:
            replace_data(tensor, saved)
            tensor.grad = None
        for optimizer, states in self.states:
            optimizer.state.clear()
            for parameter, state in states:
                optimizer.state[parameter] = state
        optimizers.refresh()
        self.skeleton.set_sizes()


def _kept_here(tensor: Tensor) -> Tensor:
    """As :func:`kept`, on the tensor's own device."""
    return from_home(_copied(tensor), tensor.device)


def _copied(value: Any) -> Any:
    """A copy of a tensor or of an optimizer's state that shares no tensor with it."""
    if isinstance(value, Tensor):
        with torch.inference_mode(False):
            return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(part) for part in value)
    return value
