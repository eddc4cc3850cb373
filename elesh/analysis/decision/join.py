"""``join``: makes one decision of the analyses of a checkpoint's levels.

Promises: levels are taken in the order channel, head, layer, each only while the whole cut still
holds together and moves the outputs little enough; a layer that goes takes its own channels and
heads out of the cut; channels and heads are merged into one order where their costs are of one
kind; a level that is rejected, has nothing, or is missing leaves the others to decide, and the
decision says so. The same analyses give the same bytes, on any worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from elesh import safety
from elesh.analysis.budgets.fitting import Fitting, fitting
from elesh.analysis.candidates import Doubles
from elesh.analysis.importance.scores import sample_weights
from elesh.analysis.levels.analyze_level import LevelDraft, budget_gate, largest, merge_shards
from elesh.analysis.levels.rounds import in_rounds
from elesh.analysis.levels.units import select_channels
from elesh.analysis.pruning_set.draft import Cut, Draft, RelativeOutputError, loss_increase
from elesh.analysis.pruning_set.plans import Identity, Target, identity_of, merged, restricted
from elesh.analysis.selection.schedule import counted_groups
from elesh.analysis.spans import span
from elesh.safety import BreakerStatus, Measured, Probing, Proposal, Remeasuring, Verifier
from elesh.settings import Settings
from leyline import (
    AnalysedPart,
    CheckpointBundle,
    Fallback,
    GateResult,
    InvalidField,
    LayerPruningTarget,
    Level,
    LevelAnalysis,
    LevelPart,
    LossFactor,
    Phase,
    RankedUnit,
    RolledBackCut,
    StructuralPruningDecision,
    WouldBeCut,
)

_JOINT_COSTS = frozenset({"output_projection", "reconstruction", "fisher", "margins"})
"""Scorers whose costs are of one kind whatever the level."""


@dataclass(frozen=True)
class JointSet:
    """The cut of several levels together, without what they take from each other."""

    parts: tuple[LevelDraft, ...]
    targets: tuple[Target, ...]
    order: tuple[RankedUnit, ...]
    cut: Cut
    error: RelativeOutputError
    gates: tuple[GateResult, ...]
    """Of the joint set: structure, predicted shift, budget, requirements."""
    fault: str
    """Why the levels cannot go together; empty if they can."""
    needless: frozenset[Identity]
    """Units that the budget is met without."""

    @classmethod
    def of(
        cls, bundle: CheckpointBundle, parts: Sequence[LevelDraft], settings: Settings
    ) -> JointSet:
        """All of ``parts``."""
        # What ranked channels and heads, where that is one thing.
        used = {p.draft.statistics.scorer for p in parts if p.level is not Level.LAYER}
        scorer = used.pop() if len(used) == 1 else ""
        fit = _resolved(bundle, parts, settings, scorer)
        targets, order = fit.targets, fit.order
        cut = Cut.of(bundle, targets, scorer)
        error = _relative_error(bundle, parts, cut, scorer)
        limit = settings.structured_pruning.channel_analysis.max_predicted_shift
        gates = (
            cut.structure,
            safety.predicted_shift(error.value, error.standard_error, limit),
            *([budget_gate(fit.use)] if fit.use else []),
            safety.requirements(bundle.requirements, cut.loss_increase, cut.parameters_removed),
        )
        gates = named(Level.JOINT, gates)
        fault = safety.rejection(gates[:-1])
        return cls(tuple(parts), targets, order, cut, error, gates, fault, fit.unneeded)


def named(level: Level, gates: Sequence[GateResult]) -> tuple[GateResult, ...]:
    """The gates with the level before their names."""
    return tuple(gate.model_copy(update={"name": f"{level}.{gate.name}"}) for gate in gates)


def _resolved(
    bundle: CheckpointBundle, parts: Sequence[LevelDraft], settings: Settings, scorer: str
) -> Fitting:
    """All targets and their order, without the units of groups that go with a whole layer and
    those that a budget is met without."""
    # Channels and heads together where their costs are of one kind; whole layers last.
    comparable = scorer in _JOINT_COSTS
    orders = [p.draft.order for p in parts if p.level is not Level.LAYER]
    order = merged(orders) if comparable else tuple(unit for each in orders for unit in each)
    order += tuple(unit for p in parts if p.level is Level.LAYER for unit in p.draft.order)
    targets = tuple(target for part in parts for target in part.draft.targets)
    if layers := [t.layer_name for t in targets if isinstance(t, LayerPruningTarget)]:
        left = bundle.architecture.without_layers(layers).group
        kept = tuple(
            unit
            for unit in order
            if unit.level is Level.LAYER
            or (unit.layer_name in left and left[unit.layer_name].prunable)
        )
        targets, order = restricted(targets, order, kept, "coupling"), kept
    round_to = bundle.parameters.round_to
    if round_to == 1:
        round_to = settings.structured_pruning.channel_analysis.round_to
    if bundle.parameters.budget is None:
        return Fitting(targets, order)
    return fitting(bundle, targets, order, round_to=round_to, comparable=comparable)


def _relative_error(
    bundle: CheckpointBundle, parts: Sequence[LevelDraft], cut: Cut, scorer: str
) -> RelativeOutputError:
    """The predicted output error of the joint set.

    The movement of all units together on all samples, plus a correction for each level: its own
    prediction, made on samples that did not choose, less its movement on all samples. Units are
    chosen where the samples make them look cheap, and the correction takes that out again. No level
    was chosen by the columns of another, so what levels do together needs no correction.
    """
    found = [part.predicted for part in parts]
    mean_square = max((p.energy for p in found if p), default=0.0)
    if not found or not mean_square or any(p is None for p in found):
        return RelativeOutputError()
    if scorer == "reconstruction" and bundle.parameters.reconstruction is not None:
        # Residuals of different levels are taken for independent, as those of one level are.
        moved = sum(p.damage for p in found if p)
        error = float(np.sqrt(sum(p.error**2 for p in found if p)))
        return RelativeOutputError(moved / mean_square, error / mean_square)
    output_error = _mean_square(_moved(bundle, cut.units, cut.layers))
    error = 0.0
    for part in parts:
        predicted, own = part.predicted, part.draft
        assert predicted is not None
        layers = [target.layer_name for target in own.layers]
        output_error += predicted.damage - _mean_square(_moved(bundle, own.units, layers))
        error += predicted.error**2
    return RelativeOutputError(
        max(output_error, 0.0) / mean_square, float(np.sqrt(error)) / mean_square
    )


def _mean_square(row: Doubles) -> float:
    return float(np.mean(row * row)) if len(row) else 0.0


def _moved(
    bundle: CheckpointBundle, units: Mapping[str, Sequence[int]], layers: Sequence[str]
) -> Doubles:
    """[N]: by how much removing units and layers moves the outputs, sample by sample, weighted
    as where units are chosen."""
    rows = [
        bundle.gates[name].projections[:, list(lost)].sum(axis=1, dtype=np.float64)
        for name, lost in sorted(units.items())
    ]
    rows += [np.asarray(bundle.layers[name].projections, np.float64) for name in sorted(layers)]
    if not rows:
        return np.zeros(0)
    gate = next(iter(bundle.gates.values()), None)
    weights = np.ones(1) if gate is None or not units else sample_weights(gate)
    return np.asarray(np.sum(rows, axis=0) * weights)


_ORDER = (Level.CHANNEL, Level.HEAD, Level.LAYER)
"""From the least to the most invasive (section "Production Safety Principles")."""
_OF_THE_WHOLE = frozenset({"requirements"})
"""Gates that are judged once, for the whole cut."""


@dataclass(frozen=True)
class JoinContext:
    """What a decision rests on besides the statistics of its checkpoint."""

    breakers: Mapping[Level, BreakerStatus] = field(default_factory=dict)
    """Of the levels; those not given are closed."""
    missing: Sequence[tuple[Level, str]] = ()
    """Levels that were asked for and have no analysis, each with the reason."""
    verify: Verifier | None = None
    """Measures the cut on held-out data, once it has passed the gates; without it a stricter gate
    looks at the prediction."""
    rolled_back: Sequence[RolledBackCut] = ()
    """Cuts that the run's trainer rolled back: left out, or refused where nothing else is left
    (decision 0061)."""
    loss_factor: LossFactor | None = None
    """What predictions of this run are multiplied by where nothing is measured; the setting's
    default if not given (decision 0062)."""
    fallbacks: Sequence[Fallback] = ()
    """That led to joining what others analysed."""
    parts: Sequence[AnalysedPart] = ()
    """What it is joined from, where the levels alone do not tell."""


def join(
    bundle: CheckpointBundle,
    analyses: Sequence[LevelAnalysis],
    settings: Settings | None = None,
    context: JoinContext | None = None,
) -> StructuralPruningDecision:
    """Decide by the analyses of all levels, made wherever they were.

    One level alone gives a decision with that level's key; several, missing ones counted, give one
    with the key ``...:joint``.

    Args:
        analyses: one a level, or its shards, in any order.

    Raises:
        InvalidField: if there is no analysis at all, or two of one level that are no shards of it.
    """
    settings = settings or Settings()
    levels = [
        LevelDraft(
            Draft.of(bundle, settings, made.decision, made.order),
            made.predicted,
            made.shard,
            made.halves,
        )
        for made in analyses
    ]
    return joined(bundle, levels, settings, context or JoinContext())


@span("join")
def joined(
    bundle: CheckpointBundle,
    levels: Sequence[LevelDraft],
    settings: Settings,
    context: JoinContext,
) -> StructuralPruningDecision:
    """Decide by levels that are not sent (see :func:`join`)."""
    merged = _levels(bundle, settings, levels, context.missing)
    verify, chosen, rounds = context.verify, merged, 1
    joint = [each for each in levels if each.draft.statistics.scorer == "output_projection"]
    if joint and isinstance(verify, Remeasuring):
        # Of levels that came in shards: the groups that these looked at.
        looked_at: dict[Level, set[str]] = {}
        for each in joint:
            if each.shard:
                looked_at.setdefault(each.level, set()).update(each.shard)
        found = in_rounds(bundle, settings, merged, verify, context.breakers, looked_at)
        chosen, rounds = [each.level for each in found], max(each.count for each in found)
    draft, measured = _decided(bundle, chosen, settings, context, rounds)
    if not measured and chosen is not merged:
        # What cannot be measured in the end is decided as if there were no network.
        draft, _ = _decided(bundle, merged, settings, context)
    if draft.phase is Phase.PREPARATION and isinstance(verify, Probing):
        _calibrate(draft, verify)
    draft.fallbacks += tuple(context.fallbacks)
    draft.parts = tuple(context.parts)
    return draft.frozen()


def _decided(
    bundle: CheckpointBundle,
    levels: Sequence[LevelDraft],
    settings: Settings,
    context: JoinContext,
    rounds: int = 1,
) -> tuple[Draft, bool]:
    """The draft after all gates, measurements and refusals; and whether it was measured, if it
    had to be."""

    def predicted(proposal: Proposal) -> Measured:
        return safety.predicted_only(proposal, settings)

    alone = len(levels) + len(context.missing) == 1
    draft = (
        _alone(levels[0], context.breakers) if alone else _joint(bundle, levels, settings, context)
    )
    again: tuple[RolledBackCut, ...] = ()
    if context.rolled_back:
        again = safety.proposed_again(draft, context.rolled_back)
        draft = draft.without_rolled_back(again)
    draft.loss_factor = context.loss_factor
    measured = draft.verify(context.verify or predicted, rounds)
    if context.rolled_back:
        gate = safety.rolled_back_gate(draft, context.rolled_back, again)
        draft.gates += (gate,)
        draft.rolled_back = tuple(context.rolled_back)
        if not gate.passed:
            draft.refuse(f"{gate.name}: {gate.detail}")
    return draft, measured


_TIMES = (0.5, 1.0, 1.5, 2.0)
"""Of the share that the aggressive phase may remove."""


@span("calibrate")
def _calibrate(draft: Draft, network: Probing) -> None:
    """Calibrate predictions: predict and measure the first channels to go, up to twice as many as
    may be removed in all. (Small cuts of a network that still trains cost too little to compare.)

    Nothing is measured where the statistics give no predicted loss increase.
    """
    bundle, settings = draft.bundle, draft.settings
    if not settings.verification.calibration_measurements:
        return
    limit = settings.structured_pruning.safety_schedule.aggressive_limit
    total = sum(group.size for group in counted_groups(bundle.architecture, Level.CHANNEL))
    found: list[WouldBeCut] = []
    for count in sorted({round(min(1.0, limit * each) * total) for each in _TIMES} - {0}):
        units = _first_to_go(bundle, settings, count)
        predicted = loss_increase(bundle, units)
        if predicted is None:
            break
        entries = [(Level.CHANNEL, name, unit) for name, own in units.items() for unit in own]
        measured = network.loss_increase(entries)
        if isinstance(measured, Fallback):
            draft.fallbacks += (measured,)
            return
        found.append(WouldBeCut(units=len(entries), predicted=predicted.mean, measured=measured))
    draft.would_be = tuple(found)


def _first_to_go(
    bundle: CheckpointBundle, settings: Settings, count: int
) -> dict[str, tuple[int, ...]]:
    """The channels that would go first; none where the request asks for what is not there."""
    channels = settings.structured_pruning.channel_analysis
    try:
        return select_channels(bundle, count, settings=channels)
    except InvalidField:  # The analysis of the level says so.
        return {}


def _levels(
    bundle: CheckpointBundle,
    settings: Settings,
    levels: Sequence[LevelDraft],
    missing: Sequence[tuple[Level, str]],
) -> list[LevelDraft]:
    """One draft a level, in the order in which levels are taken; shards are merged."""
    by_level: dict[Level, list[LevelDraft]] = {}
    for each in levels:
        by_level.setdefault(each.level, []).append(each)
    twice = [
        level
        for level, own in by_level.items()
        if len(own) > 1 and not all(each.shard for each in own)
    ]
    twice += [level for level, _ in missing if level in by_level]
    if not by_level or twice:
        found = [each.level for each in levels]
        raise InvalidField("analyses", "one analysis a level (or its shards), at least one", found)
    return [
        merge_shards(bundle, settings, sorted(by_level[level], key=lambda each: each.shard))
        if by_level[level][0].shard
        else by_level[level][0]
        for level in _ORDER
        if level in by_level
    ]


def _alone(level: LevelDraft, breakers: Mapping[Level, BreakerStatus]) -> Draft:
    """The level's own draft, under its breaker."""
    status = breakers.get(level.level, BreakerStatus())
    draft = replace(level.draft, gates=(safety.breaker_gate(status), *level.draft.gates))
    draft.judge(reason="" if draft.targets else draft.reason)
    return draft


def _joint(
    bundle: CheckpointBundle,
    levels: Sequence[LevelDraft],
    settings: Settings,
    context: JoinContext,
) -> Draft:
    gates = {}
    for each in levels:
        breaker = safety.breaker_gate(context.breakers.get(each.level, BreakerStatus()))
        own = [g for g in (breaker, *each.draft.gates) if g.name not in _OF_THE_WHOLE]
        gates[each.level] = named(each.level, own)
    whole, refused = _taken(bundle, levels, settings, gates)
    parts = (
        *(_part(each, refused, whole) for each in levels),
        *map(_missing_part, context.missing),
    )
    # A decision that is not approved shows what every level found.
    shown = whole if whole.parts else JointSet.of(bundle, levels, settings)
    drafts, first = [each.draft for each in levels], levels[0].draft
    # Units and shares are of the first level, as far as the whole cut takes from it.
    counts, count = first.statistics, sum(unit.level is first.key.level for unit in shown.order)
    original = counts.channels_original
    gone = original - counts.channels_before + count
    figures = shown.cut.figures(shown.error) | {
        "channels_after": counts.channels_before - count,
        "cumulative_ratio": min(1.0, gone / original) if original else 0.0,
    }
    draft = Draft(
        bundle,
        settings,
        first.key.at(Level.JOINT),
        shown.targets,
        shown.order,
        counts.model_copy(update=figures),
        first.phase,
        min(part.draft.confidence for part in shown.parts),
        gates=(*(gate for each in levels for gate in gates[each.level]), *shown.gates),
        fallbacks=tuple(dict.fromkeys(f for each in drafts for f in each.fallbacks)),
        ignored=tuple(dict.fromkeys(pair for each in drafts for pair in each.ignored)),
        near_cut=tuple(group for each in drafts for group in each.near_cut),
        levels=parts,
    )
    counted = [gate for part in whole.parts for gate in gates[part.level]]
    why_not = "" if whole.parts else "; ".join(map(_why_not, parts))
    draft.judge((*counted, *whole.gates), reason=why_not)
    return draft


def _taken(
    bundle: CheckpointBundle,
    levels: Sequence[LevelDraft],
    settings: Settings,
    gates: Mapping[Level, Sequence[GateResult]],
) -> tuple[JointSet, dict[Level, tuple[str, str]]]:
    """The levels that can go together, taken one after another; why each other one is not, with
    its verdict."""
    whole = JointSet.of(bundle, (), settings)
    refused: dict[Level, tuple[str, str]] = {}
    for each in levels:
        if failed := safety.rejection(gates[each.level]):
            refused[each.level] = ("rejected", failed)
        elif not each.draft.order:
            refused[each.level] = ("nothing", each.draft.reason)
        else:
            larger = JointSet.of(bundle, (*whole.parts, each), settings)
            if larger.fault and bundle.parameters.failing_gate == "shorten":
                larger = _as_much_as_passes(bundle, whole, each, settings) or larger
            if larger.fault:
                refused[each.level] = ("rejected", f"with the levels before: {larger.fault}")
            else:
                whole = larger
    return whole, refused


def _as_much_as_passes(
    bundle: CheckpointBundle, whole: JointSet, level: LevelDraft, settings: Settings
) -> JointSet | None:
    """The joint set with the longest beginning of a level's order that passes; None without one."""
    if level.level is Level.LAYER:
        return None
    order = level.draft.order

    def joined(count: int) -> JointSet:
        less = replace(level.draft)
        less.keep(order[:count], "limit")
        predicted = level.predicted
        if predicted is not None:
            share = sum(max(unit.cost, 0.0) for unit in less.order)
            total = sum(max(unit.cost, 0.0) for unit in order)
            part = share / total if total > 0 else 1.0
            update = {"damage": predicted.damage * part, "error": predicted.error * part}
            predicted = predicted.model_copy(update=update)
        shorter = replace(level, draft=less, predicted=predicted)
        return JointSet.of(bundle, (*whole.parts, shorter), settings)

    count = largest(len(order), lambda count: not joined(count).fault)
    found = joined(count)
    return found if found.parts[-1].draft.order else None


def _part(
    level: LevelDraft, refused: Mapping[Level, tuple[str, str]], whole: JointSet
) -> LevelPart:
    verdict, reason = refused.get(level.level, ("taken", ""))
    if verdict == "taken":
        kept = {(unit.level, *identity_of(unit)) for unit in whole.order}
        lost = [u for u in level.draft.order if (u.level, *identity_of(u)) not in kept]
        coupled = [u for u in lost if identity_of(u) not in whole.needless]
        groups = ", ".join(dict.fromkeys(unit.layer_name for unit in coupled))
        why = [f"{len(coupled)} of {groups} go with whole layers"] if coupled else []
        if needless := len(lost) - len(coupled):
            why.append(f"{needless} stay: the budget is met without them")
        reason = "; ".join(why)
    return LevelPart.model_validate(
        {
            "level": level.level,
            "verdict": verdict,
            "reason": reason[:8192],
            "statistics": level.draft.statistics,
        }
    )


def _why_not(part: LevelPart) -> str:
    """Why a level takes nothing; where that is a gate, its name says of which level."""
    named = part.reason.startswith(f"{part.level}.")
    return part.reason if named else f"{part.level}: {part.reason}"


def _missing_part(gap: tuple[Level, str]) -> LevelPart:
    level, reason = gap
    return LevelPart(level=level, verdict="missing", reason=reason[:8192])
