"""Proves on the network itself that masking whole layers and removing them is the same.

Promises: a block stays prunable only if, removed together with all others that passed, the outputs
were those under the mask, a forward pass in training mode ran, and every parameter that is left
got a gradient if it had one before.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from elesh.trainer.network.calling import Inputs
from elesh.trainer.surgery.bypass import BranchMasks, put_back, put_in
from leyline import LayerBlock, PrunedArchitecture

from .dependency_graph import summary
from .residual_blocks import find_blocks
from .residual_branches import Trace
from .trial import Trial
from .unit_proof import Admission
from .waypoints import apart


def with_blocks(
    trial: Trial, inputs: Inputs, architecture: PrunedArchitecture, ignored: Collection[str]
) -> PrunedArchitecture:
    """The architecture with its blocks, those that fail the proof marked with a reason.

    Args:
        trial: of a copy of the network in evaluation mode with random weights that all have an
            effect.
        ignored: modules that must stay.
    """
    blocks = find_blocks(trial.copied, inputs, architecture, ignored)
    if not blocks:
        return architecture
    drafted = _built(architecture, blocks)
    experiment = _Experiment(trial, inputs, drafted)
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

    def __init__(self, trial: Trial, inputs: Inputs, architecture: PrunedArchitecture) -> None:
        super().__init__()
        self._copied, self._inputs, self._architecture = trial.copied, inputs, architecture
        self._trial = trial
        self._fed = self._with_gradient()

    def disproof(self, names: Sequence[str]) -> str:
        """Why these blocks cannot be removed together; empty if they can."""
        blocks = [self._architecture.block[name] for name in names]
        masks = BranchMasks(self._copied)
        masks.set(blocks)
        try:
            masked = self._outputs()
        finally:
            masks.clear()
        replaced = put_in(self._copied, [one for block in blocks for one in block.stand_ins])
        try:
            if difference := apart(masked, self._outputs()):
                return f"masking and removing it differ ({difference})"
            self._trial.train()
            return self._starved()
        except Exception as error:  # Whatever the user's network raises is the finding.
            return f"the network does not run without it: {summary(error)}"
        finally:
            put_back(self._copied, reversed(replaced))
            self._copied.eval()

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
