"""Proves on the network itself that masking units and cutting them is the same.

Promises: a group stays prunable only if, with other groups, random units of it were masked and
cut on a copy, several times, and both gave the same values at every layer that mixes channels and
the same outputs. The copy has random weights: with the real ones the proof could be empty
(branches that start at zero, small layer scales).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elesh.trainer.graph.attention import parts_of_one_layer, tied, tied_parts
from elesh.trainer.network.calling import raised_in, summary
from elesh.trainer.network.kinds.written_sizes import lines_run
from elesh.trainer.network.sizes import common_parts, holder_of_group, outwards
from leyline import Level, PrunedArchitecture, PruningGroup

from .drawn import around_a_run, fitting, some_of, stays
from .products import Products
from .trial import Cut, Trial, TrialCuts, Units
from .waypoints import SHAPES, Fault, Guards, Waypoints, apart
from .weighed import weighed
from .written import unequivocal, written_sizes

_NOTHING: Mapping[int, Any] = {}
_BOTH = Level.HEAD, Level.CHANNEL


def without_refuted(trial: Trial, architecture: PrunedArchitecture) -> PrunedArchitecture:
    """The architecture with every group that fails the proof marked, with a reason.

    Args:
        trial: of a copy of the network in evaluation mode, with random weights.
    """
    with torch.no_grad():
        experiment = _Experiment(trial, architecture)
        experiment = experiment.weighed() or experiment
        together: list[Together] = []
        for tied in (experiment.tied_parts, experiment.tied_heads):
            if found := tied():
                together += found
                experiment = experiment.of(_in_place(experiment.architecture, found))
        experiment.judge()
        if any(pair[0].name in experiment.reasons for pair in together):
            experiment = experiment.with_written_sizes() or experiment
        if apart := [pair for pair in together if pair[0].name in experiment.reasons]:
            experiment = experiment.of(_split(experiment.architecture, apart))
            experiment.judge()
        if (written := experiment.with_written_sizes()) is not None:
            experiment = written
    return _marked(experiment.architecture, experiment.reasons)


Together = tuple[PruningGroup, tuple[PruningGroup, ...]]
"""A group, and those that it stands for."""


def _in_place(architecture: PrunedArchitecture, together: Sequence[Together]) -> PrunedArchitecture:
    """With groups in the place of those that they stand for."""
    gone = {member.name for _, members in together for member in members}
    kept = [group for group in architecture.groups if group.name not in gone]
    return _with_groups(architecture, [*kept, *(group for group, _ in together)])


def _split(architecture: PrunedArchitecture, together: Sequence[Together]) -> PrunedArchitecture:
    """The opposite."""
    gone = {group.name for group, _ in together}
    kept = [group for group in architecture.groups if group.name not in gone]
    return _with_groups(architecture, [*kept, *(g for _, members in together for g in members)])


def _marked(architecture: PrunedArchitecture, reasons: Mapping[str, str]) -> PrunedArchitecture:
    marked = [
        group.model_copy(update={"prunable": False, "reason": reasons[group.name], "written": ()})
        if group.name in reasons
        else group
        for group in architecture.groups
    ]
    return _with_groups(architecture, marked)


def _with_groups(
    architecture: PrunedArchitecture, groups: Sequence[PruningGroup]
) -> PrunedArchitecture:
    return PrunedArchitecture.unchecked(architecture.tensors, architecture.layers, tuple(groups))


class Admission(ABC):
    """Names are admitted one set at a time; what cannot join those admitted is refused."""

    def __init__(self) -> None:
        self._admitted: list[str] = []
        self.reasons: dict[str, str] = {}
        """Why each of those that were refused was."""
        self.failing: dict[str, str] = {}
        """Of those that were tried last, which fail by themselves, and why."""

    def admit(self, names: Sequence[str]) -> None:
        """Admit all of ``names`` if they pass together, otherwise find by halving which do not."""
        if not names:
            return
        reason = self.disproof([*self._admitted, *names])
        if not reason:
            self._admitted.extend(names)
        elif len(names) == 1:
            self.reasons[names[0]] = reason
        elif known := {name: self.failing[name] for name in names if name in self.failing}:
            self.reasons |= known
            self.admit(_without(names, known))
        else:
            middle = len(names) // 2
            self.admit(names[:middle])
            self.admit(names[middle:])

    @abstractmethod
    def disproof(self, names: Sequence[str]) -> str:
        """Why these cannot be removed together; empty if they can."""


class _Experiment(Admission):
    """Admits groups."""

    def __init__(self, trial: Trial, architecture: PrunedArchitecture) -> None:
        super().__init__()
        self._trial, self.architecture = trial, architecture
        self._cuts = TrialCuts(trial.copied, architecture)
        rng = np.random.default_rng(0)
        self._groups = groups = [group for group in architecture.groups if group.prunable]
        self._known: dict[tuple[int, tuple[str, ...]], list[_Blame]] = {}
        # Some: equal shares could hide that two groups must stay of equal size. And nearly all:
        # rounding (of halves, for example) forgives small cuts. A single channel behind an
        # activation, or a normalisation, may be nothing but rounding, magnified.
        some = some_of(groups, rng)
        nearly_all = {g.name: max(1, g.size - stays(g)) for g in groups}
        self._trials = [
            {g.name: around_a_run(g.size, fitting(g, some[g.name]), rng) for g in groups},
            {
                g.name: rng.permutation(g.size)[: fitting(g, nearly_all[g.name])].tolist()
                for g in groups
            },
        ]
        self._around = {group.name: holder_of_group(group) for group in groups}
        self._readers: dict[str, set[str]] = {}
        for group in groups:
            for site in group.sites:
                self._readers.setdefault(site.module, set()).add(group.name)
        self._makers: dict[str, set[str]] = {}
        """By layer: those that make what it reads."""
        for group in architecture.groups:
            for site in group.sites:
                self._makers.setdefault(site.module, set()).update(group.layers)

    def tied_heads(self) -> list[Together]:
        """Heads and widths of which neither can go without the other, as groups of equal shares."""
        heads = set(self._named(Level.HEAD))
        faults = self._faults(self._names)
        if all(fault.differs and heads.isdisjoint(fault.blamed) for fault in faults):
            return []
        names = {name for _, members in tied(self._groups) for name in members}
        parts = ([n for n in self._named(level) if n in names] for level in _BOTH)
        alone = set[str]().union(*map(self._suspected, parts))
        return self._together(tied(self._groups, alone))

    def tied_parts(self) -> list[Together]:
        """Equal parts that the outputs of one layer are split into (``chunk``)."""
        names = {group.name for alike in parts_of_one_layer(self._groups) for group in alike}
        faults = self._faults(self._names) if names else ()
        if all(fault.differs or names.isdisjoint(fault.blamed) for fault in faults):
            names = set()
        alone = self._suspected([name for name in self._names if name in names])
        return self._together(tied_parts(self._groups, self._trial.copied, alone))

    def with_written_sizes(self) -> _Experiment | None:
        """The same, judged again, where sizes that the network's code keeps under names of its own,
        or has written into it, are set for groups that were refused; None if none of these may go
        then."""
        model, stops = self._trial.copied, list(self.reasons)
        if not stops:
            return None
        known, groups, found = self.architecture.group, self.architecture.groups, None
        lines = lines_run(model, self._trial.run)
        ways = {name: written_sizes(self._cuts, model, known[name], lines) for name in stops}
        while any(ways[name] for name in stops):
            sizes = {name: ways[name].pop(0) for name in stops if ways[name]}
            own = unequivocal(model, known, sizes)
            groups = tuple(
                g.model_copy(update={"written": own.get(g.name, g.written)}) for g in groups
            )
            if not any(own.values()):
                continue
            again = self.of(_with_groups(self.architecture, groups))
            again.judge()
            if again.reasons.keys() < set(stops):
                again.reasons = {name: self.reasons[name] for name in again.reasons}
                found, stops = again, list(again.reasons)
        return found

    def weighed(self) -> _Experiment | None:
        """The same with groups over which products of activations sum as they pass by themselves
        (:mod:`.weighed`); None where nothing is changed."""
        found = weighed(self._groups, self._trial.copied, self._passes)
        return None if found is None else self._with(*found)

    def _passes(
        self, changed: Mapping[str, PruningGroup], gone: Collection[str], names: Sequence[str]
    ) -> bool:
        return not self._with(changed, gone)._faults(names)

    def _with(self, changed: Mapping[str, PruningGroup], gone: Collection[str]) -> _Experiment:
        """The same with other groups in the place of those of their names, and without some."""
        kept = [group for group in self.architecture.groups if group.name not in gone]
        groups = [changed.get(group.name, group) for group in kept]
        return self.of(_with_groups(self.architecture, groups))

    def of(self, architecture: PrunedArchitecture) -> _Experiment:
        """The same with another architecture."""
        return _Experiment(self._trial, architecture)

    def _together(self, found: Sequence[tuple[PruningGroup, tuple[str, ...]]]) -> list[Together]:
        named = self.architecture.group
        return [(group, tuple(named[name] for name in names)) for group, names in found]

    @property
    def _names(self) -> list[str]:
        return [group.name for group in self._groups]

    def _named(self, level: Level) -> list[str]:
        return [group.name for group in self._groups if group.level is level]

    def _suspected(self, names: Sequence[str]) -> set[str]:
        """Who may be to blame where these lose units together, one after the other."""
        found, left = set[str](), list(names)
        while blamed := set[str]().union(*(fault.blamed for fault in self._faults(left))):
            found |= blamed
            left = _without(left, blamed)
        return found

    def judge(self) -> None:
        """Find a reason against each group that may not be removed with the others."""
        left = self._names
        for number in range(len(self._trials)):
            self._number = number
            self._untrained = False
            left = self._sorted_out(left)

    def _sorted_out(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that the present trial finds no fault with.

        Groups that may cause a fault are set aside and admitted again by bisection, those of
        different faults at the same time.
        """
        good, sets, reasons = list(names), list[list[str]](), dict[str, str]()
        settled: dict[str, set[str]] = {}
        while faults := self._faults(good):
            for place in settled.keys() & {fault.place for fault in faults}:
                # There, others are the cause: who was refused for it is tried again.
                again = [name for name in settled.pop(place) if reasons.pop(name, "")]
                sets += [[name] for name in again]
            found = _cases(faults, good)
            alone = {members[0] for members in found if len(members) == 1}
            suspected = set(chain.from_iterable(found))
            for fault in faults:
                for name in alone & (fault.blamed or alone):
                    if fault.differs and name not in reasons and self._before(name) & suspected:
                        sets.append([name])  # It may be the fault of those.
                        alone.discard(name)
                        continue
                    reasons.setdefault(name, fault.reason)
                    if fault.differs:
                        settled.setdefault(fault.place, set()).add(name)
            sets += [members for members in found if len(members) > 1]
            good = _without(good, chain.from_iterable(found))
        reasons |= self._let_in(good, sets)
        if self._untrained and self._faults(good):
            return self._halved(names)
        self.reasons |= reasons
        return [name for name in names if name in set(good)]

    def _let_in(self, good: list[str], sets: Sequence[list[str]]) -> dict[str, str]:
        """Add to ``good``, which pass together, those of ``sets`` that pass with them, by halves;
        returns why the others do not."""
        cases, reasons = [list(_halves(members)) for members in sets], dict[str, str]()
        alone = False
        while cases:
            tried = cases[:1] if alone else self._independent(cases)
            heads = [case[-1] for case in tried]
            faults = self._faults([*good, *chain.from_iterable(heads)])
            nowhere = any(not fault.blamed and not fault.place for fault in faults)
            if nowhere and not alone and len(tried) > 1:
                alone = True
                continue
            failed: dict[int, str] = {}
            for fault in faults:
                failed |= {n: fault.reason for n in self._guilty(fault, heads) if n not in failed}
            joined = len(failed) < len(tried)
            self._untrained = bool(faults) and (self._untrained or joined) and not self._number
            for number, case in enumerate(tried):
                head = case.pop()
                if number not in failed:
                    good += head
                elif len(head) == 1:
                    reasons[head[0]] = failed[number]
                else:
                    case += _halves(head)
            cases, alone = [case for case in cases if case], False
        return reasons

    def _independent(self, cases: list[list[list[str]]]) -> list[list[list[str]]]:
        """Of the cases as many as can be tried together: where one lost inputs, what another is
        blamed for may be its fault."""
        tried, names, before = list[list[list[str]]](), set[str](), set[str]()
        for case in cases:
            head, own = case[-1], set[str]().union(*map(self._before, case[-1]))
            if not (before.intersection(head) or own & names):
                tried.append(case)
                names, before = names.union(head), before | own
        return tried

    def _before(self, name: str) -> set[str]:
        """The groups that layers read which make what readers of this group read."""
        made = [self._makers[site.module] for site in self.architecture.group[name].sites]
        layers = list(chain.from_iterable(made))
        layers += [layer.rpartition(".")[0] for layer in layers]  # Of a packed attention.
        return set().union(*(self._readers.get(one, set()) for one in layers)) - {name}

    def _guilty(self, fault: _Blame, heads: Sequence[Sequence[str]]) -> list[int]:
        """Which of the sets that were let in last may be to blame for a fault."""
        met = [n for n, head in enumerate(heads) if fault.blamed.intersection(head)]
        if met:
            return met

        def shared(head: Sequence[str]) -> int:
            return max(len(common_parts([fault.place, self._around[name]])) for name in head)

        most = max(map(shared, heads))
        return [n for n, head in enumerate(heads) if shared(head) == most]

    def _halved(self, names: Sequence[str]) -> list[str]:
        """The same by bisection over all, where no group in particular seems the cause."""
        self._admitted = []
        self.admit(names)
        return self._admitted

    _number = 0
    """Of the present trial."""
    _untrained = False
    """Whether some were let in while others were at fault, so that training was not tried."""

    def disproof(self, names: Sequence[str]) -> str:
        """Why these groups cannot lose units together, in the present trial."""
        return next((fault.reason for fault in self._faults(names)), "")

    def _faults(self, names: Sequence[str]) -> list[_Blame]:
        """What goes wrong where these groups lose units together."""
        key = self._number, tuple(names)
        if names and key not in self._known:
            self._known[key] = self._found(names)
        return self._known.get(key, [])

    def _found(self, names: Sequence[str]) -> list[_Blame]:
        units = {name: self._trials[self._number][name] for name in names}
        run = _Run(self._trial, self._cuts, units, self._around)
        run.do(train=self._number == 0, watched=self._number == len(self._trials) - 1)
        if run.blamed and self._number == 0 and self._trial.trained_wrongly():
            run = _Run(self._trial, self._cuts, units, self._around)
            run.do(train=True)
        for fault in run.waypoints.faults:
            blamed = self._readers.get(fault.place, set()) & units.keys()
            if not blamed:  # What makes it computes something else with the inputs that are left.
                made = [self._readers.get(one, set()) for one in self._makers.get(fault.place, ())]
                blamed = units.keys() & set().union(*made)
            run.blamed.append(_Blame(fault.place, frozenset(blamed), _mixes(fault), True))
        return run.blamed


@dataclass(frozen=True)
class _Blame:
    """Something that went wrong, and who may be to blame."""

    place: str
    blamed: frozenset[str]
    """Names of groups; none where it may be any."""
    reason: str
    differs: bool = False
    """Whether values differ there; otherwise the module failed."""
    last: str = ""
    """The layer that was called last before it failed."""


def _halves(members: list[str]) -> Iterator[list[str]]:
    """Both halves, the first one last; a single name by itself."""
    middle = len(members) // 2
    yield from (half for half in (members[middle:], members[:middle]) if half)


def _without(names: Iterable[str], others: Iterable[str]) -> list[str]:
    gone = set(others)
    return [name for name in names if name not in gone]


def _cases(faults: Sequence[_Blame], names: Sequence[str]) -> list[list[str]]:
    """Who may be to blame for each fault; faults that may have one cause are one case."""
    named = [fault for fault in faults if fault.blamed]
    if not named:  # Others will show again once these are out of the way.
        return [list(names)]
    cases: list[set[str]] = []
    for fault in named:
        case = set(fault.blamed)
        for other in [other for other in cases if other & case]:
            case |= other
            cases.remove(other)
        cases.append(case)
    return [[name for name in names if name in case] for case in cases]


class _Run:
    """One comparison of masking and cutting."""

    def __init__(
        self, trial: Trial, cuts: TrialCuts, units: Units, around: Mapping[str, str]
    ) -> None:
        self._trial, self._cuts, self._units, self._around = trial, cuts, units, around
        self.waypoints = Waypoints(cuts.mixing)
        self.waypoints.lost, self.waypoints.gone = self._lost, self._gone
        self.waypoints.shrinking = {
            layer for name in units for layer in cuts.architecture.group[name].layers
        }
        self.blamed: list[_Blame] = []
        self._failing = ""
        """The innermost module that failed with all of its own groups whole."""
        self._cut: Cut | None = None
        self._indices: dict[str, dict[int, Any]] = {"": {}} | cuts.lost_inputs(units)

    def do(self, train: bool, watched: bool = False) -> None:
        """Run the network with units masked, then without them.

        Args:
            watched: whether what is multiplied then shall be noted.
        """
        points, copied = self.waypoints, self._trial.copied
        noted = Products(lambda: (points.last, 0)) if watched else None
        try:
            with self._cuts.masked(self._units):
                points.remember()
                masked = self._trial.outputs()
        except Exception as error:
            self._trial.require_repeatable()
            reason = f"the network does not run under a mask: {summary(error)}"
            self.blamed.append(_Blame("", frozenset(), reason))
            return
        finally:
            points.close()
        guarded = {path for name in self._units for path in self._holders(name)}
        try:
            with (
                self._cuts.cut(self._units) as self._cut,
                Guards(copied, guarded, self._amend, points),
            ):
                with noted if noted and self._trial.products.wanted else contextlib.nullcontext():
                    outputs = self._compared()
                points.close()
                points.forget()
                if not self.blamed and not points.faults and (difference := apart(masked, outputs)):
                    points.faults.append(Fault("", difference))
                if train and not self.blamed and not points.faults:
                    self._trial.train()
                if noted and noted.noted and not self.blamed and not points.faults:
                    lost = {name: len(set(gone)) for name, gone in self._units.items()}
                    self._trial.products.add(lost, points.mixing, noted)
        except Exception as error:  # Whatever the user's network raises is the finding.
            # It failed again with its own groups whole: they are no more suspect than others.
            own = [blame for blame in self.blamed if blame.place == self._failing]
            self.blamed = [blame for blame in self.blamed if blame not in own]
            touching = {n for n in self._units if self._touches(n, self._failing)}
            suspects = frozenset(touching).union(*(blame.blamed for blame in own))
            self.blamed.append(_Blame(self._failing, suspects, _breaks(error)))
        finally:
            points.close()
            points.forget()
            copied.eval()

    def _compared(self) -> list[Tensor]:
        """Run what is cut, and compare on the way; where the network's own code fails, once more
        from its beginning, with what may be to blame taken back: so all faults show."""
        while True:
            self.waypoints.faults.clear()
            self.waypoints.compare()
            try:
                return self._trial.outputs()
            except Exception as error:  # Whatever the user's network raises is the finding.
                if not self._amend("", error):
                    raise

    def _amend(self, path: str, error: Exception) -> bool:
        """Take back what was cut of groups inside a module that failed: of those of the layer that
        was called last before; else of those that connect parts of the module; else of all. Where
        a part of it has failed before with its own groups whole, only of those that reach into
        that part."""
        assert self._cut is not None
        units, failing, last = self._cut.units, self._failing, self.waypoints.last
        reaching = [name for name in units if failing and self._touches(name, failing)]
        inside = [name for name in reaching or units if self._is_inside(name, path)]
        if not reaching:
            near = [name for name in inside if last in self._places(name)]
            inside = near or [n for n in inside if self._around[n] == path] or inside
        if not inside:
            self._failing = failing or path
            return False
        earlier = [b for b in self.blamed if f"{b.place}.".startswith(f"{path}.")]
        if not reaching:  # It is the same failure if it came after the same layer.
            earlier = [b for b in earlier if b.last == last]
        else:  # Its own groups are as suspect as these, and those of other parts are not.
            earlier = [b for b in earlier if b.place == failing]
            self.blamed = [b for b in self.blamed if b not in earlier]
            self._failing = ""
        blamed = frozenset(inside).union(*(b.blamed for b in earlier))
        place = failing if reaching else path
        self.blamed.append(_Blame(place, blamed, _breaks(error), last=last))
        taken_back = {name: units[name] for name in inside}
        self.waypoints.unjudged.update(self._cuts.lost_inputs(taken_back))
        self._cut.restore(inside)
        self._indices.clear()
        return True

    def _is_inside(self, name: str, path: str) -> bool:
        return not path or f"{self._around[name]}.".startswith(f"{path}.")

    def _holders(self, name: str) -> set[str]:
        """The modules that hold layers with anything of a group."""
        places = self._places(name)
        return {path for place in places for path in outwards(place.rpartition(".")[0])}

    def _places(self, name: str) -> set[str]:
        """The layers with anything of a group."""
        group = self._cuts.architecture.group[name]
        places = {part.tensor.rpartition(".")[0] for part in group.slices}
        return places | {site.module for site in group.sites}

    def _touches(self, name: str, path: str) -> bool:
        """Whether some, but not all, of what goes with a group is inside a module."""
        group = self._cuts.architecture.group[name]
        places = [part.tensor for part in group.slices] + [site.module for site in group.sites]
        inside = [f"{place}.".startswith(f"{path}.") for place in places]
        return bool(path) and any(inside) and not all(inside)

    def _lost(self, place: str) -> Mapping[int, Any]:
        """By axis, which channels of a module's input are cut."""
        if not self._indices:
            assert self._cut is not None
            self._indices = {"": {}} | self._cuts.lost_inputs(self._cut.units)
        return self._indices.get(place, _NOTHING)

    def _gone(self) -> list[tuple[int, Any]]:
        """The size of every group that is cut, and the units that go."""
        assert self._cut is not None
        named = self._cuts.architecture.group
        return [(named[name].size, np.array(gone)) for name, gone in self._cut.units.items()]


def _breaks(error: Exception) -> str:
    return (
        "the network does not run without some of its channels (a size written into the code, "
        f"or channels reshaped into heads){raised_in(error)}: {summary(error)}"
    )


def _mixes(fault: Fault) -> str:
    at = f" at {fault.place}" if fault.place else ""
    shaped = fault.reason == SHAPES
    cause = (
        "without some of its channels, what depends on them has another shape (a size in the code)"
        if shaped
        else "something mixes its channels before a layer consumes them"
    )
    return f"masking and cutting differ{at} ({fault.reason}): {cause}"
