"""What a cut network needs before training continues: refitted weights, batch statistics, scale of
its outputs.

Weight reconstruction: what reads the kept units is refitted to do without the others. A consumer
that loses input channels R and keeps K sees ``W_R x_R`` vanish. As far as ``x_R`` can be
predicted from ``x_K``, ``x_R ~ B x_K + b``, its weights can make up for it: ``W_K += W_R B`` and
``bias += W_R b``, with B by ridge least squares from the covariance of the consumer's inputs
(the reconstruction of He, Zhang and Sun 2017, "Channel Pruning", section 3, solved for the inputs
instead of the outputs, so that a C x C matrix suffices whatever the kernel).

Batch statistics. A refitted consumer sends out almost what it sent before, not just that; over many
layers the small differences add up, and the running means and variances of the normalisations
behind are those of another network. One forward pass over calibration samples sets them right.

Scale. A network trained until it is sure of every training sample has next to no gradient left: two
more epochs follow the few samples it is not sure of and end below where they began, cut or not
(docs/decisions/trainer.md, 0087). Outputs that are multiplied by one number give the same answers,
and every sample counts again.

Promises: float64 throughout; the ridge bounds the condition number of what is solved by
``1 + C / RIDGE``; the predicted inputs are never worse than zeros on the samples that were
measured; what cannot be solved in finite numbers is left as it is. A convolution uses one B for
all taps of its kernel, which leaves out what neighbouring positions could add. The constant b is
only used where it is exact: in linear layers and convolutions with a bias whose padding is not
zeros. Batch statistics change nothing but running means and variances, and every other module
stays in its mode; the scale changes nothing but the weight and bias of the layer that makes the
outputs, keeps the order of the classes for every input, and is never above 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from elesh.program.refit import Normalised, moved_statistic, normalised_by, without_inputs
from elesh.trainer.network.calling import (
    Batches,
    Removable,
    batch_size,
    call,
    device_of,
    main_output,
    map_tensors,
    replace_inputs,
    through_layers,
)
from elesh.trainer.network.gates import Axis
from elesh.trainer.network.kinds.hand_written import does_more
from elesh.trainer.network.kinds.matrices import BareMatrix, layer_at
from elesh.trainer.network.kinds.weight_norms import weight_norm_of
from elesh.trainer.network.layers import channel_axes, named_tensors
from elesh.trainer.network.state import Uncompiled, full_precision, preserved
from elesh.trainer.positions import positions_drawn, positions_to_read
from leyline import (
    CutFallback,
    IdentityMismatch,
    InvalidField,
    PrunedArchitecture,
    PruningGroup,
    StructuralPruningDecision,
)


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
        InvalidField: if one does not know its rows.
    """
    first = parts[0]
    for other in parts[1:]:
        if other.model_hash != first.model_hash:
            raise IdentityMismatch("covariance.model_hash", first.model_hash, other.model_hash)
        if not all(other.rows.values()) or not other.rows:
            found = sorted(f"{path}[{dim}]" for path, dim in other.rows)
            raise InvalidField("covariance", "known numbers of rows", found)
    # A consumer that no sample of some rank reached is not refitted: what it reads stays.
    shared = [axis for axis in first.rows if all(axis in part.rows for part in parts)]
    rows = {axis: sum(part.rows[axis] for part in parts) for axis in shared}

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
    a call (and as long as there was one), sums in float64 over calls. Of large maps some positions
    are looked at (:mod:`elesh.trainer.positions`)."""

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
        first, second = rows.sum(0).double().cpu(), (rows.T @ rows).float().cpu()
        self.rows[axis] = past + len(rows)
        self.first[axis] = self.first[axis] + first if past else first
        self.second[axis] = self.second[axis].double() + second if past else second

    def mean(self, model_hash: str) -> InputCovariance:
        """The covariance of everything seen; of a consumer that was given no row, there is none."""
        rows = {axis: count for axis, count in self.rows.items() if count}
        means = {axis: self.first[axis] / count for axis, count in rows.items()}
        sums = {axis: self.second[axis] for axis in rows}
        return InputCovariance(model_hash, means, _Means(sums, rows), rows)


@dataclass(frozen=True)
class _Means(Mapping[Axis, Tensor]):
    """Means of sums, in float64, each computed on demand: there are many, most are large, and a cut
    needs those of few consumers."""

    sums: Mapping[Axis, Tensor]
    rows: Mapping[Axis, int]

    def __getitem__(self, axis: Axis) -> Tensor:
        return self.sums[axis].to(torch.float64, copy=True).div_(self.rows[axis])

    def __iter__(self) -> Iterator[Axis]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)


@dataclass
class CovarianceMeter:
    """Sums up the covariance of inputs at some axes of a model while entered."""

    model: nn.Module
    axes: Collection[Axis]
    _sums: CovarianceSums = field(default_factory=CovarianceSums)
    _handles: list[Removable] = field(default_factory=list)

    def __enter__(self) -> CovarianceMeter:
        self._handles += through_layers(self.model, [path for path, _ in self.axes])
        for axis in self.axes:
            module = layer_at(self.model, axis[0])
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
            return replace_inputs(module, args, kwargs, see)

        return hook


def consumer_axes(architecture: PrunedArchitecture, groups: Iterable[str]) -> dict[Axis, None]:
    """The axes on which consumers read units of these groups, each once and in order."""
    return {site.axis: None for name in groups for site in architecture.group[name].sites}


def reconstructed(
    model: nn.Module,
    architecture: PrunedArchitecture,
    units: Mapping[str, Collection[int]],
    covariance: InputCovariance,
    *,
    skip: Collection[str] = (),
) -> dict[str, Tensor]:
    """The weights and biases of the consumers of ``units``, refitted; nothing is changed.

    Args:
        units: that go, by group, in current numbering.
        skip: paths of consumers that keep their weights.

    Returns:
        by path, of the shape and dtype that the tensors have before the cut. What removed
        channels are multiplied by is left as it was. Parameters that several layers share are not
        among them.

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
            lost.setdefault(site.axis, set()).update(site.all_of(chosen))
            groups.setdefault(site.axis, []).append(architecture.group[name])
    tensors, found = named_tensors(model), dict[str, Tensor]()
    shared = shared_parameters(model)
    for axis, indices in lost.items():
        if axis[0] in skip:
            continue
        if axis not in covariance.squares:
            raise InvalidField("covariance", f"moments of the inputs of {axis[0]}", "none")
        module = layer_at(model, axis[0])
        over = [norm for group in groups[axis] for norm in group.norms]
        anew = any(norm.module == axis[0] for norm in over)
        inputs = refitted_axis(module)
        if anew or inputs is None:
            continue  # No linear map of these inputs, or one that is scaled anew: nothing to refit.
        attribute, dim = inputs
        if any(id(parameter) in shared for parameter in module._parameters.values()):
            continue  # Another layer reads other inputs with the same weight.
        means, squares = covariance.means[axis], covariance.squares[axis]
        norm = None
        if over:
            norm = normalised_by(means, squares, normalisations(model, groups[axis], len(means)))
        weight, bias = without_inputs(
            getattr(module, attribute),
            module.bias if takes_constant(module) else None,  # type: ignore[arg-type]
            dim,
            getattr(module, "groups", 1),
            means,
            squares,
            indices,
            rows=covariance.rows.get(axis, 0),
            norm=norm,
        )
        refitted = {attribute: weight} if bias is None else {attribute: weight, "bias": bias}
        if all(bool(torch.isfinite(value).all()) for value in refitted.values()):
            for name, value in refitted.items():
                path = f"{axis[0]}.{name}"
                found[path] = value.to(tensors[path])
    return found


def shared_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that several layers hold; a layer with two names is one."""
    holders = Counter[int]()
    for module in model.modules():
        holders.update({id(one) for one in module._parameters.values() if one is not None})
    return {number for number, count in holders.items() if count > 1}


def normalisations(model: nn.Module, groups: Iterable[PruningGroup], size: int) -> list[Normalised]:
    """The normalisations over channels of some groups, as far as they are over ``size`` channels
    and their parameters are a gain and an offset."""
    sites = {site.module: site for group in groups for site in group.norms}
    found = []
    for path, site in sites.items():
        module = layer_at(model, path)
        gain, offset = (getattr(module, name, None) for name in ("weight", "bias"))
        found.append(Normalised.of(site.kind, size, gain, offset))
    return [norm for norm in found if norm is not None]


def takes_constant(module: nn.Module) -> bool:
    """Whether a constant input of this consumer is the same as a larger bias, everywhere."""
    bias = getattr(module, "bias", None)  # recurrent layers have a flag of this name
    if not isinstance(bias, Tensor) or isinstance(module, _ConvTransposeNd):
        return False
    if isinstance(module, _ConvNd):
        padded = module.padding == "same" or (module.padding != "valid" and any(module.padding))
        return not padded or module.padding_mode != "zeros"
    return isinstance(module, nn.Linear) or not does_more(module)


def refitted_axis(module: nn.Module) -> tuple[str, int] | None:
    """The tensor, and its axis, that a consumer's inputs are multiplied by; None if it is no one
    linear map of them, or its weight is computed."""
    if isinstance(module, BareMatrix):
        return None
    if "weight" not in module._parameters and weight_norm_of(module) is not None:
        return None
    if isinstance(module, _ConvNd) and module.groups > 1:
        return None if isinstance(module, _ConvTransposeNd) else ("weight", 1)
    inputs = channel_axes(module).inputs
    return inputs[0] if len(inputs) == 1 else None


@torch.no_grad()
def reestimate_batch_statistics(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> int:
    """Set the running statistics of batch normalisations to the means over ``batches``.

    Args:
        batches: (inputs, labels) pairs, the largest first; labels are not looked at, batches of
            less than half the largest are left out.

    Returns:
        How many normalisations were set; 0, without a pass, where there are none.
    """
    norms = list(batch_norms(model).values())
    if not norms:
        return 0
    before = [(m, m.momentum, m.num_batches_tracked.clone()) for m in norms]  # type: ignore[union-attr]
    modes = [(module, module.training) for module in model.modules()]
    kept = [(m, m.running_mean.clone(), m.running_var.clone()) for m in norms]  # type: ignore[union-attr]
    seen, largest, device = 0, 0, device_of(model)
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # The plain mean over batches.
        for inputs, _ in batches:
            size = batch_size(inputs)
            largest = max(largest, size)
            if size < 2 or 2 * size < largest:  # A small rest would count as much as the others.
                continue
            with full_precision(model):
                call(model, map_tensors(lambda x: x.to(device), inputs))
            seen += 1
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]
        for norm, mean, variance in kept:
            sound = norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()  # type: ignore[union-attr]
            if not seen or not sound:
                norm.running_mean.copy_(mean)  # type: ignore[union-attr]
                norm.running_var.copy_(variance)  # type: ignore[union-attr]
    return len(norms) if seen else 0


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch normalisations with running statistics, by path. None where they synchronise with
    other processes, which do not run this pass."""
    norms = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    several = distributed.is_available() and distributed.is_initialized()
    if several and any(isinstance(norm, nn.SyncBatchNorm) for norm in norms.values()):
        return {}
    return {path: norm for path, norm in norms.items() if norm.running_mean is not None}


def sampled_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch normalisations, of which the next pass's samples will be the statistics."""
    norms = batch_norms(model)
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None
    return norms


def statistic_after(path: str, before: tuple[Tensor, Tensor], own: Tensor) -> Tensor | None:
    """A running statistic after a cut; None where it is not finite, or something else stands in the
    normalisation's place."""
    if own.shape != before[1].shape:
        return None
    found = moved_statistic(*before, own, variance=path.endswith("running_var"))
    return found if bool(found.isfinite().all()) else None


def estimated_batch_statistics(
    model: nn.Module, batches: Iterable[tuple[Any, Any]]
) -> dict[str, Tensor]:
    """What :func:`reestimate_batch_statistics` would set, by path of the buffer; empty where that
    is nothing. The network and random states are left as they were."""
    with preserved(model), Uncompiled(model):
        if not reestimate_batch_statistics(model, batches):
            return {}
        return batch_statistics(model)


def put_batch_statistics(model: nn.Module, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Set running statistics, by path of the buffer; what they were."""
    buffers = _buffers(model)
    before = {path: buffers[path].clone() for path in statistics}
    for path, new in statistics.items():
        buffers[path].data.copy_(new)
    return before


def batch_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the running statistics, by path of the buffer."""
    return {path: buffer.clone() for path, buffer in _buffers(model).items()}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}" if path else name: getattr(norm, name)
        for path, norm in batch_norms(model).items()
        for name in ("running_mean", "running_var")
    }


_LEAST = 0.05
"""Outputs are not scaled further down than this."""
_STEPS = 30


@torch.no_grad()
def soften_outputs(model: nn.Module, batches: Iterable[tuple[Any, Any]], accuracy: float) -> float:
    """Scale the outputs down until the network is as sure of samples that it was trained on as it
    may be: their mean cross-entropy is at least ``-log(accuracy)``.

    Args:
        batches: (inputs, class labels) pairs of training data.
        accuracy: share of right answers on data that it was not trained on.

    Returns:
        The factor; 1 where nothing was changed: the network is not too sure, or its outputs are
        not made by one linear layer or convolution of their own.
    """
    layer, outputs, labels = _seen(model, batches)
    if layer is None or not 0 < accuracy < 1:
        return 1.0
    shape = tuple(outputs.shape)
    second = labels.shape == shape[:1] + shape[2:] and labels.shape != shape[:-1]
    axis = 1 if outputs.ndim > 2 and second else -1
    logits = outputs.movedim(axis, -1).flatten(0, -2).double()
    flat = labels.flatten().long()

    def loss(scale: float) -> float:
        return float(nn.functional.cross_entropy(logits * scale, flat))

    target = -math.log(accuracy)
    if not loss(1.0) < target:
        return 1.0
    low, high = _LEAST, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) >= target else (low, middle)
    for tensor in (layer.weight, layer.bias):
        if isinstance(tensor, Tensor):
            tensor.data.mul_(low)
    return low


def _seen(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> tuple[Any, Tensor, Tensor]:
    """The layer that makes the outputs (None if none does), all outputs and their labels."""
    calls: dict[nn.Module, list[Tensor]] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        calls.setdefault(module, []).append(output)

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, _ConvNd))]
    handles = [module.register_forward_hook(hook) for module in layers]
    modes = [(module, module.training) for module in model.modules()]
    device, outputs, labels, makers = device_of(model), [], [], set(layers)
    try:
        model.eval()
        for inputs, wanted in batches:
            calls.clear()
            with full_precision(model):
                output = main_output(call(model, map_tensors(lambda x: x.to(device), inputs)))
            if not isinstance(wanted, Tensor):
                return None, torch.zeros(0), torch.zeros(0)
            makers &= {m for m, made in calls.items() if len(made) == 1 and made[0] is output}
            outputs.append(output.float().cpu())
            labels.append(wanted.cpu())
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    maker = next(iter(makers), None)
    if not outputs or maker is None:
        return None, torch.zeros(0), torch.zeros(0)
    owners = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is maker.weight
    ]
    if len(owners) != 1 or any(x.shape[1:] != outputs[0].shape[1:] for x in outputs):
        return None, torch.zeros(0), torch.zeros(0)
    return maker, torch.cat(outputs), torch.cat(labels)


@dataclass(frozen=True)
class RefitData:
    """What a cut is refitted and judged by; see ``apply_decision``."""

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
    def of(
        cls,
        decision: StructuralPruningDecision,
        model: nn.Module,
        now: PrunedArchitecture,
        data: RefitData,
    ) -> Refit:
        """What there is of what a decision asks for, for the network as it is."""
        asked, said = decision.reconstruction, list[str]()
        covariance, batches = data.reconstruct, data.batches
        if data.redistribute is not None and decision.units:
            return cls(data.redistribute(), asked.skip if asked else ())
        if asked is None or not asked.applied or not decision.units:
            return cls()
        if callable(covariance):
            covariance = covariance()
            said.append("input covariance measured again")
        if covariance is None or covariance.model_hash != now.model_hash:
            reason = "not reconstructed: no input covariance of this network is available"
            return cls(said=reason, fallbacks=("not_reconstructed",))
        without: tuple[CutFallback, ...] = ()
        if asked.batch_statistics and not batches:
            said.append("batch statistics not estimated anew: no calibration batches were given")
            without = ("statistics_not_estimated",)
        estimated = batches if asked.batch_statistics else ()
        samples = batches
        if batches and not estimated and batch_norms(model):
            samples = ()  # Layers are solved behind normalisations that take their statistics.
        return cls(covariance, asked.skip, estimated, samples, "; ".join(said), without)
