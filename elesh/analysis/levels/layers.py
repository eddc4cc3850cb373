"""The layer level: which whole layers can be removed, why others cannot, which are chosen, and the
predicted effect.

Promises: a layer goes only if all five conditions of the design hold, only in the aggressive phase,
never more than the allowed share of the original layers, and never so many that fewer than three
are left; the order of the blocks does not matter. Where a failing gate refuses, the design's rank
orders them; where it shortens, they go by how far their removal moves the outputs, as channels and
heads do, and the set is the largest that the gates of the prediction let pass. What was chosen on
one half of the samples is judged on the other. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from elesh.analysis.candidates import Candidates, Doubles, Floats
from elesh.analysis.importance.scores import Prediction, Projections, output_mean_square, predict
from elesh.analysis.pruning_set.plans import LevelPlan
from elesh.analysis.selection.schedule import (
    Allowance,
    as_asked,
    phase_at,
    sentence,
    short_of_target,
    unwanted_names,
)
from elesh.analysis.spans import span
from elesh.safety import noise, predicted_shift
from elesh.settings import LayerAnalysis, Settings
from leyline import (
    CheckpointBundle,
    GateStatistics,
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


@dataclass(frozen=True)
class LayerChoice:
    """The layers that go, in order, and what they are predicted to do together."""

    names: tuple[str, ...]
    costs: tuple[float, ...]
    """Of each: its design's rank, or the mean square by which it moves the outputs."""
    prediction: Prediction | None = None
    """None without output projections of two samples or more."""
    mean_square: float = 0.0
    """Of the outputs."""
    shortfall: str = ""
    """Why fewer go than may, where the prediction is the reason."""


def choose_layers(
    bundle: CheckpointBundle,
    ranks: Mapping[str, float],
    present: Sequence[str],
    quota: int,
    max_shift: float,
) -> LayerChoice:
    """At most ``quota`` of the layers in ``ranks``.

    Args:
        ranks: the design's, by layer; the lowest go first.
        present: all removable layers that are still there.
        max_shift: of the outputs' mean square.
    """
    if not quota:
        return LayerChoice((), ())
    measured = sorted(name for name in present if name in bundle.layers)
    errors = _OutputErrors.of(bundle, measured)
    if errors is None or bundle.parameters.failing_gate == "refuse":
        names = sorted(ranks, key=lambda name: (ranks[name], name))[:quota]
        picked = LayerChoice(tuple(names), tuple(ranks[name] for name in names))
        return errors.predicted(picked, names) if errors and names else picked
    costs = errors.output_errors()
    order = sorted(ranks, key=lambda name: (costs[name], ranks[name], name))[:quota]
    whole = None
    for count in range(len(order), 0, -1):
        names = order[:count]
        picked = LayerChoice(tuple(names), tuple(costs[name] for name in names))
        choice = errors.predicted(picked, list(ranks))
        if _passes(choice, max_shift):
            return replace(choice, shortfall=_shortfall(len(order) - count, len(order)))
        whole = whole or choice
    # Nothing passes: the gates refuse the whole, with its figures.
    return whole or LayerChoice((), ())


def _shortfall(stay: int, eligible: int) -> str:
    if not stay:
        return ""
    return (
        f"{stay} of the {eligible} layers that may go stay: all together would do too much, or no "
        "less than others"
    )


def _passes(choice: LayerChoice, max_shift: float) -> bool:
    prediction, mean_square = choice.prediction, choice.mean_square
    if prediction is None or not mean_square > 0:
        return True
    error, deviation = prediction.output_error, prediction.standard_error
    shift = predicted_shift(error / mean_square, deviation / mean_square, max_shift)
    return shift.passed and noise(error, deviation, prediction.random).passed


@dataclass(frozen=True)
class _OutputErrors:
    """How far the outputs move without each layer: a layer is a group of one unit."""

    names: tuple[str, ...]
    projections: Projections
    candidates: Candidates
    mean_square: float

    @classmethod
    def of(cls, bundle: CheckpointBundle, names: Sequence[str]) -> _OutputErrors | None:
        """The output errors of the measured layers; None with fewer than two samples."""
        gates = {name: _as_gate(bundle.layers[name]) for name in names}
        if not gates or len(gates[names[0]].projections) < 2:
            return None
        ones = (1,) * len(names)
        candidates = Candidates(tuple(names), ones, ones, ones)
        mean_square = max(
            output_mean_square(gates.values()), output_mean_square(bundle.gates.values())
        )
        return cls(tuple(names), Projections.of(gates, candidates), candidates, mean_square)

    def output_errors(self) -> dict[str, float]:
        """The output error of removing each layer alone, by layer."""
        squares = self._squares(self.projections.columns) * self.projections.unit**2
        count = self.projections.columns.shape[1]
        return dict(zip(self.names, (squares / count).tolist(), strict=True))

    def predicted(self, choice: LayerChoice, eligible: Collection[str]) -> LayerChoice:
        """The choice with what it does. Each half of the samples chooses as many of ``eligible``;
        where these are no more, the choice is given."""
        places = [place for place, name in enumerate(self.names) if name in eligible]
        count = len(choice.names)

        def choose(columns: Floats) -> list[int]:
            squares = self._squares(columns)
            return sorted(sorted(places, key=lambda place: squares[place])[:count])

        prediction = predict(self.projections, self.candidates, count, choose)
        return replace(choice, prediction=prediction, mean_square=self.mean_square)

    def _squares(self, columns: Floats) -> Doubles:
        """[C]: of the columns without the gains, which are for units."""
        plain = columns / self.projections.gains[:, None]
        return np.asarray(np.einsum("ij,ij->i", plain, plain, dtype=np.float64))


def _as_gate(data: LayerStatistics) -> GateStatistics:
    # What LayerStatistics has checked need not be checked again.
    return GateStatistics.model_construct(
        layer_name=data.layer_name,
        projections=np.asarray(data.projections)[:, None],
        first_order=data.first_order,
        second_order=data.second_order,
    )


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
    phase = phase_at(bundle.metadata.epoch, as_asked(pruning.safety_schedule, bundle.parameters))
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


@span("score")
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
    """Why a layer is not judged by the conditions."""
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
