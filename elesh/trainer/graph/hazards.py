"""Groups that wiring and proof would let pass, and that are left alone all the same.

Promises: a group is refused where a cut could break what the example inputs do not show (layers
that neither evaluation nor training reaches with them: later stages, other entry points, branches
by size) or tear apart parameters that share their memory.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from elesh.observe import get_logger
from elesh.trainer.network.calling import Inputs, call, device_of, doubled, tensors_in
from elesh.trainer.network.layers import channel_axes
from elesh.trainer.network.state import seed_generators
from elesh.trainer.surgery.teachers import teachers_in
from leyline import InvalidField, PruningGroup

__all__ = ["require_initialised", "run_once", "trainable_example", "without_hazards"]

_log = get_logger(__name__)


def require_initialised(model: nn.Module) -> None:
    """Refuse a model whose lazy layers have no weights yet.

    Raises:
        InvalidField: naming the first of them.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            hint = "call the model once before it is given to the recorder"
            raise InvalidField(f"model.{name}", "an initialised tensor", "a lazy one", hint=hint)


def trainable_example(model: nn.Module, inputs: Inputs) -> tuple[Inputs | None, set[str]]:
    """Example inputs that the model runs with in training mode: these, or twice as many samples
    (one alone cannot be normalised over the batch); None if it runs with neither. And the
    parameters that are reached then, as by :func:`run_once`."""
    for example in (inputs, doubled(inputs)):
        with contextlib.suppress(Exception):  # Whatever the user's network raises.
            return example, run_once(model, example, training=True)
    return None, set()


def run_once(model: nn.Module, inputs: Inputs, *, training: bool) -> set[str]:
    """Forward and backward, seeded; the parameters that the outputs depend on, and those of modules
    that were called."""
    seed_generators(device_of(model), 0)
    model.train(training)
    called, fed = set[nn.Module](), set[int]()
    handles = [
        module.register_forward_pre_hook(lambda module, args: called.add(module))
        for module in model.modules()
    ]

    def note(parameter: Tensor) -> None:
        fed.add(id(parameter))
        parameter.grad = None  # At once: there is not room for all.

    trained = [p for p in model.parameters() if p.requires_grad]
    handles += [p.register_post_accumulate_grad_hook(note) for p in trained]  # type: ignore[no-untyped-call]
    try:
        with torch.enable_grad():
            outputs = [t for t in tensors_in(call(model, inputs)) if t.requires_grad]
            if not outputs:
                return set()
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    finally:
        for handle in handles:
            handle.remove()
        model.eval()
    reached = {name for name, parameter in model.named_parameters() if id(parameter) in fed}
    for prefix, module in model.named_modules():
        if module in called:
            reached |= {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
    return reached


def without_hazards(
    groups: Sequence[PruningGroup],
    model: nn.Module,
    traced: nn.Module,
    inputs: Inputs,
    trained: tuple[Inputs | None, set[str]],
) -> tuple[PruningGroup, ...]:
    """The groups, those that must be left alone marked with a reason.

    Args:
        model: the network itself.
        traced: its copy, which may run.
        trained: what :func:`trainable_example` found of it.
    """
    tensors = dict(traced.named_parameters())
    followed = tuple(f"{teacher.name}." for teacher in teachers_in(model))
    memory, unreached = _in_shared_memory(model), _unreached(traced, inputs, followed, trained)

    def reason(group: PruningGroup) -> str:
        for part in group.slices:
            if part.tensor in memory:
                return f"{part.tensor} shares its memory with {memory[part.tensor]}"
        widths = {
            tensors[part.tensor].shape[part.dim]
            for part in group.slices
            if part.tensor in tensors and part.tensor.rpartition(".")[0] in group.layers
        }
        for layer, width, flattened in unreached:
            if any(width == own or (flattened and width % own == 0) for own in widths):
                return f"{layer} may read it, which the example inputs do not reach"
        return ""

    found = [reason(group) if group.prunable else "" for group in groups]
    return tuple(
        group.model_copy(update={"prunable": False, "reason": why}) if why else group
        for group, why in zip(groups, found, strict=True)
    )


def _in_shared_memory(model: nn.Module) -> Mapping[str, str]:
    """Parameters that are views of one memory, each with the name of another."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.layout is torch.strided and not parameter.is_meta and parameter.numel():
            places[parameter.untyped_storage().data_ptr()].append(name)
    return {
        name: names[number - 1]
        for names in places.values()
        for number, name in enumerate(names)
        if len(names) > 1
    }


def _unreached(
    model: nn.Module,
    inputs: Inputs,
    followed: tuple[str, ...],
    trained: tuple[Inputs | None, set[str]],
) -> list[tuple[str, int, bool]]:
    """Layers whose parameters no output depends on, in evaluation or in training: name, width of
    the input, and whether the input may be flattened. Teachers (``followed``) read what their own
    layers make."""
    try:
        reached = run_once(model, inputs, training=False)
    except Exception as error:  # It ran with them before.
        told = f"{type(error).__name__}: {str(error)[:200]}"
        raise InvalidField("model", "a network that can be run several times", told) from error
    if not reached:
        return []
    example, in_training = trained
    reached |= in_training
    found = [
        (name, width, isinstance(module, nn.Linear))
        for name, module in model.named_modules()
        if not name.startswith(followed)
        and (own := {f"{name}.{path}" for path, _ in module.named_parameters(recurse=False)})
        and not own & reached
        for width in _widths(module)
    ]
    if found:
        _log.warning(
            "the example inputs do not reach some layers, what may feed them is not cut",
            layers=sorted({name for name, _, _ in found})[:20],
            runs_in_training_mode=example is not None,
        )
    return found


def _widths(module: nn.Module) -> Iterator[int]:
    """How many channels a layer may read."""
    axes = channel_axes(module)
    for attribute, dim in axes.inputs or axes.outputs:
        weight = getattr(module, attribute, None)
        if isinstance(weight, Tensor) and not isinstance(module, nn.Embedding):
            yield weight.shape[dim]
    for name in ("input_size", "embed_dim", "kdim", "vdim", "num_channels"):
        if isinstance(size := getattr(module, name, None), int):
            yield size
    if isinstance(shape := getattr(module, "normalized_shape", None), tuple):
        yield int(shape[-1])
