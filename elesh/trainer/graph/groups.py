"""From wiring to the groups of a :class:`leyline.PrunedArchitecture`.

Promises: the model is not touched (a copy is traced); every convolution, linear and embedding
layer is in a group; a group that is not proved to be removable says why.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elesh.trainer.network.calling import (
    Inputs,
    batch_size,
    example_copy,
    packed_in,
    pictures_in,
    seen_called,
)
from elesh.trainer.network.gates import Axis
from elesh.trainer.network.kinds.experts import is_experts, width_multiple
from elesh.trainer.network.kinds.matrices import (
    BareMatrix,
    bare_matrices,
    place_behind,
    plain_name,
)
from elesh.trainer.network.kinds.weight_norms import computed_by
from elesh.trainer.network.layers import (
    axes_remembered,
    channel_axes,
    describe_tensors,
    held,
    made_dim,
    named_tensors,
)
from elesh.trainer.network.rows import remember_picking
from elesh.trainer.network.state import evaluated, preserve_state, uncollected
from elesh.trainer.network.traversal import parameters_in, quick_modes, standing_still
from leyline import (
    GateSite,
    InvalidField,
    LayerBlock,
    LayerDescriptor,
    NormSite,
    PrunedArchitecture,
    PruningGroup,
    TensorSlice,
)

from .attention import Attention, Ints, span_fields
from .hazards import (
    reached_by,
    require_initialised,
    require_repeatable,
    traced_gates,
    with_acting_masks,
    without_hazards,
)
from .leftovers import sites_in_training, with_the_rest, with_vectors_of_training
from .mixtures import Gate, enclosed_in, followed, picking_in, without_mixed
from .proof.blocks import with_blocks
from .proof.in_training import without_refuted_in_training
from .proof.products import Cuts
from .proof.random_copy import random_copy
from .proof.trial import Trial
from .proof.units import without_refuted
from .residual_blocks import find_blocks
from .residual_branches import Trace, parameters_behind
from .wiring import Family, Port, Wiring, trace


def find_architecture(
    model: nn.Module,
    example_inputs: Inputs,
    ignored_layers: Collection[str] = (),
    compared: Callable[[Any], Any] | None = None,
) -> PrunedArchitecture:
    """The architecture of a network that has not been cut yet.

    Args:
        model: not changed; it must be possible to copy it (``copy.deepcopy``).
        example_inputs: a small batch; positions (MACs) are counted from its shapes.
        ignored_layers: layers, or modules with layers in them, whose outputs shall stay.
        compared: from what the model returns to what has to be equal under a mask and after the
            cut; None: all floating-point tensors of it.

    Raises:
        InvalidField: if an ignored layer is not there or the model cannot be copied.
    """
    ignored_layers = [ignored_layers] if isinstance(ignored_layers, str) else ignored_layers
    for name in ignored_layers:
        if name not in dict(model.named_modules()):
            raise InvalidField("ignored_layers", "the name of a module of the model", name)
    require_initialised(model)
    with uncollected():
        return _found(model, example_inputs, ignored_layers, compared)


def _found(
    model: nn.Module,
    example_inputs: Inputs,
    ignored_layers: Collection[str],
    compared: Callable[[Any], Any] | None,
) -> PrunedArchitecture:
    try:
        return _found_on_copy(model, example_inputs, ignored_layers, compared, True)
    except InvalidField:  # Code of its own may want weights that are contiguous.
        pass
    return _found_on_copy(model, example_inputs, ignored_layers, compared, False)


def _found_on_copy(
    model: nn.Module,
    example_inputs: Inputs,
    ignored_layers: Collection[str],
    compared: Callable[[Any], Any] | None,
    overlapping: bool,
) -> PrunedArchitecture:
    """The same, on a copy of which rows of weights may overlap."""
    precision = _precision(model)
    copied = random_copy(model, precision, overlapping)
    inputs = example_copy(example_inputs, precision)
    evaluated(copied)
    # The copy's hooks and replaced methods may refer to the network itself.
    with preserve_state(model, seed=0), _plain_arithmetic(precision), quick_modes(copied):
        with standing_still(copied):
            proved, trial, blocks, fed = _proved(model, copied, inputs, ignored_layers, compared)
        return with_blocks(trial, proved, blocks, fed)


def _require_comparable(trial: Trial) -> None:
    """That ``compared`` takes what the network returns, and leaves something to compare.

    Raises:
        InvalidField: if it does not.
    """
    with torch.no_grad():
        output = trial.run()
    expected = "a function from the model's output to floating-point tensors of it"
    try:
        found = trial.compared(output)
    except Exception as error:
        raise InvalidField("compared", expected, repr(error)) from error
    if not found:
        raise InvalidField("compared", expected, "none")


def _proved(
    model: nn.Module,
    copied: nn.Module,
    inputs: Inputs,
    ignored: Collection[str],
    compared: Callable[[Any], Any] | None,
) -> tuple[PrunedArchitecture, Trial, tuple[LayerBlock, ...], set[int]]:
    """The architecture with its groups proved; for those of its blocks, what tries them, the blocks
    themselves and the ids of the parameters that the outputs depend on."""
    trial = Trial(copied, inputs, compared)
    if compared is not None:
        _require_comparable(trial)
    with axes_remembered():
        traced = _traced(model, trial, inputs, ignored, compared)
    groups = traced.groups
    architecture = PrunedArchitecture.unchecked(describe_tensors(model), traced.layers, groups)
    if not any(group.prunable for group in groups):
        require_repeatable(copied, inputs)
    proved = without_refuted(trial, architecture)
    sites = sites_in_training(groups, traced.late, copied)
    proved = without_refuted_in_training(trial, proved, sites)
    proved = with_acting_masks(copied, inputs, proved, traced.gates, traced.rows)
    return proved, trial, traced.blocks, traced.fed


@dataclass(frozen=True)
class _Traced:
    """What one pass shows, before anything is proved."""

    layers: tuple[LayerDescriptor, ...]
    groups: tuple[PruningGroup, ...]
    blocks: tuple[LayerBlock, ...]
    fed: set[int]
    """The ids of the parameters that the outputs depend on."""
    gates: Mapping[Axis, Gate]
    rows: Mapping[Axis, int]
    late: set[str]
    """Layers that only training reaches."""


def _traced(
    model: nn.Module,
    trial: Trial,
    inputs: Inputs,
    ignored: Collection[str],
    compared: Callable[[Any], Any] | None,
) -> _Traced:
    copied = trial.copied
    wiring = trace(copied, inputs, compared)
    groups = _with_heads(_groups(wiring, copied, ignored), wiring, copied, ignored)
    groups = with_the_rest(groups, wiring, copied)
    passage, layers = wiring.passage, wiring.layers
    seen_called(one.module for one in passage.passes if one.name not in wiring.readers)
    of_modules = [one for one in passage.passes if not isinstance(one.module, BareMatrix)]
    fewer = len(of_modules) < len(passage.passes)  # Only what is a module can be taken out.
    of_blocks = Trace(of_modules, passage.outputs) if fewer else passage
    blocks = find_blocks(of_blocks, copied, layers, ignored)
    fed = parameters_behind(passage.reached)
    reached = reached_by(copied, fed, wiring.called)
    trial.products = Cuts(wiring.products, wiring.entered, batch_size(inputs))
    groups = with_vectors_of_training(groups, copied, fed, trial.met_in_training)
    late = set[str]()

    def grouped(layers: Collection[str]) -> tuple[PruningGroup, ...]:
        late.update(layers)
        return _in_training(copied, trial, ignored)

    groups = without_hazards(
        groups,
        model,
        copied,
        reached,
        trial.in_training,
        trial.read_in_training,
        grouped,
        partial(enclosed_in, passage, groups),
    )
    gates = traced_gates(passage, groups)
    # Of pictures in a list, a detector's, it picks boxes: which rows are whose is not followed.
    picking = not pictures_in(inputs) and picking_in(passage.reached)
    rows = {axis: gate.rows for axis, gate in gates.items()}
    if picking and packed_in(inputs) is None:
        rows |= followed(copied, inputs, groups)
    groups = without_mixed(groups, inputs, rows)
    remember_picking(model, picking)
    remember_picking(copied, picking)
    return _Traced(layers, groups, blocks, fed, gates, rows, late)


def _in_training(
    copied: nn.Module, trial: Trial, ignored: Collection[str]
) -> tuple[PruningGroup, ...]:
    """The groups of channels that training mode shows."""
    example = trial.example_in_training
    if example is None:
        return ()
    copied.train()
    try:
        return _groups(trace(copied, example), copied, ignored)
    finally:
        copied.eval()


def _precision(model: nn.Module) -> torch.dtype:
    """What the network is traced and proved in: single, or double where it is."""
    double = any(
        p.dtype in (torch.float64, torch.complex128) for p in parameters_in(model).values()
    )
    return torch.float64 if double else torch.float32


@contextlib.contextmanager
def _plain_arithmetic(precision: torch.dtype) -> Iterator[None]:
    """No TF32 (the proof compares to 1e-4), no way past a transformer's parts."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    fast, default = torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_default_dtype(precision)
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.set_default_dtype(default)


def _groups(wiring: Wiring, model: nn.Module, ignored: Collection[str]) -> tuple[PruningGroup, ...]:
    """Units that touch the same axes make up one group, in order of execution."""
    families = [family for family in wiring.families if _producers(family)]
    followed = {port.name for family in families for port in _producers(family)}
    reached = set(wiring.passage.reached)
    live = {one.name for one in wiring.passage.passes if one.output in reached}
    live |= wiring.readers.keys()
    handed = {one.name for one in wiring.passage.passes if not reached.isdisjoint(one.others)}
    lone = wiring.failure or "no path leads from it to the network's outputs"
    alone = [layer for layer in wiring.layers if layer.name not in followed]
    families += _lone_families(alone, model)
    order = {layer.name: number for number, layer in enumerate(wiring.layers)}
    rooted = [(_root(family, order), family) for family in families]
    rooted.sort(key=lambda pair: (order[pair[0].name], int(pair[1][pair[0]][:, 0].min())))
    tied, tensors = _tied_tensors(model, order), _Tensors(model)
    groups: dict[str, PruningGroup] = {}
    for root, family in rooted:
        name, number = plain_name(root.name), 2
        while name in groups:
            name, number = f"{plain_name(root.name)}#{number}", number + 1
        units = family[root][:, 0].argsort(kind="stable")
        ports = sorted(family, key=lambda port: (order.get(port.name, -1), port.name, port.side))
        leads = any(port.name in live or port.parameter_dim is not None for port in ports)
        reason = _refusal(ports, ignored, tied) if root.name in followed and leads else lone
        if not leads and any(port.name in handed for port in ports):
            reason = f"the last states of {root.name} are the first states of another layer"
        if root.name not in wiring.called:
            reason = f"the weight of {root.name} is used by a function; the layer is never called"
        sorted_family = {port: family[port][units] for port in ports}
        groups[name] = _group(name, sorted_family, reason, tensors, wiring.readers)
    return tuple(groups.values())


def _with_heads(
    groups: Sequence[PruningGroup], wiring: Wiring, model: nn.Module, ignored: Collection[str]
) -> tuple[PruningGroup, ...]:
    """The channel groups with those inside attentions replaced by groups of heads.

    Queries, keys and values as channels are refused anyway, being reshaped. What else such a
    group of channels has is left to it. An attention whose projections are coupled as channels
    that may go is left to the channel groups.
    """
    kept, heads = list(groups), list[PruningGroup]()
    tied = _tied_tensors(model, {layer.name for layer in wiring.layers})
    tensors = named_tensors(model)
    for attention in wiring.attentions:
        axes = {(path, dim) for path, dim, _ in attention.spans}
        inside = [g for g in kept if any((part.tensor, part.dim) in axes for part in g.slices)]
        if any(g.prunable and _coupled(g, attention, axes) for g in inside):
            continue
        rest = {g.name: _rest(g, attention, axes) for g in inside}
        kept = [one for g in kept if (one := rest.get(g.name, g)) is not None]
        names = {group.name for group in (*kept, *heads)}
        name = next(one for one in _names(attention) if one not in names)
        if any(wiring.readers.get(s.module, s.module) != s.module for s in attention.sites):
            outputs = ", ".join(site.module for site in attention.sites)
            unmasked = f"a function multiplies by the weight of {outputs}: nowhere to mask heads"
            attention = replace(attention, reason=attention.reason or unmasked)
        heads.append(attention.group(name, _head_refusal(attention, tensors, ignored, tied)))
    return (*kept, *heads)


def _names(attention: Attention) -> Iterator[str]:
    """What the group of its heads may be called, the best name first."""
    output = plain_name(attention.sites[0].module)
    yield from (plain_name(attention.name), output)
    yield from (f"{output}#{number}" for number in itertools.count(2))


def _coupled(group: PruningGroup, attention: Attention, axes: Collection[tuple[str, int]]) -> bool:
    """Whether queries, keys or values are coupled as channels to something outside."""
    outside = any((part.tensor, part.dim) not in axes for part in group.slices)
    return outside and any(layer in attention.layers for layer in group.layers)


def _rest(
    group: PruningGroup, attention: Attention, axes: Collection[tuple[str, int]]
) -> PruningGroup | None:
    """The rest of a group of channels; None if no layer makes it."""
    left = tuple(layer for layer in group.layers if layer not in attention.layers)
    slices = tuple(part for part in group.slices if (part.tensor, part.dim) not in axes)
    outputs = {site.module for site in attention.sites}
    sites = tuple(site for site in group.sites if site.module not in outputs)
    update: dict[str, Any] = {"layers": left, "slices": slices, "sites": sites}
    if group.prunable:  # Channels of a head that all query heads share.
        reason = f"its channels lie in every head of {attention.name}"
        update |= {"prunable": False, "reason": reason}
    return group.model_copy(update=update) if left else None


def _head_refusal(
    attention: Attention,
    tensors: Mapping[str, Tensor],
    ignored: Collection[str],
    tied: Collection[int],
) -> str:
    """Why these heads are left alone, as far as is known before the proof; else empty."""
    if attention.reason:
        return attention.reason
    for layer in attention.layers:
        if any(layer == name or layer.startswith(f"{name}.") for name in ignored):
            return "ignored"
    for path, _, _ in attention.spans:
        tensor = tensors.get(path)
        if tensor is None:
            return f"{path} is computed (parametrised) or shared with another layer"
        if id(tensor) in tied:
            return f"{path} is shared with another layer"
    return ""


def _producers(ports: Iterable[Port]) -> list[Port]:
    return [
        port
        for port in ports
        if port.side == "out" and port.module is not None and channel_axes(port.module).produces
    ]


def _root(family: Family, order: Mapping[str, int]) -> Port:
    """The producing layer that is executed first."""
    return min(_producers(family), key=lambda port: order[port.name])


def _lone_families(layers: Iterable[LayerDescriptor], model: nn.Module) -> Iterator[Family]:
    """Every output channel of every layer by itself, where the wiring is not known."""
    modules = {**dict(model.named_modules()), **bare_matrices(model)}
    for layer in layers:
        module = modules.get(layer.name)
        if module is not None and (axes := channel_axes(module)).produces:
            attribute, dim = axes.outputs[0]
            if (weight := held(module, attribute)) is not None:
                units = np.arange(axes.period or weight.shape[dim])[:, None]
                copies = np.arange(axes.shares if axes.period else 1) * axes.period
                yield {Port(layer.name, "out", module): units + copies}


def _tied_tensors(model: nn.Module, called: Collection[str]) -> dict[int, int]:
    """How many of the modules that are called hold a parameter, by its id, where several do."""
    holders = Counter(
        id(parameter)
        for name, module in model.named_modules()
        if name in called
        for parameter in module._parameters.values()
    )
    return {key: count for key, count in holders.items() if count > 1}


def _refusal(ports: Sequence[Port], ignored: Collection[str], tied: Mapping[int, int]) -> str:
    """Why these channels are left alone, as far as their layers' types tell; else empty."""
    for port in _producers(ports):
        if any(port.name == name or port.name.startswith(f"{name}.") for name in ignored):
            return "ignored"
    for port in ports:
        if port.module is not None and (refusal := channel_axes(port.module).refusal):
            return f"{refusal} ({port.name})"
    for port in ports:
        if port.refusal:
            return port.refusal
    for port in ports:
        if port.module is None:
            continue
        axes = channel_axes(port.module)
        if axes.produces and held(port.module, axes.outputs[0][0]) is None:
            return f"the weight of {port.name} is {computed_by(port.module)}"
    if shared := _torn(ports, tied):
        return f"{shared} shares its weight with another layer"
    if not any(_reads(port) for port in ports):
        return "no layer consumes it"
    return ""


_BESIDE = ("norm", "behind")
"""Sides of a layer on which no tensor of it has channels of its own."""


def _torn(ports: Sequence[Port], tied: Mapping[int, int]) -> str:
    """A layer whose weight is shared, and does not go along the same axis wherever it is used."""
    axes: dict[int, set[tuple[str, int]]] = {}
    for port in ports:
        if port.module is None or port.side in _BESIDE:
            continue
        own = channel_axes(port.module)
        for attribute, dim in own.inputs if port.side == "in" else own.outputs:
            parameter = held(port.module, attribute)
            if parameter is not None and id(parameter) in tied:
                axes.setdefault(id(parameter), set()).add((port.name, dim))
    for number, places in axes.items():
        dims = {dim for _, dim in places}
        if len(dims) > 1 or len(places) < tied[number]:
            return min(places)[0]
    return ""


def _reads(port: Port) -> bool:
    """Whether a layer mixes channels that come here."""
    if port.module is None or port.side == "norm":
        return False
    axes = channel_axes(port.module)
    return port.side in ("in", "behind") or (axes.site_dim is not None and not axes.produces)


def _placed(indices: Ints, port: Port, size: int) -> Ints | None:
    """Where channels [units, width] lie on an axis of that size; None if beyond it. On one that all
    shares of them have in common: their places, if each is there in all shares."""
    axes = channel_axes(port.module) if port.module is not None and port.side == "out" else None
    if axes is not None and axes.period:
        places = indices % axes.period
        same = bool((places == places[:, :1]).all()) and indices.shape[1] == axes.shares
        return places[:, :1] + np.arange(0, size, axes.period) if same else None
    if int(indices.max()) < size:
        return indices
    shares = channel_axes(port.module).shares if port.module is not None else 0
    if not shares or indices.shape[1] % shares:
        return None
    places = np.sort(indices % size, axis=1).reshape(len(indices), -1, shares)
    return places[:, :, 0] if bool((places == places[:, :, :1]).all()) else None


def _masked_behind(family: Family) -> set[Port]:
    """Layers right behind which channels are masked, as a product of activations sums over them:
    those that make one operand; all, if some channels are read by layers, too."""
    behind = {port for port in family if port.side == "behind"}
    if behind and any(_reads(port) for port in family if port not in behind):
        return set(_producers(family))
    return behind


class _Tensors:
    """The tensors of a model, looked up once."""

    def __init__(self, model: nn.Module) -> None:
        self.named = named_tensors(model)
        self.paths = {id(tensor): path for path, tensor in self.named.items()}

    def axes(self, port: Port) -> list[tuple[str, int]]:
        """Paths of tensors, each under its first name, and their axes that the channels lie on."""
        if port.parameter_dim is not None:
            return [(port.name, port.parameter_dim)] if port.name in self.named else []
        if port.module is None or port.side in _BESIDE:
            return []
        axes = channel_axes(port.module)
        pairs = axes.inputs if port.side == "in" else axes.outputs
        own = [(held(port.module, attribute), dim) for attribute, dim in pairs]
        found = [(self.paths.get(id(tensor)), dim) for tensor, dim in own]
        return [(path, dim) for path, dim in found if path is not None]


def _group(
    name: str, family: Family, reason: str, tensors: _Tensors, readers: Mapping[str, str]
) -> PruningGroup:
    slices: dict[tuple[str, int], TensorSlice] = {}
    sites: list[GateSite] = []
    norms: list[NormSite] = []
    size = len(next(iter(family.values())))
    behind = _masked_behind(family)
    for port, indices in family.items():
        span = span_fields(indices)
        for path, dim in tensors.axes(port):
            own = _placed(indices, port, tensors.named[path].shape[dim])
            if own is not None:
                placed = span if own is indices else span_fields(own)
                slices.setdefault((path, dim), TensorSlice(tensor=path, dim=dim, **placed))
            else:
                reason = reason or f"its channels could not be followed to {port.name}"
        if port.norm is not None:
            kind, dim, eps = port.norm.kind, port.norm.dim, port.norm.eps
            normed = span
            if kind == "states":
                own = _placed(indices, port, channel_axes(port.module).period)  # type: ignore[arg-type]
                normed = span if own is None else span_fields(own)
            if kind == "weights":  # As they lie in the weight.
                own = _placed(indices, port, tensors.named[f"{port.name}.weight"].shape[dim])
                normed = span if own is None else span_fields(own)
            norms.append(NormSite(module=port.name, dim=dim, kind=kind, eps=eps, **normed))
        if port in behind and port.module is not None:
            dim = made_dim(port.module)
            sites.append(GateSite(module=place_behind(port.name), dim=dim, **span))
        elif _reads(port) and port.module is not None and not behind:
            dim_of_input = channel_axes(port.module).site_dim
            reader = readers.get(port.name, port.name)
            if dim_of_input is not None and reader:
                sites.append(GateSite(module=reader, dim=dim_of_input, **span))
            elif not reader:
                user = f"a function multiplies by the weight of {port.name}"
                reason = reason or f"{user}: there is nowhere to mask what it reads"
    mixtures = (p.module for p in family if p.module is not None and is_experts(p.module))
    multiple = max((width_multiple(module) for module in mixtures), default=1)
    if size == 1:
        reason = reason or "it has a single unit"
    elif multiple > 1 and (size % multiple or size == multiple):
        reason = reason or f"experts want a multiple of {multiple} units, and it has {size}"
    return PruningGroup(
        name=name,
        layers=tuple(port.name for port in _producers(family)),
        original_size=size,
        origin=tuple(range(size)),
        slices=tuple(slices.values()),
        sites=tuple(sites),
        norms=tuple(norms),
        prunable=not reason,
        reason=reason,
        unit_multiple=multiple,
    )
