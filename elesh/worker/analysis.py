"""From admitted work to decisions: fetch, ask the child, and the ladder of the failure table.

The rungs that exist, each a field of the decision, a log line and a telemetry event: a timeout is
answered by basic importance scoring, a crash of the child by a fresh child and one more try. What
still fails is a named error for the dead letters.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from elesh.bus import Bus
from elesh.observe import span
from elesh.settings import Settings
from leyline import (
    AnalysisFailed,
    AnalysisMetrics,
    IdempotencyKey,
    Level,
    StructuralPruningDecision,
    decode,
    encode,
)

from .admission import Work
from .compute import ChildDied, ChildTimeout, ComputeChild
from .protocol import DOCUMENT, Job, Override, Reply
from .reports import Reports

__all__ = ["Analyst"]


class Analyst:
    """Decides admitted work with one compute child."""

    def __init__(self, bus: Bus, settings: Settings, reports: Reports, spool: Path) -> None:
        self._bus = bus
        self._settings = settings
        self._reports = reports
        self._spool = spool
        self._child = ComputeChild()

    async def start(self) -> None:
        """Have the child ready before the first message."""
        await self._child.start()

    async def stop(self) -> None:
        """End the child."""
        await self._child.kill()

    async def decide(self, work: Work) -> list[StructuralPruningDecision]:
        """One decision for each key of ``work``.

        Raises:
            ContractError: if blobs or statistics are not sound, or the analysis failed for good.
        """
        folder = self._spool / "checkpoint"
        try:
            await self._fetch(work, folder)
            return [await self._decide(work, key, folder) for key in work.keys]
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _fetch(self, work: Work, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        size = sum(ref.size for ref in work.blobs.values())
        with span("fetch blobs", attributes={"elesh.blob_bytes": size}):
            for name, ref in work.blobs.items():
                await self._bus.blobs.fetch(ref, folder / name)
        (folder / DOCUMENT).write_bytes(encode(work.document))
        await self._reports.step("fetched", work, figures={"bytes": size})

    async def _decide(
        self, work: Work, key: IdempotencyKey, folder: Path
    ) -> StructuralPruningDecision:
        levels = work.levels
        views = [await self._bus.breakers.admit(work.run_id, level) for level in levels]
        job = Job(
            folder=str(folder),
            key=str(key),
            settings=self._settings.model_dump_json(),
            levels=tuple(levels),
            breakers=tuple(
                (view.state if view.admitted else "open", view.failures, view.reason)
                for view in views
            ),
            threads=self._settings.worker.threads,
        )
        with span(f"analyse {key.level}", attributes={"elesh.key": str(key)}) as current:
            reply = await self._climb(work, job)
            decision = self._read(reply, job)
            current.set_attribute("elesh.approved", decision.approved_for_application)
            for taken in decision.fallbacks:
                current.add_event("fallback", {"rung": taken.rung, "reason": taken.reason})
        units = _units_by_level(decision)
        await self._reports.step(
            "analysed",
            work,
            key=key,
            metrics=AnalysisMetrics(
                duration_seconds=reply.seconds,
                channels=units.get(Level.CHANNEL, 0),
                heads=units.get(Level.HEAD, 0),
                layers=units.get(Level.LAYER, 0),
                peak_memory_bytes=reply.peak_memory,
                input_bytes=sum(ref.size for ref in work.blobs.values()),
            ),
        )
        return decision

    async def _climb(self, work: Work, job: Job) -> Reply:
        """The full analysis, or the next rung of the ladder."""
        try:
            return await self._child.run(job, timeout=work.window)
        except ChildTimeout as error:
            basic = _fallen(job, "analysis_timeout", str(error), scorer="multi_metric")
            await self._reports.fallback(work, job.key, *basic.fallbacks[-1])
            return await self._last_try(basic, work.window)
        except ChildDied as error:
            again = _fallen(job, "worker_crash", str(error))
            await self._reports.fallback(work, job.key, *again.fallbacks[-1])
            return await self._last_try(again, work.window)

    async def _last_try(self, job: Job, window: float) -> Reply:
        try:
            return await self._child.run(job, timeout=window)
        except (ChildDied, ChildTimeout) as error:
            raise AnalysisFailed(
                f"analysis of {job.key}",
                "a decision",
                str(error),
                hint="failed twice; redrive it once the cause is mended",
            ) from None

    @staticmethod
    def _read(reply: Reply, job: Job) -> StructuralPruningDecision:
        if reply.failed is not None:
            raise reply.failed.error
        return decode(StructuralPruningDecision, reply.decision, field=f"decision of {job.key}")


def _fallen(job: Job, rung: str, reason: str, *, scorer: Override = "") -> Job:
    return replace(job, scorer=scorer, fallbacks=(*job.fallbacks, (rung, reason)))


def _units_by_level(decision: StructuralPruningDecision) -> dict[Level, int]:
    """Units looked at."""
    if not decision.levels:
        return {decision.key.level: decision.statistics.channels_before}
    return {
        part.level: part.statistics.channels_before for part in decision.levels if part.statistics
    }
