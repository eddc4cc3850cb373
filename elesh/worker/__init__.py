"""The worker: a small supervisor that talks to the bus, and a compute child that may be killed.

Loaded on first use, so that the child starts without the bus, and the supervisor without numerics:
whatever a worker loads is time in which a fleet that lost one waits for the next.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .supervisor import Worker, serve, worker_name

__all__ = ["Worker", "serve", "worker_name"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".supervisor", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
