"""What Elesh makes of one network: recorded, masked, cut, trained on, undone, all checked."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.network.calling import call, tensors_in
from leyline import Level, PrunedArchitecture, PruningGroup

__all__ = ["SHARE", "examine", "plain_pass"]

SHARE = 0.3
"""Of the units of every prunable group, how many go."""


def examine(model: nn.Module, inputs: Any, jumps: bool = False) -> dict[str, Any]:
    """Figures of one network; it is as before afterwards.

    Args:
        jumps: whether its outputs jump (boxes that survive): then mask and cut are compared at
            layers that keep all outputs, and what these make is handed on alike.

    Returns:
        ``rows`` prunable and ``all_rows`` (output channels of layers but for network outputs),
        ``heads``, ``layers``: prunable and found; ``removed``: share of the parameters;
        ``difference`` between mask and cut, as a share of the largest output; whether counts were
        ``exact``, the ``undo`` bit for bit, and it ``trains`` after each kind of cut; ``passes``:
        CPU time of making the recorder in forward and backward passes; ``left_alone``: reasons.
    """
    passing = plain_pass(model, inputs)
    started = time.process_time()
    architecture = Recorder(model, inputs).architecture
    spent = time.process_time() - started
    figures = {**_prunable(architecture), "passes": spent / passing, "seconds": spent}
    surgeon = Surgeon(model, architecture, restore_points=1)
    units = _units(architecture)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if units:
        alike = _Alike(model, _whole(architecture, units) if jumps else ())
        surgeon.mask(units)
        with alike:
            masked = _outputs(model, inputs)
        surgeon.unmask()
        after = surgeon.cut(units)
        with alike:
            outputs = _outputs(model, inputs)
        some = [_apart(masked, outputs)] if any(x.numel() for x in masked) else []
        figures["difference"] = max([*some, *alike.differences])
        left = sum(parameter.numel() for parameter in model.parameters())
        figures["exact"] = after.parameters == left
        figures["removed"] = 1 - left / architecture.parameters
        surgeon.undo()
    figures["trains"] = {kind: _trains(model, inputs, surgeon, kind) for kind in _kinds(units)}
    blocks = [block.name for block in surgeon.architecture.blocks if block.prunable]
    if blocks:
        surgeon.cut_layers(blocks[:1])
        figures["trains"]["layers"] = _step(model, inputs)
        surgeon.undo()
    now = model.state_dict()
    figures["undo"] = state.keys() == now.keys() and all(
        torch.equal(now[name], tensor) for name, tensor in state.items()
    )
    return figures


class _Alike:
    """Remembers in the first run what these layers make; in the second compares, and replaces."""

    def __init__(self, model: nn.Module, layers: Collection[str]) -> None:
        self._layers = {name: model.get_submodule(name) for name in layers}
        self._made: dict[tuple[str, int], Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self.differences: list[float] = []
        """Of each, as a share of its largest output."""

    def __enter__(self) -> None:
        calls, first = Counter[str](), not self._made

        def after(name: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                calls[name] += 1
                key = name, calls[name]
                if first:
                    self._made[key] = output.clone()
                else:
                    self.differences.append(_apart([self._made[key]], [output]))
                return self._made[key].clone()

            return hook

        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(after(name)))

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()


def _whole(architecture: PrunedArchitecture, units: Collection[str]) -> list[str]:
    """Layers that keep all of their outputs, of those that are modules."""
    cut = {layer for name in units for layer in architecture.group[name].layers}
    mixing = [layer for layer in architecture.layers if layer.weight == f"{layer.name}.weight"]
    return [one.name for one in mixing if one.name not in cut and "norm" not in one.kind]


def plain_pass(model: nn.Module, inputs: Any) -> float:
    """CPU seconds of a forward and backward pass, the least of three."""
    least = float("inf")
    for _ in range(3):
        started = time.process_time()
        outputs = [t for t in tensors_in(call(model, inputs)) if t.requires_grad]
        total = torch.stack([t.float().sum() for t in outputs]).sum()
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(total, trained, allow_unused=True)
        least = min(least, time.process_time() - started)
        model.eval()  # Some keep what they have worked out since they were put into this mode.
    return least


def _prunable(architecture: PrunedArchitecture) -> dict[str, Any]:
    rows, reasons = Counter[bool](), Counter[str]()
    for group in architecture.groups:
        if group.reason != "network output":
            rows[group.prunable] += _rows(group)
            if not group.prunable:
                reasons[group.reason[:160]] += 1
    heads = [group for group in architecture.groups if group.level is Level.HEAD]
    layers = [block for block in architecture.blocks if block.branch]
    reasons.update(f"layer: {b.reason[:120]}" for b in layers if not b.prunable)
    return {
        "parameters": architecture.parameters,
        "output_layers": [
            layer
            for group in architecture.groups
            if group.reason == "network output"
            for layer in group.layers
        ],
        "rows": rows[True],
        "all_rows": rows.total(),
        "heads": [sum(group.prunable for group in heads), len(heads)],
        "layers": [sum(block.prunable for block in layers), len(layers)],
        "left_alone": dict(reasons.most_common(6)),
    }


def _rows(group: PruningGroup) -> int:
    """Output channels of the layers that make a group."""
    made = {name for x in group.layers for name in (x, f"{x}.weight", x.removesuffix("()"))}
    seen = dict[str, int]()
    for part in group.slices:  # A layer may make some of the units and read others.
        if part.tensor in made:
            seen[part.tensor] = max(part.width, seen.get(part.tensor, 0))
    return group.size * sum(seen.values()) or group.size


def _units(architecture: PrunedArchitecture) -> dict[str, list[int]]:
    chosen: dict[str, list[int]] = {}
    for group in architecture.groups:
        # A fraction of a unit counts as one: so does torch-pruning round.
        count = min(group.size - 1, group.size - int((1 - SHARE) * group.size))
        count -= count % group.unit_multiple
        if group.prunable and count > 0:
            generator = torch.Generator().manual_seed(len(chosen))
            chosen[group.name] = torch.randperm(group.size, generator=generator)[:count].tolist()
    return chosen


def _kinds(units: dict[str, list[int]]) -> list[str]:
    return ["channels", "heads"] if units else []


def _trains(model: nn.Module, inputs: Any, surgeon: Surgeon, kind: str) -> str:
    level = Level.HEAD if kind == "heads" else Level.CHANNEL
    named = surgeon.architecture.group
    units = {n: u for n, u in _units(surgeon.architecture).items() if named[n].level is level}
    if not units:
        return "none"
    surgeon.cut(units)
    found = _step(model, inputs)
    surgeon.undo()
    return found


def _step(model: nn.Module, inputs: Any) -> str:
    """One forward and backward pass and optimizer step of size zero in training mode."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        model.train()
        outputs = [t for t in tensors_in(call(model, _training(model, inputs))) if t.requires_grad]
        torch.stack([t.float().square().mean() for t in outputs]).sum().backward()
        torch.optim.SGD(model.parameters(), 0.0).step()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    finally:
        model.eval()
        model.zero_grad()
        for name, buffer in model.named_buffers():
            if buffer.shape == buffers[name].shape:
                buffer.data.copy_(buffers[name])
    return "yes"


def _training(model: nn.Module, inputs: Any) -> Any:
    """Detectors want targets in training mode."""
    if not (isinstance(inputs, tuple) and isinstance(inputs[0], list)):
        return inputs
    size = inputs[0][0].shape[-1]
    target: dict[str, Tensor] = {
        "boxes": torch.tensor([[1.0, 1.0, size / 2, size / 2]]),
        "labels": torch.ones(1, dtype=torch.long),
        "masks": torch.ones(1, size, size, dtype=torch.uint8),
    }
    return (inputs[0], [target for _ in inputs[0]])


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model.eval()
    with torch.no_grad():
        return [t.double() for t in tensors_in(call(model, inputs)) if t.is_floating_point()]


def _apart(one: list[Tensor], two: list[Tensor]) -> float:
    if [t.shape for t in one] != [t.shape for t in two]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(one, two, strict=True) if a.numel()]
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item() for a, b in pairs)
