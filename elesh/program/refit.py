"""The exported network's weights, refitted after a cut as the trainer refits them.

Promises: the same least squares as the trainer's (:mod:`.least_squares`), from inputs that the
consumers see on the checkpoint's calibration samples; nothing of the held-out samples is used;
what is no linear map of its inputs keeps its weights, as at the trainer's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elesh.safety import Entry
from leyline import Level, NormSite, PrunedArchitecture

from .batch_statistics import BatchNorm
from .least_squares import RIDGE, Normalised, normalised_by, predict_lost, spread
from .program import Node, Program

__all__ = ["Consumer", "Refit", "consumer_of"]


@dataclass(frozen=True)
class Consumer:
    """What reads the units at one gate: a linear layer or a convolution."""

    weight: str
    """Path of its weight."""
    dim: int
    """The weight's dimension that counts inputs."""
    bias: str | None
    """Path of its bias, where a constant input is the same as a larger bias everywhere."""


def consumer_of(program: Program, module: str) -> Consumer | None:
    """What the program does with the weight of ``module``; None if that is no linear map of all
    that enters, so that there is nothing to refit."""
    path = f"{module}.weight"
    names = {name for name, own in program.weights.items() if own == path}
    found = [node for node in program.nodes if names & set(_values(node))]
    if len(found) == 1:
        node = found[0]
        kind = node.operator.split(".")[1]
        if kind == "linear":
            return Consumer(path, 1, _path(program, node, 2))
        if kind in ("conv1d", "conv2d", "conv3d") and not _grouped(node):
            return Consumer(path, 1, None if _pads(node) else _path(program, node, 2))
        if kind.startswith("conv_transpose"):
            return Consumer(path, 0, None)
        if kind == "addmm" and _value(node, 2) in names:
            return Consumer(path, 0, _path(program, node, 0))
        if kind in ("mm", "matmul") and _value(node, 1) in names:
            return Consumer(path, 0, None)
    return None


@dataclass
class Refit:
    """Refits the consumers of cuts of one program.

    Args:
        inputs: by gate (module, axis): means [C], second moments [C, C] and rows of what enters.
        skip: consumers that keep their weights.
        norms: batch normalisations whose running statistics are estimated anew after refitting.
    """

    program: Program
    architecture: PrunedArchitecture
    weights: Mapping[str, Tensor]
    inputs: Mapping[tuple[str, int], tuple[Tensor, Tensor, int]]
    skip: Collection[str] = ()
    norms: tuple[BatchNorm, ...] = ()

    def of(self, entries: Sequence[Entry]) -> dict[str, Tensor]:
        """The refitted weights, by path, once the units of ``entries`` are gone."""
        lost: dict[tuple[str, int], set[int]] = {}
        norms: dict[tuple[str, int], dict[str, NormSite]] = {}
        layers = {name for level, name, _ in entries if level is Level.LAYER}
        dead = {path for name in layers for path in self.architecture.block[name].tensors}
        for level, name, unit in entries:
            if level is Level.LAYER:
                continue
            for site in self.architecture.group[name].sites:
                lost.setdefault((site.module, site.dim), set()).update(site.of(unit))
                over = {norm.module: norm for norm in self.architecture.group[name].norms}
                norms.setdefault((site.module, site.dim), {}).update(over)
        found: dict[str, Tensor] = {}
        for (module, dim), gone in lost.items():
            if module in self.skip or f"{module}.weight" in dead:
                continue
            consumer = consumer_of(self.program, module)
            if consumer is None:
                continue
            means, squares, rows = self.inputs[module, dim]
            over_all = self._normalised(norms[module, dim].values(), len(means))
            norm = normalised_by(means, squares, over_all)
            solved = predict_lost(
                means, squares, gone, consumer.bias is not None, RIDGE, rows, norm
            )
            weight = self.weights[consumer.weight]
            bias = None if consumer.bias is None else self.weights[consumer.bias]
            refitted, shifted = spread(weight, bias, consumer.dim, solved)
            if torch.isfinite(refitted).all():
                found[consumer.weight] = refitted.to(weight.dtype).contiguous()
                if consumer.bias is not None and bias is not None and shifted is not None:
                    found[consumer.bias] = shifted.to(bias.dtype)
        return found

    def _normalised(self, sites: Iterable[NormSite], size: int) -> list[Normalised]:
        """The normalisations at some sites, as far as they are over ``size`` channels."""
        found = []
        for site in sites:
            gain, offset = (self.weights.get(f"{site.module}.{x}") for x in ("weight", "bias"))
            found.append(Normalised.of(site.kind, size, gain, offset))
        return [norm for norm in found if norm is not None]


def _grouped(node: Node) -> bool:
    """Whether a convolution has several groups."""
    return bool((node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)) != 1)


def _pads(node: Node) -> bool:
    """Whether a convolution pads its input with zeros."""
    padding = node.args[4] if len(node.args) > 4 else node.kwargs.get("padding", 0)
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def _value(node: Node, place: int) -> str | None:
    """The name of the value that an argument refers to."""
    given = node.args[place] if place < len(node.args) else None
    if given is None and place == 2:
        given = node.kwargs.get("bias")
    return given.get("value") if isinstance(given, dict) else None


def _values(node: Node) -> list[str]:
    parts = [*node.args, *node.kwargs.values()]
    return [part["value"] for part in parts if isinstance(part, dict) and "value" in part]


def _path(program: Program, node: Node, place: int) -> str | None:
    name = _value(node, place)
    return None if name is None else program.weights.get(name)
