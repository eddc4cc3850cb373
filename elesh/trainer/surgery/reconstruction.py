"""Weight reconstruction: what reads the kept units is refitted to do without the others.

A consumer that loses input channels R and keeps K sees ``W_R x_R`` vanish. As far as ``x_R`` can be
predicted from ``x_K``, ``x_R ~ B x_K + b``, its weights can make up for it: ``W_K += W_R B`` and
``bias += W_R b``, with B by ridge least squares from the covariance of the consumer's inputs
(the reconstruction of He, Zhang and Sun 2017, "Channel Pruning", section 3, solved for the inputs
instead of the outputs, so that a C x C matrix suffices whatever the kernel).

Promises: float64 throughout; the ridge bounds the condition number of what is solved by
``1 + C / RIDGE``; the predicted inputs are never worse than zeros on the samples that were
measured; what cannot be solved in finite numbers is left as it is. A convolution uses one B for
all taps of its kernel, which leaves out what neighbouring positions could add. The constant b is
only used where it is exact: in linear layers and convolutions with a bias whose padding is not
zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from elesh.program.refit import (
    RIDGE,
    Normalised,
    Predictor,
    normalised_by,
    predict_lost,
    spread,
)
from elesh.trainer.network.calling import replace_first
from elesh.trainer.network.gates import Axis, axis_of
from elesh.trainer.network.layers import channel_axes, named_tensors
from elesh.trainer.network.positions import positions_drawn, positions_to_read
from leyline import IdentityMismatch, InvalidField, PrunedArchitecture, PruningGroup

__all__ = [
    "CovarianceMeter",
    "CovarianceSums",
    "InputCovariance",
    "Moments",
    "merged_covariance",
    "reconstructed",
]


@dataclass(frozen=True)
class InputCovariance:
    """First and second moments of the inputs of consumers, over samples and positions."""

    model_hash: str
    """Of the architecture they were measured on."""
    means: Mapping[Axis, Tensor]
    """By axis [C], float64."""
    squares: Mapping[Axis, Tensor]
    """By axis [C, C], float64: the mean of ``x_i x_j``, not centred."""
    rows: Mapping[Axis, int] = field(default_factory=dict)
    """By axis, samples times positions behind them; 0 or missing: not known."""


def merged_covariance(parts: Sequence[InputCovariance]) -> InputCovariance:
    """The covariance of all rows of ``parts``, which are of one network; each is weighted by its
    rows.

    Raises:
        IdentityMismatch: if they are of different networks.
        InvalidField: if one covers other consumers than the first, or does not know its rows.
    """
    first = parts[0]
    for other in parts[1:]:
        if other.model_hash != first.model_hash:
            raise IdentityMismatch("covariance.model_hash", first.model_hash, other.model_hash)
        if other.rows.keys() != first.rows.keys() or not all(other.rows.values()):
            found = sorted(f"{path}[{dim}]" for path, dim in other.rows)
            raise InvalidField("covariance", "the consumers of the first rank", found)
    rows = {axis: sum(part.rows[axis] for part in parts) for axis in first.rows}

    def mean(of: Callable[[InputCovariance], Mapping[Axis, Tensor]]) -> dict[Axis, Tensor]:
        return {
            axis: torch.stack([of(part)[axis] * part.rows[axis] for part in parts]).sum(0) / count
            for axis, count in rows.items()
        }

    means, squares = mean(lambda part: part.means), mean(lambda part: part.squares)
    return InputCovariance(first.model_hash, means, squares, rows)


Moments = InputCovariance
"""The name of the version before."""


@dataclass
class CovarianceSums:
    """Sums over samples and positions, from which a covariance is made; products in float32 within
    a call, sums in float64 over calls. Of large maps some positions are looked at
    (:mod:`elesh.trainer.network.positions`)."""

    samples: int | None = None
    """How many there will be, where that is known."""
    rows: dict[Axis, int] = field(default_factory=dict)
    first: dict[Axis, Tensor] = field(default_factory=dict)
    second: dict[Axis, Tensor] = field(default_factory=dict)

    def see(self, axis: Axis, x: Tensor) -> None:
        """Take in what enters a consumer in one call."""
        past = self.rows.get(axis, 0)
        last = x.detach().movedim(axis[1], -1)
        if last.ndim > 2:
            last = last.flatten(1, -2)
            positions, channels = last.shape[1:]
            count = positions_to_read(positions, channels, self.samples)
            read = positions_drawn(positions, count, past)
            last = last if read is None else last[:, read.to(last.device)]
        rows = last.reshape(-1, last.shape[-1]).float()
        first, second = rows.sum(0).double().cpu(), (rows.T @ rows).double().cpu()
        self.rows[axis] = past + len(rows)
        self.first[axis] = self.first[axis] + first if past else first
        self.second[axis] = self.second[axis] + second if past else second

    def mean(self, model_hash: str) -> InputCovariance:
        """The covariance of everything seen."""
        return InputCovariance(
            model_hash,
            {axis: first / self.rows[axis] for axis, first in self.first.items()},
            {axis: second / self.rows[axis] for axis, second in self.second.items()},
            dict(self.rows),
        )


@dataclass
class CovarianceMeter:
    """Sums up the covariance of inputs at some axes of a model while entered."""

    model: nn.Module
    axes: Collection[Axis]
    _sums: CovarianceSums = field(default_factory=CovarianceSums)
    _handles: list[RemovableHandle] = field(default_factory=list)

    def __enter__(self) -> CovarianceMeter:
        for axis in self.axes:
            module = self.model.get_submodule(axis[0])
            self._handles.append(
                module.register_forward_pre_hook(self._hook(axis), with_kwargs=True)
            )
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def covariance(self, model_hash: str) -> InputCovariance:
        """Of everything seen.

        Raises:
            InvalidField: if no sample reached a consumer.
        """
        for path, _ in self.axes:
            if not any(path == seen for seen, _ in self._sums.rows):
                raise InvalidField("batches", f"samples that reach {path}", "none")
        return self._sums.mean(model_hash)

    def _hook(self, axis: Axis) -> Any:
        def see(x: Tensor) -> Tensor:
            self._sums.see(axis, x)
            return x

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return replace_first(args, kwargs, see)

        return hook


def consumer_axes(architecture: PrunedArchitecture, groups: Iterable[str]) -> dict[Axis, None]:
    """The axes on which consumers read units of these groups, each once and in order."""
    return {axis_of(site): None for name in groups for site in architecture.group[name].sites}


def reconstructed(
    model: nn.Module,
    architecture: PrunedArchitecture,
    units: Mapping[str, Collection[int]],
    covariance: InputCovariance,
    *,
    skip: Collection[str] = (),
    ridge: float = RIDGE,
) -> dict[str, Tensor]:
    """The weights and biases of the consumers of ``units``, refitted; nothing is changed.

    Args:
        units: that go, by group, in current numbering.
        skip: paths of consumers that keep their weights.

    Returns:
        by path, of the shape and dtype that the tensors have before the cut. What removed
        channels are multiplied by is left as it was.

    Raises:
        IdentityMismatch: if the covariance was measured on another structure.
        InvalidField: if it does not cover a consumer that loses channels.
    """
    if covariance.model_hash != architecture.model_hash:
        raise IdentityMismatch(
            "covariance.model_hash", architecture.model_hash, covariance.model_hash
        )
    lost: dict[Axis, set[int]] = {}
    groups: dict[Axis, list[PruningGroup]] = {}
    for name, chosen in units.items():
        for site in architecture.group[name].sites if chosen else ():
            lost.setdefault(axis_of(site), set()).update(site.all_of(chosen))
            groups.setdefault(axis_of(site), []).append(architecture.group[name])
    tensors, found = named_tensors(model), dict[str, Tensor]()
    for axis, indices in lost.items():
        if axis[0] in skip:
            continue
        if axis not in covariance.squares:
            raise InvalidField("covariance", f"moments of the inputs of {axis[0]}", "none")
        module = model.get_submodule(axis[0])
        if len(channel_axes(module).inputs) != 1:
            continue  # No linear map of these inputs: nothing to refit.
        means, squares = covariance.means[axis], covariance.squares[axis]
        solved = predict_lost(
            means,
            squares,
            indices,
            takes_constant(module),
            ridge,
            covariance.rows.get(axis, 0),
            normalised_by(means, squares, normalisations(model, groups[axis], len(means))),
        )
        refitted = _refitted(module, solved)
        if all(bool(torch.isfinite(value).all()) for value in refitted.values()):
            for attribute, value in refitted.items():
                path = f"{axis[0]}.{attribute}"
                found[path] = value.to(tensors[path])
    return found


def normalisations(model: nn.Module, groups: Iterable[PruningGroup], size: int) -> list[Normalised]:
    """The normalisations over channels of some groups, as far as they are over ``size`` channels
    and their parameters are a gain and an offset."""
    sites = {site.module: site for group in groups for site in group.norms}
    found = []
    for path, site in sites.items():
        module = model.get_submodule(path)
        gain, offset = (getattr(module, name, None) for name in ("weight", "bias"))
        found.append(Normalised.of(site.kind, size, gain, offset))
    return [norm for norm in found if norm is not None]


def takes_constant(module: nn.Module) -> bool:
    """Whether a constant input of this consumer is the same as a larger bias, everywhere."""
    if getattr(module, "bias", None) is None or isinstance(module, _ConvTransposeNd):
        return False
    if isinstance(module, _ConvNd):
        padded = module.padding == "same" or (module.padding != "valid" and any(module.padding))
        return not padded or module.padding_mode != "zeros"
    return True


def _refitted(module: nn.Module, solved: Predictor) -> dict[str, Tensor]:
    """The consumer's weight with the lost inputs spread over the kept ones; its bias likewise."""
    ((attribute, dim),) = channel_axes(module).inputs
    bias = module.bias if solved.constant.any() else None
    assert bias is None or isinstance(bias, Tensor)
    weight, shifted = spread(getattr(module, attribute), bias, dim, solved)
    return {attribute: weight} if shifted is None else {attribute: weight, "bias": shifted}
