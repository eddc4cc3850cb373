"""From admitted work to results: fetches blobs, asks the compute child, tries the fallbacks.

What still fails after the last fallback is a named error. Several entries may be here at once, each
of a key of its own: their blobs are fetched side by side, the child takes one after the other. A
checkpoint whose parts come one after another is fetched once.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from elesh.bus import Bus, BusUnavailable
from elesh.bus.admission import Work
from elesh.observe import get_logger, mark_failed, metrics, record_spans, span
from elesh.safety import calibrated
from elesh.settings import Settings
from elesh.worker.compute.process import ComputeChild
from elesh.worker.compute.protocol import (
    ANALYSES,
    DOCUMENT,
    MEASURED,
    ChildFailure,
    Job,
    Kind,
    Reply,
)
from elesh.worker.telemetry.reports import Reports
from leyline import (
    AnalysisFailed,
    AnalysisMetrics,
    Level,
    LevelAnalysis,
    StructuralPruningDecision,
    decode,
    encode,
)
from leyline.network.bundle import NETWORK_FILES

from .fallback_chain import fallback_for, time_for
from .leases import InFlightLimit, KeyedLocks

_log = get_logger(__name__)
PRELOAD = True
"""The compute child loads torch, where it is installed, as soon as it has started: 185 MB of idle
memory buy the first window in which it measures a second or more."""
_MOST_IN_FLIGHT = 32
_NETWORK = frozenset(NETWORK_FILES.values())
R = TypeVar("R", StructuralPruningDecision, LevelAnalysis)


class AnalysisExecutor:
    """Analyses admitted work with one compute child."""

    def __init__(self, bus: Bus, settings: Settings, reports: Reports, spool: Path) -> None:
        self._bus = bus
        self._settings = settings
        self._reports = reports
        self._spool = spool / "checkpoints"
        self._used: Counter[Path] = Counter()
        self._settings_json, self._threads = settings.model_dump_json(), settings.threads
        self._history = bus.history(
            settings.importance_history_epochs, int(settings.analysis_cache_size)
        )
        self._untrusted = _untrusted(bus, settings)
        preload = PRELOAD and not self._untrusted
        self.child = ComputeChild(settings.worker.memory_limit, spool, preload=preload)
        self._keeping: asyncio.Task[None] | None = None
        self._waiting: set[str] = set()
        self._doing = ""
        self.in_flight_limit = InFlightLimit(_MOST_IN_FLIGHT)
        self.keyed_locks = KeyedLocks(lambda: self.in_flight_limit.long)
        """Those of the child, of runs, of their outcomes and of decision keys."""

    def begun(self, key: str) -> bool:
        """Whether the analysis of ``key`` is under way in the child."""
        return bool(key) and self._doing == key

    def waits(self, key: str) -> bool:
        """Whether the analysis of ``key`` waits for the child."""
        return key in self._waiting

    async def start(self) -> None:
        """Have the child ready before the first message, and a fresh one whenever it dies."""
        await self.child.start()
        self._keeping = asyncio.create_task(self.child.keep())

    async def stop(self) -> None:
        """End the child."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self.child.kill()

    async def run(self, job: Job, timeout: float) -> Reply:
        """One job in the child, without any fallback.

        Raises:
            ChildFailure: if it gave no reply within ``timeout`` seconds.
            Busy: if another job in it takes long.
        """
        async with self._held_child(job):
            return await self.child.run(job, timeout=timeout)

    @contextlib.asynccontextmanager
    async def _held_child(self, job: Job) -> AsyncIterator[None]:
        """Hold the child for one analysis, including its fallbacks."""
        self._waiting.add(job.key)
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self.keyed_locks.of("child"))
            finally:
                self._waiting.discard(job.key)
            self._doing = job.key
            stack.callback(setattr, self, "_doing", "")
            stack.enter_context(self.in_flight_limit.analysing())
            yield

    async def decide(self, work: Work) -> StructuralPruningDecision:
        """The decision on all levels of ``work``.

        Raises:
            ContractError: if blobs or statistics are not sound, or the analysis failed for good.
            Busy: if another analysis takes long here.
        """
        async with (
            self._fetched(work) as folder,
            self._with_run(self._job("decide", work, folder), work) as job,
        ):
            return await self._result(StructuralPruningDecision, work, job)

    async def analyse(
        self, work: Work, level: Level, groups: tuple[str, ...] = ()
    ) -> LevelAnalysis:
        """One level of ``work``, or some ``groups`` of it, to be joined by :meth:`join`.

        Raises:
            ContractError: as :meth:`decide` does.
        """
        async with self._fetched(work, network=False, keep=True) as folder:
            job = replace(self._job("level", work, folder), levels=(level,), shard=groups)
            return await self._result(LevelAnalysis, work, job)

    async def join(
        self, work: Work, analyses: Sequence[bytes], missing: Mapping[Level, str]
    ) -> StructuralPruningDecision:
        """The decision on ``work`` by its levels' encoded analyses; those that are ``missing`` come
        with their reasons.

        Raises:
            ContractError: as :meth:`decide` does.
        """
        async with self._fetched(work) as folder:
            parts = folder / ANALYSES
            parts.mkdir(exist_ok=True)
            for number, data in enumerate(analyses):
                (parts / f"{number}.msgpack").write_bytes(data)
            gaps = tuple((str(level), reason) for level, reason in missing.items())
            job = replace(self._job("join", work, folder), missing=gaps)
            async with self._with_run(job, work) as job:
                return await self._result(StructuralPruningDecision, work, job)

    @contextlib.asynccontextmanager
    async def _fetched(
        self, work: Work, *, network: bool = True, keep: bool = False
    ) -> AsyncIterator[Path]:
        """The folder with the document and the blobs of ``work``; what is there already is not
        fetched again.

        Args:
            network: with the blobs of the network, where networks are run at all.
            keep: leave it for the next part, until another checkpoint is fetched.
        """
        folder = self._spool / work.fingerprint[:32]
        for other in [
            known for known, users in self._used.items() if known != folder and not users
        ]:
            self._forget(other)
        self._used[folder] += 1
        try:
            if not (folder / DOCUMENT).exists():
                folder.mkdir(parents=True, exist_ok=True)
                draft = folder / f"{DOCUMENT}.partial"  # a full disk takes half of it
                draft.write_bytes(encode(work.document))
                draft.replace(folder / DOCUMENT)
            unwanted = frozenset[str]() if network and not self._untrusted else _NETWORK
            wanted = {
                name: ref
                for name, ref in work.blobs.items()
                if name not in unwanted and not (folder / name).exists()
            }
            size = sum(ref.size for ref in wanted.values())
            with span("fetch blobs", attributes={"elesh.blob_bytes": size}):
                for name, ref in wanted.items():
                    await self._bus.blobs.fetch(ref, folder / name)
            metrics.BLOB_BYTES.add(size)
            self._reports.step("fetched", work, figures={"bytes": size})
            yield folder
        finally:
            self._used[folder] -= 1
            if not keep:
                self._forget(folder)

    def _forget(self, folder: Path) -> None:
        self._used.pop(folder, None)
        shutil.rmtree(folder, ignore_errors=True)

    def _job(self, kind: Kind, work: Work, folder: Path) -> Job:
        return Job(
            kind=kind,
            folder=str(folder),
            key=str(work.key),
            settings=self._settings_json,
            levels=work.document.levels,
            threads=self._threads,
            unmeasured=self._untrusted if _NETWORK & work.blobs.keys() else "",
        )

    @contextlib.asynccontextmanager
    async def _with_run(self, job: Job, work: Work) -> AsyncIterator[Job]:
        """The job with the state of its levels' breakers, which admit at most one probe, with what
        the run's trainer took back before, and how far its predictions were off. A probe that led
        to no decision is given back: another worker may have it at once."""
        run, runs, admit = work.run_id, self._bus.runs, self._bus.breakers.admit
        views, cuts, probes = await asyncio.gather(
            asyncio.gather(*(admit(run, level) for level in job.levels)),
            runs.taken_back(run),
            runs.calibration_cuts(run),
        )
        states = [(v.state if v.admitted else "open", v.failures, v.reason) for v in views]
        factor = calibrated(probes, self._settings.verification) if probes else None
        try:
            yield replace(
                job,
                breakers=tuple(states),
                taken_back=tuple(map(encode, cuts)),
                loss_factor=encode(factor) if factor else b"",
            )
        except Exception:
            with contextlib.suppress(BusUnavailable):
                for view in views:
                    if view.probe:
                        await self._bus.breakers.give_back(run, view.level)
            raise

    async def _result(self, kind: type[R], work: Work, job: Job) -> R:
        """The child's answer, after as many fallbacks as it takes."""
        what = {"join": "join", "level": f"analyse {job.levels[0]}"}.get(job.kind, "decide")
        attributes = {"elesh.key": job.key, "elesh.levels": ",".join(job.levels)}
        with span(what, attributes=attributes) as current:
            async with self._held_child(job):
                reply = await self._run_with_fallbacks(work, job)
            record_spans(reply.spans)
            if reply.failed is not None:
                raise reply.failed.error
            result: R = decode(kind, reply.result, field=f"result of {job.key}")
            decision = result if isinstance(result, StructuralPruningDecision) else result.decision
            current.set_attribute("elesh.approved", decision.approved_for_application)
            for taken in decision.fallbacks:
                current.add_event("fallback", {"fallback": taken.rung, "reason": taken.reason})
        units = {
            part.level: part.statistics.channels_before
            for part in decision.levels
            if part.statistics
        } or {decision.key.level: decision.statistics.channels_before}
        figures = AnalysisMetrics(
            duration_seconds=reply.seconds,
            channels=units.get(Level.CHANNEL, 0),
            heads=units.get(Level.HEAD, 0),
            layers=units.get(Level.LAYER, 0),
            peak_memory_bytes=reply.peak_memory,
            input_bytes=sum(ref.size for ref in work.blobs.values()),
        )
        self._reports.analysed(work, decision, figures)
        path, run, epoch = Path(job.folder) / MEASURED, work.run_id, work.key.epoch
        if path.exists():
            # For the run's history; losing it costs history, nothing else.
            measured = await asyncio.to_thread(path.read_bytes)
            kept = await self._history.remember(run, epoch, measured)
            path.unlink()
            if kept == "conflict":
                _log.warning("epoch measured twice, the first stays", run=run, epoch=epoch)
        return result

    async def _run_with_fallbacks(self, work: Work, job: Job) -> Reply:
        """The child's answer to ``job``, or to what is left of it on the next fallback."""
        clock = asyncio.get_running_loop().time
        begun, timeout = clock(), work.window
        while True:
            try:
                return await self.child.run(job, timeout=timeout)
            except ChildFailure as failure:
                mark_failed(type(failure).__qualname__, str(failure))
                fallback = fallback_for(failure, job)
                timeout = time_for(fallback, work.window, clock() - begun)
                if not fallback or timeout <= 0:
                    raise _given_up(job, failure) from None
                job = replace(job, fallbacks=(*job.fallbacks, (fallback, str(failure))))
                self._reports.fallback(work, job.key, fallback, str(failure))


def _untrusted(bus: Bus, settings: Settings) -> str:
    """Why networks that come over this bus are not run; empty if they are."""
    allowed = {
        "signed": bus.guard.requires_signatures,
        "authenticated": bus.guard.requires_signatures or bus.asks_password,
        "any": True,
    }
    programs = settings.verification.programs
    if allowed[programs]:
        return ""
    return (
        f"verification.programs: {programs}, and any client may write on this bus unsigned: name a "
        "keyring (bus.security.keyring) or give the server a password"
    )


def _given_up(job: Job, failure: ChildFailure) -> AnalysisFailed:
    taken = f" after {', '.join(dict(job.fallbacks))}" if job.fallbacks else ""
    return AnalysisFailed(
        f"analysis of {job.key} ({', '.join(job.levels)})",
        "a result within the window",
        f"{failure}{taken}",
        hint="no fallback of the failure table is left; redrive it once the cause is repaired",
    )
