"""A decision in progress: a set of units of any levels, its exact savings and predicted effect
(output shift, loss increase), taken through gates, held-out data and refusals.

Promises: figures are pure functions of arrays; a set of one is its single removal, an empty one
costs nothing. A decision is approved if and only if something goes and every gate that counts
passed; one that is not says why. A draft is frozen, and with that validated, once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import TypeVar

import numpy as np

from elesh import safety
from elesh.analysis.candidates import Doubles, multiple_of
from elesh.analysis.importance.scores import single_removal
from elesh.analysis.selection.choose import Reason
from elesh.analysis.spans import span
from elesh.safety import Measured, Proposal, Verifier
from elesh.settings import Settings
from leyline import (
    AnalysedPart,
    AttentionHeadTarget,
    ChannelPruningTarget,
    CheckpointBundle,
    Fallback,
    GateResult,
    GateStatistics,
    IdempotencyKey,
    LayerPruningTarget,
    LayerStatistics,
    Level,
    LevelPart,
    LossFactor,
    Outcome,
    Phase,
    PrunedArchitecture,
    PruningGroup,
    PruningStatistics,
    RankedUnit,
    Reconstructed,
    RolledBackCut,
    SafetyValidation,
    SparedGroup,
    StructuralPruningDecision,
    Verification,
    WouldBeCut,
)

from .plans import Target, restricted, rounded_to_multiples

_RIVALS = 2.5
"""By how many standard deviations a wide scatter lifts the best of the wrong answers: the mean of
the largest of as many normal draws as there are wrong ones, 1.5 of nine, 2.5 of a hundred."""


def set_removal(
    gates: Mapping[str, GateStatistics], units: Mapping[str, Sequence[int]]
) -> tuple[float, float | None]:
    """The predicted increase of the loss, in nats a sample, when these units are removed together.

    Where margins are known, the units' moves are added up sample by sample and what their sum does
    to the margins is bent as networks bend it (:func:`_loss_increases`, decision 0084). What
    is known
    of single removals beyond that is added: of units that were masked all of it, of others the
    mean, which is the whole of it where one unit goes. Without margins: the sum of the single
    removals, far too low for sets.

    Returns:
        the increase, and its standard error over the samples where margins are known.
    """
    chosen = [(gates[name], np.asarray(lost, dtype=np.int64)) for name, lost in units.items()]
    alone = [single_removal(gate)[lost] for gate, lost in chosen]
    margins = chosen[0][0].margins if chosen else None
    if margins is None or any(gate.moves is None for gate, _ in chosen):
        return float(sum(loss_increases.sum() for loss_increases in alone)), None
    m = np.asarray(margins, dtype=np.float64)
    shift, unsure = np.zeros((2, len(m), 1))
    masked, beyond = 0.0, [np.zeros(0)]
    for (gate, lost), single in zip(chosen, alone, strict=True):
        moves = np.asarray(gate.moves, dtype=np.float64)[:, lost]
        shift += moves.sum(axis=1, keepdims=True)
        if gate.removal_error is not None:
            masked += float(
                (single - _loss_increases(m, moves, np.zeros_like(moves)).mean(axis=0)).sum()
            )
        else:
            unsure += moves.sum(axis=1, keepdims=True)
            beyond.append(single - _loss_increases(m, moves, moves).mean(axis=0))
    gaps = np.concatenate(beyond)
    loss_increases = (
        _loss_increases(m, shift, unsure) + masked + (float(gaps.mean()) if len(gaps) else 0.0)
    )
    return float(loss_increases.mean()), float(loss_increases.std()) / math.sqrt(len(m))


def _loss_increases(margins: Doubles, shifts: Doubles, unsure: Doubles) -> Doubles:
    """[N, S]: the increase of each sample's loss for each of S shifts of its margin.

    - A margin is moved less the further all of them are: what derivatives promise is lost twice
      where it runs through two units that go. If the derivative shrinks with the outputs, as
      ``exp(-t)`` along a way of length x, ``(1 - exp(-x)) / x`` of the shift is left. x is the mean
      size of the shifts by that of the margins.
    - The margin is that of the strongest wrong answer. What only scales the outputs down keeps the
      answers in their order; the rest of the shift scatters all wrong answers, and the best of
      them is then another, and higher: by half the variance where that is small (the mean of an
      exponential of normal draws), by :data:`_RIVALS` standard deviations where it is large.

    Args:
        margins: [N].
        shifts: [N, S], of the margins, downwards.
        unsure: [N, S], the part of the shifts that also scatters the other answers.
    """
    size = max(float(margins @ margins) / len(margins), 1.0)  # Under a nat, nothing bends yet.
    way = np.sqrt(np.einsum("ns,ns->s", shifts, shifts) / len(margins) / size)
    left = np.divide(-np.expm1(-way), way, out=np.ones_like(way), where=way > 0)
    scatter = unsure - np.outer(margins, margins @ unsure / len(margins) / size)
    spread = left * np.sqrt(np.einsum("ns,ns->s", scatter, scatter) / len(margins))
    lift = _RIVALS * (np.hypot(_RIVALS, spread) - _RIVALS)
    before = margins[:, None]
    loss_increases: Doubles = np.logaddexp(0, before - left * shifts + lift) - np.logaddexp(
        0, before
    )
    return loss_increases


@dataclass(frozen=True)
class LossIncrease:
    """The predicted increase of the loss, in nats a sample."""

    mean: float
    error: float | None = None
    """Standard error over the samples, where known."""


def loss_increase(
    bundle: CheckpointBundle, units: Mapping[str, Sequence[int]], layers: Sequence[str] = ()
) -> LossIncrease | None:
    """What the units do together (:func:`set_removal`), and each layer on its own besides.

    None where a unit or layer has no gate statistics, or nothing goes.
    """
    known = all(name in bundle.gates for name in units)
    known = known and all(name in bundle.layers for name in layers)
    if not known or not (units or layers):
        return None
    parts = [_of_layer(bundle.layers[name]) for name in sorted(layers)]
    if units:
        parts.append(LossIncrease(*set_removal(bundle.gates, units)))
    errors = [part.error for part in parts if part.error is not None]
    known = len(errors) == len(parts)
    return LossIncrease(sum(part.mean for part in parts), math.hypot(*errors) if known else None)


def _of_layer(data: LayerStatistics) -> LossIncrease:
    """What the trainer predicted, where it did; else to second order, as for units."""
    if data.removal_rise is None or data.removal_error is None:
        return LossIncrease(float(-data.first_order[0] + 0.5 * data.second_order[0]))
    return LossIncrease(float(data.removal_rise[0]), float(data.removal_error[0]))


@dataclass(frozen=True)
class RelativeOutputError:
    """Predicted mean square of the outputs' movement, as a share of their own mean square."""

    value: float | None = None
    """None where there are no output projections."""
    standard_error: float | None = None
    random: float | None = None
    """What a random cut of the same size would do."""


@dataclass(frozen=True)
class Cut:
    """What goes, and what is left."""

    units: Mapping[str, Sequence[int]]
    layers: tuple[str, ...]
    structure: GateResult
    before: PrunedArchitecture
    after: PrunedArchitecture | None
    """None where the cut does not hold together (the structure gate says why)."""
    loss_increase: float | None
    """What the units are predicted to do together, in nats a sample, and each layer on its own.
    None where a unit has no gate statistics, or nothing goes."""

    @classmethod
    def of(cls, bundle: CheckpointBundle, targets: Iterable[Target], scorer: str = "") -> Cut:
        """The cut that removes ``targets``.

        Args:
            scorer: what ranked them; where that was for reconstruction, and the checkpoint asks
                for it, the loss increase is of the network after it.
        """
        targets = tuple(targets)
        units = {t.layer_name: t.indices for t in targets if not isinstance(t, LayerPruningTarget)}
        layers = tuple(t.layer_name for t in targets if isinstance(t, LayerPruningTarget))
        structure, after = safety.structure(bundle.architecture, units, layers)
        increase = loss_increase(bundle, units, layers)
        mean = increase.mean if increase else None
        if mean is not None and scorer == "reconstruction":
            mean *= _left_by_reconstruction(bundle, targets, units)
        return cls(units, layers, structure, bundle.architecture, after, mean)

    @property
    def count(self) -> int:
        """Units and layers that go."""
        return sum(map(len, self.units.values())) + len(self.layers)

    @property
    def parameters_removed(self) -> float:
        """Share of the present parameters."""
        parameters = self.before.parameters
        return 1 - self.after.parameters / parameters if self.after and parameters else 0.0

    def figures(self, error: RelativeOutputError) -> dict[str, float | None]:
        """Sizes and predictions of this cut, by the fields of PruningStatistics."""
        before, after = self.before, self.after or self.before
        return {
            "parameters_before": before.parameters,
            "parameters_after": after.parameters,
            "macs_before": before.macs,
            "macs_after": after.macs,
            "predicted_shift": error.value,
            "predicted_shift_error": error.standard_error,
            "predicted_loss_rise": self.loss_increase,
        }


def _left_by_reconstruction(
    bundle: CheckpointBundle, targets: Iterable[Target], units: Mapping[str, Sequence[int]]
) -> float:
    """What of the loss increase is left: the ratio of the outputs' movements with and without.

    Without, it is the mean square of the summed projections; with, the sum of the costs.
    """
    if bundle.parameters.reconstruction is None or not units:
        return 1.0
    costs = [
        cost
        for target in targets
        if not isinstance(target, LayerPruningTarget)
        for cost in (
            target.importance if isinstance(target, ChannelPruningTarget) else target.costs
        )
    ]
    rows = [
        bundle.gates[name].projections[:, list(lost)].sum(axis=1, dtype=np.float64)
        for name, lost in sorted(units.items())
    ]
    moved = float(np.mean(np.square(np.sum(rows, axis=0))))
    return min(1.0, math.sqrt(max(sum(costs), 0.0) / moved)) if moved > 0 else 1.0


FALLBACK_DISCOUNT = 0.8
"""What each fallback of the failure table leaves of the confidence."""
_SAFETY_FAILURE = "safety_failure"
_LONGEST = 8192
"""Characters of a reason that the contract takes."""
_T = TypeVar("_T", bound=Target)


@dataclass
class Draft:
    """A decision that is not made yet. Every field holds immutable values, so that a copy
    (``dataclasses.replace``) can be tried out and thrown away."""

    bundle: CheckpointBundle
    settings: Settings
    key: IdempotencyKey
    targets: tuple[Target, ...]
    """Channels, then heads, then layers."""
    order: tuple[RankedUnit, ...]
    """The units of the targets, as they were chosen."""
    statistics: PruningStatistics
    phase: Phase
    confidence: float
    gates: tuple[GateResult, ...] = ()
    outcome: Outcome = Outcome.NO_GO
    reason: str = ""
    """Why it is rejected."""
    fallbacks: tuple[Fallback, ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    near_cut: tuple[SparedGroup, ...] = ()
    levels: tuple[LevelPart, ...] = ()
    parts: tuple[AnalysedPart, ...] = ()
    verification: Verification | None = None
    reconstruction: Reconstructed | None = None
    rolled_back: tuple[RolledBackCut, ...] = ()
    would_be: tuple[WouldBeCut, ...] = ()
    loss_factor: LossFactor | None = None

    @classmethod
    def of(
        cls,
        bundle: CheckpointBundle,
        settings: Settings,
        made: StructuralPruningDecision,
        order: Sequence[RankedUnit],
    ) -> Draft:
        """The decision of a level, as it was before it was frozen."""
        return cls(
            bundle,
            settings,
            made.key,
            (*made.channels, *made.attention_heads, *made.layers),
            tuple(order),
            made.statistics,
            made.safety.phase,
            made.safety.confidence,
            gates=made.safety.gates,
            outcome=made.safety.outcome,
            reason=made.rejection_reason,
            fallbacks=made.fallbacks,
            ignored=made.ignored,
            near_cut=made.spared,
        )

    @property
    def approved(self) -> bool:
        """Whether the trainer may apply it."""
        return not self.reason and self.outcome is not Outcome.NO_GO

    @property
    def channels(self) -> tuple[ChannelPruningTarget, ...]:
        """The targets that lose channels."""
        return _of_kind(ChannelPruningTarget, self.targets)

    @property
    def attention_heads(self) -> tuple[AttentionHeadTarget, ...]:
        """The targets that lose heads."""
        return _of_kind(AttentionHeadTarget, self.targets)

    @property
    def layers(self) -> tuple[LayerPruningTarget, ...]:
        """The layers that go."""
        return _of_kind(LayerPruningTarget, self.targets)

    @property
    def units(self) -> dict[str, tuple[int, ...]]:
        """Units to remove by group, in current numbering."""
        targets: list[ChannelPruningTarget | AttentionHeadTarget]
        targets = [*self.channels, *self.attention_heads]
        return {target.layer_name: target.indices for target in targets}

    def judge(self, counted: Sequence[GateResult] | None = None, *, reason: str = "") -> None:
        """Let verdict and reason follow from the gates.

        Args:
            counted: the gates that the verdict rests on; all of them if not given.
            reason: why it is rejected even if they passed; empty if nothing speaks against it.
        """
        counted = self.gates if counted is None else counted
        # Of whichever level.
        broken = tuple(
            gate
            for gate in self.gates
            if not gate.passed and gate.name.rpartition(".")[2] in safety.ARCHITECTURE_GATES
        )
        if broken:
            # A row of the failure table: nothing of a cut that does not hold together is applied.
            counted = tuple(dict.fromkeys((*counted, *broken)))
            if not any(taken.rung == _SAFETY_FAILURE for taken in self.fallbacks):
                found = safety.rejection(broken)
                self.fallbacks += (Fallback(rung=_SAFETY_FAILURE, reason=found),)
        passed = all(gate.passed for gate in counted)
        # A go is only for what was measured.
        self.outcome = Outcome.CONDITIONAL_GO if passed else Outcome.NO_GO
        self.reason = (safety.rejection(counted) or reason)[:_LONGEST]

    def refuse(self, reason: str) -> None:
        """Reject it, for this reason too."""
        self.outcome = Outcome.NO_GO
        self.reason = "; ".join(filter(None, [self.reason, reason]))[:_LONGEST]

    def keep(self, safe: Sequence[RankedUnit], why: Reason) -> None:
        """Keep the units ``safe`` of the cut only; the others are listed as kept near the cut.

        Of groups that would not end at their multiple, the units last taken stay, too. Sizes and
        figures become those of the smaller cut; the shift stays that of the larger one, for which
        it was predicted.
        """
        groups = {name: self.bundle.architecture.group[name] for name in self.units}
        multiples = {name: self._multiple(group) for name, group in groups.items()}
        sizes = {name: group.size for name, group in groups.items()}
        kept = rounded_to_multiples(safe, sizes, multiples)
        self.targets = restricted(self.targets, self.order, kept, why)
        first = self.levels[0].level if self.levels else self.key.level
        fewer = sum(u.level is first for u in self.order) - sum(u.level is first for u in kept)
        self.order, self.statistics = kept, self._smaller(fewer)

    def without_rolled_back(self, cuts: Sequence[RolledBackCut]) -> Draft:
        """The draft without the units of cuts that the trainer rolled back.

        Where nothing else is left it stays as it is, to be refused.

        Args:
            cuts: those that are proposed again (:func:`elesh.safety.proposed_again`).
        """
        gone = {unit for cut in cuts for unit in safety.units_of(cut)}
        if not gone or not self.approved:
            return self
        groups = self.bundle.architecture.group

        def original(unit: RankedUnit) -> tuple[str, int]:
            name = unit.layer_name
            return name, -1 if unit.level is Level.LAYER else groups[name].origin[unit.index]

        smaller = replace(self)
        smaller.keep([unit for unit in self.order if original(unit) not in gone], "rolled_back")
        return smaller if smaller.order else self

    def verify(self, verifier: Verifier, rounds: int = 1) -> bool:
        """Shorten it to what ``verifier`` measured as safe, and judge it by the figures.

        A draft that is rejected already is not measured.

        Args:
            rounds: in how many the order was chosen.

        Returns:
            Whether the cut was measured, or need not be; False where it could not be.
        """
        if not self.approved:
            self.gates += (safety.predicted_loss(None, 1.0, 0.0),)
            return True
        units = {(unit.level, unit.layer_name, unit.index): unit for unit in self.order}
        proposal = Proposal(
            order=tuple(units),
            costs=tuple(unit.cost for unit in units.values()),
            phase=self.phase,
            predicted_loss_rise=self.statistics.predicted_loss_rise,
            rounds=rounds,
            loss_factor=self.loss_factor,
        )
        with span("verify"):
            answer = verifier(proposal)
        kept = frozenset(answer.kept)
        if len(kept) < len(units):
            safe = [unit for entry, unit in units.items() if entry in kept]
            self.keep(safe, "verification")
        self._judge_measured(answer)
        return answer.skipped is None

    def _judge_measured(self, answer: Measured) -> None:
        """Take figures, gates and verdict of what was measured."""
        found, asked = answer.verification, self.bundle.parameters.reconstruction
        if found is None:  # Confidence 1 is kept for cuts that were measured.
            self.confidence *= FALLBACK_DISCOUNT if answer.skipped else 1.0
        else:
            self.confidence = 1.0
            if found.kept:
                increase = self.statistics.predicted_loss_rise  # of what was kept
                found = found.model_copy(update={"predicted_loss_rise": increase})
        self.verification, self.reconstruction = found, answer.reconstruction
        if asked is not None and answer.reconstruction is None and self.units:
            # Nothing was measured: the trainer's own check is of the refitted network.
            self.reconstruction = Reconstructed(
                applied=True, skip=asked.skip, batch_statistics=asked.batch_statistics
            )
        self.gates += answer.gates
        self.fallbacks += (*((answer.skipped,) if answer.skipped else ()), *answer.fallbacks)
        self.outcome = Outcome.CONDITIONAL_GO if found is None else Outcome.GO
        failed = safety.rejection(answer.gates)
        if not failed and not self.targets:
            failed = "verification: no part of the cut was measured as safe"
        if failed:
            self.refuse(failed)

    def _multiple(self, group: PruningGroup) -> int:
        if group.level is not Level.CHANNEL:
            return group.unit_multiple
        asked = self.bundle.parameters.round_to
        default = self.settings.structured_pruning.channel_analysis.round_to
        return multiple_of(group, default if asked == 1 else asked)

    def _smaller(self, fewer: int) -> PruningStatistics:
        """The figures of a cut of so many units less at the first level."""
        cut = Cut.of(self.bundle, self.targets, self.statistics.scorer)
        after = cut.after or cut.before
        present = self.statistics.channels_after + fewer
        original = self.statistics.channels_original
        update = {
            "parameters_after": after.parameters,
            "macs_after": after.macs,
            "predicted_loss_rise": cut.loss_increase,
            "channels_after": present,
            "cumulative_ratio": (original - present) / original if original else 0.0,
        }
        return self.statistics.model_copy(update=update)

    def frozen(self) -> StructuralPruningDecision:
        """The decision, each target with the loss increase that is predicted for it alone."""
        metadata, targets = self.bundle.metadata, list[Target]()
        for target in self.targets:
            whole, name = isinstance(target, LayerPruningTarget), target.layer_name
            units = {} if isinstance(target, LayerPruningTarget) else {name: target.indices}
            increase = loss_increase(self.bundle, units, [name] if whole else [])
            update = {
                "predicted_loss_rise": increase.mean if increase else None,
                "predicted_loss_rise_error": increase.error if increase else None,
            }
            targets.append(target.model_copy(update=update))
        return StructuralPruningDecision(
            idempotency_key=str(self.key),
            run_id=metadata.run_id,
            epoch=metadata.epoch,
            model_hash=metadata.model_hash,
            channels=_of_kind(ChannelPruningTarget, targets),
            attention_heads=_of_kind(AttentionHeadTarget, targets),
            layers=_of_kind(LayerPruningTarget, targets),
            statistics=self.statistics,
            safety=SafetyValidation(
                outcome=self.outcome,
                phase=self.phase,
                gates=self.gates,
                confidence=self.confidence,
                measured=self.verification is not None,
                verification=self.verification,
            ),
            approved_for_application=self.approved,
            rejection_reason=self.reason,
            fallbacks=self.fallbacks,
            ignored=self.ignored,
            spared=self.near_cut,
            levels=self.levels,
            parts=self.parts,
            reconstruction=self.reconstruction,
            rolled_back=self.rolled_back,
            would_be=self.would_be,
            loss_factor=self.loss_factor,
            settings_hash=self.settings.analysis_hash,
            elesh_version=_elesh_version(),
        )


def _of_kind(kind: type[_T], targets: Iterable[Target]) -> tuple[_T, ...]:
    return tuple(target for target in targets if isinstance(target, kind))


@cache
def _elesh_version() -> str:
    return version("elesh")
