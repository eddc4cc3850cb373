"""Exports the network as blobs, so that a worker can measure a cut on held-out data.

Promises: the exported graph computes what the network computes in evaluation mode, with gates just
where the trainer masks; it is made once for an architecture; nothing is pickled; the network is
left as it was found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, TensorArgument

from elesh.analysis import phase_at
from elesh.observe import get_logger
from elesh.program.program import IGNORED, GateSlot, Node, Program, encoded, name_of
from elesh.settings import SafetySchedule
from elesh.trainer.network.calling import (
    Inputs,
    batch_size,
    call,
    device_of,
    main_output,
    replace_inputs,
    through_layers,
)
from elesh.trainer.network.gates import Axis
from elesh.trainer.network.kinds.matrices import layer_at
from elesh.trainer.network.kinds.norms import refilled, replace_weight
from elesh.trainer.network.kinds.recurrent import without_states
from elesh.trainer.network.layers import require_fit
from elesh.trainer.network.state import preserve_state, unwrapped
from elesh.trainer.surgery.bypass import first_of, with_first
from leyline import ContractError, InvalidField, NetworkExport, Phase, PrunedArchitecture

from .quick_trace import quick_trace
from .refitting import Expected, refitted

_log = get_logger(__name__)
_EXAMPLES = 2
"""Samples that are traced; one would be taken for a constant by ``torch.export``."""
_KEPT = 0.8
"""Share of the units that a check of a program lets pass."""
_FIXED = 32
"""Samples of a program whose network insists on a number (``len(x)`` in its forward pass)."""


class Exporter:
    """Exports a network for verification in workers.

    Args:
        model: the network, which may lose parts between exports.
    """

    _not_followed = True

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrapped(model)
        self._traced: _Traced | None = None

    def export(
        self,
        architecture: PrunedArchitecture,
        held_out: tuple[Inputs, Tensor],
        calibration: Inputs | None = None,
    ) -> NetworkExport:
        """Program, weights and held-out data of the network as it is.

        The program is traced once (a second or more) and fitted to the cuts that follow; weights
        and data are copied to the processor's memory each time.

        Args:
            architecture: of the network now.
            held_out: one batch (inputs, class labels) that the network is not trained on and no
                statistic is measured on; about a thousand samples prove small drops.
            calibration: inputs for choosing in rounds, such as :func:`calibration_inputs`; some of
                those that statistics are measured on will do, held-out ones must not be among
                them. None: the worker chooses at once, from the statistics.

        Raises:
            ShapeMismatch: if the architecture does not describe the network.
            InvalidField: if the network cannot be exported, with the reason, or the batch has
                fewer than two samples. The worker then decides by prediction.
        """
        require_fit(self._model, architecture)
        inputs, labels = held_out
        if batch_size(inputs) < _EXAMPLES:
            raise InvalidField("held_out", f"at least {_EXAMPLES} samples", batch_size(inputs))
        traced = self._program(architecture, inputs)
        tensors = {**_tensors_of(self._model), **traced.constants}
        weights = {path: _plain(tensors[path]) for path in traced.program.weights.values()}
        return NetworkExport(
            program=traced.program.packed(),
            weights=safetensors.torch.save(weights),
            held_out=held_out_blob(inputs, labels, calibration),
        )

    def _program(self, architecture: PrunedArchitecture, inputs: Inputs) -> _Traced:
        """The program of the network as it is: known, fitted to a cut, or traced."""
        last = self._traced
        if last is None or last.architecture.model_hash != architecture.model_hash:
            fitted = None if last is None else _after_cut(self._model, last, architecture, inputs)
            last = self._traced = fitted or _trace(self._model, architecture, inputs)
        return last


def calibration_inputs(
    batches: Iterable[tuple[Inputs, Any]], samples: int = 512, nbytes: int = 16_000_000
) -> Inputs | None:
    """The first inputs of some (inputs, labels) pairs as one batch, for :meth:`Exporter.export`.

    Args:
        samples: at most so many; about 256 are enough (decision 0060).
        nbytes: as many fewer as make no more bytes than this.

    Returns:
        None where there are none. Batches of another shape than the first (sequences of another
        length) are left out.
    """
    parts: list[Inputs] = []
    taken = 0
    for inputs, _ in batches:
        if parts and _layout_of(inputs) != _layout_of(parts[0]):
            continue
        size = batch_size(inputs)
        each = sum(x.nbytes for x in _tensors(inputs).values()) / max(size, 1)
        left = min(samples - taken, size, int(nbytes / max(each, 1)) - taken)
        if left <= 0:
            break
        parts.append(_with_tensors(inputs, {n: x[:left] for n, x in _tensors(inputs).items()}))
        taken += left
    if not parts:
        return None
    columns = [_tensors(part) for part in parts]
    return _with_tensors(parts[0], {n: torch.cat([c[n] for c in columns]) for n in columns[0]})  # type: ignore[no-any-return]


def _layout_of(inputs: Inputs) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(x.shape[1:])) for name, x in _tensors(inputs).items()]


def is_worth_exporting(epoch: int, schedule: SafetySchedule) -> bool:
    """Whether workers have a use for the network at this epoch: to measure what they propose, and
    in the last third of the preparation phase to see how far their predictions are off."""
    phase = phase_at(epoch, schedule)
    if phase is Phase.PREPARATION:
        return 3 * epoch > 2 * schedule.validation_epochs
    return phase is not Phase.VALIDATION


def held_out_blob(inputs: Inputs, labels: Tensor, calibration: Inputs | None = None) -> bytes:
    """Safetensors of ``inputs/<name>``, ``labels`` and ``calibration/<name>``; a name is the
    keyword of a mapping, else the position."""
    tensors = {f"inputs/{name}": _plain(x) for name, x in _tensors(inputs).items()}
    tensors["labels"] = _plain(labels)
    if calibration is not None:
        tensors |= {f"calibration/{name}": _plain(x) for name, x in _tensors(calibration).items()}
    return safetensors.torch.save(tensors)


def _plain(tensor: Tensor) -> Tensor:
    """A copy that shares memory with nothing, which safetensors asks for."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of a batch of inputs by keyword or position."""
    if isinstance(inputs, Tensor):
        return {"0": inputs}
    items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def _with_tensors(inputs: Inputs, tensors: Mapping[str, Tensor]) -> Any:
    """The inputs with other tensors in their places; what is no tensor stays."""
    if isinstance(inputs, Tensor):
        return tensors["0"]
    if isinstance(inputs, Mapping):
        return {name: tensors.get(str(name), value) for name, value in inputs.items()}
    return [tensors.get(str(number), value) for number, value in enumerate(inputs)]


@dataclass(frozen=True)
class _Traced:
    """A network's program, and tensors that its forward pass makes from nothing."""

    program: Program
    constants: dict[str, Tensor]
    architecture: PrunedArchitecture


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by path; some buffers are in no state_dict (causal masks)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def _after_cut(
    model: nn.Module, last: _Traced, architecture: PrunedArchitecture, inputs: Inputs
) -> _Traced | None:
    """The last program, fitted to the network after a cut; None where it has to be traced."""
    weights = {**_tensors_of(model), **last.constants}
    with preserve_state(model, 0), torch.no_grad(), _Gated(model, architecture, inputs) as gated:
        gated.examples(_EXAMPLES)  # so that it knows its slots
        expected = gated.under_random_masks()
        program = refitted(
            last.program, last.architecture, architecture, gated.slots, weights, expected
        )
    return None if program is None else replace(last, program=program, architecture=architecture)


def _trace(model: nn.Module, architecture: PrunedArchitecture, inputs: Inputs) -> _Traced:
    """With any number of samples where the network allows it, else with a fixed one."""
    problem: Exception | None = None
    with preserve_state(model, 0), torch.no_grad(), _Gated(model, architecture, inputs) as gated:
        try:
            if (found := _quickly(gated, architecture)) is not None:
                return found
        except ContractError:
            raise
        except Exception as error:
            _log.info("network not traced by one call, exporting", reason=str(error)[:500])
        for samples, dynamic in ((_EXAMPLES, True), (_FIXED, False)):
            try:
                return _exported(gated, architecture, samples, dynamic=dynamic)
            except ContractError:
                raise
            except Exception as error:  # Whatever tracing meets in the user's code is the finding.
                problem = error
    reason = f"{type(problem).__name__}: {problem}"[:500]
    hint = "without a program workers decide by prediction, under stricter gates"
    expected = "a network that torch.export can trace"
    raise InvalidField("model", expected, reason, hint=hint) from problem


def _quickly(gated: _Gated, architecture: PrunedArchitecture) -> _Traced | None:
    """From one call; None where that does not say enough."""
    gated.examples(_EXAMPLES)
    tensors = _tensors_of(gated.model)
    found = quick_trace(
        gated,
        gated.examples,
        gated.slots,
        tensors,
        {*gated.sizes, *(size for tensor in tensors.values() for size in tensor.shape)},
        architecture.model_hash,
        gated.under_random_masks(),
    )
    return None if found is None else _Traced(*found, architecture)


def _exported(
    gated: _Gated, architecture: PrunedArchitecture, samples: int, *, dynamic: bool
) -> _Traced:
    examples, gates = gated.examples(samples)
    batch = {0: Dim.DYNAMIC} if dynamic else None
    exported = torch.export.export(
        gated,
        (gates, examples),
        dynamic_shapes=([batch] * len(gates), dict.fromkeys(examples, batch)),
        strict=False,
    )
    return _read(exported, gated, architecture, list(examples), None if dynamic else samples)


class _Gated(nn.Module):
    """The network with a gate at every axis and branch, as one module that takes the gates.

    The hooks are on the network only while this is entered.
    """

    def __init__(self, model: nn.Module, architecture: PrunedArchitecture, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self._inputs = inputs
        groups = [group for group in architecture.groups if group.prunable]
        axes = dict.fromkeys(site.axis for group in groups for site in group.sites)
        self._norms = {norm.axis: norm for group in groups for norm in group.norms}
        axes |= dict.fromkeys(self._norms)
        blocks = [block for block in architecture.blocks if block.prunable and not block.removed]
        self._axes: list[Axis] = list(axes)
        self._branches = list(dict.fromkeys(block.branch for block in blocks))
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._layout: list[_Layout] = []
        self._gates: list[Tensor] = []
        self._handles = contextlib.ExitStack()

    def __enter__(self) -> _Gated:
        for on in through_layers(self.model, {path for path, _ in self._axes}):
            self._handles.callback(on.remove)
        for number, (path, _) in enumerate(self._axes):
            module = layer_at(self.model, path)
            hook = self._before(number)
            handles = [module.register_forward_pre_hook(hook, with_kwargs=True)]
            if self._kind(number) == "weights":
                handles += replace_weight(module, partial(self._weight, number))
            if self._kind(number) == "states":
                handles += without_states(module, partial(self._states, number))
            for handle in handles:
                self._handles.callback(handle.remove)
        for number, path in enumerate(self._branches, start=len(self._axes)):
            module = layer_at(self.model, path)
            handle = module.register_forward_hook(self._after(number))
            self._handles.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.close()

    def examples(self, samples: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        """So many samples of the inputs, and gates that let everything pass.

        Raises:
            InvalidField: if a place of a gate was not passed by any signal.
        """
        if not self._layout:
            small, large = self._seen(2), self._seen(3)
            self._layout = [
                _Layout.of(
                    place, small.get(n, ()), large.get(n, ()), dim, (place, dim) in self._norms
                )
                for n, (place, dim) in enumerate(self._places)
            ]
        device = device_of(self.model)
        gates = [torch.ones(samples, layout.size, device=device) for layout in self._layout]
        return self._inputs_of(samples), gates

    def under_random_masks(self) -> Expected:
        """For a number of samples: inputs, gates that are partly closed, and what comes out."""
        generator = torch.Generator().manual_seed(0)

        def expected(samples: int) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
            examples, gates = self.examples(samples)
            masks = [(torch.rand(g.shape, generator=generator) < _KEPT).to(g) for g in gates]
            return examples, masks, self(masks, examples)

        return expected

    def _seen(self, samples: int) -> dict[int, tuple[int, ...]]:
        """The shape that passes each place when the network is called with so many samples."""
        self._shapes = {}
        call(self.model, _with_tensors(self._inputs, self._inputs_of(samples)))
        return self._shapes

    def _inputs_of(self, samples: int) -> dict[str, Tensor]:
        """The first samples, and from the first again where there are not enough."""
        device, tensors = device_of(self.model), _tensors(self._inputs)
        rows = torch.arange(samples)
        return {name: x[rows % len(x)].detach().to(device) for name, x in tensors.items()}

    @property
    def sizes(self) -> set[int]:
        """Sizes of what is known: the inputs, and what passed the gates."""
        inputs = (x.shape[1:] for x in _tensors(self._inputs).values())
        return {size for shape in (*inputs, *self._shapes.values()) for size in shape}

    @property
    def slots(self) -> list[tuple[str, int | None, int]]:
        """Module, axis (None: a branch) and width of every gate."""
        sizes = [layout.size for layout in self._layout]
        return [(path, dim, size) for (path, dim), size in zip(self._places, sizes, strict=True)]

    @property
    def _places(self) -> list[tuple[str, int | None]]:
        return [*self._axes, *((path, None) for path in self._branches)]

    def forward(self, gates: list[Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """The network's main output under the gates."""
        self._gates = gates
        try:
            return main_output(call(self.model, _with_tensors(self._inputs, inputs)))
        finally:
            self._gates = []

    def _before(self, number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return replace_inputs(module, args, kwargs, lambda x: self._passed(number, x))

        return hook

    def _after(self, number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return with_first(output, self._times(number, first_of(output)))

        return hook

    def _passed(self, number: int, x: Tensor) -> Tensor:
        """What enters a consumer, or a normalisation that sees the kept channels only."""
        norm = self._norms.get(self._axes[number])
        if self._kind(number) == "states" and not self._gates:
            module: Any = layer_at(self.model, self._axes[number][0])
            samples = x.shape[0 if module.batch_first else 1]
            self._shapes[number] = (module.hidden_size, samples)
            return x
        if norm is None or not self._gates:
            return self._times(number, x)
        if norm.kind in ("weights", "states"):
            return x
        return refilled(x, self._gate(number, x), norm.dim, norm.kind, norm.eps)

    def _kind(self, number: int) -> str:
        """How what enters at an axis is normalised; empty where it is not."""
        norm = self._norms.get(self._axes[number])
        return "" if norm is None else norm.kind

    def _states(self, number: int) -> Tensor:
        """The gates of a recurrent layer's states: those of the first sample, as of all."""
        module: Any = layer_at(self.model, self._axes[number][0])
        return self._gates[number][0] if self._gates else torch.ones(module.hidden_size)

    def _weight(self, number: int, weight: Tensor) -> Tensor:
        """A weight that is standardised over the inputs of the first sample, as of all."""
        if not self._gates:
            return weight
        norm, gate = self._norms[self._axes[number]], self._gates[number][0].to(weight.dtype)
        shape = [1] * weight.ndim
        shape[norm.dim] = -1
        return refilled(weight, gate.view(shape), norm.dim, norm.kind, norm.eps)

    def _times(self, number: int, x: Tensor) -> Tensor:
        if not self._gates:
            if len(x) > 1 or number not in self._shapes:  # Of calls, one with samples.
                self._shapes[number] = tuple(x.shape)
            return x
        return x * self._gate(number, x)

    def _gate(self, number: int, x: Tensor) -> Tensor:
        """The gate of a place in the form that broadcasts to ``x``."""
        layout = self._layout[number]
        gate = self._gates[number].to(x.dtype)
        if layout.samples is None or (layout.samples == 0 and len(x) == 1):
            shape = [1] * x.ndim  # What it reads for all samples: as the first has it.
            shape[layout.units] = layout.size
            return gate[0].reshape(shape)
        if layout.rows > 1:
            gate = gate.repeat_interleave(layout.rows, dim=0)
        shape = [1] * x.ndim
        shape[layout.samples], shape[layout.units] = -1, layout.size
        if layout.samples > layout.units:
            gate = gate.transpose(0, 1)
        return gate.reshape(shape)


@dataclass(frozen=True)
class _Layout:
    """Where samples and units lie in what passes a gate."""

    samples: int | None
    """The dimension that counts samples; None for a normalisation of what is the same for all."""
    rows: int
    """Rows a sample takes of it (windows and time steps of a sample lie one after the other)."""
    units: int
    """The dimension that counts units; any other than ``samples`` for a branch."""
    size: int
    """Units along it, 1 for a branch."""

    @classmethod
    def of(
        cls,
        place: str,
        two: tuple[int, ...],
        three: tuple[int, ...],
        dim: int | None,
        normed: bool = False,
    ) -> _Layout:
        """From the shapes with two and with three samples; of a normalisation or not.

        Raises:
            InvalidField: if no dimension counts samples.
        """
        if normed and two and two == three and dim is not None:
            return cls(None, 1, dim % len(two), two[dim])
        moved = [d for d, (a, b) in enumerate(zip(two, three, strict=False)) if a != b]
        if len(moved) != 1 or two[moved[0]] * 3 != three[moved[0]] * 2 or len(two) < 2:
            expected = "an input with one dimension that counts samples"
            raise InvalidField(f"at {place}", expected, f"shapes {two} and {three}")
        (samples,) = moved
        units = (0 if samples else 1) if dim is None else dim % len(two)
        return cls(samples, two[samples] // 2, units, 1 if dim is None else two[units])


def _read(
    exported: torch.export.ExportedProgram,
    gated: _Gated,
    architecture: PrunedArchitecture,
    names: list[str],
    batch: int | None,
) -> _Traced:
    """The exported graph in the form that workers read.

    Raises:
        InvalidField: if it holds something that a program may not hold.
    """
    weights: dict[str, str] = {}
    given: list[str] = []
    constants: dict[str, Tensor] = {}
    for spec in exported.graph_signature.input_specs:
        if not isinstance(spec.arg, TensorArgument):
            raise InvalidField("model", "a network of tensors only", str(spec.arg))
        if spec.kind is InputKind.USER_INPUT:
            given.append(spec.arg.name)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            weights[spec.arg.name] = path = f"constant/{spec.target}"
            constants[path] = exported.constants[str(spec.target)]
        else:
            weights[spec.arg.name] = str(spec.target).removeprefix("model.")
    count = len(gated.slots)
    slots = [GateSlot(value, *slot) for value, slot in zip(given, gated.slots, strict=False)]
    inputs = dict(zip(given[count:], names, strict=True))
    nodes = tuple(_nodes(exported.graph))
    (output,) = (node for node in exported.graph.nodes if node.op == "output")
    (result,) = output.args[0]
    given_to = (architecture.model_hash, weights, inputs, tuple(slots))
    program = Program(*given_to, nodes, result.name, batch)
    return _Traced(program, constants, architecture)


def _nodes(graph: torch.fx.Graph) -> Iterator[Node]:
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or str(node.target) in IGNORED:
            continue
        if node.op != "call_function":
            raise InvalidField("model", "a graph of operators only", f"{node.op} {node.target}")
        kwargs = {key: encoded(value) for key, value in node.kwargs.items()}
        args = tuple(encoded(value) for value in node.args)
        yield Node(node.name, name_of(node.target), args, kwargs)
