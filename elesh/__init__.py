"""Elesh watches neural networks train and says, at checkpoints, which parts can be removed.

As a library: ``from elesh import CheckpointBundle, Settings, analyze``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leyline import CheckpointBundle

    from .analysis import analyze
    from .pruning import load, save
    from .settings import Settings

__all__ = ["CheckpointBundle", "Settings", "analyze", "load", "save"]

_HOMES = {
    "CheckpointBundle": "leyline",
    "Settings": "elesh.settings",
    "analyze": "elesh.analysis",
    "load": "elesh.pruning",
    "save": "elesh.pruning",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that the command line and the supervisor start without numerics.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
