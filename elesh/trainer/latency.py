"""Measures the latency of a network's layers on this device at several sizes: a LatencyTable.

Promises: the network is left as it was; every layer is timed on the input that it really gets, in
turn with the others over several rounds, and its least time counts, so that a busy moment of the
machine hits no single layer; layers that cannot be resized alone are timed at their own size.
Devices compute so many channels at once, and one more costs a whole step: outputs and inputs are
timed at both sides of such steps, so that the table has the stairs and not a line through them.
Normalisations are timed with a rectifier behind them. What surrounds the layers (activations,
additions, attention, memory that is not in the cache any more) is the rest of the whole network's
time; smaller copies of the network tell how much of it goes with the layers' outputs.
"""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from elesh.analysis.budgets.knapsack import resource_model
from elesh.trainer.network.calling import (
    Inputs,
    batch_size,
    call,
    device_of,
)
from elesh.trainer.network.kinds.matrices import layer_at
from elesh.trainer.network.layers import channel_axes
from elesh.trainer.network.state import preserve_state
from elesh.trainer.network.traversal import deep_copied
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import Budget, LatencyTable, LayerLatency, Level, PrunedArchitecture

FRACTIONS = (0.25, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Sizes that are measured, as shares of the present size."""
_VECTOR_BYTES = {"AVX512": 64, "AVX2": 32}
WHOLES = (0.4, 0.7)
"""Shares of all units that smaller copies of the whole network keep."""
CHANCES = 10
_Norms = (nn.BatchNorm1d, nn.BatchNorm2d)
_Timed = Callable[[], object]


def channel_step(device: torch.device, dtype: torch.dtype = torch.float32) -> int:
    """How many channels the device computes at once: their number is best a multiple of it.

    A vector register on processors; on CUDA the 16 bytes that tensor cores ask rows to be aligned
    to (NVIDIA, "Matrix multiplication background user's guide").
    """
    wide = 16
    if device.type == "cpu":
        wide = _VECTOR_BYTES.get(torch.backends.cpu.get_cpu_capability(), 16)
    return max(1, wide // dtype.itemsize)


def measure_latency(
    model: nn.Module,
    inputs: Inputs,
    architecture: PrunedArchitecture,
    *,
    rounds: int = 15,
    seconds: float = 0.002,
    fractions: Sequence[float] = FRACTIONS,
) -> LatencyTable:
    """The latency table of ``model`` on its device, for batches like ``inputs``.

    Args:
        architecture: of the model as it is (``Recorder.architecture``).
        rounds: how often everything is measured; the least counts.
        seconds: how long each measurement of a round takes, at least.
    """
    with preserve_state(model, 0), torch.no_grad():
        seen = _inputs_of(model, inputs)
        grids = {
            layer.name: _grid(layer_at(model, layer.name), seen[layer.name], fractions)
            for layer in architecture.layers
            if layer.name in seen
        }
        tasks: dict[tuple[str, int, int], _Timed] = {
            (name, out, inside): task
            for name, grid in grids.items()
            for (out, inside), task in grid.items()
        }
        step = channel_step(device_of(model))
        smaller = [_smaller(architecture, share, step) for share in WHOLES]
        wholes = [model, *(_cut(model, architecture, lost) for lost in smaller)]
        for number, each in enumerate(wholes):
            tasks["", number, 0] = _called(each, inputs)
        took = _timed(tasks, rounds, seconds, model)
    totals = [took.pop(("", number, 0)) for number in range(len(wholes))]
    layers = [_table(name, grid, took) for name, grid in grids.items()]
    alone = _scaled(model, inputs, totals[0], layers)
    return with_surroundings(alone, architecture, smaller, totals)


def _smaller(architecture: PrunedArchitecture, share: float, step: int) -> dict[str, list[int]]:
    """The units of every group that go where about ``share`` of them stay, in whole steps."""
    lost = {}
    for group in architecture.groups:
        multiple = group.unit_multiple
        if group.level is Level.CHANNEL and group.size > math.lcm(multiple, step):
            multiple = math.lcm(multiple, step)
        kept = max(multiple, round(group.size * share / multiple) * multiple)
        if group.prunable and kept < group.size:
            lost[group.name] = list(range(kept, group.size))
    return lost


def _cut(
    model: nn.Module, architecture: PrunedArchitecture, lost: Mapping[str, Sequence[int]]
) -> nn.Module:
    small = deep_copied(model)
    Surgeon(small, architecture, restore_points=0).cut(lost)
    return small


def _called(model: nn.Module, inputs: Inputs) -> _Timed:
    return lambda: call(model, inputs)


def _inputs_of(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The first input of every layer that is timed, by name."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args:
                seen.setdefault(name, args[0].detach())

        return hook

    handles = [
        module.register_forward_pre_hook(remember(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear, *_Norms))
        and module.weight is not None
    ]
    try:
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _grid(
    module: nn.Module, given: Tensor, fractions: Sequence[float]
) -> dict[tuple[int, int], _Timed]:
    """What to time, by the sizes (outputs, inputs) of the weight."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    step = channel_step(weight.device, weight.dtype)
    if isinstance(module, _Norms):
        return {(n, 0): _narrowed(module, given, n) for n in _stairs(len(weight), fractions, step)}
    outputs, inside = weight.shape[:2]
    groups = module.groups if isinstance(module, (nn.Conv1d, nn.Conv2d)) else 1
    if groups == outputs and inside == 1 < groups:
        sizes = _stairs(outputs, fractions, step)
        return {(n, 1): _resized(module, given, 1, 1, n) for n in sizes}
    if groups > 1 and not channel_axes(module).shares:
        return {(outputs, inside): lambda: module(given)}  # groups tie the two sizes together
    return {
        (out * groups, into): _resized(module, given, out, into, groups)
        for out in _stairs(outputs // groups, fractions, step)
        for into in _stairs(inside, fractions, step)
    }


def _stairs(size: int, fractions: Sequence[float], step: int) -> list[int]:
    """The size, about these shares of it in whole steps, and where the next step begins."""
    edges = {max(1, round(size * fraction / step)) * step for fraction in fractions}
    return sorted({size, *(n for edge in edges for n in (edge, edge + 1) if n < size)})


def _resized(
    module: nn.Module, given: Tensor, outputs: int, inside: int, groups: int = 1
) -> _Timed:
    """A copy of ``module`` with so many groups, and outputs and inputs of each, called on a part of
    its input."""
    small, whole = copy.deepcopy(module), getattr(module, "groups", 1)
    axis = -1 if isinstance(module, nn.Linear) else 1
    for name in ("weight", "bias"):
        tensor = getattr(small, name)
        if tensor is None:
            continue
        part = tensor.unflatten(0, (whole, -1))[:groups, :outputs].flatten(0, 1)
        part = part[:, :inside] if name == "weight" else part
        setattr(small, name, nn.Parameter(part.detach().clone(), requires_grad=False))
    if isinstance(small, (nn.Conv1d, nn.Conv2d)):
        small.in_channels, small.out_channels = inside * groups, outputs * groups
        small.groups = groups
    part = given.narrow(axis, 0, inside * groups).clone()
    return lambda: small(part)


def _narrowed(module: nn.Module, given: Tensor, channels: int) -> _Timed:
    """A copy of a normalisation with fewer channels, and a rectifier."""
    small = copy.deepcopy(module)
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(small, name)
        if tensor is not None:
            part = tensor[:channels].detach().clone()
            kept = nn.Parameter(part, requires_grad=False) if name in ("weight", "bias") else part
            setattr(small, name, kept)
    part = given.narrow(1, 0, channels).clone()
    return lambda: torch.relu(small(part))


def _timed(
    tasks: dict[tuple[str, int, int], _Timed], rounds: int, seconds: float, model: nn.Module
) -> dict[tuple[str, int, int], float]:
    """Seconds a call of each task, the least of all rounds.

    Whole networks have several chances a round: longer calls are disturbed more often.
    """
    wait = _waiter(model)
    counts = {name: _calls_in(task, seconds, wait) for name, task in tasks.items()}
    best = dict.fromkeys(tasks, float("inf"))
    for _ in range(rounds):
        for name, task in tasks.items():
            for _ in range(1 if name[0] else CHANCES):
                begun = time.perf_counter()
                for _ in range(counts[name]):
                    task()
                wait()
                best[name] = min(best[name], (time.perf_counter() - begun) / counts[name])
    return best


def _calls_in(task: _Timed, seconds: float, wait: Callable[[], None]) -> int:
    task()
    wait()
    begun = time.perf_counter()
    task()
    wait()
    return max(1, min(1000, int(seconds / max(1e-7, time.perf_counter() - begun))))


def _waiter(model: nn.Module) -> Callable[[], None]:
    """What waits until the device has done all that was queued."""
    device = device_of(model)
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.get_device_module(device).synchronize(device)


def _table(
    name: str,
    grid: dict[tuple[int, int], _Timed],
    took: dict[tuple[str, int, int], float],
) -> LayerLatency:
    outputs = sorted({out for out, _ in grid})
    inside = sorted({into for _, into in grid})
    return LayerLatency(
        layer=name,
        outputs=tuple(outputs),
        inputs=tuple(inside) if inside != [0] else (),
        seconds=tuple(took[name, out, into] for out in outputs for into in inside),
    )


def _scaled(
    model: nn.Module, inputs: Inputs, total: float, layers: Sequence[LayerLatency]
) -> LatencyTable:
    """Layers timed alone pay for their call each: together they take no more than the network."""
    inside = sum(layer.seconds[-1] for layer in layers)
    factor = min(1.0, total / inside) if inside else 1.0
    device = device_of(model)
    name = platform.processor() or platform.machine()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return LatencyTable(
        device=f"{device.type} {name}{threads}",
        batch=batch_size(inputs),
        total_seconds=total,
        layers=tuple(
            layer.model_copy(update={"seconds": tuple(s * factor for s in layer.seconds)})
            for layer in layers
        ),
    )


def with_surroundings(
    table: LatencyTable,
    architecture: PrunedArchitecture,
    smaller: Sequence[Mapping[str, Sequence[int]]],
    totals: Sequence[float],
) -> LatencyTable:
    """The table with each layer's share of what surrounds the layers.

    Args:
        smaller: the units that each smaller copy of the network has lost.
        totals: seconds of the network and of each copy.
    """
    if not table.layers:
        return table
    budget = Budget(resource="latency", at_most=1.0, latency=table)
    model = resource_model(architecture, budget)
    sizes, rests = [], []
    for lost, total in zip([{}, *smaller], totals, strict=True):
        inside = model.total({name: len(units) for name, units in lost.items()}) - model.fixed
        sizes.append(_elements(architecture.without(lost) if lost else architecture))
        rests.append(max(0.0, total - inside))
    slope = _slope(sizes, rests)
    positions = {layer.name: layer.positions for layer in architecture.layers if layer.weight}
    layers = tuple(_surrounded(row, slope * positions.get(row.layer, 0)) for row in table.layers)
    return table.model_copy(update={"layers": layers})


def _elements(architecture: PrunedArchitecture) -> int:
    """Outputs of all layers that multiply a weight, a sample."""
    shapes = {path: tensor.shape for path, tensor in architecture.tensor.items()}
    return sum(x.positions * shapes[x.weight][0] for x in architecture.layers if x.weight)


def _slope(sizes: Sequence[float], rests: Sequence[float]) -> float:
    """Seconds an element by least squares; none are negative, and no more than there are."""
    x, y = np.asarray(sizes, np.float64), np.asarray(rests, np.float64)
    spread = float(np.sum((x - x.mean()) ** 2))
    if not spread:
        return 0.0
    slope = float(np.sum((x - x.mean()) * (y - y.mean()))) / spread
    return min(max(slope, 0.0), float(y[0] / x[0]))


def _surrounded(row: LayerLatency, each: float) -> LayerLatency:
    """The row with so many seconds more an output."""
    more = np.repeat(np.asarray(row.outputs, np.float64) * each, len(row.inputs) or 1)
    return row.model_copy(update={"seconds": tuple((np.asarray(row.seconds) + more).tolist())})
