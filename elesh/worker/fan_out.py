"""Fan-out and join: a checkpoint as parts that any worker of the fleet takes.

Parts are made of a large checkpoint, and of one of several levels that could not be decided at
once: then each level has fallbacks of its own. The promises of planning, storing and joining are
the bus's (:mod:`elesh.bus.streams.fan_out`); here is what a worker makes parts of, and what it does
with one. A level is split only where its statistics are large, since what one shard takes no longer
depends on what another gives up (decision 0026); the layer level is never split. A level that fails
for good is stored as a failure: the join goes on without it, and its reason stands in the decision.
Only if no level is there at all, the checkpoint itself is a dead letter.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from elesh.bus import Bus, Delivery, Plan, Planned, Stored
from elesh.bus.admission import Work, admit, hear
from elesh.observe import get_logger, mark_failed
from elesh.settings import Settings
from elesh.worker.telemetry.reports import Reports
from leyline import (
    AnalysisFailed,
    AnalysisItem,
    ContractError,
    IdempotencyKey,
    IdentityMismatch,
    ItemResult,
    JoinItem,
    Level,
    MissingBlob,
    PrunedArchitecture,
    encode,
)
from leyline.network.bundle import BLOB_FILES
from leyline.streams import WORKERS

from .executor import AnalysisExecutor
from .fallback_chain import CORRUPT
from .result_handler import ResultHandler, conflict

_INLINE = 256 << 10
"""Analyses up to this size are stored in the plan's record; larger ones are blobs."""
_LATE = "no result within the window"
_TOLERANCE = 1.0
"""Seconds by which two workers may take the server's time differently."""
_log = get_logger(__name__)
T = TypeVar("T")


class FanOut:
    """What one worker does with plans: makes them, analyses their parts, joins them."""

    def __init__(
        self,
        bus: Bus,
        settings: Settings,
        worker_id: str,
        executor: AnalysisExecutor,
        result_handler: ResultHandler,
        reports: Reports,
        stop: asyncio.Event | None = None,
    ) -> None:
        self._bus, self._stop = bus, stop
        self._settings = settings
        self._worker_id = worker_id
        self._executor = executor
        self._result_handler = result_handler
        self._reports = reports

    async def plan(self, delivery: Delivery, work: Work, why: str = "") -> bool:
        """Make a checkpoint into parts; False where it has one part only, which is itself.

        Args:
            why: what kept its levels from being decided at once, for the event.

        Raises:
            Conflict: if its key was planned for other content.
        """
        items = parts_of(work, self._settings)
        if len(items) == 1:
            return False
        plan = Plan(
            key=str(work.key),
            fingerprint=work.fingerprint,
            envelope=delivery.framed,
            carrier=delivery.carrier,
            items=tuple(item.name for item in items),
            origin="/".join(delivery.origin),
        )
        planned = await self._bus.plans.plan(
            WORKERS,
            self._worker_id,
            delivery,
            plan,
            items,
            window_seconds=work.window,
            run_id=work.run_id,
        )
        if planned is Planned.CONFLICT:
            raise conflict(work.key, work.fingerprint)
        step = "planned" if planned is Planned.PLANNED else str(planned)
        self._reports.step(step, work, detail="; ".join(filter(None, [", ".join(plan.items), why])))
        return True

    async def analyse(self, delivery: Delivery, item: AnalysisItem) -> None:
        """Analyse one part and store what became of it."""
        found = await self._planned(delivery, item.plan)
        if found is None:
            return
        work, plan = found
        try:
            self._result_handler.refuse_poison(delivery)
            groups = groups_of(work.document.architecture, item)
            data = encode(await self._executor.analyse(work, item.level, groups))
            if len(data) <= _INLINE:
                result = ItemResult(analysis=data)
            else:  # An analysis is costly: it waits for the bus.
                blobs, stop = self._bus.blobs, self._stop
                blob = await self._bus.persistently(lambda: blobs.put(data, "msgpack"), stop=stop)
                result = ItemResult(blob=blob)
        except ContractError as error:
            mark_failed(error.code, str(error))
            result = ItemResult(failed=str(error)[:8192], code=error.code)
            self._reports.status.gave_up(item.level)
            self._reports.step("failed", work, key=work.key.at(item.level), detail=str(error))
        store = self._bus.plans.store
        stored = await self._bus.persistently(
            lambda: store(WORKERS, self._worker_id, delivery, plan, item, result), stop=self._stop
        )
        if stored is Stored.GONE:
            await self._bus.acknowledge(WORKERS, self._worker_id, delivery)
        detail = f"{item.name}: {stored}"
        self._reports.step("stored", work, key=work.key.at(item.level), detail=detail)

    async def join(self, delivery: Delivery, item: JoinItem) -> None:
        """Decide by the parts that are there, and name those that are not."""
        found = await self._planned(delivery, item.plan)
        if found is None:
            return
        work, plan = found
        served = self._bus.plans.served_keys(item.plan)
        try:
            if await self._result_handler.is_decided(delivery, work, served):
                return
            self._result_handler.refuse_poison(delivery)
            results = await self._bus.plans.results(plan)
            if len(results) < len(plan.items) and await self._early(delivery, plan):
                return
            there = [results[part] for part in plan.items if part in results]
            analyses = [
                each.analysis if each.blob is None else await self._bus.blobs.get(each.blob)
                for each in there
                if not each.failed
            ]
            missing = _gaps(plan, results)
            if not analyses:
                raise _nothing(plan, results, missing)
            decision = await self._executor.join(work, analyses, missing)
        except ContractError as error:
            await self._result_handler.fail(_of_checkpoint(delivery, plan), work, error, served)
            return
        await self._result_handler.commit(delivery, work, decision, served)

    async def _planned(self, delivery: Delivery, key: str) -> tuple[Work, Plan] | None:
        """The checkpoint of a plan, and the plan.

        None if its decision was committed meanwhile: then the entry is acknowledged.

        Raises:
            MissingBlob: if the plan's time to live is over and nothing was decided.
        """
        plan = await self._bus.plans.load(key)
        if plan is None:
            await self._end_late(delivery, key)
            return None
        window = self._settings.window_seconds
        now = await self._bus.clock.now()
        # It was admitted when it was planned: from then on the plan's deadline matters.
        heard = hear(_of_checkpoint(delivery, plan), self._bus.guard)
        work = admit(heard, window=window, now=now, redriven=now)
        if not isinstance(work, Work):
            raise AnalysisFailed(f"plan {key}", "a checkpoint or a request", type(work).__name__)
        if (str(work.key), work.fingerprint) != (plan.key, plan.fingerprint):
            raise IdentityMismatch(f"plan {key}", "the checkpoint that was planned", str(work.key))
        return work, plan

    async def _early(self, delivery: Delivery, plan: Plan) -> bool:
        """Whether a join has come before its parts and before its time; then it comes again when
        that is over."""
        left = (plan.deadline - await self._bus.clock.now()).total_seconds()
        if left <= _TOLERANCE:
            return False
        _log.warning(
            "join came before its parts, waits for the deadline", plan=plan.key, seconds=left
        )
        await self._bus.groups.requeue(WORKERS, self._worker_id, delivery, delay_seconds=left)
        return True

    async def _end_late(self, delivery: Delivery, key: str) -> None:
        if await self._bus.record(IdempotencyKey.parse(key)):
            await self._bus.acknowledge(WORKERS, self._worker_id, delivery)
            _log.info("part of a checkpoint that is decided already", plan=key)
            return
        raise MissingBlob(
            f"plan {key}", "the plan's record", "no such key", hint="publish the checkpoint again"
        )


def _of_checkpoint(delivery: Delivery, plan: Plan) -> Delivery:
    """The join's entry with the fields of the checkpoint that it stands for, for a dead letter."""
    known = {b"envelope": plan.envelope}
    stream, _, entry = plan.origin.partition("/")
    context = {name.encode(): value.encode() for name, value in plan.carrier.items()}
    return replace(delivery, fields=known | context, stands_for=(stream, entry))


def _nothing(
    plan: Plan, results: Mapping[str, ItemResult], missing: Mapping[Level, str]
) -> ContractError:
    """The error where no level has an analysis: corrupt data, if all of them say so."""
    gaps = "; ".join(f"{level}: {reason}" for level, reason in missing.items())
    codes = {results[part].code if part in results else "" for part in plan.items}
    for kind in CORRUPT:
        if kind.code in codes and codes <= {each.code for each in CORRUPT}:
            return kind(f"analysis of {plan.key}", "sound data of at least one level", gaps)
    return AnalysisFailed(f"analysis of {plan.key}", "at least one level", gaps)


def _gaps(plan: Plan, results: Mapping[str, ItemResult]) -> dict[Level, str]:
    """The levels without any analysis, each with the reason; those of single shards are logged."""
    levels = [Level(part.partition(".")[0]) for part in plan.items]
    reasons: dict[Level, list[str]] = {level: [] for level in levels}
    there = set()
    for part, level in zip(plan.items, levels, strict=True):
        reason = results[part].failed if part in results else _LATE
        if reason:
            _log.warning("joined without a part", plan=plan.key, part=part, reason=reason)
            reasons[level].append(reason)
        else:
            there.add(level)
    return {
        level: "; ".join(dict.fromkeys(found))[:8192]
        for level, found in reasons.items()
        if level not in there
    }


_MOST = 4096
SHARD_BYTES = 1 << 30
"""Of statistics: smaller levels are not worth splitting."""


def parts_of(work: Work, settings: Settings) -> list[AnalysisItem]:
    """The parts of ``work``, those of one level beside each other.

    A level whose statistics are larger than ``SHARD_BYTES`` has a part for each
    ``layers_per_worker`` of its groups.
    """
    items = []
    for level in work.document.levels:
        count = 1
        # What a level is ranked by.
        names = ("heads" if level is Level.HEAD else "statistics", "gates")
        blobs = [work.blobs.get(BLOB_FILES[name]) for name in names]
        size = sum(blob.size for blob in blobs if blob is not None)
        if level is not Level.LAYER and size > SHARD_BYTES:
            groups = len(_names(work.document.architecture, level))
            count = min(_MOST, max(1, math.ceil(groups / settings.layers_per_worker)))
        items += [
            AnalysisItem(plan=str(work.key), level=level, shard=shard, shards=count)
            for shard in range(count)
        ]
    return items


def groups_of(architecture: PrunedArchitecture, item: AnalysisItem) -> tuple[str, ...]:
    """The groups that a part looks at, in the architecture's order; empty for the whole level."""
    if item.shards == 1:
        return ()
    names = _names(architecture, item.level)
    start, end = (len(names) * edge // item.shards for edge in (item.shard, item.shard + 1))
    return tuple(names[start:end])


def _names(architecture: PrunedArchitecture, level: Level) -> list[str]:
    return [group.name for group in architecture.groups if group.level is level]
