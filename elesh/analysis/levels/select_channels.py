"""Choosing channels to a budget of one's own, without phases, gates or a decision.

For those who have the network at hand and measure what a cut does: pruning in rounds, comparisons,
tools. All others call ``analyze``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from elesh.analysis.candidates import Doubles
from elesh.analysis.selection.eligible import eligible_groups
from elesh.settings import ChannelAnalysis, StructuredPruning
from leyline import CheckpointBundle, InvalidField, Phase, ShapeMismatch
from leyline.messages.parameters import WantedScorer

from .channels import CHANNELS

__all__ = ["select_channels"]


def select_channels(
    bundle: CheckpointBundle,
    count: int,
    *,
    settings: ChannelAnalysis | None = None,
    scorer: WantedScorer = "auto",
    moved: npt.ArrayLike | None = None,
    threads: int = 1,
) -> dict[str, tuple[int, ...]]:
    """Up to ``count`` channels by group name, chosen as ``analyze`` chooses.

    Minimum, multiples and redundancy threshold of the settings hold; schedule and safety gates do
    not. Fewer come back only where the minimums leave no more.

    Args:
        moved: [N] what earlier cuts have already moved the outputs by, sample by sample, along the
            directions of the bundle's projections (the difference of ``Recorder.project`` now and
            before them). Joint costs then count from there, and not from the present network.

    Raises:
        InvalidField: if the count is negative, or ``moved`` comes with scores that are not joint.
        ShapeMismatch: if ``moved`` is not one number a sample.
    """
    if count < 0:
        raise InvalidField("count", "a number >= 0", count)
    settings = settings or ChannelAnalysis()
    asked = settings.redistribute or bundle.parameters.redistribute
    used, _ = CHANNELS.choose_scorer(bundle, scorer, redistribute=asked)
    row = None if moved is None else _checked(moved, bundle, used)
    minimum, round_to = settings.min_channels_per_layer, settings.round_to
    groups = eligible_groups(bundle, used, minimum, round_to).groups
    if not groups or not count:
        return {}
    pruning = StructuredPruning(channel_analysis=settings)
    ranking = CHANNELS.rank(
        bundle, pruning, groups, used, Phase.MODERATE, round_to=round_to, threads=threads
    )
    if row is not None and ranking.projections is not None:
        row = ranking.projections.moved(row)
    return ranking.candidates.by_group(ranking.choose(count, moved=row).removal_order.units)


def _checked(moved: npt.ArrayLike, bundle: CheckpointBundle, scorer: str) -> Doubles:
    row = np.asarray(moved, dtype=np.float64)
    if scorer != "output_projection":
        raise InvalidField("moved", "nothing where scores are not joint", scorer)
    samples = len(next(iter(bundle.gates.values())).projections)
    if row.shape != (samples,):
        raise ShapeMismatch("moved", f"shape {(samples,)}", f"shape {row.shape}")
    return row
