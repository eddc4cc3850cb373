"""What a cut is refitted with in a run: input covariance, calibration samples, batch statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from elesh.trainer.network.calling import batch_size, map_tensors, packed_in, pictures_in
from elesh.trainer.surgery.after_cut import InputCovariance, batch_norms
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import CutFallback, StructuralPruningDecision

Batches = Sequence[tuple[Any, Any]]


@dataclass(frozen=True)
class RefitData:
    """What a cut is refitted and judged by; see :func:`apply_decision`."""

    reconstruct: InputCovariance | Callable[[], InputCovariance] | None = None
    redistribute: Callable[[], InputCovariance] | None = None
    batches: Batches = ()
    held_out: Batches = ()


@dataclass(frozen=True)
class Refit:
    """What a cut is refitted with."""

    covariance: InputCovariance | None = None
    skip: tuple[str, ...] = ()
    batches: Batches = ()
    """By which batch statistics move along; empty: they stay."""
    samples: Batches = ()
    """By which layers are solved one behind the other; empty: they are not."""
    said: str = ""
    """How this differs from what the decision asks for, in words."""
    fallbacks: tuple[CutFallback, ...] = ()
    """The names of what is left out."""

    @classmethod
    def of(cls, decision: StructuralPruningDecision, surgeon: Surgeon, data: RefitData) -> Refit:
        asked, said = decision.reconstruction, list[str]()
        covariance, batches = data.reconstruct, data.batches
        if data.redistribute is not None and decision.units:
            return cls(data.redistribute(), asked.skip if asked else ())
        if asked is None or not asked.applied or not decision.units:
            return cls()
        if callable(covariance):
            covariance = covariance()
            said.append("input covariance measured anew")
        if covariance is None or covariance.model_hash != surgeon.architecture.model_hash:
            reason = "not reconstructed: no input covariance of this network is at hand"
            return cls(said=reason, fallbacks=("not_reconstructed",))
        without: tuple[CutFallback, ...] = ()
        if asked.batch_statistics and not batches:
            said.append("batch statistics not estimated anew: no calibration batches were given")
            without = ("statistics_not_estimated",)
        estimated = batches if asked.batch_statistics else ()
        # Layers are solved behind normalisations that take the samples' statistics.
        samples = estimated if batch_norms(surgeon.model) else batches
        return cls(covariance, asked.skip, estimated, samples, "; ".join(said), without)


def first_samples(batches: Batches, samples: int) -> Batches:
    """The first batches, until they have so many samples."""
    taken: list[tuple[Any, Any]] = []
    for batch in batches:
        if samples <= 0:
            break
        taken.append(batch)
        samples -= batch_size(batch[0])
    return taken


def spread_samples(batches: Batches, samples: int) -> Batches:
    """So many samples at most, evenly spread over all of them, in as many batches; what cannot be
    divided is left whole."""
    every = -(-sum(batch_size(inputs) for inputs, _ in batches) // samples)

    def some(inputs: Any, labels: Any) -> tuple[Any, Any]:
        size = batch_size(inputs)
        if packed_in(inputs) is not None or pictures_in(inputs):
            return inputs, labels

        def rows(x: Tensor) -> Tensor:
            return x[::every] if x.ndim and len(x) == size else x

        return map_tensors(rows, inputs), map_tensors(rows, labels)

    return [some(*batch) for batch in batches] if every > 1 else batches
