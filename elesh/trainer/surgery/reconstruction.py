"""Redistribution: what a cut takes from a consumer is handed to the channels that stay.

A consumer that loses input channels R and keeps K sees ``W_R x_R`` vanish. As far as ``x_R`` can be
predicted from ``x_K``, ``x_R ~ B x_K + b``, its weights can make up for it: ``W_K += W_R B`` and
``bias += W_R b``, with B by ridge least squares from the second moments of the consumer's inputs
(the reconstruction of He, Zhang and Sun 2017, "Channel Pruning", section 3, solved for the inputs
instead of the outputs, so that a C x C matrix suffices whatever the kernel).

Promises: float64 throughout; the predicted inputs are never worse than zeros on the samples that
were measured. A convolution uses one B for all taps of its kernel, which leaves out what
neighbouring positions could add. The constant b is only used where it is exact: in linear layers
and convolutions with a bias whose padding is not zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from elesh.trainer.network.calling import replace_first
from elesh.trainer.network.gates import Axis, axis_of
from elesh.trainer.network.layers import channel_axes, named_tensors
from leyline import IdentityMismatch, InvalidField, PrunedArchitecture

__all__ = ["Moments", "redistributed"]

RIDGE = 1e-4
"""Ridge strength, as a share of the kept channels' mean second moment."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of the inputs of consumers, over samples and positions."""

    model_hash: str
    """Of the architecture they were measured on."""
    means: Mapping[Axis, Tensor]
    """By axis [C], float64."""
    squares: Mapping[Axis, Tensor]
    """By axis [C, C], float64: the mean of ``x_i x_j``, not centred."""


@dataclass
class _Sums:
    rows: int
    first: Tensor
    second: Tensor


@dataclass
class MomentMeter:
    """Sums up moments at some axes of a model while entered."""

    model: nn.Module
    axes: Collection[Axis]
    _sums: dict[Axis, _Sums] = field(default_factory=dict)
    _handles: list[RemovableHandle] = field(default_factory=list)

    def __enter__(self) -> MomentMeter:
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

    def moments(self, model_hash: str) -> Moments:
        """The moments of everything seen.

        Raises:
            InvalidField: if no sample reached a consumer.
        """
        for path, _ in self.axes:
            if not any(path == seen for seen, _ in self._sums):
                raise InvalidField("batches", f"samples that reach {path}", "none")
        return Moments(
            model_hash,
            {axis: sums.first / sums.rows for axis, sums in self._sums.items()},
            {axis: sums.second / sums.rows for axis, sums in self._sums.items()},
        )

    def _hook(self, axis: Axis) -> Any:
        def see(x: Tensor) -> Tensor:
            rows = x.detach().movedim(axis[1], -1).reshape(-1, x.shape[axis[1]]).float()
            sums = _Sums(len(rows), rows.sum(0).double().cpu(), (rows.T @ rows).double().cpu())
            past = self._sums.get(axis)
            if past is not None:
                sums.rows += past.rows
                sums.first += past.first
                sums.second += past.second
            self._sums[axis] = sums
            return x

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return replace_first(args, kwargs, see)

        return hook


def consumer_axes(architecture: PrunedArchitecture, groups: Iterable[str]) -> dict[Axis, None]:
    """The axes on which consumers read units of these groups, each once and in order."""
    return {axis_of(site): None for name in groups for site in architecture.group[name].sites}


def redistributed(
    model: nn.Module,
    architecture: PrunedArchitecture,
    units: Mapping[str, Collection[int]],
    moments: Moments,
    *,
    ridge: float = RIDGE,
) -> dict[str, Tensor]:
    """The weights and biases of the consumers of ``units``, re-solved; nothing is changed.

    Returns:
        by path, of the shape and dtype that the tensors have before the cut. What removed
        channels are multiplied by is left as it was.

    Raises:
        IdentityMismatch: if the moments were measured on another structure.
        InvalidField: if they do not cover a consumer that loses channels.
    """
    if moments.model_hash != architecture.model_hash:
        raise IdentityMismatch("moments.model_hash", architecture.model_hash, moments.model_hash)
    lost: dict[Axis, set[int]] = {}
    for name, chosen in units.items():
        for site in architecture.group[name].sites:
            lost.setdefault(axis_of(site), set()).update(site.all_of(chosen))
    tensors, found = named_tensors(model), dict[str, Tensor]()
    for axis, indices in lost.items():
        if axis not in moments.squares:
            raise InvalidField("moments", f"moments of the inputs of {axis[0]}", "none")
        module = model.get_submodule(axis[0])
        solved = predict_lost(
            moments.means[axis], moments.squares[axis], indices, takes_constant(module), ridge
        )
        for attribute, value in _resolved(module, solved).items():
            path = f"{axis[0]}.{attribute}"
            found[path] = value.to(tensors[path])
    return found


@dataclass(frozen=True)
class Predictor:
    """``x_lost ~ coefficients @ x_kept + constant``."""

    lost: Tensor
    kept: Tensor
    coefficients: Tensor
    """[R, K] float64."""
    constant: Tensor
    """[R] float64."""


def predict_lost(
    means: Tensor, squares: Tensor, lost: Iterable[int], constant: bool, ridge: float = RIDGE
) -> Predictor:
    """The ridge least squares prediction of lost channels from the kept ones.

    Args:
        means: [C] float64; used where a ``constant`` is allowed, which is then not penalised.
        squares: [C, C] float64, not centred.
        ridge: as a share of the kept channels' mean second moment (variance, with a constant).
    """
    gone = torch.tensor(sorted(set(lost)), dtype=torch.int64)
    stays = torch.ones(len(means), dtype=torch.bool)
    stays[gone] = False
    kept = stays.nonzero().flatten()
    inner = squares - torch.outer(means, means) if constant else squares
    among, across = inner[kept][:, kept], inner[gone][:, kept]
    strength = ridge * float(among.diagonal().mean()) if len(kept) else 0.0
    if not strength > 0:  # Nothing but silence stays.
        coefficients = torch.zeros_like(across)
    else:
        damped = among + strength * torch.eye(len(kept), dtype=among.dtype)
        coefficients = torch.linalg.solve(damped, across.T).T
    offset = means[gone] - coefficients @ means[kept]
    return Predictor(gone, kept, coefficients, offset if constant else torch.zeros_like(offset))


def takes_constant(module: nn.Module) -> bool:
    """Whether a constant input of this consumer is the same as a larger bias, everywhere."""
    if getattr(module, "bias", None) is None or isinstance(module, _ConvTransposeNd):
        return False
    if isinstance(module, _ConvNd):
        padded = module.padding == "same" or (module.padding != "valid" and any(module.padding))
        return not padded or module.padding_mode != "zeros"
    return True


def _resolved(module: nn.Module, solved: Predictor) -> dict[str, Tensor]:
    """The consumer's weight with the lost inputs spread over the kept ones; its bias likewise."""
    ((attribute, dim),) = channel_axes(module).inputs
    weight = getattr(module, attribute).detach().double().cpu().movedim(dim, 0)
    lost = weight[solved.lost]
    weight = weight.index_add(0, solved.kept, torch.tensordot(solved.coefficients.T, lost, 1))
    found = {attribute: weight.movedim(0, dim)}
    if solved.constant.any():
        # Taps of a kernel all see the constant: [R, out, *kernel] to [out].
        shift = torch.tensordot(
            solved.constant, lost.flatten(2).sum(2) if lost.ndim > 2 else lost, 1
        )
        assert isinstance(module.bias, Tensor)
        found["bias"] = module.bias.detach().double().cpu() + shift
    return found
