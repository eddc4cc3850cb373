"""A decision while it is made: one draft goes through gates, held-out data and refusals.

Promises: a decision is approved if and only if something goes and every gate that counts passed;
one that is not says why. A draft is frozen, and with that validated, once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import TypeVar

from elesh import safety
from elesh.analysis.candidates import multiple_of
from elesh.analysis.selection.choose import Reason
from elesh.settings import Settings
from leyline import (
    AnalysedPart,
    AttentionHeadTarget,
    ChannelPruningTarget,
    CheckpointBundle,
    Fallback,
    GateResult,
    IdempotencyKey,
    LayerPruningTarget,
    Level,
    LevelPart,
    LossFactor,
    Outcome,
    Phase,
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

from .effects import Cut, with_loss_increases
from .plans import Target, restricted, rounded_to_multiples

__all__ = ["FALLBACK_DISCOUNT", "Draft", "targets_of"]

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
    spared: tuple[SparedGroup, ...] = ()
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
            targets_of(made),
            tuple(order),
            made.statistics,
            made.safety.phase,
            made.safety.confidence,
            gates=made.safety.gates,
            outcome=made.safety.outcome,
            reason=made.rejection_reason,
            fallbacks=made.fallbacks,
            ignored=made.ignored,
            spared=made.spared,
        )

    @property
    def approved(self) -> bool:
        """Whether the trainer may apply it."""
        return not self.reason and self.outcome is not Outcome.NO_GO

    @property
    def channels(self) -> tuple[ChannelPruningTarget, ...]:
        """The targets that lose channels."""
        return self._kind(ChannelPruningTarget)

    @property
    def attention_heads(self) -> tuple[AttentionHeadTarget, ...]:
        """The targets that lose heads."""
        return self._kind(AttentionHeadTarget)

    @property
    def layers(self) -> tuple[LayerPruningTarget, ...]:
        """The layers that go."""
        return self._kind(LayerPruningTarget)

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
        counted, broken = self.gates if counted is None else counted, _broken(self.gates)
        if broken:
            # A row of the failure table: nothing of a cut that does not hold together is applied.
            counted = tuple(dict.fromkeys((*counted, *broken)))
            if not any(taken.rung == _SAFETY_FAILURE for taken in self.fallbacks):
                found = safety.rejection(broken)
                self.fallbacks += (Fallback(rung=_SAFETY_FAILURE, reason=found),)
        self.outcome = safety.verdict(counted, measured=False)
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
            "predicted_loss_rise": cut.loss_rise,
            "channels_after": present,
            "cumulative_ratio": (original - present) / original if original else 0.0,
        }
        return self.statistics.model_copy(update=update)

    def frozen(self) -> StructuralPruningDecision:
        """The decision, each target with the loss increase that is predicted for it alone."""
        metadata = self.bundle.metadata
        targets = with_loss_increases(self.bundle, self.targets)
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
            spared=self.spared,
            levels=self.levels,
            parts=self.parts,
            reconstruction=self.reconstruction,
            rolled_back=self.rolled_back,
            would_be=self.would_be,
            loss_factor=self.loss_factor,
            settings_hash=self.settings.analysis_hash,
            elesh_version=_elesh_version(),
        )

    def _kind(self, kind: type[_T]) -> tuple[_T, ...]:
        return _of_kind(kind, self.targets)


def _of_kind(kind: type[_T], targets: Iterable[Target]) -> tuple[_T, ...]:
    return tuple(target for target in targets if isinstance(target, kind))


def targets_of(decision: StructuralPruningDecision) -> tuple[Target, ...]:
    """All targets of a decision: channels, then heads, then layers."""
    return (*decision.channels, *decision.attention_heads, *decision.layers)


def _broken(gates: Iterable[GateResult]) -> tuple[GateResult, ...]:
    """The gates of the architecture's integrity that failed, of whichever level."""
    return tuple(
        gate
        for gate in gates
        if not gate.passed and gate.name.rpartition(".")[2] in safety.ARCHITECTURE_GATES
    )


@cache
def _elesh_version() -> str:
    return version("elesh")
