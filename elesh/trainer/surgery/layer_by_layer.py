"""Weight reconstruction, layer by layer: after a cut, every layer that reads units is solved once
more for the outputs that it had before the cut, from the inputs that really reach it.

What :mod:`.after_cut` refits makes up for the units that one layer lost. What is then still
missing adds up over the layers, and neighbouring positions of a map, which could add to it, are not
asked. Here layers are solved in the order in which the network calls them, each behind the ones
that were solved before it (He, Zhang and Sun 2017, "Channel Pruning", section 3.1, "whole model
pruning"), with a coefficient for every tap of a kernel. That takes two forward passes.

Promises: a layer's solution is kept only if it is nearer to the outputs before the cut on samples
that it was not solved on; nothing but weights and biases of layers that read units changes; what
cannot be solved in finite numbers, is called several times in a pass, shares its weight, or has too
many inputs is left as it is. Batch normalisations take the statistics of the samples meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold
from torch.nn.modules.batchnorm import _BatchNorm

from elesh.trainer.network.calling import (
    Inputs,
    batch_size,
    call,
    device_of,
    map_tensors,
    replace_first,
)
from elesh.trainer.network.layers import is_transposed_linear
from elesh.trainer.network.positions import positions_drawn
from elesh.trainer.network.state import Uncompiled, evaluated, preserved
from leyline import PrunedArchitecture

__all__ = ["OutputsBefore", "layer_solutions", "outputs_before", "solved_layer_by_layer"]

_RIDGES = (1e-3, 1e-2, 1e-1)
"""Strengths of the ridge that are tried, as shares of the inputs' mean second moment."""
_MOST_INPUTS = 4096
"""Coefficients an output: solving for more takes longer than the passes."""
_LIVE = 2**27
"""So many elements (512 MB) the inputs and outputs of one layer may have, all samples together."""
_HELD = 2**28
"""So many elements (1 GB) the outputs of all layers may have at the positions looked at."""
_ROWS, _FEW = (16, 8, 4, 2), 1024
"""Rows for every coefficient, as many as fit; of layers with few coefficients as if they had so
many."""
_TWO = 2
"""Samples by which shapes are found out."""
_CHUNK = 2**24
"""Elements that are laid out as rows at a time."""


@dataclass(frozen=True)
class OutputsBefore:
    """What layers made of some samples before a cut."""

    inputs: Inputs
    """The samples, on the network's device."""
    values: Mapping[str, Tensor]
    """By layer [S, P, C]: outputs at some positions, or at all."""
    counts: Mapping[str, int]
    """By layer: at how many."""
    axes: Mapping[str, int]
    """By layer: the axis of its weight that counts outputs."""

    def without(
        self, architecture: PrunedArchitecture, units: Mapping[str, Collection[int]]
    ) -> OutputsBefore:
        """The same of what is still there after a cut.

        Args:
            architecture: before the cut.
            units: that go, by group, in the numbering of then.
        """
        gone: dict[tuple[str, int], set[int]] = {}
        for name, chosen in units.items():
            for part in architecture.group[name].slices:
                gone.setdefault((part.tensor, part.dim), set()).update(part.all_of(chosen))
        values = {}
        for name, value in self.values.items():
            lost = gone.get((f"{name}.weight", self.axes[name]), set())
            kept = [row for row in range(value.shape[-1]) if row not in lost]
            values[name] = value[..., kept] if lost else value
        return replace(self, values=values)


def outputs_before(
    model: nn.Module, architecture: PrunedArchitecture, inputs: Inputs
) -> OutputsBefore:
    """The outputs of every layer that reads units, and can be solved for them.

    Args:
        inputs: one batch. So many samples of it are taken as fit into memory side by side.
    """
    device = device_of(model)
    inputs = map_tensors(lambda x: x.to(device), inputs)
    layers = _solvable(model, architecture)
    shapes = _shapes(model, layers, _first(inputs, _TWO))
    live = max((shape.live for shape in shapes.values()), default=1)
    inputs = _first(inputs, max(_TWO, _LIVE // live))
    counts, values = _counts(shapes, batch_size(inputs)), dict[str, Tensor]()
    with _watching(model) as stack:
        for name, count in counts.items():

            def keep(
                module: nn.Module, args: Any, output: Any, name: str = name, count: int = count
            ) -> None:
                values[name] = _drawn(_positions_last(module, output), count)

            stack.enter_context(_hooked(layers[name].register_forward_hook(keep)))
        if counts:
            call(model, inputs)
    axes = {name: int(is_transposed_linear(layers[name])) for name in values}
    return OutputsBefore(inputs, values, counts, axes)


@dataclass(frozen=True)
class _Shape:
    """Of one layer, for one sample."""

    inputs: int
    """Coefficients an output."""
    outputs: int
    lead: int
    """How often the layer sees a sample along the first axis: windows of it."""
    positions: int
    """Of each of these."""
    live: int
    """Elements of its inputs and outputs."""


def _shapes(model: nn.Module, layers: Mapping[str, Any], inputs: Inputs) -> dict[str, _Shape]:
    """By layer that is called once, of two samples."""
    seen: dict[str, list[_Shape]] = {name: [] for name in layers}
    with _watching(model) as stack:
        for name, layer in layers.items():

            def see(module: Any, args: tuple[Any, ...], output: Any, name: str = name) -> None:
                weight, size = _weight(module), sum(x.numel() for x in (*args[:1], output))
                lead, rows = len(output), output.numel() // len(weight)
                seen[name].append(
                    _Shape(
                        weight[0].numel(),
                        len(weight),
                        lead // _TWO if lead % _TWO == 0 and output.ndim > 1 else 0,
                        rows // max(lead, 1),
                        size // _TWO,
                    )
                )

            stack.enter_context(_hooked(layer.register_forward_hook(see)))
        call(model, inputs)
    return {name: own[0] for name, own in seen.items() if len(own) == 1 and own[0].lead}


def _counts(shapes: Mapping[str, _Shape], samples: int) -> dict[str, int]:
    """At how many positions each layer is looked at; empty where not even few rows fit."""
    for rows in _ROWS:
        counts = {
            name: min(x.positions, -(-rows * max(x.inputs, _FEW) // (samples * x.lead)))
            for name, x in shapes.items()
            if x.inputs < _MOST_INPUTS
        }
        held = sum(samples * shapes[n].lead * c * shapes[n].outputs for n, c in counts.items())
        if held <= _HELD:
            return counts
    return {}


def solved_layer_by_layer(model: nn.Module, before: OutputsBefore) -> tuple[str, ...]:
    """Solve the layers of a network that has been cut, in the order of their calls.

    Args:
        before: without what was cut.

    Returns:
        The layers whose weights changed.
    """
    found, parameters = layer_solutions(model, before), dict(model.named_parameters())
    for path, value in found.items():
        parameters[path].data.copy_(value)
    return tuple(dict.fromkeys(path.rpartition(".")[0] for path in found))


def layer_solutions(
    model: nn.Module, before: OutputsBefore, *, skip: Collection[str] = ()
) -> dict[str, Tensor]:
    """What :func:`solved_layer_by_layer` would give parameters, by path; nothing is changed.

    Args:
        model: cut, or masked.
        before: without what was cut, or with what is masked.
        skip: paths of layers that keep their weights.
    """
    layers: dict[str, Any] = dict(model.named_modules())
    found, samples = dict[str, Tensor](), batch_size(before.inputs)
    with _watching(model) as stack:
        for name, wanted in before.values.items():
            layer = layers.get(name)
            if layer is None or not _is_linear(layer) or len(_weight(layer)) != wanted.shape[-1]:
                continue  # A whole layer went, and something else stands in its place.
            if name in skip:
                continue

            def hook(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                name: str = name,
                wanted: Tensor = wanted,
                count: int = before.counts[name],
            ) -> Any:
                def solve(x: Tensor) -> Tensor:
                    solution = _solved(module, x, wanted, samples, count) or {}
                    for attribute, value in solution.items():
                        found[f"{name}.{attribute}"] = value
                        parameter = getattr(module, attribute)
                        stack.callback(parameter.data.copy_, parameter.detach().clone())
                        parameter.data.copy_(value)
                    return x

                return replace_first(args, kwargs, solve)

            stack.enter_context(_hooked(layer.register_forward_pre_hook(hook, with_kwargs=True)))
        call(model, before.inputs)
    return found


@contextmanager
def _watching(model: nn.Module) -> Iterator[ExitStack]:
    """For a pass in evaluation mode, batch normalisations by the samples; all but parameters is put
    back."""
    with preserved(model), torch.no_grad(), Uncompiled(model), ExitStack() as stack:
        evaluated(model)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                module.train()
        yield stack


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _solvable(model: nn.Module, architecture: PrunedArchitecture) -> dict[str, Any]:
    """The layers that read units and whose outputs are linear in their weights, each owning them;
    by path."""
    paths = {site.module for group in architecture.groups if group.prunable for site in group.sites}
    owners: dict[int, int] = {}
    for _, tensor in model.named_parameters(remove_duplicate=False):
        owners[id(tensor)] = owners.get(id(tensor), 0) + 1
    found = {}
    for path in sorted(paths):
        module = model.get_submodule(path)
        own = vars(module).get("_parameters", {})
        if not _is_linear(module) or owners.get(id(own.get("weight")), 0) != 1:
            continue
        if own.get("bias") is None or owners.get(id(own["bias"])) == 1:
            found[path] = module
    return found


def _is_linear(module: nn.Module) -> bool:
    if type(module) is nn.Linear or is_transposed_linear(module):
        return True
    if type(module) is not nn.Conv1d and type(module) is not nn.Conv2d:
        return False
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return plain and module.groups == 1


def _weight(module: Any) -> Tensor:
    """[C, ...]: a layer's weight, outputs first."""
    weight: Tensor = module.weight.detach()
    return weight.T if is_transposed_linear(module) else weight


def _first(inputs: Inputs, samples: int) -> Inputs:
    """The first samples of a batch."""
    size = batch_size(inputs)

    def rows(x: Tensor) -> Tensor:
        return x[:samples] if x.ndim and len(x) == size else x

    found: Inputs = map_tensors(rows, inputs)
    return found


def _positions_last(module: Any, output: Tensor) -> Tensor:
    """[S, P, C] of a layer's output."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return output.flatten(2).transpose(1, 2)
    return output.reshape(len(output), -1, output.shape[-1])


def _drawn(rows: Tensor, count: int) -> Tensor:
    """Of [S, P, ...] the positions that are looked at: before and after a cut the same."""
    drawn = positions_drawn(rows.shape[1], count, 0)
    return rows if drawn is None else rows[:, drawn.to(rows.device)]


def _rows(module: Any, x: Tensor, count: int) -> Iterator[tuple[slice, Tensor]]:
    """[s, P, K] what the weights of an output are multiplied by, some samples at a time."""
    samples = len(x)
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        yield slice(0, samples), _drawn(_positions_last(module, x), count)
        return
    one, conv = isinstance(module, nn.Conv1d), dict[str, Any](vars(module))
    values = ((1, "kernel_size"), (1, "dilation"), (0, "padding"), (1, "stride"))
    settings = [(fill, *conv[name]) if one else conv[name] for fill, name in values]
    maps = x.unsqueeze(2) if one else x
    taps = module.weight[0].numel()
    step = max(1, _CHUNK // max(1, taps * maps[0, 0].numel()))
    for start in range(0, samples, step):
        laid = unfold(maps[start : start + step], *settings).transpose(1, 2)
        yield slice(start, start + step), _drawn(laid, count)


def _solved(
    module: Any, x: Tensor, wanted: Tensor, samples: int, positions: int
) -> dict[str, Tensor] | None:
    """Weight and bias that bring the outputs nearest to ``wanted``; None where they are near
    already, on samples that were not solved on, or there is nothing to solve.

    Args:
        x: what enters the layer, samples (or windows of them) first.
        wanted: [S, P, C].
        samples: in the pass.
        positions: that are looked at.
    """
    weight, bias = _weight(module), module.bias
    inputs, outputs = weight[0].numel(), len(weight)
    if inputs + 1 > _MOST_INPUTS or len(x) != len(wanted):
        return None
    of_sample = torch.arange(len(x), device=x.device) // max(1, len(x) // samples)
    count = inputs + (bias is not None)
    sums = [_Sums.empty(count, outputs) for _ in range(2)]
    flat = weight.flatten(1).float()
    for part, rows in _rows(module, x, positions):
        rows = rows.float()
        missing = wanted[part].float() - rows @ flat.T
        if bias is not None:
            missing = missing - bias.detach().float()
            rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
        for half in (0, 1):
            own = of_sample[part] % 2 == half
            sums[half].see(rows[own].flatten(0, 1), missing[own].flatten(0, 1))
    change = _change(sums, count)
    if change is None:
        return None
    new = flat.double().cpu() + change[:inputs].T
    new = new.view(weight.shape)
    found = {"weight": (new.T if is_transposed_linear(module) else new).to(weight)}
    if bias is not None:
        found["bias"] = (bias.detach().double().cpu() + change[-1]).to(bias)
    return found if all(bool(value.isfinite().all()) for value in found.values()) else None


@dataclass
class _Sums:
    """Normal equations; products in float32 within a chunk, sums in float64."""

    among: Tensor
    """[K, K]."""
    across: Tensor
    """[K, C]."""
    rows: int = 0

    @classmethod
    def empty(cls, inputs: int, outputs: int) -> _Sums:
        return cls(
            torch.zeros(inputs, inputs, dtype=torch.float64),
            torch.zeros(inputs, outputs, dtype=torch.float64),
        )

    def see(self, rows: Tensor, missing: Tensor) -> None:
        """Take in [N, K] inputs and [N, C] of what the outputs lack."""
        self.among += (rows.T @ rows).double().cpu()
        self.across += (rows.T @ missing).double().cpu()
        self.rows += len(rows)

    def gain(self, change: Tensor) -> float:
        """How much the squared error falls, by a change of the coefficients."""
        return float(2 * (change * self.across).sum() - (change * (self.among @ change)).sum())


def _change(sums: list[_Sums], count: int) -> Tensor | None:
    """[K, C]: the change of the coefficients, by the ridge that does best on the half that it was
    not solved on; None where none does any good there."""
    first, second = sums
    if not first.rows or not second.rows:
        return None
    tried = {ridge: second.gain(_ridge(first, ridge)) for ridge in _RIDGES}
    best = max(tried, key=lambda ridge: tried[ridge])
    if not tried[best] > 0:
        return None
    both = _Sums(first.among + second.among, first.across + second.across)
    return _ridge(both, best)


def _ridge(sums: _Sums, ridge: float) -> Tensor:
    squares = sums.among.diagonal()
    heard = squares[squares > 0]  # Masked inputs are none: a cut one is solved alike.
    strength = ridge * float(heard.mean()) if len(heard) else 0.0
    damped = sums.among + max(strength, 1e-30) * torch.eye(len(sums.among), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return torch.full_like(sums.across, float("nan"))
    return torch.cholesky_solve(sums.across, factor)
