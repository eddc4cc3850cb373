"""The protocol of supervisor and compute child: frames over pipes, heartbeat, memory limit,
failures, and where files are.

Frames are length-prefixed msgpack. Only paths, keys and figures go through the pipe; checkpoints
lie in a spool folder that the supervisor has filled and verified. Nothing is pickled. A reply has
the spans of its job, as a :class:`Stopwatch` measured them, for the supervisor to record.

The heartbeat (decision 0051): a thread of the child writes the time twice a second into a small
file that the supervisor maps, whatever the job does. A heartbeat that is missing has three possible
causes, which ``/proc`` tells apart: the child is stopped (its state is ``T``), it holds the
interpreter lock in a long native call (its CPU time grows: it is busy, not wedged), or it does
nothing at all.

Its memory is limited from both sides. The child limits its own data segments (``RLIMIT_DATA``:
private anonymous memory, which numpy and torch allocate; ``RLIMIT_AS`` would count the address
space that thread stacks, mapped libraries and mapped weights merely reserve), so that an allocation
too many is a ``MemoryError`` in it. The supervisor watches its resident size, which also counts
what is shared or mapped, and kills it.

Promises: neither side waits for the other; without ``/proc`` only heartbeats count.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgpack

from elesh.worker.spool import SHORTAGE_CODE, Shortage
from leyline import CheckpointDocument, ContractError, Fallback, Level, errors

SpanTimes = tuple[str, int, int, int]
"""Name, place of its parent among the spans (-1: none), begin and end in ns since 1970."""
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


TIMEOUT = "analysis_timeout"
CRASH = "worker_crash"
MEMORY = "memory_overflow"
REPLAYED = frozenset({TIMEOUT, CRASH, MEMORY})
"""The fallbacks that a replay takes from the record; the analysis takes the others by itself."""
Scorer = Literal["", "multi_metric", "magnitude"]


@dataclass(frozen=True)
class Scope:
    """What is left of an analysis after the fallbacks that were taken."""

    scorer: Scorer = ""
    """Overrides the scorer of request and settings."""
    vectors_only: bool = False
    """Whether only the three vectors are loaded, and only channels analysed."""
    conservative: bool = False
    """Whether the cut stays within the conservative phase's limit."""

    def narrowed(self, document: CheckpointDocument, limit: float) -> CheckpointDocument:
        """The checkpoint's document with the conservative ``limit``."""
        asked = document.parameters.target_ratio
        target = limit if asked is None else min(asked, limit)
        parameters = document.parameters.model_copy(update={"target_ratio": target})
        return document.model_copy(update={"parameters": parameters})


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
    levels: tuple[Level, ...]
    breakers: tuple[tuple[str, int, str], ...] = ()
    """State, failures and reason of each level's breaker, as the supervisor saw them."""
    threads: int = 1
    fallbacks: tuple[tuple[str, str], ...] = ()
    """Fallbacks of the failure table that led to this job, each with its reason; what they change
    in the analysis is :attr:`scope`."""
    shard: tuple[str, ...] = ()
    """The groups that a ``level`` job looks at; empty for all."""
    missing: tuple[tuple[str, str], ...] = ()
    """Levels that are missing in a join, each with the reason."""
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
    def scope(self) -> Scope:
        """The scope that the fallbacks leave."""
        taken = dict(self.fallbacks)
        over_memory = MEMORY in taken
        return Scope(
            scorer="multi_metric" if over_memory or TIMEOUT in taken else "",
            vectors_only=over_memory,
            conservative=over_memory,
        )

    @property
    def taken_fallbacks(self) -> tuple[Fallback, ...]:
        """The fallbacks as a decision has them."""
        return tuple(Fallback(rung=rung, reason=reason) for rung, reason in self.fallbacks)


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
    spans: tuple[SpanTimes, ...] = ()
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
        plain = ("shard", "taken_back", "parts")
        values |= {name: tuple(values[name]) for name in plain}
        return kind(**values | {"levels": tuple(map(Level, values["levels"]))})
    if values["failed"] is not None:
        values["failed"] = Failed(**values["failed"])
    values["spans"] = tuple(map(tuple, values["spans"]))
    return kind(**values)


@dataclass
class Stopwatch:
    """Measures the spans of one job; the first 256 are kept."""

    spans: list[SpanTimes] = field(default_factory=list)
    """What was measured, parents before their children."""
    _open: list[int] = field(default_factory=list)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure one span; an observer for :func:`elesh.analysis.spans.observed`."""
        if len(self.spans) >= _MOST:
            yield
            return
        place, parent = len(self.spans), self._open[-1] if self._open else -1
        begun = time.time_ns()
        self.spans.append((name, parent, begun, begun))
        self._open.append(place)
        try:
            yield
        finally:
            self._open.pop()
            self.spans[place] = (name, parent, begun, max(begun, time.time_ns()))


class ChildFailure(Exception):
    """The compute child gave no answer."""


class ChildDied(ChildFailure):
    """It ended in the middle of a job (crash, kill)."""


class ChildTimeout(ChildFailure):
    """The job took longer than its time; the child was killed."""


class ChildOverMemory(ChildFailure):
    """The job needed more memory than it may; the child was killed."""


_TIME = struct.Struct("<d")
_HEARTBEAT_SECONDS = 0.5
_SILENT_SECONDS = 4.0
"""Without a heartbeat for so long, and without CPU time used meanwhile, a child is wedged."""
_TICKS = os.sysconf("SC_CLK_TCK")


def heartbeat_into(path: Path) -> None:
    """Start the thread of this process that writes the heartbeat until the process ends."""
    memory = mmap.mmap(os.open(path, os.O_RDWR), _TIME.size)

    def heartbeat() -> None:
        while True:
            _TIME.pack_into(memory, 0, time.monotonic())
            time.sleep(_HEARTBEAT_SECONDS)

    # Little of the child's memory allowance goes into this stack.
    before = threading.stack_size(256 << 10)
    threading.Thread(target=heartbeat, name="elesh-heartbeat", daemon=True).start()
    threading.stack_size(before)


@dataclass(frozen=True)
class Finding:
    """The health of the child, and why it is not well."""

    child: Literal["idle", "busy", "wedged", "dead"]
    why: str = ""


class HeartbeatReader:
    """Reads the heartbeat in the supervisor.

    Args:
        path: the file of the heartbeat; it is made here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(_TIME.size))
        descriptor = os.open(path, os.O_RDONLY)
        self._memory = mmap.mmap(descriptor, _TIME.size, access=mmap.ACCESS_READ)
        os.close(descriptor)
        self._pid, self._moved, self._used = 0, 0.0, 0.0

    def probe(self, pid: int | None, *, busy: bool) -> Finding:
        """The health of the child ``pid``; call it every second or so."""
        if pid is None:
            return Finding("dead", "the compute child ended; a fresh one is being started")
        now = time.monotonic()
        # Nothing is known where there is no ``/proc``.
        state, used = "", 0.0
        with contextlib.suppress(OSError):
            # The name may hold spaces and brackets: what counts comes after the last bracket.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            state, used = fields[0].upper(), (int(fields[11]) + int(fields[12])) / _TICKS
        if pid != self._pid or used > self._used:
            # A fresh child has its time, too: it must load its numerics before its first heartbeat.
            self._pid, self._moved = pid, now
        self._used = used
        (heartbeat,) = _TIME.unpack_from(self._memory)
        silent = now - heartbeat
        if silent < _SILENT_SECONDS or (state != "T" and now - self._moved < _SILENT_SECONDS):
            return Finding("busy" if busy else "idle")
        if state == "T":
            return Finding("wedged", f"the compute child (pid {pid}) is stopped by a signal")
        return Finding(
            "wedged",
            f"the compute child (pid {pid}) has neither a heartbeat nor used any CPU time for "
            f"{now - self._moved:.0f} s",
        )


def limit_data(size: int) -> None:
    """Have the kernel refuse this process more than ``size`` bytes of data segments.

    Where the platform has no such limit, or a lower hard one, nothing changes.
    """
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (size, hard))


def resident(pid: int) -> int | None:
    """Resident size of a process in bytes; None where it cannot be read (no /proc, no process)."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return None
    return int(pages) * resource.getpagesize()


REQUEST = "request.msgpack"
MASKS = "masks.bin"


@dataclass(frozen=True)
class RankFiles:
    """Where one rank's importance lies in the spool folder."""

    importance: Path
    sketches: Path
    samples: Path


def rank_files(folder: Path, number: int) -> RankFiles:
    """The files of rank ``number``."""
    return RankFiles(
        folder / f"importance-{number}.msgpack",
        folder / f"sketches-{number}.safetensors",
        folder / f"samples-{number}.safetensors",
    )
