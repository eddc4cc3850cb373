"""``join``: the analyses of all levels of a checkpoint become its one decision.

Promises: levels are taken in the order channel, head, layer, each only while the whole cut still
holds together and moves the outputs little enough; a layer that goes takes its own channels and
heads out of the cut; a level that is rejected, has nothing, or is missing leaves the others to
decide, and the decision says so. The same analyses give the same bytes, whoever made them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from elesh import safety
from elesh.analysis.levels.rounds import in_rounds
from elesh.analysis.levels.shards import merge_shards
from elesh.analysis.levels.to_limits import largest
from elesh.analysis.pruning_set.subsets import identity_of
from elesh.analysis.pruning_set.verdicts import decided, targets_of
from elesh.analysis.spans import stage
from elesh.safety import BreakerStatus, Measured, Probing, Proposal, Remeasuring, Verifier
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    GateResult,
    InvalidField,
    Level,
    LevelAnalysis,
    LevelPart,
    LossFactor,
    Phase,
    RankedUnit,
    RolledBackCut,
    StructuralPruningDecision,
)

from .calibration_probe import would_be
from .joint_set import JointSet, named
from .shortened import shortened, without_taken_back
from .verified import Verified, verified

__all__ = ["join"]

_ORDER = (Level.CHANNEL, Level.HEAD, Level.LAYER)
"""From the least to the most invasive (section "Production Safety Principles")."""
_OF_THE_WHOLE = frozenset({"requirements"})
"""Gates that are judged once, for the whole cut."""


@stage("join")
def join(
    bundle: CheckpointBundle,
    analyses: Sequence[LevelAnalysis],
    settings: Settings | None = None,
    *,
    breakers: Mapping[Level, BreakerStatus] | None = None,
    missing: Sequence[tuple[Level, str]] = (),
    verify: Verifier | None = None,
    taken_back: Sequence[RolledBackCut] = (),
    loss_factor: LossFactor | None = None,
) -> StructuralPruningDecision:
    """Decide by the analyses of all levels.

    One level alone gives a decision with that level's key; several, missing ones counted, give one
    with the key ``...:joint``.

    Args:
        analyses: one a level, or its shards, in any order.
        breakers: of the levels; those not given are closed.
        missing: levels that were asked for and have no analysis, each with the reason.
        verify: measures the cut on held-out data, once it has passed the gates; without it a
            stricter gate looks at the prediction.
        taken_back: cuts of the run that its trainer rolled back: spared, or refused where nothing
            else is left (decision 0061).
        loss_factor: what predictions of this run are multiplied by where nothing is measured; the
            setting's default if not given (decision 0062).

    Raises:
        InvalidField: if there is no analysis at all, or two of one level that are no shards of it.
    """
    settings, breakers = settings or Settings(), breakers or {}
    ordered = _levels(bundle, settings, analyses, missing)

    def predicted(proposal: Proposal) -> Measured:
        return safety.predicted_only(proposal, settings)

    def decide(ordered: Sequence[LevelAnalysis], rounds: int = 1) -> Verified:
        decision, order = _decided(bundle, ordered, settings, breakers, missing)
        again = safety.proposed_again(decision, taken_back)
        decision, order = without_taken_back(bundle, decision, order, again, settings)
        decision = decision.model_copy(update={"loss_factor": loss_factor})
        found = verified(bundle, decision, order, settings, verify or predicted, rounds)
        told = safety.refuse_rolled_back(found.decision, taken_back, again)
        return replace(found, decision=told)

    if isinstance(verify, Remeasuring):
        found = in_rounds(bundle, settings, ordered, verify, breakers, _looked_at(analyses))
        best = decide([each.analysis for each in found], max(each.count for each in found))
        if not best.skipped:
            return _with_calibration_probe(bundle, best.decision, settings, verify)
        # What cannot be measured in the end is decided as if there were no network.
    return _with_calibration_probe(bundle, decide(ordered).decision, settings, verify)


def _with_calibration_probe(
    bundle: CheckpointBundle,
    decision: StructuralPruningDecision,
    settings: Settings,
    verify: Verifier | None,
) -> StructuralPruningDecision:
    """In the preparation phase the decision with cuts that were measured to calibrate by."""
    wanted = settings.verification.calibration_measurements > 0
    if decision.safety.phase is not Phase.PREPARATION or not wanted:
        return decision
    if not isinstance(verify, Probing):
        return decision
    found = would_be(bundle, settings, verify)
    skipped = (found.skipped,) if found.skipped else ()
    update = {"would_be": found.cuts, "fallbacks": (*decision.fallbacks, *skipped)}
    return decision.model_copy(update=update)


def _decided(
    bundle: CheckpointBundle,
    ordered: Sequence[LevelAnalysis],
    settings: Settings,
    breakers: Mapping[Level, BreakerStatus],
    missing: Sequence[tuple[Level, str]],
) -> tuple[StructuralPruningDecision, tuple[RankedUnit, ...]]:
    """The decision before anything is measured, and the order of its units."""
    if len(ordered) + len(missing) == 1:
        return _alone(bundle, ordered[0], settings, breakers), ordered[0].order
    return _joint(bundle, ordered, settings, breakers, missing)


def _looked_at(analyses: Sequence[LevelAnalysis]) -> dict[Level, set[str]]:
    """By level that came in shards: the groups that these looked at and ranked by projections."""
    names: dict[Level, set[str]] = {}
    for analysis in analyses:
        if analysis.shard and analysis.decision.statistics.scorer == "output_projection":
            names.setdefault(analysis.level, set()).update(analysis.shard)
    return names


def _levels(
    bundle: CheckpointBundle,
    settings: Settings,
    analyses: Sequence[LevelAnalysis],
    missing: Sequence[tuple[Level, str]],
) -> list[LevelAnalysis]:
    """One analysis a level, in the order in which levels are taken; shards are merged."""
    by_level: dict[Level, list[LevelAnalysis]] = {}
    for analysis in analyses:
        by_level.setdefault(analysis.level, []).append(analysis)
    twice = [
        level
        for level, found in by_level.items()
        if len(found) > 1 and not all(a.shard for a in found)
    ]
    twice += [level for level, _ in missing if level in by_level]
    if not by_level or twice:
        found = [analysis.level for analysis in analyses]
        raise InvalidField("analyses", "one analysis a level (or its shards), at least one", found)
    return [
        merge_shards(bundle, settings, sorted(by_level[level], key=lambda a: a.shard))
        if by_level[level][0].shard
        else by_level[level][0]
        for level in _ORDER
        if level in by_level
    ]


def _alone(
    bundle: CheckpointBundle,
    analysis: LevelAnalysis,
    settings: Settings,
    breakers: Mapping[Level, BreakerStatus],
) -> StructuralPruningDecision:
    """The level's own decision, under its breaker."""
    own = analysis.decision
    status = breakers.get(analysis.level, BreakerStatus())
    return decided(
        bundle,
        settings,
        own.key,
        targets=targets_of(own),
        statistics=own.statistics,
        phase=own.safety.phase,
        gates=(safety.breaker_gate(status), *own.safety.gates),
        confidence=own.safety.confidence,
        reason="" if targets_of(own) else own.rejection_reason,
        fallbacks=own.fallbacks,
        ignored=own.ignored,
        spared=own.spared,
    )


def _joint(
    bundle: CheckpointBundle,
    analyses: Sequence[LevelAnalysis],
    settings: Settings,
    breakers: Mapping[Level, BreakerStatus],
    missing: Sequence[tuple[Level, str]],
) -> tuple[StructuralPruningDecision, tuple[RankedUnit, ...]]:
    gates = {a.level: _own_gates(a, breakers.get(a.level, BreakerStatus())) for a in analyses}
    whole = JointSet.of(bundle, (), settings)
    refused: dict[Level, tuple[str, str]] = {}
    for analysis in analyses:
        if failed := safety.rejection(gates[analysis.level]):
            refused[analysis.level] = ("rejected", failed)
        elif not analysis.order:
            refused[analysis.level] = ("nothing", analysis.decision.rejection_reason)
        else:
            larger = JointSet.of(bundle, (*whole.analyses, analysis), settings)
            if larger.fault and bundle.parameters.failing_gate == "shorten":
                larger = _as_much_as_passes(bundle, whole, analysis, settings) or larger
            if larger.fault:
                refused[analysis.level] = ("rejected", f"with the levels before: {larger.fault}")
            else:
                whole = larger
    parts = (*(_part(a, refused, whole) for a in analyses), *map(_missing_part, missing))
    # A decision that is not approved shows what every level found.
    shown = whole if whole.analyses else JointSet.of(bundle, analyses, settings)
    taken = [analysis.level for analysis in whole.analyses]
    first = analyses[0].decision
    decision = decided(
        bundle,
        settings,
        first.key.at(Level.JOINT),
        targets=shown.targets,
        statistics=shown.cut.statistics(_counts(analyses[0], shown), shown.shift),
        phase=first.safety.phase,
        gates=(*(gate for a in analyses for gate in gates[a.level]), *shown.gates),
        counted=(*(gate for level in taken for gate in gates[level]), *whole.gates),
        confidence=min(a.decision.safety.confidence for a in shown.analyses),
        reason="" if taken else "; ".join(map(_why_not, parts)),
        fallbacks=tuple(dict.fromkeys(f for a in analyses for f in a.decision.fallbacks)),
        ignored=tuple(dict.fromkeys(pair for a in analyses for pair in a.decision.ignored)),
        spared=tuple(group for a in analyses for group in a.decision.spared),
        levels=parts,
    )
    return decision, shown.order


def _as_much_as_passes(
    bundle: CheckpointBundle, whole: JointSet, analysis: LevelAnalysis, settings: Settings
) -> JointSet | None:
    """The joint set with the longest beginning of a level's order that passes; None without one."""
    if analysis.level is Level.LAYER:
        return None

    def joined(count: int) -> JointSet:
        own, order = shortened(
            bundle, analysis.decision, analysis.order, analysis.order[:count], settings, "limit"
        )
        predicted = analysis.predicted
        if predicted is not None:
            share = sum(max(unit.cost, 0.0) for unit in order)
            total = sum(max(unit.cost, 0.0) for unit in analysis.order)
            part = share / total if total > 0 else 1.0
            update = {"damage": predicted.damage * part, "error": predicted.error * part}
            predicted = predicted.model_copy(update=update)
        less = analysis.model_copy(update={"decision": own, "order": order, "predicted": predicted})
        return JointSet.of(bundle, (*whole.analyses, less), settings)

    count = largest(len(analysis.order), lambda count: not joined(count).fault)
    found = joined(count)
    return found if found.analyses[-1].order else None


def _own_gates(analysis: LevelAnalysis, status: BreakerStatus) -> tuple[GateResult, ...]:
    own = (safety.breaker_gate(status), *analysis.decision.safety.gates)
    return named(analysis.level, [gate for gate in own if gate.name not in _OF_THE_WHOLE])


def _part(
    analysis: LevelAnalysis, refused: Mapping[Level, tuple[str, str]], whole: JointSet
) -> LevelPart:
    verdict, reason = refused.get(analysis.level, ("taken", ""))
    if verdict == "taken":
        kept = {(unit.level, *identity_of(unit)) for unit in whole.order}
        lost = [u for u in analysis.order if (u.level, *identity_of(u)) not in kept]
        coupled = [u for u in lost if identity_of(u) not in whole.needless]
        groups = ", ".join(dict.fromkeys(unit.layer_name for unit in coupled))
        told = [f"{len(coupled)} of {groups} go with whole layers"] if coupled else []
        if needless := len(lost) - len(coupled):
            told.append(f"{needless} stay: the budget is met without them")
        reason = "; ".join(told)
    return LevelPart.model_validate(
        {
            "level": analysis.level,
            "verdict": verdict,
            "reason": reason[:8192],
            "statistics": analysis.decision.statistics,
        }
    )


def _why_not(part: LevelPart) -> str:
    """Why a level takes nothing; where that is a gate, its name says of which level."""
    named = part.reason.startswith(f"{part.level}.")
    return part.reason if named else f"{part.level}: {part.reason}"


def _missing_part(gap: tuple[Level, str]) -> LevelPart:
    level, reason = gap
    return LevelPart(level=level, verdict="missing", reason=reason[:8192])


def _counts(analysis: LevelAnalysis, whole: JointSet) -> dict[str, object]:
    """Units, quota and shares of the first level, as far as the whole cut takes from it."""
    own = analysis.decision.statistics
    count = sum(unit.level is analysis.level for unit in whole.order)
    gone = own.channels_original - own.channels_before + count
    return {
        "scorer": own.scorer,
        "channels_before": own.channels_before,
        "channels_after": own.channels_before - count,
        "channels_original": own.channels_original,
        "quota": own.quota,
        "shortfall": own.shortfall,
        "phase_limit": own.phase_limit,
        "cumulative_ratio": min(1.0, gone / own.channels_original)
        if own.channels_original
        else 0.0,
        "samples": own.samples,
    }
