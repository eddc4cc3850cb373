"""The arithmetic of the document's accuracy targets: estimated against true importance.

Promises: pure functions of what was estimated and what was measured; what cannot be measured
is reported so, with the reason, and never counted as passed or missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from elesh.analysis.importance.scores import (
    Pair,
    fisher,
    magnitude,
    multi_metric,
    single_removal,
    weights_at,
)
from elesh.analysis.levels.analyze_level import UNIT_LEVELS
from elesh.analysis.levels.units import CHANNELS
from elesh.analysis.pruning_set.plans import wanted_scorer
from elesh.analysis.selection.choose import Scorer, pairs_by_group
from elesh.analysis.selection.schedule import as_asked, phase_at
from elesh.analysis.sketch.count_min import CountMinSketch, element_keys
from elesh.settings import AccuracyTarget, Settings
from leyline import CheckpointBundle, Level, PruningGroup, stable_hash

from .candidates import Doubles

ByGroup = Mapping[str, Doubles]
"""[C] by group: one value a unit, higher is more important."""
Verdict = Literal["passed", "missed", "out of reach", "not measured"]
_LOWER_IS_BETTER = frozenset({"MAPE_vs_Taylor"})
_TOP = 0.2


@dataclass(frozen=True)
class AccuracyCheck:
    """One accuracy target and what came out."""

    name: str
    """Its key in ``accuracy_targets``."""
    metric: str
    target: float
    value: float | None
    """None: not measured, ``detail`` says why."""
    ceiling: float | None
    """What one half of the samples gets when it is judged by the other half: the noise of
    measuring. None where that is not known."""
    detail: str
    """What was compared with what."""

    @property
    def verdict(self) -> Verdict:
        """``out of reach``: missed, but these samples could not have shown otherwise."""
        if self.value is None:
            return "not measured"
        if self._reached(self.value):
            return "passed"
        known = self.ceiling is not None and self.metric not in _LOWER_IS_BETTER
        return "out of reach" if known and not self._reached(self.ceiling or 0.0) else "missed"

    def _reached(self, value: float) -> bool:
        return value <= self.target if self.metric in _LOWER_IS_BETTER else value >= self.target


def not_measured(name: str, target: AccuracyTarget, reason: str) -> AccuracyCheck:
    """The check of what could not be measured."""
    return AccuracyCheck(name, target.metric, target.target, None, None, reason)


def ranking_scores(bundle: CheckpointBundle, settings: Settings) -> tuple[Scorer, ByGroup]:
    """What single channels are worth to the scorer in force, for every group with statistics.

    With projections that is the predicted increase of the loss if the one unit goes: sets are
    ranked jointly, and a list of single scores cannot be compared with that.
    """
    channels = settings.structured_pruning.channel_analysis
    wanted, reconstructs = wanted_scorer(bundle, settings)
    scorer, _ = CHANNELS.choose_scorer(bundle, wanted, reconstructs=reconstructs)
    groups = [group for group in bundle.architecture.groups if _is_channel(group)]
    if scorer in ("output_projection", "reconstruction"):
        gates = bundle.gates
        return scorer, {g.name: single_removal(gates[g.name]) for g in groups if g.name in gates}
    if scorer == "fisher":
        gates = bundle.gates
        return scorer, {g.name: fisher([gates[g.name]]) for g in groups if g.name in gates}
    data = {group.name: bundle.channels[group.name] for group in groups}
    data = {name: each for name, each in data.items() if each.size}
    if scorer == "magnitude":
        return scorer, {name: magnitude([each]) for name, each in data.items()}
    weights = weights_at(
        phase_at(
            bundle.metadata.epoch,
            as_asked(settings.structured_pruning.safety_schedule, bundle.parameters),
        ),
        channels,
    )
    return scorer, {name: multi_metric([each], weights) for name, each in data.items()}


def _is_channel(group: PruningGroup) -> bool:
    return group.prunable and group.level is Level.CHANNEL


def redundancy(
    bundle: CheckpointBundle, settings: Settings, level: Level
) -> dict[str, tuple[Pair, ...]]:
    """The pairs that the level calls redundant, by group, in the group's numbering."""
    of_level = UNIT_LEVELS[level]
    plan = of_level.prepare(bundle, settings)
    if not plan.groups:
        return {}
    phase = plan.allowed.phase
    # The order under reconstruction looks for no pairs.
    scorer = "output_projection" if plan.scorer == "reconstruction" else plan.scorer
    pruning = settings.structured_pruning
    ranking = of_level.rank(bundle, pruning, plan.groups, scorer, phase)
    pairs = pairs_by_group(ranking.candidates, ranking.redundant)
    return {ranking.candidates.names[group]: tuple(own) for group, own in pairs.items()}


def agreement(metric: str, estimated: ByGroup, measured: ByGroup) -> float | None:
    """How well two orders of the same units agree: the mean over the groups of ``measured``.

    A group whose units are all alike in one of them has no order and is left out.

    Args:
        metric: ``kendall_tau`` (tau-b), ``spearman``, or ``top_20_precision``: of the fifth that
            one calls the most important, the share that the other does as well.

    Returns:
        None if no group has an order.
    """
    found = [_agreement(metric, estimated[name], row) for name, row in measured.items()]
    known = [value for value in found if np.isfinite(value)]
    return float(np.mean(known)) if known else None


def _agreement(metric: str, left: Doubles, right: Doubles) -> float:
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    from scipy import stats  # a second to load, for which only a validation is to wait

    if metric == "kendall_tau":
        return float(stats.kendalltau(left, right).statistic)
    if metric == "spearman":
        return float(stats.spearmanr(left, right).statistic)
    count = max(1, round(_TOP * len(left)))
    tops = (set(np.argsort(-row, kind="stable")[:count].tolist()) for row in (left, right))
    return len(set.intersection(*tops)) / count


def sketch_error(bundle: CheckpointBundle, settings: Settings) -> tuple[float, int] | None:
    """Mean absolute percentage error (as a share) of Taylor importance read from a Count-Min
    sketch of the settings' size that holds all units of the checkpoint, and how many those are.

    Units whose importance is zero have no percentage and are left out. None without any other.
    """
    rows = {
        **{name: data.taylor_importance for name, data in bundle.channels.items()},
        **{f"{name}:heads": data.gradient_sensitivity for name, data in bundle.heads.items()},
        **{f"{name}:layer": data.taylor for name, data in bundle.layers.items()},
    }
    if not rows:
        return None
    keys = np.concatenate(
        [element_keys(stable_hash(name), np.arange(len(row))) for name, row in rows.items()]
    )
    exact = np.concatenate([np.asarray(row, np.float64) for row in rows.values()])
    known = exact > 0
    if not known.any():
        return None
    sketch = CountMinSketch(settings.sketch_width, settings.sketch_depth)
    sketch.add(keys, exact)
    read = sketch.estimate(keys)
    error = np.abs(read[known] - exact[known]) / exact[known]
    return float(error.mean()), int(known.sum())


def half_split_error(bundle: CheckpointBundle) -> float | None:
    """What the samples leave open of the same importance, as a share: half the difference between
    even and odd calibration samples over their mean, averaged over units.

    The importance is the mean magnitude of the gate gradient of the true-label loss (Molchanov et
    al. 2017), which the margins' moves give sample by sample: the loss is ``softplus(margin)``, so
    its derivative is ``sigmoid(margin)`` times theirs. None without margins or with one sample.
    """
    errors = []
    for gate in bundle.gates.values():
        if gate.moves is None or gate.margins is None or len(gate.margins) < 2:
            return None
        slope = 1 / (1 + np.exp(-np.asarray(gate.margins, np.float64)))
        sizes = np.abs(slope[:, None] * np.asarray(gate.moves, np.float64))
        even, odd = sizes[::2].mean(axis=0), sizes[1::2].mean(axis=0)
        known = even + odd > 0
        errors.append(np.abs(even - odd)[known] / (even + odd)[known])
    return float(np.concatenate(errors).mean()) if errors and any(map(len, errors)) else None
