"""The midpoint of a cut: which channels would go first, and where their gates are.

Promises: the same statistics choose the same channels; nothing but where the projections are taken
depends on the choice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from elesh.analysis import select_channels
from elesh.settings import ChannelAnalysis
from elesh.trainer.network.gates import Axis
from leyline import CheckpointBundle, PruningGroup

LOOK_AHEAD = 0.2
"""The share of channels that the design document's schedule removes in the end."""


def first_to_go(
    bundle: CheckpointBundle, groups: Sequence[PruningGroup], share: float
) -> dict[str, tuple[int, ...]]:
    """By group: the channels that the analysis would remove first, a share of those of all groups.

    What a worker's settings keep in every group is not known here; a quarter of the smallest
    group is kept.
    """
    count = round(share * sum(group.size for group in groups))
    if not count or bundle.metadata.samples < 2:
        return {}
    kept = max(1, min(group.size for group in groups) // 4)
    return select_channels(bundle, count, settings=ChannelAnalysis(min_channels_per_layer=kept))


def indices_of(
    groups: Sequence[PruningGroup], units: Mapping[str, Collection[int]]
) -> dict[Axis, list[int]]:
    """By axis: the indices at which ``units`` enter their consumers."""
    found: dict[Axis, set[int]] = {}
    for group in groups:
        for site in group.sites:
            entering = site.all_of(units.get(group.name, ()))
            found.setdefault(site.axis, set()).update(entering)
    return {axis: sorted(indices) for axis, indices in found.items() if indices}
