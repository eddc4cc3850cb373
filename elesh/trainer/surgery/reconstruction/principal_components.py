"""Rotates residual streams to their principal components, so that some channels carry little.

Between normalisations that treat all directions alike, no basis of a stream is special: what writes
to it may write turned by an orthogonal matrix R, what reads it may turn back, and the network
computes the same (SliceGPT, Ashkboos et al. 2024, section 3.1). An RMS normalisation allows any R,
a layer normalisation one that keeps the vector of ones, along which its mean lies. Its gain and
offset tell channels apart, so they first go into the layers that read what it puts out. With R of
the principal components of the normalised stream, over all its normalisations together, a cut
loses the directions that carry least, and the network stays a plain one: SliceGPT, which turns
every block by a matrix of its own, keeps a product at every addition.

Promises: what the network computes in evaluation mode stays the same up to rounding, which is
looked at, or every weight stays bit for bit; shapes and modules stay as they are. A stream is
turned only where all that reads it is linear and comes behind one normalisation over all of its
channels: pre-norm transformers. Post-norm ones, tied embeddings, normalisations over positions and
weights below 32 bits keep their channels, and a line in the log says why. Optimizers that hold
figures for every weight would speak of other weights: for networks that are not being trained.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elesh.trainer.network.calling import Inputs, call, device_of, map_tensors, tensors_in
from elesh.trainer.network.kinds.matrices import layer_at
from elesh.trainer.network.layers import is_transposed_linear
from elesh.trainer.network.state import Uncompiled, evaluated, full_precision, preserved
from leyline import Level, NormSite, PrunedArchitecture, PruningGroup, TensorSlice

_LOGGER = logging.getLogger(__name__)
_MOST_CHANNELS = 4096
"""Eigenvectors of more take longer than the passes."""
_ALIKE = 1e-4
"""How far outputs may move by rounding, as a share of the largest."""


class _Kept(Exception):
    """The stream keeps its channels; says why."""


@dataclass(frozen=True)
class _Stream:
    """What belongs to the channels of one group."""

    size: int
    norms: Mapping[str, NormSite]
    readers: Mapping[str, str]
    """By module, the normalisation that it is behind."""
    writers: Sequence[TensorSlice]


def turn_streams(
    model: nn.Module,
    architecture: PrunedArchitecture,
    batches: Iterable[tuple[Inputs, Any]],
    example: Inputs,
    compared: Callable[[Any], Any] | None = None,
) -> tuple[str, ...]:
    """Turn every residual stream that can be turned, in place.

    Args:
        batches: (inputs, labels) pairs of training data; labels are not looked at.
        example: inputs of two samples, for which the network has to compute the same.
        compared: from what the model returns to what has to stay the same; by default all of it.

    Returns:
        The groups whose channels are principal components now, in falling order but the last.
    """
    device, found = device_of(model), []
    inputs = [map_tensors(lambda x: x.to(device), x) for x, _ in batches]
    for group in architecture.groups:
        if not (group.prunable and group.norms and group.level is Level.CHANNEL):
            continue
        try:
            _turn(model, group, inputs, example, compared or (lambda outputs: outputs))
        except _Kept as kept:
            _LOGGER.info("the channels of %s are not rotated: %s", group.name, kept)
        else:
            found.append(group.name)
    return tuple(found)


def _turn(
    model: nn.Module,
    group: PruningGroup,
    inputs: Sequence[Inputs],
    example: Inputs,
    compared: Callable[[Any], Any],
) -> None:
    stream = _stream_of(model, group, example)
    turn = _rotation(_covariance(model, stream, inputs), _keeps_mean(stream))
    new = _turned(model, stream, turn)
    parameters = dict(model.named_parameters())
    before = {path: parameters[path].detach().clone() for path in new}

    def outputs() -> list[Tensor]:
        with _watching(model), torch.no_grad():
            return [x for x in tensors_in(compared(call(model, example))) if x.is_floating_point()]

    def put(values: Mapping[str, Tensor]) -> None:
        for path, value in values.items():
            parameters[path].data.copy_(value)

    expected = outputs()
    put(new)
    found = outputs()
    largest = max((float(x.abs().max()) for x in expected if x.numel()), default=0.0)
    moved = [float((a - b).abs().max()) for a, b in zip(expected, found, strict=True) if a.numel()]
    if not moved or not max(moved) <= _ALIKE * largest:
        put(before)
        raise _Kept("the network would compute something else")


@contextmanager
def _watching(model: nn.Module) -> Iterator[ExitStack]:
    """For a pass in evaluation mode; all but parameters is put back, hooks are taken off."""
    with preserved(model), full_precision(model), Uncompiled(model), ExitStack() as stack:
        evaluated(model)
        yield stack


def _stream_of(model: nn.Module, group: PruningGroup, example: Inputs) -> _Stream:
    norms = {site.module: site for site in group.norms}
    if any(site.kind not in ("layer", "rms") for site in norms.values()):
        raise _Kept("a normalisation is over positions, too")
    if not 1 < group.size <= _MOST_CHANNELS:
        raise _Kept(f"it has {group.size} channels")
    readers, writers = {site.module for site in group.sites}, list[TensorSlice]()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, int] = {}
    for each in parameters.values():
        owners[id(each)] = owners.get(id(each), 0) + 1
    for part in group.slices:
        parameter = parameters.get(part.tensor)
        if parameter is None or parameter.dtype not in (torch.float32, torch.float64):
            raise _Kept(f"{part.tensor} is no parameter of 32 bits or more")
        if not parameter.requires_grad:
            raise _Kept(f"{part.tensor} is frozen")
        whole = list(part.all_of(range(group.size))) == list(range(parameter.shape[part.dim]))
        if owners[id(parameter)] != 1 or not whole:
            raise _Kept(f"{part.tensor} is tied, or holds more than the stream")
        path, _, name = part.tensor.rpartition(".")
        module = layer_at(model, path)
        if path in norms:
            continue
        if path in readers and name == "weight" and part.dim == _inputs_of(module, path):
            continue
        writers.append(part)
    for path in readers:
        _inputs_of(layer_at(model, path), path)
        bias = parameters.get(f"{path}.bias")
        if f"{path}.weight" not in parameters or (bias is not None and owners[id(bias)] != 1):
            raise _Kept(f"weight and bias of {path} are not its own")
    return _Stream(group.size, norms, _norms_before(model, readers, norms, example), writers)


def _inputs_of(module: nn.Module, path: str) -> int:
    """The dimension of a linear layer's weight that counts inputs."""
    if type(module) is nn.Linear:
        return 1
    if is_transposed_linear(module):
        return 0
    raise _Kept(f"{path}, which reads it, is no linear layer")


def _norms_before(
    model: nn.Module, readers: Iterable[str], norms: Mapping[str, NormSite], example: Inputs
) -> dict[str, str]:
    """By reader, the one normalisation that all it reads comes through, by the autograd graph."""
    made: dict[Any, str] = {}
    read: dict[str, list[Tensor]] = {path: [] for path in readers}
    with _watching(model) as stack, torch.enable_grad():
        for path in norms:

            def keep(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                made[getattr(output, "grad_fn", None)] = path

            stack.callback(layer_at(model, path).register_forward_hook(keep).remove)
        for path in read:

            def note(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                read[path] += tensors_in((args, kwargs))[:1]

            before = layer_at(model, path).register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(before.remove)
        call(model, example)
    made.pop(None, None)
    found = {}
    for path, seen in read.items():
        behind = {name for x in seen for name in _nearest(x.grad_fn, made)}
        if len(behind) != 1 or "" in behind:
            raise _Kept(f"{path} reads it elsewhere than behind one normalisation")
        found[path] = behind.pop()
    return found


def _nearest(start: Any, made: Mapping[Any, str]) -> set[str]:
    """The normalisations first met on the ways back from a node; "" for a way past all of them."""
    waiting, met, found = [start], set[Any](), set[str]()
    while waiting:
        node = waiting.pop()
        if node in met:
            continue
        met.add(node)
        if node in made:
            found.add(made[node])
        elif node is None or hasattr(node, "variable"):
            return {""}
        else:
            waiting += [before for before, _ in node.next_functions if before is not None]
    return found


def _keeps_mean(stream: _Stream) -> bool:
    return any(site.kind == "layer" for site in stream.norms.values())


def _covariance(model: nn.Module, stream: _Stream, inputs: Sequence[Inputs]) -> Tensor:
    """[C, C] float64: second moments of the stream as normalised, gains and offsets apart, summed
    over its normalisations."""
    total = torch.zeros(stream.size, stream.size, dtype=torch.float64)

    def see(x: Tensor, site: NormSite) -> None:
        if site.dim not in (-1, x.ndim - 1) or x.shape[-1] != stream.size:
            raise _Kept(f"its channels are not the last axis of what enters {site.module}")
        rows = x.detach().reshape(-1, stream.size).float()
        if site.kind == "layer":
            rows = rows - rows.mean(1, keepdim=True)
        rows = rows / (rows.square().mean(1, keepdim=True) + site.eps).sqrt()
        total.add_((rows.T @ rows).double().cpu())

    with _watching(model) as stack, torch.no_grad():
        for path, site in stream.norms.items():

            def hook(module: nn.Module, args: Any, kwargs: Any, site: NormSite = site) -> None:
                see(tensors_in((args, kwargs))[0], site)

            before = layer_at(model, path).register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(before.remove)
        for batch in inputs:
            call(model, batch)
    if not bool(total.isfinite().all()):
        raise _Kept("what enters its normalisations is not finite")
    return total


def _rotation(covariance: Tensor, keeps_mean: bool) -> Tensor:
    """[C, C] orthogonal: a row of channels times it is the row of principal components, the
    strongest first. With ``keeps_mean`` the vector of ones stays, and the last column takes what
    that needs."""
    size = len(covariance)
    if not keeps_mean:
        return torch.as_tensor(torch.linalg.eigh(covariance).eigenvectors.flip(1))
    ones = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    apart = covariance + size * float(covariance.trace()) * ones @ ones.T
    components = torch.linalg.eigh(apart).eigenvectors[:, :-1].flip(1)
    last = torch.zeros_like(ones)
    last[-1] = 1.0
    mirror = last - ones  # Of a Householder reflection that takes the last axis to the ones.
    reflection = (
        torch.eye(size, dtype=torch.float64) - 2 * mirror @ mirror.T / mirror.square().sum()
    )
    return torch.as_tensor(ones @ ones.T + components @ reflection[:, :-1].T)


def _turned(model: nn.Module, stream: _Stream, turn: Tensor) -> dict[str, Tensor]:
    """The new values of all parameters of a stream, by path."""
    found = {}
    parameters = {path: x.detach().double().cpu() for path, x in model.named_parameters()}
    for path, norm in stream.readers.items():
        gain, offset = (parameters.get(f"{norm}.{name}") for name in ("weight", "bias"))
        transposed = is_transposed_linear(layer_at(model, path))
        weight = parameters[f"{path}.weight"]
        weight = weight.T if transposed else weight
        if offset is not None and bool(offset.any()):
            if f"{path}.bias" not in parameters:
                raise _Kept(f"{path} has no bias for what {norm} adds")
            found[f"{path}.bias"] = parameters[f"{path}.bias"] + weight @ offset
        weight = (weight if gain is None else weight * gain) @ turn
        found[f"{path}.weight"] = weight.T if transposed else weight
    for norm in stream.norms:
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            if (own := parameters.get(f"{norm}.{name}")) is not None:
                found[f"{norm}.{name}"] = torch.full_like(own, value)
    for part in stream.writers:
        written = found.get(part.tensor, parameters[part.tensor])
        found[part.tensor] = (written.movedim(part.dim, -1) @ turn).movedim(-1, part.dim)
    return found
