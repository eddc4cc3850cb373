"""Proves on the network itself that masking whole layers and removing them is the same.

Promises: a block stays prunable only if, removed together with all others that passed, the outputs
were those under the mask, a forward pass in training mode ran, and every parameter that is left
got a gradient if it had one before.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from elesh.trainer.network.calling import Inputs
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import LayerBlock, PrunedArchitecture

from .dependency_graph import summary
from .residual_blocks import find_blocks
from .residual_branches import Trace
from .unit_proof import Admission, Trial, apart


def with_blocks(
    copied: nn.Module, inputs: Inputs, architecture: PrunedArchitecture, ignored: Collection[str]
) -> PrunedArchitecture:
    """The architecture with its blocks, those that fail the proof marked with a reason.

    Args:
        twin: a copy of the network in evaluation mode with random weights that all have an effect.
        ignored: modules that must stay.
    """
    blocks = find_blocks(copied, inputs, architecture, ignored)
    if not blocks:
        return architecture
    drafted = _built(architecture, blocks)
    experiment = _Experiment(copied, inputs, drafted)
    experiment.admit([block.name for block in blocks if block.prunable])
    reasons = experiment.reasons
    marked = tuple(
        b.model_copy(update={"prunable": False, "reason": reasons[b.name]})
        if b.name in reasons
        else b
        for b in blocks
    )
    return _built(architecture, marked)


def _built(architecture: PrunedArchitecture, blocks: tuple[LayerBlock, ...]) -> PrunedArchitecture:
    return PrunedArchitecture.build(
        architecture.tensors, architecture.layers, architecture.groups, blocks=blocks
    )


class _Experiment(Admission):
    """Admits blocks."""

    def __init__(self, copied: nn.Module, inputs: Inputs, architecture: PrunedArchitecture) -> None:
        super().__init__()
        self._copied, self._inputs, self._architecture = copied, inputs, architecture
        self._surgeon = Surgeon(copied, architecture, restore_points=1)
        self._trial = Trial(copied, inputs)
        self._fed = self._with_gradient()

    def disproof(self, names: Sequence[str]) -> str:
        """Why these blocks cannot be removed together; empty if they can."""
        self._surgeon.mask_layers(names)
        try:
            masked = self._outputs()
        finally:
            self._surgeon.unmask()
        self._surgeon.cut_layers(names)
        try:
            if difference := apart(masked, self._outputs()):
                return f"masking and removing it differ ({difference})"
            self._trial.train()
            return self._starved()
        except Exception as error:  # Whatever the user's network raises is the finding.
            return f"the network does not run without it: {summary(error)}"
        finally:
            self._surgeon.undo()

    def _outputs(self) -> list[Tensor]:
        with torch.no_grad():
            return self._trial.outputs()

    def _with_gradient(self) -> set[str]:
        reached = Trace(self._copied, self._inputs).parameters()
        return {path for path, p in self._copied.named_parameters() if id(p) in reached}

    def _starved(self) -> str:
        """Which parameters that are left get no gradient any more."""
        left = {path for path, _ in self._copied.named_parameters()}
        starved = sorted((self._fed & left) - self._with_gradient())
        return f"without it no gradient reaches {', '.join(starved[:5])}" if starved else ""
