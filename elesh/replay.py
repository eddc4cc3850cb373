"""Replay: run the analysis of a recorded event again, publish nothing, compare with the record.

The same code and settings give the same bytes. Where they do not, the differing fields are named,
and whether settings or version changed since.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from elesh.analysis import analyze
from elesh.bus import Bus
from elesh.safety import BreakerStatus, refuse_rolled_back
from elesh.settings import Settings
from elesh.verification import verifier
from elesh.worker.admission import Work, admit
from leyline import (
    CheckpointBundle,
    ContractError,
    IdempotencyKey,
    Level,
    StructuralPruningDecision,
    encode,
    read_envelope,
    unwrap,
)
from leyline.streams import CHECKPOINTS, REQUESTS

__all__ = ["Replayed", "Selection", "replay"]


@dataclass(frozen=True)
class Selection:
    """Which recorded events: all of a run, of an epoch, or of one key; empty selects everything."""

    key: str = ""
    run_id: str = ""
    epoch: int | None = None

    def takes(self, work: Work) -> bool:
        """Whether ``work`` is selected."""
        return (
            (not self.key or self.key in map(str, work.keys))
            and (not self.run_id or work.run_id == self.run_id)
            and (self.epoch is None or work.epoch == self.epoch)
        )


@dataclass(frozen=True)
class Replayed:
    """One replayed key: the decision made now, the recorded one, and where they differ."""

    key: IdempotencyKey
    decision: StructuralPruningDecision | None
    recorded: StructuralPruningDecision | None
    differences: tuple[tuple[str, Any, Any], ...] = ()
    """Path of the field, recorded value, value now."""
    error: str = ""

    @property
    def identical(self) -> bool:
        """Whether the bytes are the same."""
        return (
            self.decision is not None
            and self.recorded is not None
            and encode(self.decision) == encode(self.recorded)
        )


async def replay(bus: Bus, settings: Settings, selection: Selection) -> AsyncIterator[Replayed]:
    """Replay every selected event that is still in the streams, in their order."""
    done: set[IdempotencyKey] = set()
    for stream in (CHECKPOINTS, REQUESTS):
        for delivery in await bus.read(stream):
            work = _work(delivery.envelope, settings)
            if work is None or not selection.takes(work):
                continue
            for key in work.keys:
                if key not in done and (not selection.key or str(key) == selection.key):
                    done.add(key)
                    yield await _replay(bus, settings, work, key)


def _work(envelope: bytes, settings: Settings) -> Work | None:
    try:
        work = admit(envelope, window=settings.worker.window_seconds, now=datetime.now(UTC))
    except ContractError:
        return None  # it never was work: it is among the dead letters
    return work if isinstance(work, Work) else None


async def _replay(bus: Bus, settings: Settings, work: Work, key: IdempotencyKey) -> Replayed:
    recorded = await recorded_decision(bus, key)
    try:
        bundle = await fetch_bundle(bus, work)
    except ContractError as error:
        return Replayed(key, None, recorded, error=str(error))
    fallbacks = recorded.fallbacks if recorded else ()
    timed_out = any(taken.rung == "analysis_timeout" for taken in fallbacks)
    decision = analyze(
        bundle,
        settings,
        level=None if key.level is Level.JOINT else key.level,
        key=key,
        breakers=BreakerStatus.of(recorded) if recorded else None,
        scorer="multi_metric" if timed_out else None,
        fallbacks=tuple(f for f in fallbacks if f.rung in {"analysis_timeout", "worker_crash"}),
        verify=verifier(bundle, settings, recorded),
    )
    decision = refuse_rolled_back(decision, recorded.rolled_back if recorded else ())
    differences = tuple(_differences(recorded, decision)) if recorded else ()
    return Replayed(key, decision, recorded, differences)


async def recorded_decision(bus: Bus, key: IdempotencyKey) -> StructuralPruningDecision | None:
    """The decision that was published for ``key``, or None."""
    record = await bus.record(key)
    if record is None:
        return None
    message = unwrap(read_envelope(record.envelope))
    return message if isinstance(message, StructuralPruningDecision) else None


async def fetch_bundle(bus: Bus, work: Work) -> CheckpointBundle:
    """The checkpoint that ``work`` points at.

    Raises:
        MissingBlob: if a blob has expired since.
    """
    with tempfile.TemporaryDirectory(prefix="elesh-replay-") as name:
        folder = Path(name)
        for file, ref in work.blobs.items():
            await bus.blobs.fetch(ref, folder / file)
        (folder / "checkpoint.json").write_text(work.document.model_dump_json())
        return CheckpointBundle.load(folder)


def _differences(
    recorded: StructuralPruningDecision, now: StructuralPruningDecision
) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    _compare("", recorded.model_dump(mode="json"), now.model_dump(mode="json"), found)
    return found


def _compare(path: str, old: Any, new: Any, found: list[tuple[str, Any, Any]]) -> None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            _compare(f"{path}.{key}".lstrip("."), old.get(key), new.get(key), found)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            _compare(f"{path}[{index}]", a, b, found)
    elif old != new:
        found.append((path, old, new))
