"""Which of the layers that may go do go, and what that is predicted to do.

Promises: where a failing gate refuses, the design's rank orders them; where it shortens, they go by
how far their removal moves the outputs, as channels and heads do, and the set is the largest that
the gates of the prediction let pass. What was chosen on one half of the samples is judged on the
other. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from elesh.analysis.candidates import Candidates, Doubles, Floats
from elesh.analysis.importance.output_projections import (
    Prediction,
    Projections,
    output_mean_square,
    predict,
)
from elesh.safety import noise, predicted_shift
from leyline import CheckpointBundle, GateStatistics, LayerStatistics

__all__ = ["LayerChoice", "choose_layers"]


@dataclass(frozen=True)
class LayerChoice:
    """The layers that go, in order, and what they are predicted to do together."""

    names: tuple[str, ...]
    costs: tuple[float, ...]
    """Of each: its design's rank, or the mean square by which it moves the outputs."""
    prediction: Prediction | None = None
    """None without output projections of two samples or more."""
    mean_square: float = 0.0
    """Of the outputs."""
    shortfall: str = ""
    """Why fewer go than may, where the prediction is the reason."""


def choose_layers(
    bundle: CheckpointBundle,
    ranks: Mapping[str, float],
    present: Sequence[str],
    quota: int,
    max_shift: float,
) -> LayerChoice:
    """At most ``quota`` of the layers in ``ranks``.

    Args:
        ranks: the design's, by layer; the lowest go first.
        present: all removable layers that are still there.
        max_shift: of the outputs' mean square.
    """
    measured = sorted(name for name in present if name in bundle.layers)
    moves = _Moves.of(bundle, measured)
    if moves is None or bundle.parameters.failing_gate == "refuse":
        names = sorted(ranks, key=lambda name: (ranks[name], name))[:quota]
        picked = LayerChoice(tuple(names), tuple(ranks[name] for name in names))
        return moves.predicted(picked, names) if moves and names else picked
    costs = moves.output_errors()
    order = sorted(ranks, key=lambda name: (costs[name], ranks[name], name))[:quota]
    whole = None
    for count in range(len(order), 0, -1):
        names = order[:count]
        picked = LayerChoice(tuple(names), tuple(costs[name] for name in names))
        choice = moves.predicted(picked, list(ranks))
        if _passes(choice, max_shift):
            return replace(choice, shortfall=_shortfall(len(order) - count, len(order)))
        whole = whole or choice
    # Nothing passes: the gates refuse the whole, with its figures.
    return whole or LayerChoice((), ())


def _shortfall(stay: int, eligible: int) -> str:
    if not stay:
        return ""
    return (
        f"{stay} of the {eligible} layers that may go stay: all together would do too much, or no "
        "less than others"
    )


def _passes(choice: LayerChoice, max_shift: float) -> bool:
    prediction, mean_square = choice.prediction, choice.mean_square
    if prediction is None or not mean_square > 0:
        return True
    error, deviation = prediction.output_error, prediction.standard_error
    shift = predicted_shift(error / mean_square, deviation / mean_square, max_shift)
    return shift.passed and noise(error, deviation, prediction.random).passed


@dataclass(frozen=True)
class _Moves:
    """How far the outputs move without each layer: a layer is a group of one unit."""

    names: tuple[str, ...]
    projections: Projections
    candidates: Candidates
    mean_square: float

    @classmethod
    def of(cls, bundle: CheckpointBundle, names: Sequence[str]) -> _Moves | None:
        """Of the layers that were measured; None where there are no two samples."""
        gates = {name: _as_gate(bundle.layers[name]) for name in names}
        if not gates or len(gates[names[0]].projections) < 2:
            return None
        ones = (1,) * len(names)
        candidates = Candidates(tuple(names), ones, ones, ones)
        mean_square = max(
            output_mean_square(gates.values()), output_mean_square(bundle.gates.values())
        )
        return cls(tuple(names), Projections.of(gates, candidates), candidates, mean_square)

    def output_errors(self) -> dict[str, float]:
        """By layer, alone."""
        squares = self._squares(self.projections.columns) * self.projections.unit**2
        count = self.projections.columns.shape[1]
        return dict(zip(self.names, (squares / count).tolist(), strict=True))

    def predicted(self, choice: LayerChoice, eligible: Collection[str]) -> LayerChoice:
        """The choice with what it does. Each half of the samples chooses as many of ``eligible``;
        where these are no more, the choice is given."""
        places = [place for place, name in enumerate(self.names) if name in eligible]
        count = len(choice.names)

        def choose(columns: Floats) -> list[int]:
            squares = self._squares(columns)
            return sorted(sorted(places, key=lambda place: squares[place])[:count])

        prediction = predict(self.projections, self.candidates, count, choose)
        return replace(choice, prediction=prediction, mean_square=self.mean_square)

    def _squares(self, columns: Floats) -> Doubles:
        """[C]: of the columns without the gains, which are for units."""
        plain = columns / self.projections.gains[:, None]
        return np.asarray(np.einsum("ij,ij->i", plain, plain, dtype=np.float64))


def _as_gate(data: LayerStatistics) -> GateStatistics:
    # What LayerStatistics has checked need not be checked again.
    return GateStatistics.model_construct(
        layer_name=data.layer_name,
        projections=np.asarray(data.projections)[:, None],
        first_order=data.first_order,
        second_order=data.second_order,
    )
