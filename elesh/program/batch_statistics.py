"""The running statistics of a program's batch normalisations, estimated anew after a cut.

Refitted weights send on almost what was sent before, not just that. Over many layers the small
differences add up, and normalisations keep the statistics of another network. The trainer estimates
them anew by a pass over its calibration samples; so does this, for what a worker measures.

Promises: the trainer's rule (:mod:`elesh.trainer.surgery.after_cut`): means over portions of what
normalisations see when they normalise by the portion itself; small portions are left out;
statistics that are no finite numbers stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .program import Node, Program

__all__ = ["BatchNorm", "Estimate", "batch_norms"]

_OPERATOR = "aten.batch_norm.default"
_TRAINING, _EPSILON = 5, 7
"""Where its arguments say that it is training, and have what is added to the variance."""


@dataclass(frozen=True)
class BatchNorm:
    """A normalisation by running statistics."""

    node: str
    """Name of the value that it makes."""
    mean: str
    """Path of its running mean."""
    variance: str
    """Path of its running variance."""


def batch_norms(program: Program) -> tuple[BatchNorm, ...]:
    """The batch normalisations whose running statistics the program has as weights."""
    return tuple(found for node in program.nodes if (found := _batch_norm(program, node)))


def _batch_norm(program: Program, node: Node) -> BatchNorm | None:
    if node.operator != _OPERATOR or len(node.args) <= _EPSILON:
        return None
    if node.args[_TRAINING] is not False:
        return None
    names = [arg.get("value") if isinstance(arg, dict) else None for arg in node.args[3:5]]
    mean, variance = (program.weights.get(name or "") for name in names)
    if mean is None or variance is None:
        return None
    return BatchNorm(node.name, mean, variance)


@dataclass
class Estimate:
    """Sums over the portions of one pass."""

    norms: tuple[BatchNorm, ...]
    sums: dict[str, Tensor] = field(default_factory=dict)
    portions: int = 0

    def instead(self) -> dict[str, Callable[..., Any]]:
        """What is to be called in place of each normalisation, by its value's name."""
        return {norm.node: partial(self._normalised, norm) for norm in self.norms}

    def means(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The statistics by path, where they are finite, in the dtype of those ``before``."""
        found = {path: total / max(self.portions, 1) for path, total in self.sums.items()}
        return {
            path: value.to(before[path].dtype)
            for path, value in found.items()
            if torch.isfinite(value).all()
        }

    def _normalised(self, norm: BatchNorm, *args: Any) -> Tensor:
        x, weight, bias, epsilon = *args[:3], args[_EPSILON]
        across = [axis for axis in range(x.ndim) if axis != 1]
        rows = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x.float(), across, correction=0)
        for path, value in ((norm.mean, mean), (norm.variance, variance * rows / (rows - 1))):
            self.sums[path] = self.sums[path] + value if path in self.sums else value
        return nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=epsilon)
