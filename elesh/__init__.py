"""Elesh watches neural networks train and finds, at checkpoints, which parts can be removed.

For a training script: ``elesh.prune`` (at once), ``elesh.attach`` (while it trains), ``elesh.save``
and ``elesh.load``. For an analysis of one's own: ``CheckpointBundle``, ``Settings``, ``analyze``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leyline import CheckpointBundle

    from .analysis import analyze
    from .pruning import Pruning, PruningReport, attach, load, prune, save
    from .settings import Settings
    from .trainer import Evaluation

__all__ = [
    "CheckpointBundle",
    "Evaluation",
    "Pruning",
    "PruningReport",
    "Settings",
    "analyze",
    "attach",
    "load",
    "prune",
    "save",
]

_HOMES = {
    "CheckpointBundle": "leyline",
    "Evaluation": "elesh.trainer",
    "Pruning": "elesh.pruning",
    "PruningReport": "elesh.pruning",
    "Settings": "elesh.settings",
    "analyze": "elesh.analysis",
    "attach": "elesh.pruning",
    "load": "elesh.pruning",
    "prune": "elesh.pruning",
    "save": "elesh.pruning",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that the command line and the supervisor start without numerics.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
