"""Calls a network with inputs and outputs of any form; times a call; and makes linear layers
visible whose weight a function multiplies by.

Promises: inputs may be a tensor, a sequence (positional) or a mapping (keywords); nests of tuples,
named tuples, lists, mappings and dataclasses keep their types.

Some code hands the weights of its layers to a function (torchvision's Swin): the layers are never
called, so nothing can be masked or measured at their inputs. While the hooks of
:func:`through_layers` are on a network, such a product is made by calling the layer. The values are
the same; a layer that is called anyway costs nothing from its second call on.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import time
import traceback
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Mapping,
    MutableMapping,
    Sequence,
    ValuesView,
)
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from leyline import InvalidField

from .kinds.matrices import BareMatrix, calling_matrices, layer_at, plain_name
from .kinds.outputs import LayerOutput, passing_outputs
from .multihead import NATIVE, Patched

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""One batch of inputs, positional or by keyword; the first dimension of every tensor counts
samples."""
Pair = tuple[Inputs, Any]
"""Inputs and labels of one batch."""
Batches = Sequence[Pair]

_PLAIN = (str, bytes, int, float, type(None))
_EXAMPLES: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def remember_example(model: nn.Module, inputs: Inputs) -> None:
    """Keep a batch that the network runs with, for those that have to try it later."""
    _EXAMPLES[model] = map_tensors(lambda x: x.detach(), inputs)


def example_of(model: nn.Module) -> Any:
    """The batch that was last remembered; None if none was."""
    return _EXAMPLES.get(model)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's answer to one batch of inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    # One argument: no plain sequence, or a named tuple that the network does not take as several.
    one = isinstance(inputs, (Tensor, PackedSequence)) or not isinstance(inputs, Sequence)
    if not one and hasattr(inputs, "_fields"):
        try:
            inspect.signature(model.forward).bind(*inputs)
        except TypeError:
            one = True
    return model(inputs) if one else model(*inputs)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` applied to every tensor in its tuples, lists, mappings and
    dataclasses, which are copied; of packed sequences, to all but the batch sizes."""

    def mapped(part: Any) -> Any:
        return map_tensors(function, part)

    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, PackedSequence):
        return PackedSequence(
            function(value.data),
            value.batch_sizes,
            mapped(value.sorted_indices),
            mapped(value.unsorted_indices),
        )
    if isinstance(value, tuple):
        parts = [mapped(part) for part in value]
        return type(value)._make(parts) if hasattr(value, "_make") else tuple(parts)
    if isinstance(value, list):
        return [mapped(part) for part in value]
    if isinstance(value, Mapping):
        return _mapping(value, {key: mapped(part) for key, part in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        copied = copy.copy(value)
        for field in dataclasses.fields(value):
            # Frozen ones, too; fields that __init__ does not take, too.
            object.__setattr__(copied, field.name, mapped(getattr(value, field.name)))
        return copied
    return value


def _mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the type of ``value`` with other items."""
    if type(value) is dict or not isinstance(value, MutableMapping):
        return items
    copied = copy.copy(value)
    for key, item in items.items():
        copied[key] = item
    return copied


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in a nest of tuples, lists, mappings, dataclasses, distributions, in order."""
    parts: Iterable[Any] = ()
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        parts = (value.data, value.sorted_indices, value.unsorted_indices)
    elif isinstance(value, (tuple, list)):
        parts = value
    elif isinstance(value, dict) or (not isinstance(value, _PLAIN) and isinstance(value, Mapping)):
        parts = value.values()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, Distribution):
        parts = vars(value).values()
    return [tensor for part in parts for tensor in tensors_in(part)]


def packed_in(value: Any) -> PackedSequence | None:
    """The first packed sequence in a nest."""
    if isinstance(value, PackedSequence):
        return value
    if isinstance(value, Mapping):
        parts: Iterable[Any] = value.values()
    elif isinstance(value, (tuple, list)):
        parts = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = vars(value).values()
    else:
        return None
    return next((found for part in parts if (found := packed_in(part)) is not None), None)


def example_copy(inputs: Inputs, precision: torch.dtype = torch.float32) -> Any:
    """Example inputs that no tracing can change, in this precision where they are floats."""

    def copied(tensor: Tensor) -> Tensor:
        clone = tensor.detach().clone()
        return clone.to(precision) if clone.is_floating_point() else clone

    with torch.inference_mode(False):
        return map_tensors(copied, inputs)


def first_samples(inputs: Inputs, count: int) -> Any:
    """The first samples of a batch; packed sequences, which cannot be shortened, and lists of
    pictures as they are."""
    size = batch_size(inputs)
    if packed_in(inputs) is not None or pictures_in(inputs):
        return inputs
    return map_tensors(lambda x: x[:count] if x.ndim and x.shape[0] == size else x, inputs)


def doubled(inputs: Inputs) -> Any:
    """A batch with every sample twice; packed sequences and lists of pictures as they are."""
    size = batch_size(inputs)
    if packed_in(inputs) is not None or pictures_in(inputs):
        return inputs
    return map_tensors(lambda x: torch.cat([x, x]) if x.ndim and x.shape[0] == size else x, inputs)


def joined(batches: Sequence[Pair]) -> Pair:
    """All batches as one. Those of another shape than the first (sequences of another length) are
    left out."""
    alike = [batch for batch in batches if _layout(batch) == _layout(batches[0])]
    columns = [iter(column) for column in zip(*(_counted(batch) for batch in alike), strict=True)]
    order, size = iter(columns), batch_size(alike[0][0])

    def whole(tensor: Tensor) -> Tensor:
        return torch.cat(list(next(order))) if tensor.ndim and len(tensor) == size else tensor

    inputs, labels = map_tensors(whole, alike[0])
    return inputs, labels


def _counted(batch: Pair) -> list[Tensor]:
    """The tensors of a batch that count samples."""
    size = batch_size(batch[0])
    return [x for x in tensors_in(list(batch)) if x.ndim and len(x) == size]


def _layout(batch: Pair) -> list[tuple[int, ...]]:
    return [tuple(x.shape[1:]) for x in _counted(batch)]


def batch_size(inputs: Inputs) -> int:
    """Samples in a batch of inputs: the first dimension of its first tensor, the sequences of its
    first packed sequence, or the pictures of a list (as detectors take them).

    Raises:
        InvalidField: if there is no tensor with a first dimension.
    """
    if (packed := packed_in(inputs)) is not None:
        return int(packed.batch_sizes[0])
    if pictures := pictures_in(inputs):
        return pictures
    for tensor in tensors_in(inputs):
        if tensor.is_nested:
            return tensor.size(0)
        if tensor.ndim:
            return tensor.shape[0]
    raise InvalidField("inputs", "at least one tensor whose first dimension counts samples", inputs)


def first_batches(batches: Batches, samples: int) -> Batches:
    """The first batches, until they have so many samples."""
    taken: list[Pair] = []
    for batch in batches:
        if samples <= 0:
            break
        taken.append(batch)
        samples -= batch_size(batch[0])
    return taken


def spread_samples(batches: Batches, samples: int) -> Batches:
    """So many samples at most, evenly spread over all of them, in as many batches; what cannot be
    divided is left whole."""
    every = -(-sum(batch_size(inputs) for inputs, _ in batches) // samples)

    def some(inputs: Any, labels: Any) -> tuple[Any, Any]:
        size = batch_size(inputs)
        if packed_in(inputs) is not None or pictures_in(inputs):
            return inputs, labels

        def rows(x: Tensor) -> Tensor:
            return x[::every] if x.ndim and len(x) == size else x

        return map_tensors(rows, inputs), map_tensors(rows, labels)

    return [some(*batch) for batch in batches] if every > 1 else batches


def pictures_in(inputs: Any) -> int:
    """How many pictures [channels, height, width] the first argument lists; 0 if it is no list."""
    given = inputs.values() if isinstance(inputs, Mapping) else inputs
    first = next(iter(given), None) if isinstance(given, (tuple, list, ValuesView)) else None
    if not isinstance(first, list):
        return 0
    alike = all(isinstance(x, Tensor) and x.ndim == 3 and 1 <= len(x) <= 4 for x in first)
    return len(first) if alike else 0


def main_output(output: Any) -> Tensor:
    """The tensor that speaks for the network: ``logits`` where it has that name, else the first.

    Raises:
        InvalidField: if the output holds no floating-point tensor.
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    for tensor in tensors_in(output):
        if tensor.is_floating_point():
            return tensor
    raise InvalidField("outputs", "at least one floating-point tensor", type(output).__name__)


def replace_inputs(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    function: Callable[[Tensor], Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's arguments with ``function`` applied to its input (for pre-hooks), however that is
    given: to the first, wherever it stands; of a packed sequence to its rows; of an attention to
    queries, keys and values, each tensor once."""
    if not isinstance(module, nn.MultiheadAttention):
        first = args[0] if args else next(iter(kwargs.values()))
        packed = isinstance(first, PackedSequence)
        new = first._replace(data=function(first.data)) if packed else function(first)
        if len(args) == 1 and not kwargs:
            return (new,), kwargs
        replaced = tuple(new if x is first else x for x in args)
        return replaced, {name: new if x is first else x for name, x in kwargs.items()}
    names = ("query", "key", "value")[len(args) :]
    streams = [*args[:3], *(kwargs[name] for name in names)]
    made = {number: function(x) for number, x in {id(x): x for x in streams}.items()}
    changed = {name: made[id(kwargs[name])] for name in names}
    return (*(made[id(x)] for x in args[:3]), *args[3:]), {**kwargs, **changed}


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor lives; the CPU if it has none."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def timed_call(
    network: nn.Module, inputs: Inputs, clock: Callable[[], float] = time.perf_counter
) -> Callable[[int], float]:
    """Calls the network so many times and returns the seconds of the quickest; it was called once
    before. A device has finished before the clock is read."""
    device = device_of(network)
    placed = map_tensors(lambda tensor: tensor.to(device), inputs)

    def finish() -> None:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    def timed(times: int) -> float:
        best = float("inf")
        for _ in range(times):
            begun = clock()
            call(network, placed)
            finish()
            best = min(best, clock() - begun)
        return best

    timed(1)
    return timed


_CALLED: WeakSet[nn.Module] = WeakSet()
"""Layers that were seen to be called."""


def seen_called(layers: Iterable[nn.Module]) -> None:
    """Say that these layers are called themselves: nothing has to be watched for them."""
    _CALLED.update(layers)


class Removable(Protocol):
    """What can be taken off a network again."""

    def remove(self) -> None:
        """Take it off."""


def through_layers(model: nn.Module, paths: Iterable[str]) -> list[Removable]:
    """Have the layers at these paths called that a function is handed the weights of: linear layers
    by the module around them, output projections by PyTorch's attention, bare parameters by whoever
    multiplies; and what stands for places behind layers. To be put on before other hooks."""
    around: dict[str, list[nn.Linear]] = {}
    matrices: dict[str, BareMatrix] = {}
    handles: list[Removable] = []
    for path in paths:
        owner, _, name = path.rpartition(".")
        layer, attention = layer_at(model, path), model.get_submodule(owner)
        if isinstance(layer, LayerOutput):
            handles.append(passing_outputs(model.get_submodule(plain_name(path))))
        if type(attention) is NATIVE and name == "out_proj":
            handles.append(Patched(attention))
        if isinstance(layer, BareMatrix):
            matrices[path] = layer
        if isinstance(layer, nn.Linear) and layer not in _CALLED and path:
            around.setdefault(owner, []).append(layer)
    if matrices:
        handles += calling_matrices(model, matrices)
    for path, layers in around.items():
        products, holder = _Products(layers), model.get_submodule(path)
        handles.append(holder.register_forward_pre_hook(products.begin))
        handles.append(holder.register_forward_hook(products.end, always_call=True))
        handles += [layer.register_forward_pre_hook(products.note) for layer in layers]
    return handles


class _Products:
    """Watches the products inside one module."""

    def __init__(self, layers: Collection[nn.Linear]) -> None:
        self._layers = layers
        self._modes: list[_Calling | None] = []

    def begin(self, module: nn.Module, args: Any) -> None:
        mode = None
        if any(layer not in _CALLED for layer in self._layers):
            mode = _Calling({id(layer.weight): layer for layer in self._layers})
            mode.__enter__()  # type: ignore[no-untyped-call]
        self._modes.append(mode)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._modes and (mode := self._modes.pop()) is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def note(self, layer: nn.Module, args: Any) -> None:
        if not any(mode is not None and mode.calling is layer for mode in self._modes):
            _CALLED.add(layer)


class _Calling(TorchFunctionMode):
    """Calls the layers whose weights (by id) ``functional.linear`` is given."""

    def __init__(self, layers: dict[int, nn.Linear]) -> None:
        super().__init__()
        self._layers = layers
        self.calling: nn.Linear | None = None
        """The layer that is called for such a product."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        layer = self._layer(*args, **given) if func is functional.linear else None
        if layer is None:
            return func(*args, **given)
        self.calling = layer
        try:
            return layer(args[0] if args else given["input"])
        finally:
            self.calling = None

    def _layer(self, input: Any, weight: Any, bias: Any = None) -> nn.Linear | None:
        layer = self._layers.get(id(weight))
        return layer if layer not in _CALLED and layer is not None and bias is layer.bias else None


def described(inputs: Inputs) -> str:
    """The tensors of a batch: shape, dtype and device."""
    kinds = [f"{list(x.shape)} {x.dtype} on {x.device}" for x in tensors_in(inputs)]
    return ", ".join(kinds).replace("torch.", "") or "no tensor"


def summary(error: BaseException) -> str:
    """An exception in one line."""
    kind, lines = type(error).__name__, str(error).strip().splitlines()
    return f"{kind}: {lines[0][:200]}" if lines else kind


def raised_in(error: BaseException) -> str:
    """The line of the network's own code that an exception came from, as far as it has one."""
    others = [str(Path(torch.__file__).parent), str(Path(__file__).parents[2])]
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if not one.filename.startswith((*others, "<"))]
    if not own or not own[-1].line:
        return ""
    return f" in {Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line[:80]}"
