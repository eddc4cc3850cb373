"""Proves on the network itself that masking whole layers and removing them is the same.

Promises: a block stays prunable only if, removed together with all others that passed, the outputs
were those under the mask, a forward pass in training mode ran, and every parameter that is left
got a gradient if it had one before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from elesh.trainer.graph.residual_branches import behind, parameters_behind
from elesh.trainer.network.calling import raised_in, summary, tensors_in
from elesh.trainer.network.saved import without_saving
from elesh.trainer.network.traversal import parameters_in
from elesh.trainer.surgery.bypass import Replaced, put_back, put_in
from elesh.trainer.surgery.masks import Masks
from leyline import LayerBlock, PrunedArchitecture

from .trial import Trial
from .units import Admission
from .waypoints import Guards, Waypoints, apart


def with_blocks(
    trial: Trial,
    architecture: PrunedArchitecture,
    blocks: tuple[LayerBlock, ...],
    fed: Collection[int],
) -> PrunedArchitecture:
    """The architecture with these blocks, those that fail the proof marked with a reason, and with
    all that is multiplied.

    Args:
        trial: of a copy of the network in evaluation mode with random weights that all have an
            effect.
        fed: ids of the parameters that the outputs depend on.
    """
    experiment = _Experiment(trial, architecture, blocks, fed)
    experiment.admit([block.name for block in blocks if block.prunable])
    reasons = experiment.reasons
    marked = tuple(
        b.model_copy(update={"prunable": False, "reason": reasons[b.name]})
        if b.name in reasons
        else b
        for b in blocks
    )
    layers, products = trial.products.counted(architecture)
    return PrunedArchitecture.build(
        architecture.tensors, layers, architecture.groups, blocks=marked, products=products
    )


class _Experiment(Admission):
    """Admits blocks."""

    def __init__(
        self,
        trial: Trial,
        architecture: PrunedArchitecture,
        blocks: Sequence[LayerBlock],
        fed: Collection[int],
    ) -> None:
        super().__init__()
        self._architecture = architecture
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
        masks = Masks(self._copied)
        masks.set(self._architecture, {}, blocks)
        try:
            with torch.no_grad():
                masked = self._trial.outputs()
        finally:
            masks.clear()
        replaced = {block.name: put_in(self._copied, block.stand_ins) for block in blocks}

        def run() -> Any:
            with self._guarded(blocks, replaced):
                return self._trial.run()

        try:
            output, _ = without_saving(run)
            if self.failing:
                return next(iter(self.failing.values()))
            if difference := apart(masked, self._trial.compared(output)):
                return f"masking and removing it differ ({difference})"
            if starved := self._starved(output):
                return f"without it no gradient reaches {', '.join(starved[:5])}"
            del output
            self._trial.train()
            return ""
        except Exception as error:  # Whatever the user's network raises is the finding.
            return _fails(error)
        finally:
            for one in reversed(replaced.values()):
                put_back(self._copied, reversed(one))
            self._copied.eval()

    def _guarded(
        self, blocks: Sequence[LayerBlock], replaced: Mapping[str, Sequence[Replaced]]
    ) -> Guards:
        """Where a module fails without parts of it that belong to one block alone, these are put
        back, and it is called again: so all that fail show at once."""
        self.failing = {}

        def amend(path: str, error: Exception) -> bool:
            holding = [
                block.name
                for block in blocks
                if any(part.module.startswith(f"{path}.") for part in block.stand_ins)
            ]
            if len(holding) != 1 or holding[0] in self.failing:
                return False
            self.failing[holding[0]] = _fails(error)
            put_back(self._copied, reversed(replaced[holding[0]]))
            return True

        parts = [part.module for block in blocks for part in block.stand_ins]
        around = {
            ".".join(path[:i])
            for path in (p.split(".") for p in parts)
            for i in range(1, len(path))
        }
        return Guards(self._copied, around, amend, Waypoints({}))

    def _starved(self, output: Any) -> list[str]:
        """The remaining parameters that get no gradient."""
        roots = [t.grad_fn for t in tensors_in(output) if t.grad_fn is not None]
        fed = parameters_behind(behind(roots))
        left = parameters_in(self._copied)
        return sorted(path for path in self._fed & left.keys() if id(left[path]) not in fed)


def _fails(error: Exception) -> str:
    return f"the network does not run without it{raised_in(error)}: {summary(error)}"
