"""The streams of the bus, the messages of each and their readers; and the messages of the stream
that only workers use, for the parts of a checkpoint.

Any worker may take a part; the join decides by all of them. The checkpoint itself stands once, in
the plan's record, not in every part.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from leyline.messages.audit import AuditEntry
from leyline.messages.checkpoint import BlobRef, CheckpointReady
from leyline.messages.decisions import Fallback, StructuralPruningDecision
from leyline.messages.events import (
    BreakerTransition,
    DeadLetter,
    OperatorAction,
    PruningOutcome,
    RecompilationRequest,
    StructuralValidationResult,
    TelemetryEvent,
)
from leyline.messages.legacy import AnalysisReport, ImportanceData, MaskApplication, PruningMasks
from leyline.messages.requests import AnalysisRequest, StructuralAnalysisRequest

from .base import Label, Message, Text
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


WORKERS = "elesh-workers"
"""The consumer group of the analysis workers."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream by its short name; its key in Redis is ``elesh:{<partition>}:<name>``."""

    name: str
    messages: tuple[type[Message], ...]
    description: str
    group: str = ""
    """The consumer group whose members share the work; empty: every reader reads all of it."""

    def key(self, partition: str) -> str:
        """The Redis key; the braces are the hash tag that keeps a partition on one node."""
        return f"elesh:{{{partition}}}:{self.name}"


CHECKPOINTS = Stream(
    "checkpoints", (CheckpointReady,), "checkpoints that are ready for analysis", WORKERS
)
REQUESTS = Stream(
    "requests",
    (StructuralAnalysisRequest, AnalysisRequest, ImportanceData),
    "analyses that a coordinator asks for",
    WORKERS,
)
DECISIONS = Stream(
    "decisions",
    (StructuralPruningDecision, PruningMasks, AnalysisReport),
    "one decision a key",
)
OUTCOMES = Stream("outcomes", (PruningOutcome,), "what trainers made of decisions", WORKERS)
WORK = Stream("work", (AnalysisItem, JoinItem), "parts of checkpoints for any worker", WORKERS)
REDELIVERIES = Stream(
    "redeliveries",
    (*CHECKPOINTS.messages, *REQUESTS.messages, *OUTCOMES.messages, *WORK.messages),
    "entries of the other work streams that were released or whose worker died",
    WORKERS,
)
MASKS = Stream("masks", (MaskApplication,), "validated parameter masks for checkpoints")
TELEMETRY = Stream("telemetry", (TelemetryEvent, BreakerTransition), "what workers do, for Nissa")
VALIDATION = Stream("validation", (StructuralValidationResult,), "safety results, for Urabrask")
RECOMPILE = Stream("recompile", (RecompilationRequest,), "changed architectures, for Tezzeret")
DEAD = Stream("dead", (DeadLetter,), "messages that could not be served")
OPERATIONS = Stream("operations", (OperatorAction,), "what operators did by hand")
AUDIT = Stream("audit", (AuditEntry,), "what was decided and done, each entry chained to the last")

STREAMS: tuple[Stream, ...] = (
    CHECKPOINTS,
    REQUESTS,
    DECISIONS,
    OUTCOMES,
    WORK,
    REDELIVERIES,
    MASKS,
    TELEMETRY,
    VALIDATION,
    RECOMPILE,
    DEAD,
    OPERATIONS,
    AUDIT,
)
MESSAGES: dict[str, type[Message]] = {m.__name__: m for s in STREAMS for m in s.messages}
"""Every message type that may stand in an envelope, by name."""
