"""Proves on the network itself that masking whole layers and removing them is the same.

Promises: a block stays prunable only if, removed together with all others that passed, the outputs
were those under the mask, a forward pass in training mode ran, and every parameter that is left
got a gradient if it had one before.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from elesh.trainer.network.calling import tensors_in
from elesh.trainer.surgery.bypass import BranchMasks, put_back, put_in
from leyline import LayerBlock, PrunedArchitecture

from .dependency_graph import summary
from .residual_branches import parameters_behind
from .trial import Trial
from .unit_proof import Admission
from .waypoints import apart


def with_blocks(
    trial: Trial,
    architecture: PrunedArchitecture,
    blocks: tuple[LayerBlock, ...],
    fed: Collection[int],
) -> PrunedArchitecture:
    """The architecture with these blocks, those that fail the proof marked with a reason.

    Args:
        trial: of a copy of the network in evaluation mode with random weights that all have an
            effect.
        fed: ids of the parameters that the outputs depend on.
    """
    experiment = _Experiment(trial, blocks, fed)
    experiment.admit([block.name for block in blocks if block.prunable])
    reasons = experiment.reasons
    marked = tuple(
        b.model_copy(update={"prunable": False, "reason": reasons[b.name]})
        if b.name in reasons
        else b
        for b in blocks
    )
    return PrunedArchitecture.build(
        architecture.tensors, architecture.layers, architecture.groups, blocks=marked
    )


class _Experiment(Admission):
    """Admits blocks."""

    def __init__(self, trial: Trial, blocks: Sequence[LayerBlock], fed: Collection[int]) -> None:
        super().__init__()
        self._copied, self._trial = trial.copied, trial
        self._blocks = {block.name: block for block in blocks}
        named = trial.copied.named_parameters()
        self._fed = {path for path, parameter in named if id(parameter) in fed}

    def disproof(self, names: Sequence[str]) -> str:
        """Why these blocks cannot be removed together; empty if they can."""
        reason = self._tried(names)
        return self._tried(names) if reason and self._trial.trained_wrongly() else reason

    def _tried(self, names: Sequence[str]) -> str:
        blocks = [self._blocks[name] for name in names]
        masks = BranchMasks(self._copied)
        masks.set(blocks)
        try:
            with torch.no_grad():
                masked = self._trial.outputs()
        finally:
            masks.clear()
        replaced = put_in(self._copied, [one for block in blocks for one in block.stand_ins])
        try:
            output = self._trial.run()
            if difference := apart(masked, self._trial.compared(output)):
                return f"masking and removing it differ ({difference})"
            if starved := self._starved(output):
                return f"without it no gradient reaches {', '.join(starved[:5])}"
            del output
            self._trial.train()
            return ""
        except Exception as error:  # Whatever the user's network raises is the finding.
            return f"the network does not run without it: {summary(error)}"
        finally:
            put_back(self._copied, reversed(replaced))
            self._copied.eval()

    def _starved(self, output: Any) -> list[str]:
        """Which parameters that are left get no gradient any more."""
        roots = [t.grad_fn for t in tensors_in(output) if t.grad_fn is not None]
        fed = parameters_behind(roots)
        left = dict(self._copied.named_parameters())
        return sorted(path for path in self._fed & left.keys() if id(left[path]) not in fed)
