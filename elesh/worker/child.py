"""The compute child (``python -m elesh.worker.child``): reads jobs, analyses, writes decisions.

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
from pathlib import Path
from typing import BinaryIO

from elesh._process import die_with_parent
from elesh.analysis import analyze_level, join
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    CheckpointDocument,
    ContractError,
    NetworkExport,
    decode,
    encode,
)
from leyline.bundle import map_file

from .protocol import DOCUMENT, PREFIX, Failed, Job, Reply, pack_frame, unpack_body


def main() -> None:
    """Serve jobs from standard input until it ends."""
    die_with_parent()
    # Ctrl-C reaches the whole terminal group: the supervisor decides what becomes of a job.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not tear the frames
    sink.write(pack_frame(Reply()))  # ready: everything is imported
    sink.flush()
    while (job := _next_job(source)) is not None:
        sink.write(pack_frame(_answer(job)))
        sink.flush()


def _next_job(source: BinaryIO) -> Job | None:
    prefix = source.read(PREFIX.size)
    if len(prefix) < PREFIX.size:
        return None
    job: Job = unpack_body(Job, source.read(*PREFIX.unpack(prefix)))
    return job


def _answer(job: Job) -> Reply:
    begun = time.perf_counter()
    decision, failed = b"", None
    try:
        decision = _decide(job)
    except ContractError as error:
        failed = Failed(error.code, error.field, error.expected, error.found, contract=True)
    except Exception as error:
        traceback.print_exc()
        failed = Failed(
            "analysis_failed",
            f"analysis of {job.key}",
            "a decision",
            f"{type(error).__name__}: {error}",
            contract=False,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Reply(decision, failed, time.perf_counter() - begun, peak)


def _decide(job: Job) -> bytes:
    """All levels of the job and their join."""
    bundle, settings = _bundle(Path(job.folder)), Settings.model_validate_json(job.settings)
    analyses = [
        analyze_level(
            bundle,
            settings,
            level,
            key=job.idempotency_key.at(level),
            threads=job.threads,
            scorer=job.scorer or None,
            fallbacks=job.taken_fallbacks,
        )
        for level in job.asked_levels
    ]
    return encode(join(bundle, analyses, settings, breakers=job.breaker_of))


def _bundle(folder: Path) -> CheckpointBundle:
    """The checkpoint of the spool folder; the supervisor has verified sizes and digests."""
    document = decode(CheckpointDocument, (folder / DOCUMENT).read_bytes(), field="checkpoint")
    optional = [folder / f"{name}.safetensors" for name in ("gates", "layers", "heads")]
    return CheckpointBundle.from_blobs(
        document,
        map_file(folder / "statistics.safetensors"),
        *(map_file(file) if file.exists() else None for file in optional),
        network=NetworkExport.load(folder),
    )


if __name__ == "__main__":
    main()
