"""Masks units of a network, cuts them out, takes a cut back, and replays earlier cuts.

Promises: a cut is made wholly or not at all; parameters keep their identity and optimizer state
is cut with them; after :meth:`Surgeon.undo` everything is bit for bit as before the cut.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from elesh.trainer.network.headcounts import refit_heads
from elesh.trainer.network.layers import named_tensors, refit, require_fit
from leyline import InvalidField, Level, PrunedArchitecture, PruningGroup, PruningRecord

from .bypass import BranchMasks, put_in
from .lineage import present, remember, steps
from .masks import Masks
from .reconstruction import Moments, redistributed
from .tensors import Cutter, RestorePoint, Skeleton, cut_state, forget, replace_data

Units = Mapping[str, Iterable[int]]
"""Units in current numbering by group name, as in ``decision.units``."""


class Surgeon:
    """The only one who changes the network's structure.

    A mask multiplies by zero what enters the *consumers* of a unit, not what its producer puts
    out. So nothing is left behind that would have to be folded away when the unit is cut: a bias
    or a normalisation between producer and consumer may turn a zeroed output into something else,
    but what the consumer sees of a masked unit is zero, just as after the cut.

    Args:
        model: the network; its parameters stay the same objects.
        architecture: what ``Recorder(model, ...)`` found.
        optimizer: whose state (momentum, moments) is cut along with the parameters.
        restore_points: how many cuts can be undone; each holds a copy of all weights, buffers and
            optimizer state.

    Raises:
        ShapeMismatch: if the architecture does not describe the model.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: PrunedArchitecture,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        restore_points: int = 3,
    ) -> None:
        require_fit(model, architecture)
        self._model = model
        self._architecture = architecture
        self._optimizer = optimizer
        self._limit = restore_points
        self._points: list[RestorePoint] = []
        self._skeletons = [Skeleton.take(model, architecture, optimizer)]
        self._masks = Masks(model)
        self._masked: dict[str, frozenset[int]] = {}
        self._branch_masks = BranchMasks(model)
        self._masked_layers: frozenset[str] = frozenset()
        remember(model, architecture)

    @property
    def architecture(self) -> PrunedArchitecture:
        """What the network looks like now (masked units are still in it)."""
        return self._architecture

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self._model

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer whose state is cut along, if there is one."""
        return self._optimizer

    @property
    def masked(self) -> dict[str, tuple[int, ...]]:
        """The masked units by group, in current numbering."""
        # Kept in original numbering, which no cut and no undo can shift.
        found: dict[str, tuple[int, ...]] = {}
        for name, originals in self._masked.items():
            if name not in self._architecture.group:  # It went with a whole layer.
                continue
            origin = self._architecture.group[name].origin
            units = tuple(unit for unit, number in enumerate(origin) if number in originals)
            if units:
                found[name] = units
        return found

    @property
    def masked_layers(self) -> tuple[str, ...]:
        """The masked blocks, by name."""
        return tuple(sorted(self._masked_layers))

    @property
    def can_undo(self) -> int:
        """How many cuts can be undone now."""
        return len(self._points)

    def mask(self, units: Units) -> None:
        """Silence units until :meth:`unmask`, on top of those that are masked already.

        Raises:
            InvalidField: naming group and unit, if one does not exist or may not be removed.
        """
        for name, chosen in self._checked(units).items():
            origin = self._architecture.group[name].origin
            before = self._masked.get(name, frozenset())
            self._masked[name] = before | {origin[unit] for unit in chosen}
        self._masks.set(self._architecture, self.masked)

    def mask_layers(self, names: Iterable[str]) -> None:
        """Multiply the branches of whole blocks by zero until :meth:`unmask`, on top of those that
        are masked already.

        Raises:
            InvalidField: if a block does not exist (any more) or may not be removed.
        """
        chosen = frozenset(names)
        self._architecture.without_layers(sorted(chosen))  # refuses what cannot go
        self._masked_layers |= chosen
        self._set_masks()

    def unmask(self) -> None:
        """Let every masked unit and layer speak again."""
        self._masked.clear()
        self._masks.clear()
        self._masked_layers = frozenset()
        self._branch_masks.clear()

    def cut(
        self, units: Units, *, epoch: int = 0, key: str = "", redistribute: Moments | None = None
    ) -> PrunedArchitecture:
        """Remove units for good; returns the architecture afterwards.

        Args:
            units: current numbering, by group name.
            epoch, key: for the history (the decision's idempotency key).
            redistribute: moments of the network as it is now, unmasked (``Recorder.moments``).
                The consumers of the units are then re-solved, so that what the kept channels
                predict of the removed ones is not lost; without, their weights stay as they are.

        Raises:
            InvalidField: naming group and unit, if one does not exist or may not be removed, or
                if nothing would be left of a group.
            ShapeMismatch: if the model, or the optimizer's state, is not what the architecture
                says. Nothing has been changed then.
            IdentityMismatch: if the moments were measured on another structure.
        """
        chosen = self._checked(units)
        require_fit(self._model, self._architecture)
        after = self._architecture.without(chosen, epoch=epoch, key=key)
        tensors = named_tensors(self._model)
        cutters = _cutters(self._architecture, chosen, tensors)
        data = {}
        if redistribute is not None:
            data = redistributed(self._model, self._architecture, chosen, redistribute)
        for path, cutter in cutters.items():
            data[path] = cutter(data.get(path, tensors[path].detach()))
        states = cut_state(self._optimizer, cutters, tensors) if self._optimizer else {}
        self._remember()
        # Everything that can fail is behind us.
        for path, new in data.items():
            replace_data(tensors[path], new)
        for path, state in states.items():
            self._optimizer.state[tensors[path]] = state  # type: ignore[union-attr]
        for parameter in self._model.parameters():
            parameter.grad = None
        for module in self._model.modules():
            refit(module)
        for name in chosen:
            if after.group[name].level is Level.HEAD:
                refit_heads(self._model, self._architecture.group[name], after.group[name])
        self._reach(after)
        return after

    def cut_layers(
        self, names: Iterable[str], *, epoch: int = 0, key: str = ""
    ) -> PrunedArchitecture:
        """Remove whole blocks for good; returns the architecture afterwards.

        Their modules are replaced by stand-ins without parameters, and the optimizer forgets their
        parameters and its state of them.

        Args:
            names: of blocks of the architecture.
            epoch, key: for the history (the decision's idempotency key).

        Raises:
            InvalidField: if a block does not exist (any more) or may not be removed.
            ShapeMismatch: if the model is not what the architecture says. Nothing has been
                changed then.
        """
        names = list(dict.fromkeys(names))
        after = self._architecture.without_layers(names, epoch=epoch, key=key)
        require_fit(self._model, self._architecture)
        self._remember()
        self._masks.clear()
        self._branch_masks.clear()
        tensors = named_tensors(self._model)
        blocks = [self._architecture.block[name] for name in names]
        put_in(self._model, [stand_in for block in blocks for stand_in in block.stand_ins])
        gone = tensors.keys() - named_tensors(self._model).keys()
        forget(self._optimizer, [tensors[path] for path in gone])
        for parameter in tensors.values():
            parameter.grad = None
        self._reach(after)
        return after

    def undo(self) -> PrunedArchitecture:
        """Go back to just before the last cut, bit for bit, whatever was trained since.

        Raises:
            InvalidField: if there is no cut to undo.
        """
        if not self._points:
            raise InvalidField(
                "undo", f"a cut to undo (the last {self._limit} are kept)", "none left"
            )
        point = self._points.pop()
        self._masks.clear()
        self._branch_masks.clear()
        point.bring_back(self._optimizer)
        self._architecture = point.skeleton.architecture
        remember(self._model, self._architecture)
        self._masked, self._masked_layers = dict(point.masked), point.masked_layers
        self._set_masks()
        return self._architecture

    def undo_to(self, architecture: PrunedArchitecture) -> bool:
        """Undo cuts until the network is just as this object describes it; False, and nothing is
        undone, if the restore point for that is not kept."""
        kept = [point.skeleton.architecture for point in self._points]
        if self._architecture is not architecture and not any(a is architecture for a in kept):
            return False
        while self._architecture is not architecture:
            self.undo()
        return True

    def replay(self, history: Iterable[PruningRecord]) -> PrunedArchitecture:
        """Make the cuts of a history (``architecture.history``) on this network.

        Meant for a freshly built model: afterwards a ``state_dict`` saved after those cuts loads.

        Raises:
            InvalidField: if a record names a group or a unit that is not there (any more).
        """
        for step in steps(history):
            if step.layers:
                self.cut_layers(step.layers, epoch=step.epoch, key=step.key)
            else:
                units = present(self._architecture, step)
                self.cut(units, epoch=step.epoch, key=step.key)
        return self._architecture

    def move_to(self, architecture: PrunedArchitecture) -> None:
        """Give the network the structure of ``architecture``, back or forth in its history.

        Tensors that must change their shape get new ones **without sound content**: whoever moves
        puts the contents in afterwards, as restore points do. Masks are taken off, and cuts made
        before cannot be undone any more.

        Raises:
            InvalidField: if it does not descend from the network that this surgeon began with.
        """
        history = architecture.history
        known = [
            (len(skeleton.architecture.history), number)
            for number, skeleton in enumerate(self._skeletons)
            if skeleton.architecture.history == history[: len(skeleton.architecture.history)]
        ]
        if not known:
            first = self._skeletons[0].architecture
            expected = f"a history that begins with the {len(first.history)} cuts made before"
            raise InvalidField("architecture.history", expected, f"{len(history)} other cuts")
        self.unmask()
        skeleton = self._skeletons[max(known)[1]]
        skeleton.put_in(self._optimizer)
        tensors = named_tensors(self._model)
        for descriptor in skeleton.architecture.tensors:
            tensor = tensors[descriptor.path]
            if tuple(tensor.shape) != descriptor.shape:
                replace_data(tensor, tensor.new_zeros(descriptor.shape))
            tensor.grad = None
        skeleton.commit()
        self._architecture = skeleton.architecture
        remember(self._model, self._architecture)
        if self._optimizer is not None:
            self._optimizer.state.clear()
        limit, self._limit = self._limit, 0
        self.replay(history[len(self._architecture.history) :])
        self._limit = limit
        self._points.clear()

    def _remember(self) -> None:
        """Take a restore point of now, as far as they are asked for."""
        if self._limit:
            now = Skeleton.take(self._model, self._architecture, self._optimizer)
            point = RestorePoint.take(
                self._model, now, self._masked, self._masked_layers, self._optimizer
            )
            self._points = [*self._points, point][-self._limit :]

    def _reach(self, architecture: PrunedArchitecture) -> None:
        """The network has a new structure now."""
        self._architecture = architecture
        remember(self._model, architecture)
        history = architecture.history
        self._skeletons = [s for s in self._skeletons if s.architecture.history != history]
        self._skeletons.append(Skeleton.take(self._model, architecture, self._optimizer))
        self._set_masks()

    def _set_masks(self) -> None:
        """Masks of everything that is masked and still there."""
        self._masks.set(self._architecture, self.masked)
        blocks = [self._architecture.block[name] for name in self.masked_layers]
        self._branch_masks.set(block for block in blocks if not block.removed)

    def _group(self, name: str) -> PruningGroup:
        group = self._architecture.group.get(name)
        if group is None:
            raise InvalidField("group", f"one of {sorted(self._architecture.group)}", name)
        return group

    def _checked(self, units: Units) -> dict[str, frozenset[int]]:
        """The units by group, refused if they are not there or may not go."""
        checked: dict[str, frozenset[int]] = {}
        for name, listed in units.items():
            group, chosen = self._group(name), frozenset(listed)
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


def _cutters(
    architecture: PrunedArchitecture,
    units: Mapping[str, Collection[int]],
    tensors: Mapping[str, Tensor],
) -> dict[str, Cutter]:
    """For every tensor that shrinks, the function that takes the removed indices out."""
    gone: dict[str, dict[int, set[int]]] = {}
    for name, chosen in units.items():
        for part in architecture.group[name].slices:
            axes = gone.setdefault(part.tensor, {})
            axes.setdefault(part.dim, set()).update(part.all_of(chosen))

    def cutter(shape: tuple[int, ...], axes: Mapping[int, set[int]]) -> Cutter:
        kept = {
            dim: torch.tensor([i for i in range(shape[dim]) if i not in lost])
            for dim, lost in axes.items()
        }

        def cut(tensor: Tensor) -> Tensor:
            for dim, indices in kept.items():
                tensor = tensor.index_select(dim, indices.to(tensor.device))
            return tensor

        return cut

    return {path: cutter(tuple(tensors[path].shape), axes) for path, axes in gone.items()}
