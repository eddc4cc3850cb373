"""The surgeon: masks units of a network, cuts them, undoes a cut, and replays earlier cuts.

Promises: a cut is made wholly or not at all; parameters keep their identity and optimizer state
is cut with them; after :meth:`Surgeon.undo` everything is bit for bit as before the cut.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from elesh.observe import get_logger
from elesh.trainer.network.kinds.weight_norms import DIRECTIONS, gains_after
from elesh.trainer.network.kinds.written_sizes import require_own_methods
from elesh.trainer.network.layers import named_tensors, require_fit
from elesh.trainer.network.sizes import cut_by_place, refit, refit_heads
from elesh.trainer.network.state import drop_cached, unwrapped
from leyline import (
    ContractError,
    InvalidField,
    PrunedArchitecture,
    PruningRecord,
)

from .averages import (
    Beside,
    Followed,
    WeightCopy,
    require_layers,
    teachers_in,
)
from .bypass import put_in
from .lineage import present, remember, require_same, steps
from .masks import Masks
from .optimizer_trial import require_cuttable
from .optimizers import (
    Given,
    Optimizers,
    begin_others_anew,
    check_what_they_load,
    rebuild_reducers,
    require_whole,
)
from .reconstruction.after_cut import InputCovariance, reconstructed
from .tensors import (
    RestorePoint,
    Skeleton,
    cutters_of,
    indices_lost,
    laid_out,
    removable,
    replace_data,
    some_cutters,
)
from .unnamed import Unnamed, unnamed_average

_log = get_logger(__name__)
Units = Mapping[str, Iterable[int]]
"""Units in current numbering by group name, as in ``decision.units``."""


class Surgeon:
    """Changes the network's structure; nothing else does.

    A mask multiplies the inputs of a unit's *consumers* by zero, not the outputs of its producer. A
    bias or a normalisation between the two may turn a zeroed output into something else, but what
    the consumer reads of a masked unit is zero, as after the cut.

    Args:
        model: the network, which may be compiled; its parameters stay the same objects.
        architecture: as ``Recorder(model, ...)`` found it.
        optimizer: its state (momentum, moments) is cut with the parameters; several optimizers, or
            a wrapper, are possible.
        restore_points: 1: the last cut can be undone, from a copy of all weights, buffers and
            optimizer state; 0: none is kept, for a session that keeps restore points of its own.

    Raises:
        ShapeMismatch: if the architecture does not describe the model.
        InvalidField: if the network's parameters are sharded over processes, or the optimizer is
            not one of it, does not survive a cut, or is not the only one of it.
    """

    _not_followed = True

    def __init__(
        self,
        model: nn.Module,
        architecture: PrunedArchitecture,
        *,
        optimizer: Given = None,
        restore_points: int = 1,
    ) -> None:
        model = unwrapped(model)
        require_whole(model)
        require_fit(model, architecture)
        self.model = model
        self.architecture = architecture
        """What the network looks like now (masked units are still in it)."""
        self._followed, self._unnamed = Followed(model), Unnamed(model)
        self.optimizers = self._cuttable(optimizer)
        """Those whose state is cut along."""
        self.notes: tuple[str, ...] = ()
        """What has to be said of the last cut: state of optimizers that is begun anew."""
        self._teachers = teachers_in(model)
        if restore_points > 1:
            _log.warning("a surgeon keeps one restore point; a session more", asked=restore_points)
        self._keeps_point = restore_points > 0
        self._undo_point: RestorePoint | None = None
        self._skeletons = [self._skeleton()]
        self._masks = Masks(*self._views())
        self._masked: dict[str, frozenset[int]] = {}
        self._masked_layers: frozenset[str] = frozenset()
        self._refitted: list[tuple[Tensor, Tensor]] = []
        """Tensors that are refitted under the mask, with what they held before."""
        remember(model, architecture)
        if optimizer is not None:
            self._unnamed.require_all_optimizers(self.optimizers.all)

    @property
    def copies(self) -> tuple[WeightCopy, ...]:
        """The averages and other copies of the weights that are cut along, as they are now."""
        self._look_again()
        return self._followed.all()

    def follow(self, name: str, holder: object) -> tuple[WeightCopy, ...]:
        """Cut, mask and restore the copies of the network that ``holder`` keeps with the network.

        Cuts made before cannot be undone by :meth:`undo` any more. Following it again looks again:
        a holder may have other tensors after its state was loaded.

        Returns:
            The copies; none if ``holder`` keeps none.
        """
        if self._followed.add(name, holder):
            self.unmask()
            self._views_changed()
            self._undo_point = None
        return tuple(copy for copy in self._followed.all() if copy.name == name)

    def _look_again(self) -> None:
        """Find the tensors that averages have now."""
        modules = [copy.module for copy in self._followed.all()]
        if self._followed.look_again() and modules != [c.module for c in self._followed.all()]:
            self._masks.clear()
            self._views_changed()
            self._set_masks()

    def _views_changed(self) -> None:
        self._masks = Masks(*self._views())
        present = [each.history for each in self.architectures].index(self.architecture.history)
        self._skeletons[present] = self._skeleton()  # not the last one after a load of before a cut

    def train_with(self, optimizer: Given) -> None:
        """Have other optimizers from now on: a framework makes them late.

        Raises:
            InvalidField: as when the surgeon is made.
        """
        self.optimizers = self._cuttable(optimizer)
        self._unnamed.require_all_optimizers(self.optimizers.all)
        self._undo_point = None
        self._views_changed()

    def _cuttable(self, given: Given) -> Optimizers:
        """The optimizers, if they go on after a cut; what wrappers keep beside them is followed."""
        tensors = named_tensors(self.model)
        optimizers = Optimizers(given, tensors)
        self._followed.add_wrappers(optimizers.wrappers, optimizers.masters.values())
        cutters = some_cutters(self.architecture, tensors)
        require_cuttable(optimizers, tensors, cutters, self._followed.all())
        check_what_they_load(optimizers, self)
        return optimizers

    @property
    def unnamed_copies(self) -> dict[str, Beside]:
        """Who keeps a second set of the weights and is followed without having been named."""
        return self._followed.unnamed()

    def blocked(self) -> str:
        """Why nothing may be cut now; empty if it may."""
        return self._unnamed.blocks(self.architecture, self.optimizers.all, self.copies)

    def unnamed_average(self) -> str:
        """What to do about an average of the network that the surgeon was not given; empty if
        there is none. Nothing is cut until it is done."""
        return unnamed_average(self.model, self.copies)

    def updated_copies(self, known: Iterable[WeightCopy] = ()) -> list[WeightCopy]:
        """Copies of the network, kept by the script as plain modules or tensors and neither named
        nor ``known``, that were updated since they were looked at first."""
        return self._unnamed.updated_copies((*self.copies, *known))

    @property
    def masked(self) -> dict[str, tuple[int, ...]]:
        """The masked units by group, in current numbering."""
        # Kept in original numbering, which no cut and no undo can shift.
        found: dict[str, tuple[int, ...]] = {}
        for name, originals in self._masked.items():
            if name not in self.architecture.group:  # It went with a whole layer.
                continue
            origin = self.architecture.group[name].origin
            if units := tuple(u for u, number in enumerate(origin) if number in originals):
                found[name] = units
        return found

    @property
    def masked_layers(self) -> tuple[str, ...]:
        """The masked blocks, by name."""
        return tuple(sorted(self._masked_layers))

    @property
    def can_undo(self) -> int:
        """How many cuts can be undone now: 1 or 0."""
        return int(self._undo_point is not None)

    def mask(
        self,
        units: Units,
        *,
        reconstruct: InputCovariance | None = None,
        skip: Collection[str] = (),
    ) -> None:
        """Silence units until :meth:`unmask`, on top of those that are masked already.

        Args:
            units: current numbering, by group name.
            reconstruct: refit what reads the kept units, as :meth:`cut` does with the same, so
                that the masked network computes what the cut one will.
            skip: paths of consumers that keep their weights.

        Raises:
            InvalidField: naming group and unit, if one does not exist or may not be removed.
            IdentityMismatch: if the covariance was measured on another structure.
        """
        chosen, masked = removable(self.architecture, units), dict(self._masked)
        self._look_again()
        for name, lost in chosen.items():
            origin = self.architecture.group[name].origin
            masked[name] = masked.get(name, frozenset()) | {origin[unit] for unit in lost}
        self._put_back()
        before, self._masked = self._masked, masked
        if reconstruct is not None:
            tensors, units = named_tensors(self.model), self.masked
            try:
                solved = reconstructed(self.model, self.architecture, units, reconstruct, skip=skip)
            except ContractError:
                self._masked = before
                raise
            self._refit(solved, tensors)
        self._set_masks()

    def refit_masked(self, solved: Mapping[str, Tensor]) -> None:
        """Give parameters other content until :meth:`unmask`, beside what a mask has refitted; for
        the cut to have the same, give it to :meth:`cut`.

        Args:
            solved: new content by path, in present sizes.
        """
        self._refit(solved, named_tensors(self.model))

    def mask_layers(self, names: Iterable[str]) -> None:
        """Multiply the branches of whole blocks by zero until :meth:`unmask`, on top of those that
        are masked already.

        Raises:
            InvalidField: if a block does not exist (any more) or may not be removed.
        """
        chosen = frozenset(names)
        self.architecture.without_layers(sorted(chosen))  # refuses what cannot go
        self._masked_layers |= chosen
        self._set_masks()

    def unmask(self) -> None:
        """Let every masked unit and layer speak again, with the weights as they were."""
        self._put_back()
        self._masked = {}
        self._masked_layers = frozenset()
        self._masks.clear()

    def cut(
        self,
        units: Units,
        *,
        epoch: int = 0,
        key: str = "",
        reconstruct: InputCovariance | None = None,
        skip: Collection[str] = (),
        solved: Mapping[str, Tensor] | None = None,
        redistribute: InputCovariance | None = None,
    ) -> PrunedArchitecture:
        """Remove units for good; returns the architecture afterwards.

        Args:
            units: current numbering, by group name.
            epoch, key: for the history (the decision's idempotency key).
            reconstruct: input covariance of the network as it is now, unmasked
                (``bundle.covariance`` of ``Recorder.measure``). What reads the kept units is then
                refitted, so that what they predict of the removed ones is not lost; without, the
                weights stay as they are.
            skip: paths of consumers that keep their weights.
            solved: new content of parameters, by path, in present sizes, set before the cut; in
                place of what ``reconstruct`` computes (:meth:`refit_masked`).
            redistribute: the name that ``reconstruct`` had in the version before.

        Raises:
            InvalidField: naming group and unit, if one does not exist or may not be removed, or
                if nothing would be left of a group.
            ShapeMismatch: if the model, or the optimizer's state, is not what the architecture
                says. Nothing has been changed then.
            IdentityMismatch: if the covariance was measured on another structure.
        """
        chosen = removable(self.architecture, units)
        require_fit(self.model, self.architecture)
        written = [group for n in chosen if (group := self.architecture.group[n]).written]
        if written:
            require_own_methods(self.model, written)
        self._look_again()
        self._put_back()
        after = self.architecture.without(chosen, epoch=epoch, key=key)
        tensors = named_tensors(self.model)
        lost = indices_lost(self.architecture, chosen)
        cutters = cutters_of(lost, tensors)
        given, solved = solved or {}, {}
        if (covariance := reconstruct or redistribute) is not None:
            solved = reconstructed(self.model, self.architecture, chosen, covariance, skip=skip)
        solved = {**solved, **given}
        if any(path.endswith(DIRECTIONS) for path in lost):
            solved |= gains_after(self.model, {**tensors, **solved}, lost)
        data = dict(solved)
        for path, cutter in cutters.items():
            kept = cutter(data.get(path, tensors[path].detach()))
            data[path] = laid_out(kept, tensors[path])
        contents = [(tensors[path], new) for path, new in data.items()]
        for copy in self._copied():
            contents += copy.cut(cutters, solved, tensors)
        states = self.optimizers.cut(cutters, tensors)
        self._remember()
        # Everything that can fail is behind us.
        for tensor, new in contents:
            replace_data(tensor, new)
        self.notes = self.optimizers.put(states)
        for parameter in self.model.parameters():
            parameter.grad = None
        by_place = cut_by_place(self.model, after, self._views()[1:])
        for root in self._roots():
            for module in root.modules():
                refit(module, module in by_place)
        left = [(self.architecture.group[name], after.group[name].size) for name in chosen]
        for view in self._views():
            refit_heads(view, left)
        self._reach(after)
        return after

    def cut_layers(
        self, names: Iterable[str], *, epoch: int = 0, key: str = ""
    ) -> PrunedArchitecture:
        """Remove whole blocks for good; returns the architecture afterwards.

        Their modules are replaced by bypass modules without parameters, and the optimizer forgets
        their parameters and its state of them.

        Args:
            names: of blocks of the architecture.
            epoch, key: for the history (the decision's idempotency key).

        Raises:
            InvalidField: if a block does not exist (any more) or may not be removed.
            ShapeMismatch: if the model is not what the architecture says. Nothing has been
                changed then.
        """
        names = list(dict.fromkeys(names))
        after = self.architecture.without_layers(names, epoch=epoch, key=key)
        require_fit(self.model, self.architecture)
        self._look_again()
        self._put_back()
        require_layers(self._copied())
        self._remember()
        self._masks.clear()
        tensors = named_tensors(self.model)
        blocks = [self.architecture.block[name] for name in names]
        for view in self._views(teachers=False):  # blocks name what teachers lose
            put_in(view, [stand_in for block in blocks for stand_in in block.stand_ins])
        gone = tensors.keys() - named_tensors(self.model).keys()
        self.optimizers.forget([tensors[path] for path in gone])
        self.notes = ()
        for parameter in tensors.values():
            parameter.grad = None
        self._reach(after)
        return after

    def undo(self) -> PrunedArchitecture:
        """Go back to just before the last cut, bit for bit, whatever was trained since.

        Raises:
            InvalidField: if there is no cut to undo.
        """
        if self._undo_point is None:
            hint = (
                "only the last cut can be undone, and none while a session keeps the restore points"
            )
            raise InvalidField("undo", "a cut to undo", "none", hint=hint)
        point, self._undo_point = self._undo_point, None
        self.bring_back(point)
        return self.architecture

    @contextmanager
    def as_one_cut(self) -> Iterator[None]:
        """Cuts that are made inside are undone together."""
        self._remember()
        keeps, self._keeps_point = self._keeps_point, False
        try:
            yield
        finally:
            self._keeps_point = keeps

    def leave_undo_to_session(self) -> None:
        """Keep no restore point from now on: a session has better ones."""
        self._keeps_point, self._undo_point = False, None

    def restore_point(self) -> RestorePoint:
        """A copy of everything that a cut can change, for :meth:`bring_back`."""
        self._look_again()
        return RestorePoint.take(
            named_tensors(self.model).values(),
            [copy.tensors() for copy in self._copied()],
            self._skeleton(),
            self._masked,
            self._masked_layers,
            self.optimizers,
        )

    def bring_back(self, point: RestorePoint) -> None:
        """Make a restore point of this surgeon the present again, bit for bit."""
        self._put_back()
        self._look_again()
        self._masks.clear()
        point.bring_back(self.optimizers, lambda: [c.tensors() for c in self._copied()])
        self.architecture = point.skeleton.architecture
        remember(self.model, self.architecture)
        self._masked, self._masked_layers = dict(point.masked), point.masked_layers
        self._changed()

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
                units = present(self.architecture, step)
                self.cut(units, epoch=step.epoch, key=step.key)
        return self.architecture

    def move_to(self, architecture: PrunedArchitecture) -> None:
        """Give the network the structure of ``architecture``, back or forth in its history.

        Tensors that must change their shape get new ones **without sound content**: the caller
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
            made = len(self._skeletons[0].architecture.history)
            expected = f"a history that begins with the {made} cuts made before"
            hint = "load it into the network as it is built, before any cut"
            raise InvalidField("architecture.history", expected, len(history), hint=hint)
        skeleton = self._skeletons[max(known)[1]]
        require_same(skeleton.architecture, architecture)
        self.unmask()
        self._look_again()
        skeleton.put_in(self.optimizers)
        for tensors in (named_tensors(self.model), *(c.tensors() for c in self._copied())):
            for descriptor in skeleton.architecture.tensors:
                tensor = tensors.get(descriptor.path)
                if tensor is not None:
                    if tuple(tensor.shape) != descriptor.shape:
                        replace_data(tensor, tensor.new_zeros(descriptor.shape))
                    tensor.grad = None
        skeleton.set_sizes()
        self.architecture = skeleton.architecture
        remember(self.model, self.architecture)
        self.optimizers.clear()
        keeps, self._keeps_point = self._keeps_point, False
        self.replay(history[len(self.architecture.history) :])
        self._keeps_point, self._undo_point = keeps, None
        for kind in begin_others_anew(self.model, self.optimizers.all):
            _log.warning("an optimizer that was not named begins its state anew", optimizer=kind)
        self._changed()

    @property
    def architectures(self) -> tuple[PrunedArchitecture, ...]:
        """What the network looked like since this surgeon was made, the first first."""
        return tuple(skeleton.architecture for skeleton in self._skeletons)

    def fill_copies(self, contents: Mapping[str, object]) -> None:
        """Have averages, masters and other copies begin anew with these contents, by path."""
        for copy in self._copied():
            for path, tensor in copy.tensors().items():
                content = contents.get(path)
                if isinstance(content, Tensor) and content.shape == tensor.shape:
                    tensor.data.copy_(content)

    def _refit(self, solved: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Give parameters, and with them averages of them, other content until it is put back."""
        contents = [(tensors[path], new) for path, new in solved.items()]
        for copy in self._copied():
            contents += copy.cut({}, solved, tensors)
        self._refitted += [(tensor, tensor.detach().clone()) for tensor, _ in contents]
        for tensor, new in contents:
            tensor.data.copy_(new)

    def _put_back(self) -> None:
        """Undo what a mask has refitted, bit for bit."""
        for tensor, before in reversed(self._refitted):
            tensor.data.copy_(before)
        self._refitted = []

    def _remember(self) -> None:
        """Take a restore point of now, if one is to be kept."""
        if self._keeps_point:
            self._undo_point = self.restore_point()

    def _reach(self, architecture: PrunedArchitecture) -> None:
        """The network has a new structure now."""
        self.architecture = architecture
        remember(self.model, architecture)
        history = architecture.history
        self._skeletons = [s for s in self._skeletons if s.architecture.history != history]
        self._skeletons.append(self._skeleton())
        self._changed()

    def _changed(self) -> None:
        """Whatever was made of tensors and modules of before is made anew."""
        drop_cached(self.model)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # everything that was compiled in this process
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rebuild_reducers(self.model)
        self._set_masks()

    def _set_masks(self) -> None:
        """Masks of everything that is masked and still there."""
        blocks = [self.architecture.block[name] for name in sorted(self._masked_layers)]
        present = [block for block in blocks if not block.removed]
        self._masks.set(self.architecture, self.masked, present)

    def _copied(self) -> tuple[WeightCopy, ...]:
        """All second sets of the weights: those followed, and masters that optimizers train."""
        masters = self.optimizers.masters
        if not masters:
            return self._followed.all()
        return (*self._followed.all(), WeightCopy("optimizer", loose=masters, ordered=True))

    def _roots(self) -> list[nn.Module]:
        return [self.model, *(c.module for c in self._followed.all() if c.module is not None)]

    def _views(self, *, teachers: bool = True) -> list[nn.Module]:
        """What answers to the network's module paths: the network, its copies and teachers."""
        copies = [copy for copy in self._followed.all() if copy.module is not None]
        copies += self._teachers if teachers else ()
        return [self.model, *(cast(nn.Module, copy) for copy in copies)]

    def _skeleton(self) -> Skeleton:
        return Skeleton.take(self._roots(), self.architecture, self.optimizers)
