"""The head level: its multi-factor score, and what differs from channels.

The gate of a head scales what it sends to the output projection, so with gate statistics heads are
ranked as channels are (:class:`.units.UnitLevel`). Heads whose attention patterns are alike are
considered first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from elesh.analysis.candidates import Doubles, Floats
from elesh.analysis.importance.scores import shares, single_removal
from elesh.analysis.pruning_set.plans import Target
from elesh.analysis.selection.choose import Scorer
from elesh.analysis.selection.schedule import as_asked
from elesh.settings import AttentionAnalysis, StructuredPruning
from leyline import (
    AnalysisParameters,
    AttentionHeadTarget,
    CheckpointBundle,
    Fallback,
    HeadImportanceData,
    HeadRedundancy,
    Level,
    Phase,
    PruningGroup,
)

from .units import Limits, UnitLevel


class HeadWeights(NamedTuple):
    """How much each factor counts in the mix; they sum to 1."""

    entropy: float
    diversity: float
    gradient: float


EARLY = HeadWeights(0.2, 0.3, 0.5)
LATE = HeadWeights(0.4, 0.4, 0.2)


def head_weights_at(phase: Phase, settings: AttentionAnalysis) -> HeadWeights:
    """The mix of a training phase (FACTS, "Importance").

    Early is the preparation phase, late from the aggressive phase on; in between the configured
    weights hold. (The documents name .3/.4/.3 for mid-training and .3/.3/.4 as configuration:
    where they differ, the configuration wins.)
    """
    if phase is Phase.PREPARATION:
        return EARLY
    if phase in (Phase.AGGRESSIVE, Phase.VALIDATION):
        return LATE
    return HeadWeights(settings.entropy_weight, settings.diversity_weight, settings.gradient_weight)


def multi_factor(groups: Sequence[HeadImportanceData], weights: HeadWeights) -> Doubles:
    """[C] of all groups side by side: focus, diversity and gradient sensitivity mixed, 0 to 1,
    higher is more important.

    Focus is 1 - entropy / its bound: a head of *low* entropy has specialised (counting high
    entropy as important ranks worse than chance, ARCHITECTURE). Diversity is the Jensen-Shannon
    divergence from the other heads as a share of ln 2, its largest value. Gradients, which are in
    the loss's units, count as shares of the layer's largest. Where attention weights could not be
    seen, only they are left.
    """
    sizes = np.array([data.size for data in groups], dtype=np.int64)
    gradient = shares(
        np.concatenate([data.gradient_sensitivity for data in groups]), np.cumsum(sizes) - sizes
    )
    seen = [data.entropy is not None and data.diversity is not None for data in groups]
    entropy, bound, diversity = (_side_by_side(groups, name) for name in _PATTERNS)
    spread = np.divide(entropy, bound, out=np.ones_like(bound), where=bound > 0)
    mixed = (
        weights.entropy * np.clip(1 - spread, 0, 1)
        + weights.diversity * np.clip(diversity / math.log(2), 0, 1)
        + weights.gradient * gradient
    )
    return np.where(np.repeat(seen, sizes), mixed, gradient)


_PATTERNS = ("entropy", "entropy_bound", "diversity")


def _side_by_side(groups: Sequence[HeadImportanceData], name: str) -> Doubles:
    """[C]: one vector of all groups, zeros where a group has none."""
    rows = [getattr(data, name) for data in groups]
    rows = [np.zeros(d.size) if r is None else r for r, d in zip(rows, groups, strict=True)]
    return np.concatenate(rows).astype(np.float64)


class Heads(UnitLevel):
    """Attention heads: ranked by focus, diversity and gradients where there are no gate
    statistics."""

    level = Level.HEAD
    own_order = "entropy, diversity and gradients"
    redundancy = HeadRedundancy

    def limits(self, settings: StructuredPruning, asked: AnalysisParameters) -> Limits:
        """Heads come in with the moderate phase (section "Progressive safety schedule")."""
        schedule, own = as_asked(settings.safety_schedule, asked), settings
        return Limits(
            schedule.model_copy(update={"conservative_limit": 0.0}),
            own.attention_analysis.safety_margin,
            own.attention_analysis.min_heads_per_layer,
            own.attention_analysis.similarity_threshold,
        )

    def blind_spots(self, bundle: CheckpointBundle) -> tuple[Fallback, ...]:
        """``no_attention_patterns`` where attention weights could not be seen: redundancy is not
        judged there, and the mix is gradients alone."""
        known = {name for name, data in bundle.heads.items() if data.entropy is not None}
        blind = [
            group.name
            for group in bundle.architecture.groups
            if group.level is Level.HEAD and group.prunable and group.name not in known
        ]
        if not blind:
            return ()
        reason = f"no attention weights could be seen in {', '.join(blind)}"[:2000]
        return (Fallback(rung="no_attention_patterns", reason=reason),)

    def own_scorer(
        self, bundle: CheckpointBundle, wanted: str
    ) -> tuple[Scorer, tuple[Fallback, ...]]:
        """The multi-factor score; heads are not ranked by magnitude (``no_head_magnitude``)."""
        taken = []
        if wanted == "magnitude":
            reason = f"heads have no magnitudes: ranked by {self.own_order}"
            taken.append(Fallback(rung="no_head_magnitude", reason=reason))
        heads = bundle.heads.values()
        if heads and not any(data.gradient_sensitivity.any() for data in heads):
            reason = "all gradient sensitivities are zero: ranked by entropy and diversity"
            taken.append(Fallback(rung="taylor_failure", reason=reason))
        return "multi_metric", tuple(taken)

    def own_scores(
        self,
        bundle: CheckpointBundle,
        names: Sequence[str],
        scorer: Scorer,
        settings: StructuredPruning,
        phase: Phase,
    ) -> Doubles:
        weights = head_weights_at(phase, settings.attention_analysis)
        return multi_factor([bundle.heads[name] for name in names], weights)

    def likeness(self, bundle: CheckpointBundle) -> Mapping[str, Floats | None]:
        return {name: data.similarity for name, data in bundle.heads.items()}

    def target(
        self,
        bundle: CheckpointBundle,
        group: PruningGroup,
        units: tuple[int, ...],
        costs: tuple[float, ...],
        scores: Doubles,
        common: Mapping[str, Any],
    ) -> Target:
        data, gate = bundle.heads.get(group.name), bundle.gates.get(group.name)
        alone = scores if gate is None else single_removal(gate)
        entropy = () if data is None or data.entropy is None else data.entropy.tolist()
        return AttentionHeadTarget(
            head_indices=units,
            head_importance=tuple(alone.tolist()),
            costs=costs,
            attention_entropy=tuple(entropy),
            heads_before=group.size,
            heads_after=group.size - len(units),
            **common,
        )


HEADS = Heads()
