"""Proves on the network itself that masking units and cutting them is the same.

Promises: a group stays prunable only if, with other groups, random units of it were masked and
cut on a copy, several times, and both gave the same outputs. The copy gets random weights first:
with the real ones the proof could be empty (branches that start at zero, small layer scales).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from elesh.trainer.network.calling import Inputs, call, device_of, seed_generators, tensors_in
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import PrunedArchitecture

from .dependency_graph import summary

TOLERANCE = 1e-4
"""Allowed difference, as a share of the largest output (single precision)."""


def without_refuted(
    copied: nn.Module, inputs: Inputs, architecture: PrunedArchitecture
) -> PrunedArchitecture:
    """The architecture with every group that fails the proof marked, with a reason.

    Args:
        twin: a copy of the network in evaluation mode; its weights are overwritten.
    """
    _scramble(copied)
    experiment = _Experiment(copied, inputs, architecture)
    candidates = [group.name for group in architecture.groups if group.prunable]
    with torch.no_grad():
        experiment.admit(candidates)
    groups = tuple(
        group.model_copy(update={"prunable": False, "reason": experiment.reasons[group.name]})
        if group.name in experiment.reasons
        else group
        for group in architecture.groups
    )
    # Not model_copy: it would carry the architecture's cached look-ups along.
    return PrunedArchitecture.build(architecture.tensors, architecture.layers, groups)


class Admission(ABC):
    """Names are admitted one set at a time; what cannot join those admitted is refused."""

    def __init__(self) -> None:
        self._admitted: list[str] = []
        self.reasons: dict[str, str] = {}
        """Why each of those that were refused was."""

    def admit(self, names: Sequence[str]) -> None:
        """Admit all of ``names`` if they pass together, otherwise find by halving which do not."""
        if not names:
            return
        reason = self.disproof([*self._admitted, *names])
        if not reason:
            self._admitted.extend(names)
        elif len(names) == 1:
            self.reasons[names[0]] = reason
        else:
            middle = len(names) // 2
            self.admit(names[:middle])
            self.admit(names[middle:])

    @abstractmethod
    def disproof(self, names: Sequence[str]) -> str:
        """Why these cannot be removed together; empty if they can."""


class _Experiment(Admission):
    """Admits groups."""

    def __init__(self, copied: nn.Module, inputs: Inputs, architecture: PrunedArchitecture) -> None:
        super().__init__()
        self._trial = Trial(copied, inputs)
        self._surgeon = Surgeon(copied, architecture, restore_points=1)
        rng = np.random.default_rng(0)
        groups = [group for group in architecture.groups if group.prunable]
        # Numbers at random: equal shares could hide that two groups must stay of equal size. And
        # all but one: rounding (of halves, for example) forgives small cuts.
        counts = [{g.name: int(rng.integers(1, g.size)) for g in groups} for _ in range(2)]
        counts.append({g.name: g.size - 1 for g in groups})
        self._trials = [
            {g.name: rng.permutation(g.size)[: count[g.name]].tolist() for g in groups}
            for count in counts
        ]

    def disproof(self, names: Sequence[str]) -> str:
        """Why these groups cannot lose units together, in any of the trials."""
        reasons = (self._disproof({name: t[name] for name in names}) for t in self._trials)
        return next((reason for reason in reasons if reason), "")

    def _disproof(self, units: Mapping[str, Sequence[int]]) -> str:
        """Why these units cannot be removed together; empty if they can."""
        self._surgeon.mask(units)
        masked = self._trial.outputs()
        self._surgeon.unmask()
        self._surgeon.cut(units)
        try:
            difference = _difference(masked, self._trial.outputs())
            if not difference:
                self._trial.train()
            return difference
        except Exception as error:  # Whatever the user's network raises is the finding.
            return (
                "the network does not run without some of its channels (a size written into the "
                f"code, or channels reshaped into heads): {summary(error)}"
            )
        finally:
            self._surgeon.undo()


class Trial:
    """A network and example inputs to try changes on."""

    def __init__(self, copied: nn.Module, inputs: Inputs) -> None:
        self._copied, self._inputs = copied, inputs
        self._trains = True
        try:
            self.train()
        except Exception:  # A single sample cannot be normalised over the batch, for example.
            self._trains = False

    def outputs(self) -> list[Tensor]:
        """All floating-point outputs, the random generators seeded."""
        seed_generators(device_of(self._copied), 0)
        return [t for t in tensors_in(call(self._copied, self._inputs)) if t.is_floating_point()]

    def train(self) -> None:
        """A forward pass in training mode, if it ran at first; moves running statistics.

        Branches that only training uses (auxiliary heads) must fit, too.
        """
        if not self._trains:
            return
        self._copied.train()
        try:
            call(self._copied, self._inputs)
        finally:
            self._copied.eval()


def apart(masked: Sequence[Tensor], cut: Sequence[Tensor]) -> str:
    """How outputs under a mask and after the cut differ; empty if they do not."""
    if [tensor.shape for tensor in masked] != [tensor.shape for tensor in cut]:
        return "the outputs' shapes differ"
    for a, b in zip(masked, cut, strict=True):
        scale = a.abs().max().item() if a.numel() else 1.0
        most = (a - b).abs().max().item() if a.numel() else 0.0
        if not (math.isfinite(most) and most <= TOLERANCE * scale):
            return f"by {most:.3g} where outputs reach {scale:.3g}"
    return ""


def _difference(masked: Sequence[Tensor], cut: Sequence[Tensor]) -> str:
    if [tensor.shape for tensor in masked] != [tensor.shape for tensor in cut]:
        return "network output"
    difference = apart(masked, cut)
    return difference and (
        f"masking and cutting differ ({difference}): "
        "something mixes its channels before a layer consumes them"
    )


def _scramble(model: nn.Module) -> None:
    """Random weights that keep signals at about one, all of them having an effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                drawn = torch.rand(parameter.shape, generator=generator) + 0.5
            else:
                fan_in = parameter[0].numel()
                drawn = torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5
            if parameter.is_floating_point():
                parameter.copy_(drawn)
        for module in model.modules():
            if isinstance(module, _NormBase):
                for buffer in (module.running_mean, module.running_var):
                    if buffer is not None:
                        buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
