"""Margins and what units move them by, measured on a masked network, on calibration samples.

What the recorder measures once for a checkpoint, measured again on its program with some units gone
(ARCHITECTURE, "What we rank by"). The same masks give the same figures: seeded positions, fixed
portions, one thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elesh.safety import Entry, Moves
from leyline import NotFinite, PrunedArchitecture, PruningGroup

from .measure import Bench
from .sandbox import confined

__all__ = ["LogitGapMeter"]

_SEED = 2
_SAMPLES = 512
"""More are not looked at."""
_POSITIONS = 4
"""Answers looked at of a sample that has many (tokens, pixels), each for a backward pass."""

Floats = npt.NDArray[np.float32]


class LogitGapMeter:
    """Measures one checkpoint's network under masks.

    Args:
        bench: the network.
        inputs: calibration inputs by name.

    Raises:
        TooSlow, ContractError: as :meth:`Bench.measure` does; so do calls.
    """

    def __init__(
        self, bench: Bench, architecture: PrunedArchitecture, inputs: dict[str, Tensor]
    ) -> None:
        self._bench, self._inputs = bench, inputs
        self._groups = [group for group in architecture.groups if group.prunable]
        self._samples = min(_SAMPLES, len(next(iter(inputs.values()))))
        generator = torch.Generator().manual_seed(_SEED)
        with confined(), torch.no_grad():
            answers = []
            for rows in bench.portions(self._samples):
                logits = self._logits(rows, bench.gates(()))[0]
                answers.append(_answers(logits, generator))
        self._places, self._answers = (torch.cat(part) for part in zip(*answers, strict=True))

    def __call__(self, masked: Sequence[Entry], halved: Sequence[Entry] = ()) -> Moves:
        """The network with ``masked`` gone and the gates of ``halved`` at one half."""
        gates, margins, moves = self._bench.gates(masked, halved), [], []
        with confined():
            for rows in self._bench.portions(self._samples):
                found = self._of_portion(rows, gates)
                margins.append(found[0])
                moves.append(found[1])
        names = [group.name for group in self._groups]
        return Moves(
            np.concatenate(margins),
            {name: np.concatenate([part[n] for part in moves]) for n, name in enumerate(names)},
        )

    def _of_portion(self, rows: Tensor, mask: Sequence[Tensor]) -> tuple[Floats, list[Floats]]:
        """Margins of a portion's rows, and by group what its units move them by."""
        logits, gates = self._logits(rows, mask)
        places, answers = self._places[rows], self._answers[rows]
        chosen = logits.gather(1, places[:, :, None].expand(-1, -1, logits.shape[2]))
        odds = _logit_gaps(chosen, answers)
        if not torch.isfinite(odds).all():
            raise NotFinite("outputs on calibration samples", "finite margins", "NaN or infinity")
        found, last = [], odds.shape[1] - 1
        for n in range(odds.shape[1]):
            along = odds[:, n].sum()
            slopes = torch.autograd.grad(along, gates, retain_graph=n < last, allow_unused=True)
            found.append([self._owned(slopes, group, len(rows)) for group in self._groups])
        flat = odds.detach().T.flatten().numpy()
        return flat, [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def _logits(self, rows: Tensor, mask: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """[samples, positions, classes], and the gates they went through."""
        outputs, gates = self._bench.run(self._inputs, rows, mask)
        logits = outputs.movedim(self._bench.class_axis(outputs), -1)
        return logits.reshape(len(rows), -1, logits.shape[-1]), gates

    def _owned(self, slopes: Sequence[Tensor | None], group: PruningGroup, samples: int) -> Floats:
        """[samples, size]: the sum over the places where the units of a group enter."""
        total = torch.zeros(samples, group.size)
        for site in group.sites:
            slope = slopes[self._bench.slot(site)]
            if slope is not None:
                owned = slope[:samples, site.all_of(range(group.size))]
                total += owned.reshape(samples, group.size, -1).sum(2)
        return total.numpy()


def _answers(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[samples, P] some positions of every sample, and what the network answers there."""
    samples, positions, _ = logits.shape
    drawn = torch.rand(samples, positions, generator=generator)
    places = drawn.argsort(1)[:, :_POSITIONS]
    return places, logits.argmax(2).gather(1, places)


def _logit_gaps(logits: Tensor, answers: Tensor) -> Tensor:
    """[samples, P]: log of the odds against the answers, from [samples, P, classes]."""
    rivals = logits.scatter(2, answers[:, :, None], -torch.inf).logsumexp(2)
    return rivals - logits.gather(2, answers[:, :, None])[:, :, 0]
