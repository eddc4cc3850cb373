"""How the trainer's side guards a run: restore points, the watch after a cut, its claim."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ._base import Section


class TrainerSettings(Section):
    """Limits of one training session."""

    watch_epochs: int = Field(default=3, ge=0)
    """Reports of accuracy (``Session.watch``) that a cut must stand; 0: none."""
    rollback: Literal["immediate", "progressive", "atomic"] = "immediate"
    """``immediate``: to before the first cut whose trigger fired; ``progressive``: to ever older
    restore points until one validates; ``atomic``: only the newest cut is taken back."""
    restore_points: int = Field(default=4, ge=2)
    """How many are kept; more only while cuts under watch need them."""
    claim_seconds: float = Field(default=15.0, gt=0)
    """How long a run stays claimed by a trainer that is not heard of any more."""
    reconstruct: bool = True
    """Cuts are followed by refitting what reads the kept units, from the calibration pass."""
    reconstruct_skip: tuple[str, ...] = ()
    """Layers, by path, that keep their weights all the same."""
