"""The network's current structure, and which of its parts can be removed.

A :class:`PrunedArchitecture` is complete enough that removal can be computed without the
network: every removable unit (a channel of a coupled group, an attention head, a layer) lists
the slices of the tensors that go with it. Parameters after a cut are therefore counted exactly,
and the trainer cuts by the same slices that the worker counted.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Self, TypeVar

from pydantic import Field, model_validator

from leyline.base import Count, Message, ModelHash
from leyline.errors import IdentityMismatch, InvalidField
from leyline.identity import Level, stable_hash

from .blocks import LayerBlock, groups_left, inside_any
from .parts import (
    MAX_AXIS,
    ActivationProduct,
    GateSite,
    LayerDescriptor,
    NormSite,
    PruningGroup,
    PruningRecord,
    Span,
    TensorDescriptor,
    TensorSlice,
)


class PrunedArchitecture(Message):
    """Architecture descriptor with pruning history."""

    model_hash: ModelHash
    """16 hex digits over tensors and groups: the structure, not the weights."""
    tensors: tuple[TensorDescriptor, ...]
    """All parameters and buffers, in the order of the ``state_dict``."""
    layers: tuple[LayerDescriptor, ...]
    """All leaf modules."""
    groups: tuple[PruningGroup, ...]
    """What can be removed unit by unit."""
    original_parameters: Count
    """Parameters before the first cut."""
    original_macs: Count
    """Multiply-accumulates of one sample before the first cut."""
    history: tuple[PruningRecord, ...] = ()
    """All cuts so far, oldest first."""
    blocks: tuple[LayerBlock, ...] = Field(default=(), exclude_if=operator.not_)
    """Layers that can be removed whole, and why others cannot; removed ones stay listed. Left out
    of messages where there are none."""
    products: tuple[ActivationProduct, ...] = Field(default=(), exclude_if=operator.not_)
    """What is multiplied beside weights. Left out of messages where there is none."""

    @classmethod
    def unchecked(
        cls,
        tensors: tuple[TensorDescriptor, ...],
        layers: tuple[LayerDescriptor, ...],
        groups: tuple[PruningGroup, ...],
        blocks: tuple[LayerBlock, ...] = (),
        products: tuple[ActivationProduct, ...] = (),
    ) -> PrunedArchitecture:
        """A descriptor to count and try cuts by: not validated, and without its hash."""
        return cls.model_construct(
            model_hash="0" * 16,
            tensors=tensors,
            layers=layers,
            groups=groups,
            original_parameters=0,
            original_macs=0,
            history=(),
            blocks=blocks,
            products=products,
        )

    @classmethod
    def build(
        cls,
        tensors: tuple[TensorDescriptor, ...],
        layers: tuple[LayerDescriptor, ...],
        groups: tuple[PruningGroup, ...],
        *,
        history: tuple[PruningRecord, ...] = (),
        blocks: tuple[LayerBlock, ...] = (),
        products: tuple[ActivationProduct, ...] = (),
        original_parameters: int | None = None,
        original_macs: int | None = None,
    ) -> PrunedArchitecture:
        """Assemble a descriptor; the hash, and the original counts if not given, are computed."""
        draft = cls.unchecked(tensors, layers, groups, blocks, products)
        _check_references(draft)
        parameters, macs = original_parameters, original_macs
        found = {
            "model_hash": draft.computed_hash(),
            "history": history,
            "original_parameters": draft.parameters if parameters is None else parameters,
            "original_macs": draft.macs if macs is None else macs,
        }
        return draft.model_copy(update=found)

    def computed_hash(self) -> str:
        """Hash over tensors, groups (origins, wiring), blocks: the structure, not the weights."""
        parts = [f"{t.identifier}/{t.kind}/{t.owner}" for t in self.tensors]
        parts += [
            f"{g.name}/{g.level}/{g.original_size}/{','.join(map(str, g.origin))}"
            for g in self.groups
        ]
        parts += [
            f"{part.tensor}/{part.dim}/{part.start}/{part.width}/{part.indices}"
            for g in self.groups
            for part in g.slices
        ]
        for block in self.blocks:
            left = ",".join(f"{s.module}={s.kind}{s.extra_outputs}" for s in block.stand_ins)
            tensors = ",".join(block.tensors)
            parts.append(f"{block.name}/{block.removed}/{block.branch}/{left}/{tensors}")
        return stable_hash(*parts)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_references(self)
        computed = self.computed_hash()
        if computed != self.model_hash:
            raise IdentityMismatch("architecture.model_hash", computed, self.model_hash)
        return self

    @cached_property
    def tensor(self) -> Mapping[str, TensorDescriptor]:
        """Tensors by path."""
        return {t.path: t for t in self.tensors}

    @cached_property
    def group(self) -> Mapping[str, PruningGroup]:
        """Groups by name."""
        return {g.name: g for g in self.groups}

    @cached_property
    def block(self) -> Mapping[str, LayerBlock]:
        """Blocks by name."""
        return {b.name: b for b in self.blocks}

    @property
    def parameters(self) -> int:
        """Number of parameters now (buffers not counted)."""
        return sum(t.numel for t in self.tensors if t.kind == "parameter")

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample now."""
        by_weights = sum(self.tensor[x.weight].numel * x.positions for x in self.layers if x.weight)
        return by_weights + sum(product.macs for product in self.products)

    def without(
        self, removed: Mapping[str, Iterable[int]], *, epoch: int = 0, key: str = ""
    ) -> PrunedArchitecture:
        """The architecture after removing units (current numbering) of groups, by group name.

        Raises:
            InvalidField: if a group is unknown or a unit is outside it.
        """
        chosen = {name: frozenset(units) for name, units in removed.items()}
        lost: dict[_Axis, set[int]] = {}
        records = []
        for name, units in chosen.items():
            group = self.group.get(name)
            if group is None and units:
                raise InvalidField("group", f"one of {sorted(self.group)}", name)
            if group is None or not units:
                continue
            if outside := sorted(unit for unit in units if not 0 <= unit < group.size):
                raise InvalidField(f"groups.{name}", f"units from 0 to {group.size - 1}", outside)
            parts: tuple[TensorSlice | GateSite, ...] = (*group.slices, *group.sites, *group.norms)
            for part in parts:
                lost.setdefault(_axis(part), set()).update(part.all_of(units))
            record = PruningRecord(
                epoch=epoch,
                idempotency_key=key or "manual",
                group=group.name,
                level=group.level,
                original_indices=tuple(group.origin[unit] for unit in sorted(units)),
            )
            records.append(record)
        counts = {name: len(units) for name, units in chosen.items()}
        gone = {axis: sorted(indices) for axis, indices in lost.items()}
        tensors = []
        for tensor in self.tensors:
            left = (n - len(gone.get((tensor.path, dim), ())) for dim, n in enumerate(tensor.shape))
            shape = tuple(left)
            same = shape == tensor.shape
            tensors.append(tensor if same else tensor.model_copy(update={"shape": shape}))
        return PrunedArchitecture.build(
            tuple(tensors),
            self.layers,
            tuple(_renumbered(g, chosen.get(g.name, frozenset()), gone) for g in self.groups),
            history=(*self.history, *records),
            blocks=self.blocks,
            products=tuple(one.without(counts) for one in self.products),
            original_parameters=self.original_parameters,
            original_macs=self.original_macs,
        )

    def without_layers(
        self, names: Iterable[str], *, epoch: int = 0, key: str = ""
    ) -> PrunedArchitecture:
        """The architecture after removing whole blocks, by name.

        Raises:
            InvalidField: if a block is unknown, was removed before, or may not be removed.
        """
        chosen = [self._block(name) for name in dict.fromkeys(names)]
        gone = {path for block in chosen for path in block.tensors}
        replaced = {path for block in chosen for path in block.modules}
        removed, blocks = {block.name for block in chosen}, []
        for block in self.blocks:
            kept = tuple(path for path in block.tensors if path not in gone)
            if block.name in removed:
                block = block.model_copy(update={"removed": True})
            elif not block.removed and kept != block.tensors:  # around a removed one
                block = block.model_copy(update={"tensors": kept})
            blocks.append(block)
        records = tuple(
            PruningRecord(
                epoch=epoch,
                idempotency_key=key or "manual",
                group=block.name,
                level=Level.LAYER,
                original_indices=(),
            )
            for block in chosen
        )
        groups = groups_left(self.groups, gone, replaced)
        left = {group.name for group in groups}
        products = (p for p in self.products if not inside_any(p.module, replaced))
        return PrunedArchitecture.build(
            tuple(t for t in self.tensors if t.path not in gone),
            tuple(x for x in self.layers if not inside_any(x.name, replaced)),
            groups,
            history=self.history + records,
            blocks=tuple(blocks),
            products=tuple(product.among(left) for product in products),
            original_parameters=self.original_parameters,
            original_macs=self.original_macs,
        )

    def _block(self, name: str) -> LayerBlock:
        block = self.block.get(name)
        if block is None:
            raise InvalidField("block", f"one of {sorted(self.block)}", name)
        if block.removed or not block.prunable:
            found = "removed before" if block.removed else f"not prunable: {block.reason}"
            raise InvalidField(f"blocks.{name}", "a layer that may be removed", found)
        return block


_Part = TypeVar("_Part", TensorSlice, GateSite, NormSite)
_Axis = tuple[str, int]
"""A tensor's or a gate site's name with one of its dimensions."""


def _axis(part: TensorSlice | GateSite) -> _Axis:
    # Tensors and modules never share a name: a tensor's path ends in its attribute.
    return (part.tensor if isinstance(part, TensorSlice) else part.module, part.dim)


def _renumbered(
    group: PruningGroup, units: frozenset[int], gone: Mapping[_Axis, list[int]]
) -> PruningGroup:
    """The group after the cut: its units without the removed ones, its spans moved up."""
    kept = [unit for unit in range(group.size) if unit not in units]

    def move(part: _Part) -> _Part:
        lost = gone.get(_axis(part))
        if not lost:
            return part
        # Another group on the same axis must not have taken a part of a unit that stays.
        taken = set(lost)
        torn = next((index for index in part.all_of(kept) if index in taken), None)
        if torn is not None:
            where = f"groups.{group.name}.{'.'.join(map(str, _axis(part)))}"
            expected = "units that are removed whole"
            raise InvalidField(where, expected, f"index {torn} taken elsewhere")
        if part.indices is None:
            return part.model_copy(update={"start": part.start - bisect_left(lost, part.start)})
        indices = tuple(i - bisect_left(lost, i) for i in part.all_of(kept))
        return part.model_copy(update={"indices": indices})

    return group.model_copy(
        update={
            "origin": tuple(group.origin[unit] for unit in kept),
            "slices": tuple(move(part) for part in group.slices),
            "sites": tuple(move(part) for part in group.sites),
            "norms": tuple(move(part) for part in group.norms),
        }
    )


def _check_references(architecture: PrunedArchitecture) -> None:
    """Names are unique, every tensor that is named exists, every unit lies inside its axes."""
    for field, names in (
        ("tensors", [t.path for t in architecture.tensors]),
        ("groups", [g.name for g in architecture.groups]),
        ("blocks", [b.name for b in architecture.blocks]),
    ):
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidField(field, "every name once", twice)
    for block in architecture.blocks:
        unknown = [path for path in block.tensors if path not in architecture.tensor]
        if unknown and not block.removed:
            raise InvalidField(f"blocks.{block.name}.tensors", "paths of tensors", unknown)
    for layer in architecture.layers:
        if layer.weight and layer.weight not in architecture.tensor:
            raise InvalidField(f"layers.{layer.name}.weight", "the path of a tensor", layer.weight)
    for product in architecture.products:
        _check_product(product, architecture.group)
    for group in architecture.groups:
        for site in (*group.sites, *group.norms):
            _check_span(f"groups.{group.name}.sites.{site.module}", site, group.size, MAX_AXIS)
        for part in group.slices:
            where = f"groups.{group.name}.slices.{part.tensor}"
            tensor = architecture.tensor.get(part.tensor)
            if tensor is None:
                raise InvalidField(where, "the path of a tensor", part.tensor)
            if part.dim >= len(tensor.shape):
                raise InvalidField(f"{where}.dim", f"a dimension of {tensor.shape}", part.dim)
            _check_span(where, part, group.size, min(tensor.shape[part.dim], MAX_AXIS))
    for name in ("parameters", "macs"):
        if getattr(architecture, name) >= 2**63:
            raise InvalidField(name, "less than 2**63", getattr(architecture, name))


def _check_product(product: ActivationProduct, groups: Mapping[str, PruningGroup]) -> None:
    """Every axis has room for all units that it becomes shorter with."""
    where = f"products.{product.module}.cuts"
    left = list(product.shape)
    for cut in product.cuts:
        if cut.group not in groups:
            raise InvalidField(where, "groups of the architecture", cut.group)
        if cut.dim >= len(left):
            raise InvalidField(where, f"an axis of {product.shape}", cut.dim)
        left[cut.dim] -= cut.width * groups[cut.group].size
    if min(left, default=0) < 0:
        raise InvalidField(where, f"no more units than {product.shape} has room for", left)


def _check_span(where: str, part: Span, units: int, length: int) -> None:
    """All indices of ``units`` units are different and lie on an axis of ``length``."""
    if part.indices is None:
        top = part.start + units * part.width - 1
        if units and top >= length:
            raise InvalidField(where, f"indices below {length}", top)
        return
    if len(part.indices) != units * part.width:
        expected = f"{units * part.width} numbers"
        raise InvalidField(f"{where}.indices", expected, len(part.indices))
    if len(set(part.indices)) != len(part.indices):
        raise InvalidField(f"{where}.indices", "every index once", part.indices)
    if part.indices and not 0 <= min(part.indices) <= max(part.indices) < length:
        found = (min(part.indices), max(part.indices))
        raise InvalidField(f"{where}.indices", f"indices from 0 to {length - 1}", found)
