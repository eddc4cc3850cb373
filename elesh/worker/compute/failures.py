"""How the compute child fails, for who hears of it and for the fallback chain that answers."""

from __future__ import annotations

__all__ = ["ChildDied", "ChildFailure", "ChildOverMemory", "ChildTimeout"]


class ChildFailure(Exception):
    """The compute child gave no answer."""


class ChildDied(ChildFailure):
    """It ended in the middle of a job (crash, kill)."""


class ChildTimeout(ChildFailure):
    """The job took longer than its time; the child was killed."""


class ChildOverMemory(ChildFailure):
    """The job needed more memory than it may; the child was killed."""
