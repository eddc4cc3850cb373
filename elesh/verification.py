"""The former name of :mod:`elesh.program`; it goes with the next version."""

from __future__ import annotations

from .program import verifier

__all__ = ["verifier"]
