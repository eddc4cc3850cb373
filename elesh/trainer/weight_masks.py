"""The trainer's part of parameter masks (section 4.4): keeps importance in a sketch, applies masks.

Promises: a pass leaves the network as it was, ``grad`` included; what the sketch says of an
element is never below its latest importance, so that masks made from it are safe; ranks of a
data-parallel run that give the same ``seed`` can be merged; a mask is put only on the tensor that
it was made for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from elesh.analysis.sketch.count_min import CountMinSketch, element_keys
from elesh.analysis.sketch.parameter_masks import allotted, sampled_indices
from elesh.bus import Bus
from elesh.settings import Settings
from elesh.trainer.calibration.losses import Loss, cross_entropy, total
from elesh.trainer.network.calling import Inputs, batch_size, call, device_of, map_tensors
from elesh.trainer.network.state import preserve_state
from leyline import (
    AnalysisRequest,
    IdentityMismatch,
    ImportanceData,
    InvalidField,
    NotFinite,
    ParameterIdentifier,
    PruningMasks,
    ShapeMismatch,
    encode,
    stable_hash,
)
from leyline.arrays import pack_arrays
from leyline.streams import REQUESTS


def identifiers(model: nn.Module) -> tuple[ParameterIdentifier, ...]:
    """The identities of all trained parameters, in ``named_parameters`` order."""
    return tuple(
        ParameterIdentifier(
            path=path, shape=tuple(p.shape), dtype=str(p.dtype).removeprefix("torch.")
        )
        for path, p in model.named_parameters()
        if p.requires_grad
    )


@dataclass(frozen=True)
class ParameterImportance:
    """What a rank exports: the content of an ImportanceData and of its two blobs."""

    parameters: tuple[ParameterIdentifier, ...]
    sketch: CountMinSketch
    samples: Mapping[str, npt.NDArray[np.float32]]

    def sketches_blob(self) -> bytes:
        """Safetensors of the sketch."""
        return self.sketch.to_bytes()

    def samples_blob(self) -> bytes:
        """Safetensors of the exact samples, by identifier."""
        return pack_arrays(dict(self.samples))


class ParameterTracker:
    """Discounted importance of every single parameter: S <- momentum * S + mean |w * dL/dw|.

    The first-order Taylor term of each weight (Molchanov et al. 2017, for single weights), a mean
    over batches of the batch's own; without the usual (1 - momentum), so that S is at least the
    latest importance and an element below the threshold is so now, whatever it was before.

    Args:
        model: the network; its parameters may change shape (then the history starts anew).
        loss: as for :class:`elesh.trainer.Recorder`; cross-entropy by default.
        settings: the sketch has ``sketch_depth`` rows of ``sketch_width`` cells, or of a hundredth
            of the parameters if that is more; ``statistical_samples`` elements are kept exactly
            beside it, to check masks with.
        momentum: of the discount, 0 to 1; 0 forgets earlier checkpoints.
        seed: of the sketch's hashes; the same on every rank.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss | None = None,
        settings: Settings | None = None,
        momentum: float = 0.99,
        seed: int = 0,
    ) -> None:
        if not 0 <= momentum < 1:
            raise InvalidField("momentum", "at least 0 and below 1", momentum)
        self._model, self._loss = model, loss or cross_entropy
        self._settings, self._momentum, self._seed = settings or Settings(), momentum, seed
        self._start(identifiers(model))

    def _start(self, parameters: tuple[ParameterIdentifier, ...]) -> None:
        self._parameters = parameters
        size = sum(int(np.prod(p.shape, dtype=np.int64)) for p in parameters)
        width, depth = self._settings.sketch_width, self._settings.sketch_depth
        self._sketch = CountMinSketch.sized(size, width, depth, seed=self._seed)
        counts = allotted(parameters, self._settings.statistical_samples)
        self._places = {
            p.identifier: sampled_indices(p, counts.get(p.identifier, 0)) for p in parameters
        }
        self._exact = {name: np.zeros(len(places)) for name, places in self._places.items()}

    def observe(self, batches: Iterable[tuple[Inputs, Any]]) -> None:
        """One pass over calibration batches: one forward and one backward pass each.

        Raises:
            NotFinite: naming the parameter whose importance is not finite; nothing has changed.
            InvalidField: if there is no batch.
        """
        now = identifiers(self._model)
        if now != self._parameters:
            self._start(now)
        means = self._importance(batches)
        if self._sketch.total:
            self._decay()
        for parameter in self._parameters:
            amounts = means[parameter.path].ravel()
            keys = element_keys(parameter.identifier, np.arange(len(amounts)))
            self._sketch.add(keys, amounts)
            self._exact[parameter.identifier] += amounts[self._places[parameter.identifier]]

    def export(self) -> ParameterImportance:
        """What is known now; the sketch is a copy."""
        return ParameterImportance(
            self._parameters,
            CountMinSketch.from_bytes(self._sketch.to_bytes()),
            # Rounded down: what is called exact must not exceed what the sketch holds.
            {name: _below(values) for name, values in self._exact.items() if len(values)},
        )

    def _decay(self) -> None:
        if self._momentum == 0:
            self._start(self._parameters)
            return
        self._sketch.decay(self._momentum)
        for values in self._exact.values():
            values *= self._momentum

    def _importance(
        self, batches: Iterable[tuple[Inputs, Any]]
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Mean over batches of |w * dL/dw|, by path."""
        trained = {path: p for path, p in self._model.named_parameters() if p.requires_grad}
        sums = {path: torch.zeros_like(p, dtype=torch.float32) for path, p in trained.items()}
        device, seen = device_of(self._model), 0
        with preserve_state(self._model, self._seed):
            for inputs, labels in batches:
                seen += 1
                for path, amount in self._of_batch(trained, inputs, labels, device):
                    sums[path] += amount
        if not seen:
            raise InvalidField("batches", "at least one batch", 0)
        means = {path: value.double().cpu().numpy() / seen for path, value in sums.items()}
        for path, mean in means.items():
            if not np.isfinite(mean).all():
                raise NotFinite(f"importance of {path}", "finite numbers", "NaN or infinity")
        return means

    def _of_batch(
        self, trained: Mapping[str, Tensor], inputs: Inputs, labels: Any, device: torch.device
    ) -> Iterable[tuple[str, Tensor]]:
        move: Callable[[Tensor], Tensor] = lambda tensor: tensor.to(device)  # noqa: E731
        output = call(self._model, map_tensors(move, inputs))
        samples = batch_size(inputs)
        loss = total(self._loss(output, map_tensors(move, labels)), samples) / samples
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for (path, weight), gradient in zip(trained.items(), gradients, strict=True):
            if gradient is not None:
                yield path, (weight.detach() * gradient).abs().float()


async def ask_for_masks(
    bus: Bus,
    ranks: Sequence[ParameterImportance],
    *,
    request_id: str,
    epoch: int,
    model_hash: str,
    run_id: str = "",
    settings: Settings | None = None,
) -> AnalysisRequest:
    """Put every rank's importance and publish the request for masks; returns it.

    Thresholds are those of the settings (``marking_threshold``, ``confidence_threshold``).

    Raises:
        InvalidField: if there is no rank.
    """
    if not ranks:
        raise InvalidField("ranks", "the importance of at least one rank", 0)
    settings = settings or Settings()
    first, *others = [
        await bus.blobs.put(encode(await _put(bus, rank, epoch, model_hash)), "msgpack")
        for rank in ranks
    ]
    request = AnalysisRequest(
        request_id=request_id,
        epoch=epoch,
        model_hash=model_hash,
        run_id=run_id,
        importance=first,
        ranks=tuple(others),
        marking_threshold=settings.marking_threshold,
        confidence_threshold=settings.confidence_threshold,
        statistical_samples=settings.statistical_samples,
    )
    event_id = f"masks-{stable_hash(run_id, epoch, model_hash, request_id)}"
    await bus.publish(
        REQUESTS, request, source="emrakul", run_id=run_id, epoch=epoch, event_id=event_id
    )
    return request


async def _put(bus: Bus, rank: ParameterImportance, epoch: int, model_hash: str) -> ImportanceData:
    return ImportanceData(
        epoch=epoch,
        model_hash=model_hash,
        parameters=rank.parameters,
        sketch_width=rank.sketch.width,
        sketch_depth=rank.sketch.depth,
        sketches=await bus.blobs.put(rank.sketches_blob(), architecture=model_hash),
        samples=await bus.blobs.put(rank.samples_blob(), architecture=model_hash)
        if rank.samples
        else None,
    )


def apply_masks(model: nn.Module, masks: PruningMasks, packed: bytes = b"") -> int:
    """Set every marked parameter to zero, in place; how many there were.

    Arguments and errors are those of :func:`kept_elements`.
    """
    tensors, marked = dict(model.named_parameters()), 0
    with torch.no_grad():
        for path, keep in kept_elements(model, masks, packed).items():
            tensors[path].mul_(keep.to(tensors[path].device))
            marked += int((~keep).sum())
    return marked


def kept_elements(model: nn.Module, masks: PruningMasks, packed: bytes = b"") -> dict[str, Tensor]:
    """By path of a masked parameter, a bool tensor of its shape: which elements stay.

    Args:
        packed: the content of ``masks.packed`` where the masks travel in a blob.

    Raises:
        IdentityMismatch: if a mask speaks of a tensor that the model does not have in that shape
            and dtype.
        ShapeMismatch: if ``packed`` has not the bytes of all masks.
    """
    known = {p.identifier: p.path for p in identifiers(model)}
    size = sum(mask.size for mask in masks.masks)
    if masks.packed is not None and len(packed) != size:
        raise ShapeMismatch("packed", f"{size} bytes", f"{len(packed)} bytes")
    kept: dict[str, Tensor] = {}
    start = 0
    for mask in masks.masks:
        path = known.get(mask.parameter.identifier)
        if path is None:
            found = f"no such tensor: {mask.parameter.path} {mask.parameter.shape}"
            raise IdentityMismatch("masks.parameter", "a parameter of the model", found)
        bits = packed[start : start + mask.size] if masks.packed is not None else mask.bits
        start += mask.size
        shape = mask.parameter.shape
        keep = np.unpackbits(np.frombuffer(bits, np.uint8), count=math.prod(shape)).astype(bool)
        kept[path] = torch.from_numpy(keep).view(shape)
    return kept


def _below(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    single = values.astype(np.float32)
    over = single > values
    return np.where(over, np.nextafter(single, np.float32(0)), single).astype(np.float32)
