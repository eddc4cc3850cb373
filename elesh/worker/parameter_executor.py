"""The Analysis Executor in the worker: an AnalysisRequest becomes PruningMasks (section 4.4).

Promises: as for every other request: one result for its key ``<epoch>:<hash>:<id>:parameter``,
committed with the acknowledgement; sketches are merged and masks made in the compute child; masks
too large for a message travel as a blob. The AnalysisReport is published before the masks are
committed, as one event however often the request is delivered.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgpack

from elesh.bus import Bus, Commit, CommitOutcome, Delivery
from elesh.bus.admission import fingerprint
from elesh.observe import carrier_of, get_logger, span
from elesh.settings import Settings
from elesh.worker.compute.protocol import MASKS, REQUEST, ChildFailure, Job, rank_files
from leyline import (
    AnalysisFailed,
    AnalysisReport,
    AnalysisRequest,
    IdempotencyKey,
    IdentityMismatch,
    ImportanceData,
    Level,
    PruningMasks,
    decode,
    encode,
    stable_hash,
)
from leyline.streams import DECISIONS, WORKERS

from .executor import AnalysisExecutor
from .result_handler import conflict

_SOURCE = "elesh"
_log = get_logger(__name__)


def parameter_key(request: AnalysisRequest) -> IdempotencyKey:
    """The key of the masks that answer a request."""
    return IdempotencyKey(request.epoch, request.model_hash, request.request_id, Level.PARAMETER)


class ParameterExecutor:
    """Serves parameter analyses with the worker's compute child."""

    def __init__(
        self, bus: Bus, settings: Settings, worker_id: str, executor: AnalysisExecutor, spool: Path
    ) -> None:
        self._bus = bus
        self._settings = settings
        self._worker_id = worker_id
        self._executor = executor
        self._spool = spool / "parameters"

    async def serve(self, delivery: Delivery, request: AnalysisRequest) -> None:
        """Fetch, merge, mark, report, commit.

        Raises:
            ContractError: if request, importance or sketches are not sound, or the child failed.
            Conflict: if the key was committed for other content.
        """
        key = parameter_key(request)
        content = fingerprint(request)
        record = await self._bus.record(key)
        if record is not None:
            if record.fingerprint != content:
                raise conflict(key, content)
            await self._bus.acknowledge(WORKERS, self._worker_id, delivery)
            return
        folder = self._spool / content[:32]
        try:
            with span("mark parameters", attributes={"elesh.key": str(key)}):
                await self._fetch(request, folder)
                masks, report = await self._marked(key, request, folder)
            await self._publish(delivery, request, report)
            await self._commit(delivery, request, key, content, masks)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _fetch(self, request: AnalysisRequest, folder: Path) -> None:
        """Have every rank's importance in the spool folder, its blobs verified."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REQUEST).write_bytes(encode(request))
        for number, ref in enumerate((request.importance, *request.ranks)):
            data = await self._bus.blobs.get(ref)
            importance = decode(ImportanceData, data, field=f"importance of rank {number}")
            _require_of(request, importance, number)
            files = rank_files(folder, number)
            files.importance.write_bytes(data)
            await self._bus.blobs.fetch(importance.sketches, files.sketches)
            if importance.samples is not None:
                await self._bus.blobs.fetch(importance.samples, files.samples)

    async def _marked(
        self, key: IdempotencyKey, request: AnalysisRequest, folder: Path
    ) -> tuple[PruningMasks, AnalysisReport]:
        job = Job(
            kind="parameters",
            folder=str(folder),
            key=str(key),
            settings=self._settings.model_dump_json(),
            levels=(Level.PARAMETER,),
            threads=self._settings.threads,
        )
        window = min(self._settings.window_seconds, request.timeout.total_seconds())
        try:
            reply = await self._executor.run(job, window)
        except ChildFailure as failure:
            raise AnalysisFailed(
                f"analysis of {key}", "masks within the window", str(failure)
            ) from None
        if reply.failed is not None:
            raise reply.failed.error
        parts: Sequence[bytes] = msgpack.unpackb(reply.result)
        masks = decode(PruningMasks, parts[0], field=f"masks of {key}")
        if masks.packed is not None:
            blob = await self._bus.blobs.put((folder / MASKS).read_bytes(), "raw")
            masks = masks.model_copy(update={"packed": blob})
        return masks, decode(AnalysisReport, parts[1], field=f"report of {key}")

    async def _publish(
        self, delivery: Delivery, request: AnalysisRequest, report: AnalysisReport
    ) -> None:
        await self._bus.publish(
            DECISIONS,
            report,
            source=_SOURCE,
            carrier=carrier_of(delivery.carrier),
            run_id=request.run_id,
            epoch=request.epoch,
            event_id=f"report-{stable_hash(report.idempotency_key)}",
        )

    async def _commit(
        self,
        delivery: Delivery,
        request: AnalysisRequest,
        key: IdempotencyKey,
        content: str,
        masks: PruningMasks,
    ) -> None:
        result = Commit(
            key, content, masks, carrier_of(delivery.carrier), request.run_id, request.epoch
        )
        committed = await self._bus.commit(WORKERS, self._worker_id, delivery, result)
        marked = sum(mask.marked for mask in masks.masks)
        _log.info(f"masks {committed}", key=str(key), marked=marked, confidence=masks.confidence)
        if committed is CommitOutcome.CONFLICT:
            raise conflict(key, content)


def _require_of(request: AnalysisRequest, importance: ImportanceData, number: int) -> None:
    """Refuse importance of another checkpoint than the request's."""
    asked = (request.epoch, request.model_hash)
    if (importance.epoch, importance.model_hash) != asked:
        raise IdentityMismatch(
            f"importance of rank {number}",
            f"epoch {request.epoch}, model {request.model_hash}",
            f"epoch {importance.epoch}, model {importance.model_hash}",
        )
