"""Masks: the outputs of removed units, and the branches of removed layers, are multiplied by zero
where they are read.

Promises: nothing is added to the ``state_dict``; a mask follows its input to any device and
dtype; while there is one, compiled networks run uncompiled, as they would not see it; after
:meth:`Masks.clear` no hook is left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elesh.trainer.network.calling import Removable, replace_inputs, through_layers
from elesh.trainer.network.kinds.matrices import layer_at
from elesh.trainer.network.kinds.norms import refilled, replace_weight
from elesh.trainer.network.kinds.recurrent import without_states
from elesh.trainer.network.state import Uncompiled
from leyline import LayerBlock, NormSite, PrunedArchitecture

from .bypass import first_of, with_first


class _Mask:
    """A forward pre-hook that multiplies axis ``dim`` of the module's first input.

    Args:
        norm: of a normalisation over channels, which sees the kept ones only.
    """

    def __init__(self, dim: int, dead: Collection[int], norm: NormSite | None = None) -> None:
        self.dim, self._norm = dim, norm
        self.dead = np.fromiter(dead, dtype=np.int64, count=len(dead))
        self._factors: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replace_inputs(module, args, kwargs, self.masked)

    def masked(self, x: Tensor) -> Tensor:
        if x.is_nested and x.layout is torch.strided:
            # As nn.TransformerEncoder packs padded batches: rows of sequences of their own length.
            return torch.nested.as_nested_tensor([self.masked(row) for row in x.unbind()])
        factors, size, norm = self._factors, x.shape[self.dim], self._norm
        if factors is None or (factors.device, factors.dtype) != (x.device, x.dtype):
            with torch.inference_mode(False):
                kept = np.ones(size, dtype=np.float32)
                kept[self.dead] = 0
                factors = torch.from_numpy(kept).to(x.device, x.dtype)
            self._factors = factors
        shape = [1] * x.ndim
        shape[self.dim] = size
        gate = factors.view(shape)
        return x * gate if norm is None else refilled(x, gate, self.dim, norm.kind, norm.eps)


class _MaskOfParts:
    """A forward pre-hook that masks every equal part of the batch in a way of its own."""

    def __init__(self, dim: int, dead: Sequence[Collection[int]]) -> None:
        self._dim, self._dead = dim, dead

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replace_inputs(module, args, kwargs, self._masked)

    def _masked(self, x: Tensor) -> Tensor:
        gate = x.new_ones(len(self._dead), x.shape[self._dim])
        for row, indices in zip(gate, self._dead, strict=True):
            row[list(indices)] = 0
        shape = [1] * x.ndim
        shape[0], shape[self._dim] = len(x), x.shape[self._dim]
        return x * gate.repeat_interleave(len(x) // len(gate), 0).view(shape)


class Masks:
    """The masks of a model, and of copies with the same paths, set all at once from the units and
    layers that are to be silent."""

    def __init__(self, *models: nn.Module) -> None:
        self._models = models
        self._handles: list[Removable] = []
        self._uncompiled = Uncompiled(models[0])

    def set(
        self,
        architecture: PrunedArchitecture,
        units: Mapping[str, Collection[int]],
        blocks: Iterable[LayerBlock] = (),
    ) -> None:
        """Silence just these units (current numbering), by group name, and these blocks: the
        branch of each is multiplied by zero."""
        self.clear()
        branches = [block.branch for block in blocks]
        dead: dict[tuple[str, int], list[int]] = {}
        sites: dict[str, NormSite] = {}
        gone: dict[str, list[int]] = {}
        for name, chosen in units.items():
            for site in architecture.group[name].sites:
                dead.setdefault(site.axis, []).extend(site.all_of(chosen))
            for norm in architecture.group[name].norms:
                sites[norm.module] = norm
                gone.setdefault(norm.module, []).extend(norm.all_of(chosen))
        for model in self._models:
            for path in branches:
                module = layer_at(model, path)
                self._handles.append(module.register_forward_hook(_silence))
            paths = {path for (path, _), indices in dead.items() if indices} | set(gone)
            self._handles += through_layers(model, paths)
            for (path, dim), indices in dead.items():
                if indices:
                    module, mask = layer_at(model, path), _Mask(dim, indices)
                    self._handles.append(module.register_forward_pre_hook(mask, with_kwargs=True))
            for path, indices in gone.items():
                if indices:
                    self._handles += _norm_masked(layer_at(model, path), sites[path], indices)
        if self._handles:
            self._uncompiled.__enter__()

    def set_parts(
        self, architecture: PrunedArchitecture, parts: Sequence[tuple[str, Collection[int]]]
    ) -> None:
        """Silence, in every equal part of the batches to come, just these units of one group; of
        groups without normalisations over their units."""
        self.clear()
        dead: dict[tuple[str, int], list[Collection[int]]] = {}
        for number, (name, chosen) in enumerate(parts):
            for site in architecture.group[name].sites:
                found = dead.setdefault(site.axis, [()] * len(parts))
                found[number] = {*found[number], *site.all_of(chosen)}
        paths = {path for path, _ in dead}
        for model in self._models:
            self._handles += through_layers(model, paths)
            for (path, dim), indices in dead.items():
                module, mask = layer_at(model, path), _MaskOfParts(dim, indices)
                self._handles.append(module.register_forward_pre_hook(mask, with_kwargs=True))
        self._uncompiled.__enter__()

    def clear(self) -> None:
        """Take every mask off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._uncompiled.__exit__()


def _norm_masked(module: nn.Module, site: NormSite, dead: Collection[int]) -> list[RemovableHandle]:
    """Mask channels of a normalisation, by what it normalises."""
    mask = _Mask(site.dim, dead, site)
    if site.kind == "states":
        return list(without_states(module, partial(_kept, module, frozenset(dead))))
    if site.kind == "weights":
        return list(replace_weight(module, mask.masked))
    return [module.register_forward_pre_hook(mask, with_kwargs=True)]


def _kept(module: Any, dead: Collection[int]) -> Tensor:
    """[H]: which states of a recurrent layer stay."""
    return torch.tensor([float(unit not in dead) for unit in range(module.hidden_size)])


def _silence(module: nn.Module, args: Any, output: Any) -> Any:
    return with_first(output, first_of(output) * 0)
