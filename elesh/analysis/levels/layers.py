"""The layer level: which whole layers can go, and why each other one cannot.

Promises: a layer goes only if all five conditions of the design hold, only in the aggressive phase,
never more than the allowed share of the original layers, and never so many that fewer than three
are left; the order of the blocks does not matter. Pure. Which of them go first:
:mod:`elesh.analysis.levels.layer_choice`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from elesh.analysis.pruning_set.plans import LevelPlan
from elesh.analysis.selection.eligible import unwanted_names
from elesh.analysis.selection.schedule import Allowance, phase_at
from elesh.analysis.selection.shortfalls import sentence, short_of_target
from elesh.analysis.spans import stage
from elesh.settings import LayerAnalysis, Settings
from leyline import (
    CheckpointBundle,
    InvalidField,
    LayerBlock,
    LayerPruningTarget,
    LayerStatistics,
    Level,
    Phase,
    PrunedArchitecture,
    RankedUnit,
)
from leyline.network.blocks import inside_any

from .layer_choice import choose_layers

__all__ = ["architecture_impact", "failed_conditions", "first_to_go", "plan_layers", "rank"]

MIN_LAYERS = 3
"""So many removable layers are always left (FACTS, "Selection")."""
MIN_GRADIENT_FLOW = 0.5
MAX_IMPACT = 0.5
_CONFIDENCE = 0.6
"""As for the document's mix of channels: the five conditions follow the outputs, the projections
predict them."""
_KIND = {"attention": 0.8, "conv": 0.6, "linear": 0.5, "other": 0.3}


@dataclass(frozen=True)
class _Layer:
    """A layer with the figures that it is judged by."""

    block: LayerBlock
    data: LayerStatistics
    impact: float

    @property
    def taylor(self) -> float:
        """Mean magnitude of the gate gradient, in nats."""
        return float(self.data.taylor[0])

    @property
    def flow(self) -> float:
        """Share of the gradient's norm that the identity path carries."""
        return float(self.data.gradient_flow[0])

    @property
    def similarity(self) -> float:
        """Cosine of the layer's input and output."""
        return float(self.data.similarity[0])


def plan_layers(bundle: CheckpointBundle, settings: Settings) -> LevelPlan:
    """Choose the layers to remove, by the five conditions, and predict what removing them does.

    Raises:
        InvalidField: if the request ignores a group or layer that does not exist, or has a budget
            for layers alone.
    """
    pruning, architecture = settings.structured_pruning, bundle.architecture
    if bundle.parameters.budget is not None and bundle.levels == (Level.LAYER,):
        expected = "a level that can be fitted to it (channel or head)"
        hint = "whole layers go by their five conditions; ask for channels or heads as well"
        raise InvalidField("parameters.budget", expected, "layer alone", hint=hint)
    phase = phase_at(bundle.metadata.epoch, pruning.safety_schedule)
    fit, reasons = _judged(bundle, pruning.layer_analysis)
    removable = [block for block in architecture.blocks if block.prunable]
    present = [block for block in removable if not block.removed]
    allowed = _allowance(
        len(removable),
        len(present),
        phase,
        pruning.layer_analysis.max_layer_removal_ratio,
        bundle.parameters.target_ratio,
    )
    fitting = {layer.block.name: layer for layer in fit}
    ranks = {name: rank(layer) for name, layer in fitting.items()}
    limit = pruning.channel_analysis.max_predicted_shift
    names = [block.name for block in present]
    choice = choose_layers(bundle, ranks, names, allowed.quota, limit)
    for name in fitting.keys() - set(choice.names):
        reasons[name] = choice.shortfall or _beyond(allowed)
    counts = [len(data.projections) for data in bundle.layers.values()]
    return LevelPlan(
        level=Level.LAYER,
        allowed=allowed,
        scorer="multi_metric",
        confidence=_CONFIDENCE,
        fallbacks=(),
        ignored=tuple((b.name, reasons[b.name]) for b in architecture.blocks if b.name in reasons),
        nothing=_nothing(allowed),
        shortfall=sentence(
            short_of_target(bundle, Level.LAYER, allowed),
            choice.shortfall or _short(allowed, len(choice.names)),
        ),
        minimum=MIN_LAYERS,
        present=len(present),
        prunable=len(present),
        measured=sum(block.name in bundle.layers for block in present),
        samples=counts[0] if counts else bundle.metadata.samples,
        targets=tuple(_target(fitting[name]) for name in choice.names),
        order=tuple(
            RankedUnit(level=Level.LAYER, layer_name=name, cost=cost)
            for name, cost in zip(choice.names, choice.costs, strict=True)
        ),
        prediction=choice.prediction,
        output_mean_square=choice.mean_square,
    )


@stage("score")
def _judged(
    bundle: CheckpointBundle, settings: LayerAnalysis
) -> tuple[list[_Layer], dict[str, str]]:
    """The layers that meet all five conditions, and why each other one that is there does not."""
    architecture = bundle.architecture
    unwanted, impact = unwanted_names(bundle), architecture_impact(architecture)
    fit: list[_Layer] = []
    reasons: dict[str, str] = {}
    for block in architecture.blocks:
        reason = _why_not(block, bundle.layers, unwanted, architecture)
        if not reason:
            layer = _Layer(block, bundle.layers[block.name], impact[block.name])
            reason = "; ".join(failed_conditions(layer, settings))
            if not reason:
                fit.append(layer)
        if reason and not block.removed:
            reasons[block.name] = reason
    return fit, reasons


def failed_conditions(layer: _Layer, settings: LayerAnalysis) -> list[str]:
    """Which of the five conditions of the design (FACTS, "Selection") do not hold."""
    skip = layer.block.skip_potential
    conditions = (
        ("Taylor importance", layer.taylor, "<", settings.taylor_threshold),
        ("gradient flow", layer.flow, ">", MIN_GRADIENT_FLOW),
        ("input/output similarity", layer.similarity, ">", settings.similarity_threshold),
        ("skip potential", skip, ">", settings.skip_potential_threshold),
        ("architecture impact", layer.impact, "<", MAX_IMPACT),
    )
    return [
        f"{name} is {value:.4g}, must be {sign} {limit:g}"
        for name, value, sign, limit in conditions
        if not (value < limit if sign == "<" else value > limit)
    ]


def architecture_impact(architecture: PrunedArchitecture) -> dict[str, float]:
    """.4 depth + .4 kind + .2 connection density of every block, 0 to 1 (FACTS, "Selection").

    The density is the share of the coupled channel groups that run through the layer.
    """
    groups_of: dict[str, set[str]] = {}
    for group in architecture.groups:
        for part in group.slices:
            groups_of.setdefault(part.tensor, set()).add(group.name)
    count = max(1, len(architecture.groups))
    impact = {}
    for block in architecture.blocks:
        touched = set[str]().union(*(groups_of.get(path, ()) for path in block.tensors))
        density = len(touched) / count
        impact[block.name] = 0.4 * block.depth + 0.4 * _KIND[block.kind] + 0.2 * density
    return impact


def rank(layer: _Layer) -> float:
    """What orders the layers, cheapest first (FACTS, "Selection")."""
    skip = layer.block.skip_potential
    return 0.3 * layer.taylor + 0.3 * (1 - layer.similarity) + 0.2 * (1 - skip) + 0.2 * layer.impact


def first_to_go(bundle: CheckpointBundle, settings: LayerAnalysis) -> tuple[str, ...]:
    """The layers that could be skipped (by the threshold), cheapest first: as many as the settings
    allow to remove, at least one, whatever the other conditions, phase and quota say."""
    unwanted, impact = unwanted_names(bundle), architecture_impact(bundle.architecture)
    known = [
        _Layer(block, bundle.layers[block.name], impact[block.name])
        for block in bundle.architecture.blocks
        if not _why_not(block, bundle.layers, unwanted, bundle.architecture)
    ]
    fit = [x for x in known if x.block.skip_potential > settings.skip_potential_threshold]
    most = max(1, math.floor(settings.max_layer_removal_ratio * len(known) + 1e-6))
    order = sorted(fit, key=lambda layer: (rank(layer), layer.block.name))
    return tuple(layer.block.name for layer in order[:most])


def _why_not(
    block: LayerBlock,
    measured: Mapping[str, LayerStatistics],
    unwanted: frozenset[str],
    architecture: PrunedArchitecture,
) -> str:
    """Why a layer is not even judged."""
    if block.removed:
        return "removed before"
    if not block.prunable:
        return block.reason or "not prunable"
    if named := sorted(x for x in unwanted if x == block.name or inside_any(x, block.modules)):
        return f"ignored by the request: {', '.join(named)}"
    if len({architecture.tensor[path].owner for path in block.tensors}) > 1:
        return "couples host and seed tensors (gradient isolation)"
    return "" if block.name in measured else "no layer statistics"


def _allowance(
    original: int, present: int, phase: Phase, limit: float, target: float | None
) -> Allowance:
    """The layers that may go now: only in the aggressive phase, and so that enough are left."""
    share = limit if target is None else min(limit, target)
    removed = original - present
    # A product like 0.29 * 100 lies below its true value: a millionth of a layer evens that out.
    quota = min(math.floor(share * original + 1e-6) - removed, present - MIN_LAYERS)
    active = phase is Phase.AGGRESSIVE
    return Allowance(phase, limit, share, original, removed, max(0, quota) if active else 0)


def _nothing(allowed: Allowance) -> str:
    if not allowed.original:
        return "nothing to remove: no layer of this network can be removed (see ignored)"
    if not allowed.quota:
        return (
            f"nothing to remove: quota 0 ({allowed.removed} of {allowed.original} original layers "
            f"are removed, {MIN_LAYERS} must be left)"
        )
    return "nothing to remove: no layer meets all five conditions (see ignored)"


def _short(allowed: Allowance, count: int) -> str:
    short = allowed.quota - count
    if not short:
        return ""
    may_go = f"{short} of the {allowed.quota} layers that may go stay"
    return f"{may_go}: no other meets all five conditions"


def _beyond(allowed: Allowance) -> str:
    if allowed.phase is not Phase.AGGRESSIVE:
        return f"layers are removed in the aggressive phase only, this is the {allowed.phase} phase"
    return (
        f"it could go, but the quota is {allowed.quota}: {allowed.removed} of {allowed.original} "
        f"original layers are gone, and {MIN_LAYERS} must be left"
    )


def _target(layer: _Layer) -> LayerPruningTarget:
    return LayerPruningTarget(
        layer_name=layer.block.name,
        importance=layer.taylor,
        gradient_flow=layer.flow,
        similarity=layer.similarity,
        skip_potential=layer.block.skip_potential,
        skip_strategy=layer.block.strategy,
        architecture_impact=layer.impact,
    )
