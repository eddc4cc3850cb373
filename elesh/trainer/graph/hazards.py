"""Groups that pass wiring and proof but must still be left alone.

Promises: a group is refused where a cut could break what the example inputs do not show (layers
that neither evaluation nor training reaches with them: later stages, other entry points, branches
by size), where a cut would tear apart parameters that share their memory, and where a measurement
under its mask would prove nothing: the mask has no effect, since the forward pass goes around the
modules (compiled or traced parts), or consumers read rows that do not belong to single samples.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from elesh.observe import get_logger
from elesh.trainer.network.calling import (
    Inputs,
    call,
    device_of,
    doubled,
    replace_inputs,
    tensors_in,
    through_layers,
)
from elesh.trainer.network.calls import Call, Calls, Link
from elesh.trainer.network.gates import Axis, GateMeter
from elesh.trainer.network.kinds.matrices import layer_at
from elesh.trainer.network.kinds.weight_norms import owner_of
from elesh.trainer.network.layers import channel_axes, held
from elesh.trainer.network.saved import without_saving
from elesh.trainer.network.state import seed_generators
from elesh.trainer.network.traversal import modules_in, parameters_in
from elesh.trainer.surgery.averages import teachers_in
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import InvalidField, Level, PrunedArchitecture, PruningGroup

from .dependencies import SPREADS, leaf_of
from .leftovers import of_training, of_unreached, with_all_matrices, with_readers_of_training
from .mixtures import MIXED, Gate, beside, mixed_in, refused
from .residual_branches import Trace, behind, with_gradients

__all__ = [
    "met_in_training",
    "reached_by",
    "read_in_training",
    "require_initialised",
    "require_repeatable",
    "traced_gates",
    "train_once",
    "trainable_example",
    "with_acting_masks",
    "without_hazards",
]

_log = get_logger(__name__)

_NO_EFFECT = "masking it changes no output, so a cut cannot be judged under a mask"


def require_initialised(model: nn.Module) -> None:
    """Refuse a model whose weights are not there yet: lazy layers, tensors on the meta device.

    Raises:
        InvalidField: naming the first of them.
    """
    buffers = (
        (f"{path}.{name}".lstrip("."), held)
        for path, module in modules_in(model).items()
        for name, held in module._buffers.items()
        if held is not None
    )
    for name, tensor in (*parameters_in(model).items(), *buffers):
        if is_lazy(tensor):
            hint = "call the model once before it is given to the recorder"
            raise InvalidField(f"model.{name}", "an initialised tensor", "a lazy one", hint=hint)
        if tensor.is_meta:
            hint = "give the model memory and weights first: model.to_empty(device=...), then load"
            raise InvalidField(f"model.{name}", "a tensor with values", "a meta tensor", hint=hint)


def require_modules(model: nn.Module) -> None:
    """Refuse a network whose modules are compiled away: none of them can be masked or cut.

    Raises:
        InvalidField: naming the first of them.
    """
    for name, module in modules_in(model).items():
        scripted = isinstance(module, torch.jit.ScriptModule)
        exported = any(kind.__module__.startswith("torch.export") for kind in type(module).__mro__)
        if scripted or exported:
            kind = "scripted" if scripted else "exported"
            where = f"model.{name}" if name else "model"
            hint = "give the network that it was made of, and script or export the cut one"
            raise InvalidField(where, "a module of Python", f"a {kind} one", hint=hint)


def require_repeatable(model: nn.Module, inputs: Inputs) -> None:
    """Refuse a network that does not run again with the inputs that it ran with.

    Raises:
        InvalidField: saying what it raised.
    """
    try:
        seed_generators(device_of(model), 0)
        call(model, inputs)
    except Exception as error:
        found = f"{type(error).__name__}: {str(error)[:200]}"
        raise InvalidField("model", "a network that can be run several times", found) from error


def trainable_example(model: nn.Module, inputs: Inputs) -> tuple[Inputs | None, set[str]]:
    """Example inputs that the model runs with in training mode: these, or twice as many samples
    (one alone cannot be normalised over the batch); None if it runs with neither. And the
    parameters that its outputs depend on then, and those of modules that were called."""
    for example in (inputs, doubled(inputs)):
        with contextlib.suppress(Exception):  # Whatever the user's network raises.
            return example, _reached_in_training(model, example)
    return None, set()


def _reached_in_training(model: nn.Module, inputs: Inputs) -> set[str]:
    """See :func:`train_once`; the parameters that the outputs depend on, and those of modules that
    were called."""
    called, handles = set[nn.Module](), list[RemovableHandle]()

    def note(module: nn.Module, args: Any) -> None:
        called.add(module)

    handles += [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        fed = train_once(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in model.named_modules()}
    return set() if fed is None else reached_by(model, fed, {names[module] for module in called})


def train_once(model: nn.Module, inputs: Inputs) -> set[int] | None:
    """Forward in training mode, seeded; the ids of the parameters that the outputs depend on, None
    if these have no history. That what the backward pass needs is still there is seen without
    keeping it: the network runs again, and backward, only where it has functions of its own in it,
    or if something is not there. The model is left in evaluation mode."""

    def outputs() -> list[Tensor]:
        seed_generators(device_of(model), 0)
        with torch.enable_grad():
            return [t for t in tensors_in(call(model, inputs)) if t.requires_grad]

    model.train()
    try:
        found, saved = without_saving(outputs)
        functions = behind([t.grad_fn for t in found if t.grad_fn is not None])
        own = any(isinstance(function, BackwardCFunction) for function in functions)
        if not found or not (saved is None or own or saved.changed):
            return {id(f.variable) for f in functions if hasattr(f, "variable")} or None
        if saved is not None:
            del found, functions
            found = outputs()
        return _fed(model, found)
    finally:
        model.eval()


def _fed(model: nn.Module, outputs: Sequence[Tensor]) -> set[int]:
    """The ids of the parameters that a backward pass from these reaches."""
    fed = set[int]()

    def note(parameter: Tensor) -> None:
        fed.add(id(parameter))
        parameter.grad = None  # At once: there is not room for all.

    trained = [p for p in model.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(note) for p in trained]  # type: ignore[no-untyped-call]
    try:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    finally:
        for handle in handles:
            handle.remove()
    return fed


def read_in_training(
    model: nn.Module, inputs: Inputs, layers: Collection[str]
) -> dict[str, list[str]]:
    """By layer that makes channels: which of ``layers`` read these in training mode, with nothing
    between that makes others. The model is left in evaluation mode."""
    calls, _ = _calls_in_training(model, inputs)
    makers = {one.output: one.name for one in calls if channel_axes(one.module).produces}
    found: dict[str, list[str]] = defaultdict(list)
    for one in calls:
        if one.name in layers:
            for made in _nearest([link[0] for link in one.inputs], makers):
                found[makers[made]].append(one.name)
    return found


def _nearest(starts: Sequence[Any], makers: Collection[Any]) -> list[Any]:
    """Which of ``makers`` these functions come from, with none of the others between."""
    stack, seen = list(starts), dict[Any, None]()
    while stack:
        function = stack.pop()
        if function is not None and function not in seen:
            seen[function] = None
            if function not in makers:
                stack += [before for before, _ in function.next_functions]
    return [function for function in seen if function in makers]


def met_in_training(model: nn.Module, inputs: Inputs, vectors: Mapping[str, int]) -> dict[str, str]:
    """By path of a parameter: the layer among whose channels training puts it, by an operation of
    both. The model is left in evaluation mode."""
    calls, roots = _calls_in_training(model, inputs)
    made = [one for one in calls if channel_axes(one.module).produces and one.output is not None]
    makers = {one.output: one.name for one in made}
    # What is written over a view (a linear layer's output, of sequences) has what it is a view of
    # in its history, and not the view.
    views = [one for one in made if "View" in one.output.name()]
    makers |= {one.output.next_functions[0][0]: one.name for one in views}
    paths = {id(parameter): path for path, parameter in model.named_parameters() if path in vectors}
    found: dict[str, str] = {}
    for function in behind(roots):
        operands = [source for source, _ in function.next_functions if source is not None]
        own = [paths.get(id(leaf_of(source, SPREADS))) for source in operands]
        others = [one for one, path in zip(operands, own, strict=True) if path is None]
        nearest = [makers[one] for one in _nearest(others, makers)] if any(own) else []
        found |= {path: name for path in own if path is not None for name in nearest[:1]}
    return found


def _calls_in_training(model: nn.Module, inputs: Inputs) -> tuple[list[Call], list[Any]]:
    """What a pass in training mode calls, and the functions that made its outputs."""

    def run() -> tuple[list[Call], list[Any]]:
        seed_generators(device_of(model), 0)
        with torch.enable_grad(), Calls(model) as calls:
            outputs = tensors_in(call(model, inputs))
        return calls.made, [one.grad_fn for one in outputs if one.grad_fn is not None]

    model.train()
    try:
        return without_saving(run)[0]
    finally:
        model.eval()


def reached_by(model: nn.Module, fed: Collection[int], called: Collection[str]) -> set[str]:
    """Paths of the parameters with these ids, and of those of modules that were called."""
    reached = {name for name, parameter in model.named_parameters() if id(parameter) in fed}
    for prefix, module in model.named_modules():
        if prefix in called:
            reached |= _own(prefix, module)
    return reached


def _own(prefix: str, module: nn.Module) -> set[str]:
    """Paths of a module's own parameters."""
    held = module._parameters.items()
    return {f"{prefix}.{name}".lstrip(".") for name, tensor in held if tensor is not None}


def without_hazards(
    groups: Sequence[PruningGroup],
    model: nn.Module,
    traced: nn.Module,
    reached: Collection[str],
    in_training: Callable[[], set[str]],
    read: Callable[[Collection[str]], Mapping[str, Sequence[str]]],
    grouped: Callable[[Collection[str]], Sequence[PruningGroup]],
    enclosed: Callable[[], Mapping[str, str]] = dict,
) -> tuple[PruningGroup, ...]:
    """The groups, those that must be left alone marked with a reason.

    Args:
        model: the network itself.
        traced: its copy.
        reached: its parameters that outputs depend on, and those of modules that were called.
        in_training: asks for the same of training mode, if anything was not reached.
        read: asks which layers are read by some that only training reaches.
        grouped: asks for the groups of channels that training mode shows, where only it reaches
            some layers.
        enclosed: asks, if anything was not reached, by group for the module that its channels do
            not leave: they are not read by parts of modules beside that one.
    """
    tensors = dict(traced.named_parameters())
    followed = tuple(f"{teacher.name}." for teacher in teachers_in(model))
    memory, (unreached, late) = (
        _in_shared_memory(model),
        _unreached(traced, followed, reached, in_training),
    )
    groups = with_readers_of_training(groups, late, grouped(late)) if late else groups
    readers = read(late) if late else {}
    holders = enclosed() if unreached else {}

    def reason(group: PruningGroup) -> str:
        for part in group.slices:
            if part.tensor in memory:
                return f"{part.tensor} shares its memory with {memory[part.tensor]}"
        owners = {owner_of(part.tensor)[0] for part in group.slices}
        for reader in (one for layer in group.layers for one in readers.get(layer, ())):
            if reader not in owners:
                return f"{reader} reads it, which runs in training mode only"
        widths = {
            tensors[part.tensor].shape[part.dim]
            for part in group.slices
            if part.tensor in tensors and owner_of(part.tensor)[0] in group.layers
        }
        for layer, width, flattened in unreached:
            if beside(layer, holders.get(group.name, ""), group.level is Level.HEAD):
                continue
            if any(width == own or (flattened and width % own == 0) for own in widths):
                unseen = "which the example inputs do not reach; some with more samples may"
                return f"{layer} may read it, {unseen}"
        return ""

    found = [reason(group) if group.prunable else "" for group in groups]
    marked = tuple(
        group.model_copy(update={"prunable": False, "reason": why}) if why else group
        for group, why in zip(groups, found, strict=True)
    )
    unseen = of_unreached(dict.fromkeys(name for name, _, _ in unreached), traced)
    listed = (*marked, *unseen, *of_training(marked, late, traced))
    return with_all_matrices(listed, traced, followed)


def _in_shared_memory(model: nn.Module) -> Mapping[str, str]:
    """Parameters that are views of one memory, each with the name of another."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, parameter in parameters_in(model).items():
        if parameter.layout is torch.strided and not parameter.is_meta and parameter.numel():
            places[parameter.untyped_storage().data_ptr()].append(name)
    return {
        name: names[number - 1]
        for names in places.values()
        for number, name in enumerate(names)
        if len(names) > 1 and not _of_one_recurrent_layer(model, names)
    }


def _of_one_recurrent_layer(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether these are the weights of one recurrent layer, which it lays into one memory on a GPU
    (``flatten_parameters``) and gives up as soon as one of them is elsewhere."""
    owners = {name.rpartition(".")[0] for name in names}
    return len(owners) == 1 and isinstance(model.get_submodule(owners.pop()), nn.RNNBase)


def _unreached(
    model: nn.Module,
    followed: tuple[str, ...],
    reached: Collection[str],
    in_training: Callable[[], set[str]],
) -> tuple[list[tuple[str, int, bool]], set[str]]:
    """Layers whose parameters no output depends on, in evaluation or in training: name, width of
    the input, and whether the input may be flattened; and the names of those that training
    reaches. Teachers (``followed``) read what their own layers make."""
    layers = [
        (name, module, own)
        for name, module in model.named_modules()
        if name
        and not name.startswith(followed)
        and (own := _own(name, module))
        and own.isdisjoint(reached)
    ]
    if not reached or not layers:
        return [], set()
    trained = in_training()
    found = [
        (name, width, isinstance(module, nn.Linear))
        for name, module, own in layers
        if own.isdisjoint(trained)
        for width in _widths(module)
    ]
    if found:
        _log.warning(
            "the example inputs do not reach some layers, what may feed them is not cut",
            layers=sorted({name for name, _, _ in found})[:20],
            runs_in_training_mode=bool(trained),
        )
    return found, {name for name, _, own in layers if not own.isdisjoint(trained)}


def _widths(module: nn.Module) -> Iterator[int]:
    """How many channels a layer may read."""
    axes = channel_axes(module)
    for attribute, dim in axes.inputs or axes.outputs:
        weight = held(module, attribute)
        if weight is not None and not isinstance(module, nn.Embedding):
            yield weight.shape[dim]
    for name in ("input_size", "embed_dim", "kdim", "vdim", "num_channels"):
        if isinstance(size := getattr(module, name, None), int):
            yield size
    if isinstance(shape := getattr(module, "normalized_shape", None), tuple):
        yield int(shape[-1])


def traced_gates(passage: Trace, groups: Sequence[PruningGroup]) -> dict[Axis, Gate]:
    """What the traced pass shows of masks, by one backward pass that leaves out all weights."""
    shrinking = {layer for group in groups if group.prunable for layer in group.layers}
    calls = [one for one in passage.passes if one.given is not None and one.made is not None]
    # What leaves a layer that stays whole counts as an output: a detector's scores before it
    # chooses by them.
    kept = [one.made for one in calls if one.name not in shrinking]
    starts = list(dict.fromkeys(link for link in (*passage.outputs, *kept) if link is not None))
    ends = list(dict.fromkeys(one.made for one in calls if one.made is not None))
    generator = torch.Generator().manual_seed(0)

    def drawn(link: Link) -> Tensor:
        kind = link[0]._input_metadata[link[1]]
        shape = [int(size) for size in kind.shape]
        return torch.randn(shape, generator=generator).to(kind.device, kind.dtype)

    try:
        moved = with_gradients(starts, [drawn(link) for link in starts], ends)
    except Exception:  # Whatever the user's network raises: the masks are tried, then.
        return {}
    found: dict[Axis, Gate] = {}
    for one in calls:
        axes = channel_axes(one.module)
        dim = axes.site_dim
        if one.given is None or dim is None or axes.refusal:
            continue
        acting = one.given.acting.cpu().numpy() & (one.made in moved)
        known = found.get((one.name, dim))
        acting = acting if known is None else acting | known.acting
        rows = one.given.rows
        if known is not None and 1 in (rows, known.rows):  # One for all samples: not measured.
            rows = max(rows, known.rows)
        found[one.name, dim] = Gate(rows, acting)
    return found


def with_acting_masks(
    copied: nn.Module,
    inputs: Inputs,
    architecture: PrunedArchitecture,
    gates: Mapping[Axis, Gate],
    rows: Mapping[Axis, int],
) -> PrunedArchitecture:
    """The architecture with every group whose mask has no effect marked.

    Args:
        copied: a copy of the network in evaluation mode with random weights.
        gates: what is known of them already.
        rows: of what enters consumers, as far as is known.
    """
    candidates = [group for group in architecture.groups if group.prunable]
    mixed = mixed_in(inputs, candidates, rows)
    moving = {group.name for group in candidates if _acts(group, gates)}
    untried = [g for g in candidates if g.name not in moving and g.name not in mixed]
    if any(site.axis not in gates for group in untried for site in group.sites):
        others = _moving(copied, inputs, candidates, rows)
        moving, mixed = moving | others[0], mixed | others[1]
        untried = [g for g in untried if g.name not in moving and g.name not in mixed]
    if untried:  # A sigmoid that is saturated may be so no more where less comes in.
        with _quiet(copied, untried):
            moving |= _moving(copied, inputs, candidates, rows)[0]
        untried = [g for g in untried if g.name not in moving]
    reasons = dict.fromkeys(_silent(copied, inputs, architecture, untried), _NO_EFFECT)
    reasons |= dict.fromkeys(mixed, MIXED)
    if not reasons:
        return architecture
    groups = refused(architecture.groups, reasons)
    return PrunedArchitecture.build(architecture.tensors, architecture.layers, groups)


def _acts(group: PruningGroup, gates: Mapping[Axis, Gate]) -> bool:
    return any(
        bool(gate.acting[site.all_of(range(group.size))].any())
        for site in group.sites
        if (gate := gates.get(site.axis)) is not None
    )


def _moving(
    copied: nn.Module,
    inputs: Inputs,
    groups: Sequence[PruningGroup],
    known: Mapping[Axis, int],
) -> tuple[set[str], set[str]]:
    """Those of the groups along whose gates the outputs have a gradient: not all of those that have
    an effect, but at the cost of one pass; and those of which a consumer reads rows that the
    samples do not share evenly."""
    rows = dict[Axis, int]()

    def watch(axis: Axis, x: Tensor) -> None:
        rows[axis] = 0 if x.is_nested else x.shape[0]

    axes = dict.fromkeys(site.axis for group in groups for site in group.sites)
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad(), GateMeter(copied, axes, watch) as meter:
            meter.expect(1)
            with _kept_whole(copied, groups) as heads:
                outputs = [t for t in tensors_in(call(copied, inputs)) if t.requires_grad]
            outputs += heads
            drawn = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
            products = [(t * d).sum() for t, d in zip(outputs, drawn, strict=True)]
            sums, _ = meter.backward(torch.stack(products).sum(), keep=False)
    except Exception:  # Whatever the user's network raises: each mask is tried, then.
        return set(), set()
    return {
        group.name
        for group in groups
        for site in group.sites
        if site.axis in sums
        and bool(sums[site.axis][0, sorted(site.all_of(range(group.size)))].any())
    }, mixed_in(inputs, groups, {**rows, **known})


@contextlib.contextmanager
def _quiet(copied: nn.Module, groups: Sequence[PruningGroup]) -> Iterator[None]:
    """What the consumers of these groups read is made small."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return replace_inputs(module, args, kwargs, lambda x: x * 1e-3)

    paths = dict.fromkeys(site.module for group in groups for site in group.sites)
    handles = through_layers(copied, paths)
    handles += [
        layer_at(copied, path).register_forward_pre_hook(hook, with_kwargs=True) for path in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _kept_whole(copied: nn.Module, groups: Sequence[PruningGroup]) -> Iterator[list[Tensor]]:
    """What leaves layers that none of the groups shrinks: scores and boxes of a detector, before it
    chooses among them."""
    shrinking, seen = {layer for group in groups for layer in group.layers}, list[Tensor]()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            seen.append(output)

    handles = [
        module.register_forward_hook(note)
        for name, module in copied.named_modules()
        if name not in shrinking and channel_axes(module).site_dim is not None
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _silent(
    copied: nn.Module,
    inputs: Inputs,
    architecture: PrunedArchitecture,
    groups: Sequence[PruningGroup],
) -> set[str]:
    """Those of the groups that can lose all units but one under a mask, and no output changes."""
    if not groups:
        return set()
    surgeon = Surgeon(copied, architecture, restore_points=0)

    def outputs() -> list[Tensor]:
        seed_generators(device_of(copied), 0)
        with torch.no_grad():
            return [t for t in tensors_in(call(copied, inputs)) if t.is_floating_point()]

    plain, found = outputs(), set()
    for group in groups:
        surgeon.mask({group.name: range(group.size - group.unit_multiple)})
        try:
            masked = outputs()
        finally:
            surgeon.unmask()
        if all(torch.equal(a, b) for a, b in zip(plain, masked, strict=True)):
            found.add(group.name)
    return found
