"""What the supervisor and its compute child say to each other: length-prefixed msgpack frames.

Only paths, keys and figures go through the pipe; checkpoints lie in a spool folder that the
supervisor has filled and verified. Nothing is pickled. A reply has the stages of its job, as a
:class:`Stopwatch` measured them, for the supervisor to make spans of.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import msgpack

from elesh.safety import BreakerStatus
from elesh.worker.shortage import SHORTAGE_CODE, Shortage
from leyline import ContractError, Fallback, IdempotencyKey, Level, errors

__all__ = [
    "Failed",
    "Job",
    "Kind",
    "MEMORY_CODE",
    "Reply",
    "Stage",
    "Stopwatch",
    "pack_frame",
    "unpack_body",
]

Stage = tuple[str, int, int, int]
"""Name, place of its parent among the stages (-1: none), begin and end in ns since 1970."""
_MOST = 256

Kind = Literal["decide", "level", "join", "again", "parameters"]
PREFIX = struct.Struct("<I")
PRELOAD = "preload"
"""The child's argument that asks it to load torch before the first job."""
DOCUMENT = "document.msgpack"
"""The file of the spool folder that holds the checkpoint's CheckpointDocument."""
ANALYSES = "analyses"
"""The folder in it that holds the LevelAnalysis of each level, for a join."""
MEASURED = "measured.safetensors"
"""What the child leaves in it for the run's history (an ImportanceTracker), once channels were
analysed."""
MEMORY_CODE = "memory"
"""``Failed.code`` of a job that ran out of memory."""


@dataclass(frozen=True)
class Job:
    """What to do with one checkpoint.

    ``decide``: analyse all ``levels`` and join them; ``level``: analyse the one level; ``join``:
    join the analyses that lie beside the checkpoint; ``again``: analyse the ``parts`` and join
    them, as was done before; ``parameters``: mark single parameters. ``folder`` holds a checkpoint
    bundle, for ``parameters`` their importance; ``settings`` the worker's settings as JSON.
    """

    kind: Kind
    folder: str
    key: str
    settings: str
    levels: tuple[str, ...]
    breakers: tuple[tuple[str, int, str], ...] = ()
    """State, failures and reason of each level's breaker, as the supervisor saw them."""
    threads: int = 1
    fallbacks: tuple[tuple[str, str], ...] = ()
    """Fallbacks of the failure table that led to this job, each with its reason; what they change
    in
    the analysis is :func:`elesh.worker.fallback_chain.scope_of`."""
    shard: tuple[str, ...] = ()
    """The groups that a ``level`` job looks at; empty for all."""
    missing: tuple[tuple[str, str], ...] = ()
    """Levels that a join has to do without, each with the reason."""
    unmeasured: str = ""
    """Why the network that the checkpoint names is not run; empty: it may be."""
    taken_back: tuple[bytes, ...] = ()
    """The run's cuts that its trainer rolled back, encoded, for a join or a decision."""
    loss_factor: bytes = b""
    """The run's LossFactor, encoded, where its predictions were calibrated."""
    parts: tuple[bytes, ...] = ()
    """What an ``again`` job joins: encoded AnalysedParts."""
    recorded: bytes = b""
    """In a replay, the encoded decision of then: what chance decided (see
    :func:`elesh.program.verifier`) is taken from it."""

    @property
    def asked_levels(self) -> tuple[Level, ...]:
        """The levels to analyse."""
        return tuple(map(Level, self.levels))

    @property
    def missing_levels(self) -> tuple[tuple[Level, str], ...]:
        """The levels that are missing, each with the reason."""
        return tuple((Level(level), reason) for level, reason in self.missing)

    @property
    def breaker_of(self) -> dict[Level, BreakerStatus]:
        """The breakers by level."""
        pairs = zip(self.asked_levels, self.breakers, strict=True)
        return {level: BreakerStatus(*status) for level, status in pairs}  # type: ignore[arg-type]

    @property
    def fallback_names(self) -> tuple[str, ...]:
        """The names of the fallbacks that were taken."""
        return tuple(name for name, _ in self.fallbacks)

    @property
    def taken_fallbacks(self) -> tuple[Fallback, ...]:
        """The fallbacks as a decision has them."""
        return tuple(Fallback(rung=rung, reason=reason) for rung, reason in self.fallbacks)

    @property
    def idempotency_key(self) -> IdempotencyKey:
        """The parsed key."""
        return IdempotencyKey.parse(self.key)


@dataclass(frozen=True)
class Failed:
    """Why a job gave no decision. ``contract`` tells bad input from a fault of ours."""

    code: str
    field: str
    expected: str
    found: str
    contract: bool

    @property
    def error(self) -> ContractError | Shortage:
        """The error that the child met, as the contract's class where it is one."""
        if self.code == SHORTAGE_CODE:
            return Shortage(self.found)
        kinds = {
            kind.code: kind
            for kind in vars(errors).values()
            if isinstance(kind, type) and issubclass(kind, ContractError)
        }
        return kinds.get(self.code, ContractError)(self.field, self.expected, self.found)

    @property
    def reason(self) -> str:
        """One line for logs and dead letters."""
        return str(self.error) if self.contract else f"{self.field}: {self.found}"


@dataclass(frozen=True)
class Reply:
    """The encoded result, or why there is none, with the child's own figures."""

    result: bytes = b""
    """A StructuralPruningDecision; for kind ``level`` a LevelAnalysis; for ``parameters`` the pair
    of PruningMasks and AnalysisReport."""
    failed: Failed | None = None
    seconds: float = 0.0
    peak_memory: int = 0
    """Highest resident size of the child so far, in bytes."""
    stages: tuple[Stage, ...] = ()
    """What the child measured of its work."""


def pack_frame(message: Job | Reply) -> bytes:
    """A frame: four bytes of length, little-endian, and the fields as msgpack."""
    body: bytes = msgpack.packb(asdict(message))
    return PREFIX.pack(len(body)) + body


def unpack_body(kind: type[Job] | type[Reply], body: bytes) -> Any:
    """The message of a frame's body."""
    values = msgpack.unpackb(body)
    if kind is Job:
        pairs = ("breakers", "fallbacks", "missing")
        values |= {name: tuple(map(tuple, values[name])) for name in pairs}
        plain = ("levels", "shard", "taken_back", "parts")
        values |= {name: tuple(values[name]) for name in plain}
        return kind(**values)
    if values["failed"] is not None:
        values["failed"] = Failed(**values["failed"])
    values["stages"] = tuple(map(tuple, values["stages"]))
    return kind(**values)


class Stopwatch:
    """Measures the stages of one job; the first 256 are kept."""

    def __init__(self) -> None:
        self._stages: list[Stage] = []
        self._open: list[int] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure one stage; an observer for :func:`elesh.analysis.spans.observed`."""
        if len(self._stages) >= _MOST:
            yield
            return
        place, parent = len(self._stages), self._open[-1] if self._open else -1
        begun = time.time_ns()
        self._stages.append((name, parent, begun, begun))
        self._open.append(place)
        try:
            yield
        finally:
            self._open.pop()
            self._stages[place] = (name, parent, begun, max(begun, time.time_ns()))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What was measured, parents before their children."""
        return tuple(self._stages)
