"""Fan-out: a checkpoint as parts that any worker may take, and the join that decides.

Only workers write and read these; a trainer never sees them. The checkpoint itself stands once, in
the plan's record, not in every part.
"""

from __future__ import annotations

import operator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from leyline.messages.checkpoint import BlobRef
from leyline.messages.decisions import Fallback

from .base import Label, Message, Moment, Name, Text
from .identity import DecisionKey, Level


class AnalysisItem(Message):
    """One part of a planned checkpoint: a level, or a group of layers of one."""

    contract_of: ClassVar[str] = "Elesh to Elesh"

    plan: DecisionKey
    """Key of the decision that the parts lead to."""
    level: Level
    shard: Annotated[int, Field(ge=0, lt=4096)] = 0
    """Which of the level's groups of layers."""
    shards: Annotated[int, Field(ge=1, le=4096)] = 1
    """Into how many groups of layers the level is split."""

    @property
    def name(self) -> str:
        """Names the part within its plan."""
        return f"{self.level}.{self.shard}" if self.shards > 1 else str(self.level)


class JoinItem(Message):
    """All parts are there, or the deadline is over: join what there is and decide."""

    contract_of: ClassVar[str] = "Elesh to Elesh"

    plan: DecisionKey


class ItemResult(Message):
    """What became of one part; kept in the plan's record until the join."""

    analysis: bytes = b""
    """The encoded LevelAnalysis, where it is small."""
    blob: BlobRef | None = None
    """Claim check of the same, where it is large."""
    failed: Text = ""
    """Why there is none: the join goes on without and names the gap."""
    code: Label = Field(default="", exclude_if=operator.not_)
    """The class of that error."""
    fallbacks: tuple[Fallback, ...] = ()
    """Fallbacks of the failure table that were taken on the way to no analysis."""


class Attempt(Message):
    """One delivery of an entry that did not end it."""

    cause: Literal["crash", "exception", "handover"]
    """``crash``: the lease ran out; ``exception``: the worker failed and went on; ``handover``: the
    worker was drained before it began (not counted as a delivery)."""
    worker_id: Name
    at: Moment
    detail: Label = ""
