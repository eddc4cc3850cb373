"""Into which parts a checkpoint is made: one a level, and more where a level is large.

Pure. A level is split only where its statistics are large, since what one shard takes no longer
depends on what another gives up (decision 0026). The layer level is never split.
"""

from __future__ import annotations

import math

from elesh.bus.admission import Work
from elesh.settings import Settings
from leyline import AnalysisItem, Level, PrunedArchitecture

__all__ = ["groups_of", "level_of", "parts_of"]

_MOST = 4096


def parts_of(work: Work, settings: Settings) -> list[AnalysisItem]:
    """The parts of ``work``, those of one level beside each other.

    A level whose statistics are larger than 1 GiB has a part for each
    ``layers_per_worker`` of its groups.
    """
    items = []
    for level in work.levels:
        count = 1
        if level is not Level.LAYER and _size(work, level) > settings.worker.shard_bytes:
            groups = len(_names(work.document.architecture, level))
            count = min(_MOST, max(1, math.ceil(groups / settings.layers_per_worker)))
        items += [
            AnalysisItem(plan=str(work.key), level=level, shard=shard, shards=count)
            for shard in range(count)
        ]
    return items


def groups_of(architecture: PrunedArchitecture, item: AnalysisItem) -> tuple[str, ...]:
    """The groups that a part looks at, in the architecture's order; empty for the whole level."""
    if item.shards == 1:
        return ()
    names = _names(architecture, item.level)
    start, end = (len(names) * edge // item.shards for edge in (item.shard, item.shard + 1))
    return tuple(names[start:end])


def level_of(part: str) -> Level:
    """The level of a part by its name."""
    return Level(part.partition(".")[0])


def _names(architecture: PrunedArchitecture, level: Level) -> list[str]:
    return [group.name for group in architecture.groups if group.level is level]


def _size(work: Work, level: Level) -> int:
    """Bytes of the statistics that a level is ranked by."""
    own = work.heads if level is Level.HEAD else work.statistics
    return sum(blob.size for blob in (own, work.gates) if blob is not None)
