"""The streams of the bus: which messages each carries and who reads them."""

from __future__ import annotations

from dataclasses import dataclass

from leyline.messages.audit import AuditEntry
from leyline.messages.checkpoint import CheckpointReady
from leyline.messages.decisions import StructuralPruningDecision
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

from .base import Message
from .work import AnalysisItem, JoinItem

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
