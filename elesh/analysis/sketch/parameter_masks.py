"""The Analysis Executor: masks of single parameters from Count-Min sketches (section 4.4, legacy).

Promises: an element whose true importance reaches the marking threshold is never marked, whatever
the sketch's size or load. Proof: a cell of a Count-Min sketch holds the sum of the importance of
every element that falls into it; importance is never negative and every rounding goes up, so each
cell is at least the element's own importance, and so is the least of its cells, the estimate.
An element is marked only if its estimate is below the threshold; then its importance is, too.
Merging adds cells and keeps this true. What a crowded sketch costs is recall, never safety.

Memory: the sketch, one bit an element for the masks, and a few chunks of 2^20 keys at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elesh.analysis.candidates import Doubles, Ints
from leyline import (
    AnalysisReport,
    IdempotencyKey,
    InvalidField,
    ParameterIdentifier,
    ParameterMask,
    PruningMasks,
    ShapeMismatch,
)

from .count_min import CountMinSketch, element_keys, splitmix64

Bits = npt.NDArray[np.uint8]
Samples = Mapping[str, Doubles]
"""Exact importance [k] of the sampled elements of each tensor, by its identifier."""

_CHUNK = 1 << 20
"""Elements at a time; a multiple of eight, so that chunks are whole bytes of a mask."""


@dataclass(frozen=True)
class Marking:
    """What is asked for: AnalysisRequest's figures, or those of the settings."""

    threshold: float = 1e-8
    """Elements whose importance is surely below it are marked."""
    confidence: float = 0.95
    """Masks of less confidence are not made."""


def analyze_parameters(
    key: IdempotencyKey,
    parameters: Sequence[ParameterIdentifier],
    sketch: CountMinSketch,
    samples: Samples,
    marking: Marking,
    *,
    threads: int = 1,
) -> tuple[PruningMasks, AnalysisReport]:
    """Masks of all tensors that hold marked elements, and what was found.

    Args:
        key: of the decision, at level ``parameter``.
        parameters: the tensors whose elements are in the sketch.
        sketch: the importance of every element, merged over ranks.
        samples: exact importance of :func:`sampled_indices`; may be empty or hold some tensors.
            Without any, the confidence is 1 - delta, the sketch's own bound.
        threads: chunks are estimated on so many; the result does not depend on it.

    Raises:
        ShapeMismatch: if a tensor has another number of samples than were to be taken.
        InvalidField: if an estimate is below the exact importance of a sampled element (then the
            sketch is not what it says), or samples name an unknown tensor.
    """
    _check_samples(parameters, sketch, samples)
    with ThreadPoolExecutor(threads) as pool:
        marked = {
            parameter.identifier: _marked(parameter, sketch, marking.threshold, pool)
            for parameter in parameters
        }
    found = sum(count for _, count in marked.values())
    checked, right = _validated(parameters, samples, marked, marking.threshold)
    if samples:
        confidence = _confidence(checked, right, found, marking.confidence)
    else:
        confidence = 1.0 - sketch.bound.delta
    confident = confidence >= marking.confidence
    masks = tuple(
        ParameterMask(parameter=parameter, bits=bits.tobytes(), marked=count, confidence=confidence)
        for parameter in parameters
        for bits, count in [marked[parameter.identifier]]
        if count and confident
    )
    report = AnalysisReport(
        idempotency_key=str(key),
        analysed=sum(map(elements, parameters)),
        marked=found if confident else 0,
        error_bound=sketch.bound.error,
        confidence=confidence,
        expected_recall=expected_recall(sketch, marking.threshold),
        samples=sum(map(len, samples.values())),
        recommendations=tuple(
            _recommendations(parameters, marked, sketch, marking, confidence, checked)
        ),
    )
    return (
        PruningMasks(
            idempotency_key=str(key),
            masks=masks,
            marking_threshold=marking.threshold,
            confidence=confidence,
        ),
        report,
    )


def elements(parameter: ParameterIdentifier) -> int:
    """How many elements a tensor has."""
    return math.prod(parameter.shape)


def allotted(parameters: Sequence[ParameterIdentifier], total: int) -> dict[str, int]:
    """How many elements of each tensor are sampled, by identifier: about ``total`` in proportion
    to size, at least one of each tensor that has any."""
    size = sum(map(elements, parameters))
    return {
        p.identifier: min(elements(p), max(1, round(total * elements(p) / size)))
        for p in parameters
        if elements(p)
    }


def sampled_indices(parameter: ParameterIdentifier, count: int) -> Ints:
    """[count] int64, rising: one flat index out of each of ``count`` equal strata of the tensor.

    A function of the tensor's identity alone, so that every rank and every checkpoint samples the
    same elements and only values need to travel.
    """
    states = np.arange(count, dtype=np.uint64) + np.uint64(int(parameter.identifier, 16))
    fractions = (splitmix64(states) >> np.uint64(11)).astype(np.float64) / 2**53
    borders = np.arange(count + 1, dtype=np.int64) * elements(parameter) // max(1, count)
    widths = borders[1:] - borders[:-1]
    return np.asarray(borders[:-1] + (fractions * widths).astype(np.int64))


def expected_recall(sketch: CountMinSketch, threshold: float) -> float:
    """Share of the elements with no importance that the sketch shows as such, in expectation.

    Such an element is found if in any row its cell, a random one, holds less than ``threshold``:
    1 - prod over rows of (1 - share of such cells).
    """
    return 1.0 - math.prod(1.0 - share for share in sketch.shares_below(threshold))


def _marked(
    parameter: ParameterIdentifier,
    sketch: CountMinSketch,
    threshold: float,
    pool: ThreadPoolExecutor,
) -> tuple[Bits, int]:
    """Packed bits, highest first, 1 = keep, padding 0, and how many elements are marked."""

    def chunk(start: int) -> Bits:
        keys = element_keys(parameter.identifier, np.arange(start, min(size, start + _CHUNK)))
        return np.packbits(sketch.estimate(keys) >= threshold)

    size = elements(parameter)
    parts = list(pool.map(chunk, range(0, size, _CHUNK)))
    bits = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
    return bits, size - int(np.bitwise_count(bits).sum(dtype=np.int64))


def _check_samples(
    parameters: Sequence[ParameterIdentifier], sketch: CountMinSketch, samples: Samples
) -> None:
    known = {p.identifier: p for p in parameters}
    for identifier, exact in samples.items():
        if identifier not in known:
            raise InvalidField(f"samples.{identifier}", "an identifier of parameters", identifier)
        parameter = known[identifier]
        if exact.ndim != 1 or len(exact) > elements(parameter):
            expected = f"[k] with k up to {elements(parameter)}"
            raise ShapeMismatch(f"samples.{identifier}", expected, exact.shape)
        keys = element_keys(identifier, sampled_indices(parameter, len(exact)))
        short = np.flatnonzero(sketch.estimate(keys) < exact)
        if short.size:
            place = int(short[0])
            raise InvalidField(
                f"sketches: element {int(keys[place])} of {parameter.path}",
                f"an estimate of at least its exact importance {float(exact[place]):g}",
                float(sketch.estimate(keys[place : place + 1])[0]),
                hint="the sketch lost something: merged from other data, or damaged",
            )


def _validated(
    parameters: Sequence[ParameterIdentifier],
    samples: Samples,
    marked: Mapping[str, tuple[Bits, int]],
    threshold: float,
) -> tuple[int, int]:
    """Sampled elements that are marked, and how many of them are truly below the threshold."""
    checked = right = 0
    for parameter in parameters:
        exact = samples.get(parameter.identifier)
        if exact is None:
            continue
        places = sampled_indices(parameter, len(exact))
        kept = marked[parameter.identifier][0][places >> 3] >> (7 - (places & 7)) & 1
        checked += int((kept == 0).sum())
        right += int(((kept == 0) & (exact < threshold)).sum())
    return checked, right


def _confidence(checked: int, right: int, marked: int, level: float) -> float:
    """How surely a marked element is below the threshold, from ``checked`` of ``marked`` ones.

    The lower end of the one-sided Clopper-Pearson interval at ``level`` of the share that is right;
    the share itself where every marked element was checked.
    """
    if not right or checked == marked:
        return right / checked if checked else 0.0
    # Loaded here: it costs every start of a compute child a second, and few jobs mark parameters.
    from scipy.special import betaincinv

    return float(betaincinv(right, checked - right + 1, 1 - level))


def _recommendations(
    parameters: Sequence[ParameterIdentifier],
    marked: Mapping[str, tuple[Bits, int]],
    sketch: CountMinSketch,
    marking: Marking,
    confidence: float,
    checked: int,
) -> Iterator[str]:
    """What to do in the next cycle; each with its figures."""
    if confidence < marking.confidence:
        yield (
            f"no masks: confidence {confidence:.4f} from {checked} marked samples is below "
            f"{marking.confidence:g}; take more samples or mark more"
        )
    recall = expected_recall(sketch, marking.threshold)
    if recall < 0.5:
        yield (
            f"the sketch of width {sketch.width} shows only {recall:.1%} of the dead parameters: "
            f"widen it towards the number of live parameters"
        )
    for parameter in parameters:
        if elements(parameter) and marked[parameter.identifier][1] == elements(parameter):
            yield f"{parameter.path} is dead altogether: does it take part in the loss?"
