"""Parameter masks in the compute child: merge the ranks of the spool folder and mark.

The supervisor has verified sizes and digests; what the blobs say is checked here.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgpack
import numpy as np

from elesh.analysis import CountMinSketch
from elesh.analysis.candidates import Doubles
from elesh.analysis.sketch.parameter_masks import Marking, analyze_parameters
from leyline import (
    AnalysisRequest,
    BlobRef,
    IdempotencyKey,
    IdentityMismatch,
    ImportanceData,
    ParameterIdentifier,
    PruningMasks,
    ShapeMismatch,
    decode,
    encode,
)
from leyline.arrays import require_finite, unpack_arrays
from leyline.network.bundle import map_file

from .protocol import MASKS, REQUEST, Job, rank_files

_INLINE = 4 << 20
"""Bytes of masks that still go into a message."""


def marked(job: Job) -> bytes:
    """The encoded PruningMasks and AnalysisReport of a job, as a msgpack pair.

    Raises:
        ContractError: if ranks do not belong together or a blob is not what it should be.
    """
    folder = Path(job.folder)
    request = decode(AnalysisRequest, (folder / REQUEST).read_bytes(), field="request")
    parameters, sketch, samples = _merged(folder, 1 + len(request.ranks))
    asked = Marking(request.marking_threshold, request.confidence_threshold)
    masks, report = analyze_parameters(
        IdempotencyKey.parse(job.key), parameters, sketch, samples, asked, threads=job.threads
    )
    return bytes(msgpack.packb([encode(_packed(masks, folder)), encode(report)]))


def _merged(
    folder: Path, ranks: int
) -> tuple[tuple[ParameterIdentifier, ...], CountMinSketch, dict[str, Doubles]]:
    """What all ranks measured together; samples only where every rank has them."""
    known: tuple[ParameterIdentifier, ...] = ()
    whole: CountMinSketch | None = None
    samples: list[dict[str, Doubles]] = []
    for number in range(ranks):
        files = rank_files(folder, number)
        said = decode(ImportanceData, files.importance.read_bytes(), field="importance")
        if whole is not None and said.parameters != known:
            raise IdentityMismatch(
                f"importance of rank {number}", "the parameters of rank 0", "others"
            )
        known = said.parameters
        sketch = _sketch(files.sketches, said, number)
        if whole is None:
            whole = sketch
        else:
            whole.merge(sketch)
        if files.samples.exists():
            samples.append(_samples(files.samples, number))
    assert whole is not None
    return known, whole, _summed(samples) if len(samples) == ranks else {}


def _sketch(path: Path, said: ImportanceData, number: int) -> CountMinSketch:
    sketch = CountMinSketch.from_bytes(map_file(path), field=f"sketches of rank {number}")
    if (sketch.depth, sketch.width) != (said.sketch_depth, said.sketch_width):
        raise ShapeMismatch(
            f"sketches of rank {number}",
            f"{said.sketch_depth} x {said.sketch_width} cells",
            f"{sketch.depth} x {sketch.width}",
        )
    return sketch


def _samples(path: Path, number: int) -> dict[str, Doubles]:
    arrays, _ = unpack_arrays(map_file(path), field=f"samples of rank {number}")
    for name, array in arrays.items():
        require_finite(f"samples of rank {number}.{name}", array)
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def _summed(samples: list[dict[str, Doubles]]) -> dict[str, Doubles]:
    """Exact importance summed over ranks."""
    first, *others = samples
    for number, other in enumerate(others, 1):
        shapes = {name: array.shape for name, array in other.items()}
        if shapes != {name: array.shape for name, array in first.items()}:
            raise ShapeMismatch(f"samples of rank {number}", "the samples of rank 0", "others")
    return {name: sum((o[name] for o in others), first[name]) for name in first}


def _packed(masks: PruningMasks, folder: Path) -> PruningMasks:
    """The masks as they are, or with their bits in a file where they are too many."""
    bits = b"".join(mask.bits for mask in masks.masks)
    if len(bits) <= _INLINE:
        return masks
    (folder / MASKS).write_bytes(bits)
    digest = hashlib.sha256(bits).hexdigest()
    return PruningMasks(
        idempotency_key=masks.idempotency_key,
        masks=tuple(mask.model_copy(update={"bits": b""}) for mask in masks.masks),
        marking_threshold=masks.marking_threshold,
        confidence=masks.confidence,
        # The supervisor puts the file and names its real place.
        packed=BlobRef(uri=f"file:{MASKS}", size=len(bits), sha256=digest, codec="raw"),
    )
