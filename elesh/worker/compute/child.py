"""``python -m elesh.worker.compute.child``: reads jobs, analyses, writes decisions.

It touches neither the bus nor the network, takes its checkpoints from the spool folder, and may be
killed at any moment: nothing that matters lives only here.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from elesh._process import die_with_parent
from elesh.analysis import JoinContext, LevelDraft, draft_level, join, joined
from elesh.analysis.importance.tracker import measurements_of
from elesh.analysis.spans import observed, span
from elesh.program import preload, verifier
from elesh.safety import BreakerStatus
from elesh.settings import Settings
from elesh.worker.spool import SHORTAGE_CODE, shortage_of
from leyline import (
    AnalysedPart,
    CheckpointBundle,
    CheckpointDocument,
    ContractError,
    IdempotencyKey,
    Level,
    LevelAnalysis,
    LossFactor,
    NetworkExport,
    RolledBackCut,
    StructuralPruningDecision,
    decode,
    encode,
)
from leyline.network.bundle import map_file

from .parameter_masks import marked
from .protocol import (
    ANALYSES,
    DOCUMENT,
    MEASURED,
    MEMORY_CODE,
    PREFIX,
    PRELOAD,
    REPLAYED,
    Failed,
    Job,
    Kind,
    Reply,
    Stopwatch,
    heartbeat_into,
    limit_data,
    pack_frame,
    unpack_body,
)

_NICENESS = 5
"""Where a trainer is on the same machine, its threads get about three times as much of a core."""


def main() -> None:
    """Serve jobs from standard input until it ends.

    Arguments: memory limit, heartbeat file, and ``preload`` to load torch before the first job.
    """
    die_with_parent()
    os.nice(_NICENESS)
    limit_data(int(sys.argv[1]))
    heartbeat_into(Path(sys.argv[2]))
    # Ctrl-C reaches the whole terminal group: the supervisor decides what becomes of a job.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not tear the frames
    sink.write(pack_frame(Reply()))  # ready: everything is imported
    sink.flush()
    if sys.argv[3:] == [PRELOAD]:
        _load_torch()
    while len(prefix := source.read(PREFIX.size)) == PREFIX.size:
        job: Job = unpack_body(Job, source.read(*PREFIX.unpack(prefix)))
        sink.write(pack_frame(_answer(job)))
        sink.flush()


def _load_torch() -> None:
    try:
        preload()
    except Exception:  # The first job that measures meets it again, and its answer says so.
        traceback.print_exc()


def _answer(job: Job) -> Reply:
    begun, watch = time.perf_counter(), Stopwatch()
    result, failed = b"", None
    try:
        with observed(watch.span):
            result = _KINDS[job.kind](job)
    except ContractError as error:
        failed = Failed(error.code, error.field, error.expected, error.found, contract=True)
    except MemoryError as error:
        reason = str(error) or "MemoryError"
        failed = Failed(MEMORY_CODE, f"analysis of {job.key}", "a result", reason, contract=False)
    except Exception as error:
        traceback.print_exc()
        lacking = shortage_of(error)
        failed = Failed(
            SHORTAGE_CODE if lacking else "analysis_failed",
            f"analysis of {job.key}",
            "a decision",
            lacking or f"{type(error).__name__}: {error}",
            contract=False,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Reply(result, failed, time.perf_counter() - begun, peak, tuple(watch.spans))


def _decide(job: Job) -> bytes:
    """All levels of the job and their join."""
    bundle, settings = _input(job)
    levels = list[LevelDraft]()
    for level in job.levels:
        with span(f"analyse {level}"):
            levels.append(_analysis(job, bundle, settings, level))
    return encode(joined(bundle, levels, settings, _context(job, bundle, settings)))


def _level(job: Job) -> bytes:
    """The analysis of the job's one level."""
    bundle, settings = _input(job)
    (level,) = job.levels
    return encode(_analysis(job, bundle, settings, level).frozen())


def _join(job: Job) -> bytes:
    """The decision by the analyses that others made."""
    analyses = [
        decode(LevelAnalysis, path.read_bytes(), field=f"analysis {path.stem}")
        for path in sorted((Path(job.folder) / ANALYSES).iterdir())
    ]
    return encode(_of_parts(job, analyses))


def _again(job: Job) -> bytes:
    """A recorded decision made again: its parts are analysed here, one after the other, with the
    fallbacks that were taken then."""
    analyses = []
    for data in job.parts:
        part = decode(AnalysedPart, data, field="part")
        taken = tuple((each.rung, each.reason) for each in part.fallbacks)
        own = replace(job, levels=(part.level,), shard=part.groups, fallbacks=taken)
        narrow, settings = _input(replace(own, kind="level"))
        analyses.append(_analysis(own, narrow, settings, part.level).frozen())
    return encode(_of_parts(job, analyses))


def _of_parts(job: Job, analyses: list[LevelAnalysis]) -> StructuralPruningDecision:
    """The decision by these analyses; it lists them where its levels alone do not show them."""
    bundle, settings = _input(job)
    context = replace(_context(job, bundle, settings), fallbacks=job.taken_fallbacks)
    parts = tuple(
        AnalysedPart(
            level=analysis.level,
            groups=analysis.shard,
            fallbacks=tuple(f for f in analysis.decision.fallbacks if f.rung in REPLAYED),
        )
        for analysis in sorted(analyses, key=lambda a: (a.level, a.shard))
    )
    if job.fallbacks or any(part.groups or part.fallbacks for part in parts):
        context = replace(context, parts=parts)
    return join(bundle, analyses, settings, context)


_KINDS: dict[Kind, Callable[[Job], bytes]] = {
    "decide": _decide,
    "level": _level,
    "join": _join,
    "again": _again,
    "parameters": marked,
}


def _analysis(job: Job, bundle: CheckpointBundle, settings: Settings, level: Level) -> LevelDraft:
    if level is Level.CHANNEL:
        measured = measurements_of(bundle, settings.importance_history_epochs)
        (Path(job.folder) / MEASURED).write_bytes(measured)
    return draft_level(
        bundle,
        settings,
        level,
        key=IdempotencyKey.parse(job.key).at(level),
        threads=job.threads,
        scorer=job.scope.scorer or None,
        fallbacks=job.taken_fallbacks,
        shard=job.shard or None,
    )


def _context(job: Job, bundle: CheckpointBundle, settings: Settings) -> JoinContext:
    """What the join needs besides the checkpoint and its analyses."""
    kind = StructuralPruningDecision
    recorded = decode(kind, job.recorded, field="recorded") if job.recorded else None
    # After a fallback there is no time or memory for measuring; gates are stricter without it.
    measures = not job.scope.scorer
    factor = job.loss_factor
    return JoinContext(
        breakers={
            level: BreakerStatus(*status)  # type: ignore[arg-type]
            for level, status in zip(job.levels, job.breakers, strict=True)
        },
        missing=tuple((Level(level), reason) for level, reason in job.missing),
        verify=verifier(bundle, settings, recorded, job.unmeasured) if measures else None,
        rolled_back=[decode(RolledBackCut, cut, field="rolled back") for cut in job.taken_back],
        loss_factor=decode(LossFactor, factor, field="loss factor") if factor else None,
    )


@span("read")
def _input(job: Job) -> tuple[CheckpointBundle, Settings]:
    """The checkpoint of the spool folder, as far as the job's scope goes, and the settings.

    The supervisor has verified sizes and digests.
    """
    folder, settings = Path(job.folder), _settings(job.settings)
    scope = job.scope
    document = decode(CheckpointDocument, (folder / DOCUMENT).read_bytes(), field="checkpoint")
    if scope.conservative:
        limit = settings.structured_pruning.safety_schedule.conservative_limit
        document = scope.narrowed(document, limit)
    names = () if scope.vectors_only else ("gates", "layers", "heads")
    optional = [folder / f"{name}.safetensors" for name in names]
    bundle = CheckpointBundle.from_blobs(
        document,
        map_file(folder / "statistics.safetensors"),
        *(map_file(file) if file.exists() else None for file in optional),
        network=None if scope.vectors_only or job.kind == "level" else NetworkExport.load(folder),
    )
    return bundle, settings


@lru_cache(maxsize=2)
def _settings(text: str) -> Settings:
    """A worker's settings, which come with each of its jobs."""
    return Settings.model_validate_json(text)


if __name__ == "__main__":
    main()
