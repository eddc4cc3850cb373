"""Measures whole layers along with a checkpoint: gates of branches, similarity, gradient flow.

The gate of a branch multiplies its contribution: out = stream + gate * branch. Its gradient is the
sum over positions of contribution times gradient there; the stream's gradient before the branch is
that of its tensor, the one after it the contribution's (an addition passes gradients on). Promises:
everything but the projections is a sum over samples; hooks are installed only while entered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import expit
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elesh.trainer.network.calling import tensors_in
from elesh.trainer.surgery.bypass import first_of, with_first
from leyline import InvalidField, LayerBlock, LayerStatistics, ShapeMismatch

Reading = Literal["projections", "true", "sampled"]
"""Which backward pass is under way: along random directions, or of the loss with which labels."""
Sums = npt.NDArray[np.float64]
_LEAST = 1e-16
"""Of a product of two norms: the cosine with nothing is 0."""


@dataclass
class _Tally:
    """The sums of one block."""

    block: LayerBlock
    projections: list[Sums] = field(default_factory=list)
    first: float = 0.0
    size: float = 0.0
    second: float = 0.0
    before: float = 0.0
    """Squared norm of the true-label loss's gradient at the stream before the branch."""
    after: float = 0.0
    cosines: float = 0.0
    positions: int = 0
    moves: Sums = field(default_factory=lambda: np.zeros(0))
    """[N] of the present batch: the gate gradients of its margins."""
    loss_increases: list[Sums] = field(default_factory=list)
    """Of the samples' losses, as predicted for the removal of the block alone."""

    def read(self, reading: Reading, gates: Sums, margins: Sums | None) -> None:
        """Take in the gate gradients of one batch, ``[N]``; with ``margins`` they are of these
        (see :meth:`GroupTally.add_logit_gaps`), else of the loss."""
        odds = None if margins is None else expit(margins)
        if reading == "projections":
            self.projections.append(gates)
        elif reading == "true":
            slopes = gates if odds is None else odds * gates
            self.first += float(slopes.sum())
            self.size += float(np.abs(slopes).sum())
            if odds is not None:
                self.second += float((odds * (1 - odds) * gates**2).sum())
                self.moves = gates
        else:
            squares = np.square(gates)
            self.second += float((squares if odds is None else odds * squares).sum())
            if margins is not None:
                after = np.logaddexp(0, margins - self.moves + squares / 2)
                self.loss_increases.append(after - np.logaddexp(0, margins))

    def statistics(self, samples: int, derived: int) -> LayerStatistics:
        """The block's statistics over all samples; ``derived`` of them have the loss's derivatives.

        Raises:
            InvalidField: if the batches never reached the branch.
        """
        if not self.positions:
            where = f"blocks.{self.block.name}.branch"
            raise InvalidField(where, "a module that the batches reach", self.block.branch)
        low, high = sorted((self.before, self.after))
        projections = np.concatenate(self.projections) if self.projections else np.zeros(samples)
        return LayerStatistics(
            layer_name=self.block.name,
            taylor=_single(self.size / derived),
            gradient_flow=_single((low / high) ** 0.5 if high > 0 else 0.0),
            similarity=_single(float(np.clip(self.cosines / self.positions, -1, 1))),
            projections=projections.astype(np.float32),
            first_order=_single(self.first / derived),
            second_order=_single(self.second / derived),
            **self._rise(derived),
        )

    def _rise(self, derived: int) -> dict[str, npt.NDArray[np.float32]]:
        """The predicted rise and its standard error, where samples have margins."""
        loss_increases = np.concatenate([np.zeros(0), *self.loss_increases])
        if len(loss_increases) != derived:
            return {}
        error = float(loss_increases.std()) / math.sqrt(derived)
        return {
            "removal_rise": _single(float(loss_increases.mean())),
            "removal_error": _single(error),
        }


class BranchMeter:
    """Reads the branches of blocks while entered; enter it before other hooks are installed.

    Args:
        model: the network.
        blocks: what to measure.
        anchor: a scalar zero that requires a gradient, and that every backward pass asks for.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[LayerBlock], anchor: Tensor) -> None:
        self._model, self._anchor = model, anchor
        self._tallies = [_Tally(block) for block in blocks if block.prunable and not block.removed]
        self._handles: list[RemovableHandle] = []
        self._streams: dict[str, Tensor] = {}
        self._trained: list[nn.Parameter] = []
        self._batch = self._derived = 0
        self._reading: Reading = "projections"
        self._logit_gaps: Tensor | None = None

    def __enter__(self) -> BranchMeter:
        if self._tallies:
            # Only what leads back to the anchor is run through backwards: let that be everything.
            self._trained = [p for p in self._model.parameters() if p.requires_grad]
            for parameter in self._trained:
                parameter.requires_grad_(False)
            for module in self._model.modules():
                self._handles.append(module.register_forward_hook(self._anchored))
        for tally in self._tallies:
            entry = self._model.get_submodule(tally.block.entry)
            branch = self._model.get_submodule(tally.block.branch)
            self._handles += [
                entry.register_forward_pre_hook(self._enter(tally), with_kwargs=True),
                branch.register_forward_hook(self._leave(tally)),
            ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._streams.clear()
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def expect(self, batch: int) -> None:
        """Say how many samples the next forward pass has."""
        self._batch = batch

    def read(self, reading: Reading, margins: Tensor | None = None) -> None:
        """Say what the next backward pass is of.

        Args:
            reading: of which scalar.
            margins: ``[N]``, where the pass is of them and not of the loss ``softplus(margin)``.
        """
        self._reading, self._logit_gaps = reading, margins
        if reading == "true":
            self._derived += self._batch

    def statistics(self, samples: int) -> dict[str, LayerStatistics]:
        """The statistics by block."""
        derived = max(self._derived, 1)
        return {tally.block.name: tally.statistics(samples, derived) for tally in self._tallies}

    def _anchored(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Give activations a history from the first layer on."""
        first = first_of(output)
        if isinstance(first, Tensor) and first.is_floating_point() and not first.requires_grad:
            return with_first(output, first + self._anchor.to(first.device, first.dtype))
        return output

    def _enter(self, tally: _Tally) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            stream = tensors_in([*args, *kwargs.values()])[0]
            self._streams[tally.block.name] = stream
            _on_gradient(stream, lambda gradient: self._before(tally, gradient))

        return enter

    def _before(self, tally: _Tally, gradient: Tensor) -> None:
        if self._reading == "true":
            tally.before += self._output_energy(gradient)

    def _output_energy(self, gradient: Tensor) -> float:
        """Squared norm of the loss's gradient, where that of the margins comes in."""
        rows = gradient.float().reshape(self._batch, -1).square().sum(1, dtype=torch.float64)
        slopes = 1.0 if self._logit_gaps is None else self._logit_gaps.sigmoid().to(rows).square()
        return float((rows * slopes).sum())

    def _leave(self, tally: _Tally) -> Callable[..., Any]:
        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            kept = first_of(output)
            # Code that adds in place shall not change what is kept.
            passed = kept.clone()
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self._compare(tally, self._streams.pop(tally.block.name, None), kept)
            kept = kept.detach()
            _on_gradient(passed, lambda gradient: self._after(tally, kept, gradient))
            return with_first(output, passed)

        return leave

    def _compare(self, tally: _Tally, stream: Tensor | None, contribution: Tensor) -> None:
        """Cosines of the stream before and after, position by position."""
        if stream is None or stream.shape != contribution.shape:
            raise ShapeMismatch(
                f"blocks.{tally.block.name}.entry",
                f"the stream in the shape of its branch {tuple(contribution.shape)}",
                "not called before the branch" if stream is None else tuple(stream.shape),
            )
        cosines = _cosines(stream.float(), contribution.float(), tally.block.dim % stream.ndim)
        tally.cosines += float(cosines.sum(dtype=torch.float64))
        tally.positions += cosines.numel()

    def _after(self, tally: _Tally, contribution: Tensor, gradient: Tensor) -> None:
        gradient = gradient.float()
        gates = (contribution.float() * gradient).reshape(self._batch, -1).sum(1).cpu()
        margins = None if self._logit_gaps is None else self._logit_gaps.double().cpu().numpy()
        tally.read(self._reading, gates.double().numpy(), margins)
        if self._reading == "true":
            tally.after += self._output_energy(gradient)


def _cosines(before: Tensor, contribution: Tensor, dim: int) -> Tensor:
    """Of ``before`` and what it is after the contribution, along a dimension.

    ``torch.cosine_similarity`` takes ten times as long along channels that do not lie last.
    """
    after = before + contribution
    squares = before.square().sum(dim) * after.square().sum(dim)
    return (before * after).sum(dim) / squares.sqrt().clamp_min(_LEAST)


def _on_gradient(tensor: Tensor, read: Callable[[Tensor], None]) -> None:
    """Have the whole gradient of a tensor read, once in each backward pass."""
    if tensor.requires_grad:
        tensor.register_hook(read)  # type: ignore[no-untyped-call]


def _single(value: float) -> npt.NDArray[np.float32]:
    return np.array([value], np.float32)
