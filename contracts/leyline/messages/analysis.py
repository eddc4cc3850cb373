"""What the analysis of one level found: half a decision, before the levels are joined."""

from __future__ import annotations

import operator
from typing import ClassVar, Self

from pydantic import Field, model_validator

from leyline.base import Count, Finite, Message, Name, NonNegative
from leyline.errors import InvalidField
from leyline.identity import Level

from .decisions import StructuralPruningDecision


class RankedUnit(Message):
    """One unit of a cut at its place in the order of removal."""

    level: Level
    layer_name: Name
    """The group that loses the unit, or the layer that goes whole."""
    index: Count = 0
    """In current numbering; 0 for a layer."""
    cost: Finite
    """What it cost when it was chosen, on the scale of its target's importance."""


class PredictedDamage(Message):
    """What a level's cut is predicted to do to the outputs, judged on samples that did not choose
    it, in squared output units."""

    damage: NonNegative
    error: NonNegative
    """Standard error of ``damage``."""
    energy: NonNegative
    """The outputs' own mean square along the same directions."""


class LevelAnalysis(Message):
    """One level of one checkpoint, analysed; :func:`elesh.analysis.decision.join` decides by it."""

    contract_of: ClassVar[str] = "Elesh internal"

    decision: StructuralPruningDecision
    """The level by itself, with key ``<epoch>:<model_hash>:<decision_id>:<level>`` and every gate
    but the breaker's, which is looked at when the levels are joined."""
    order: tuple[RankedUnit, ...] = ()
    """The units of the cut as they were chosen: redundant ones first, then the cheapest. So a
    prefix of the cut is a cut, too."""

    shard: tuple[Name, ...] = Field(default=(), exclude_if=operator.not_)
    """The groups that were looked at, where those were not all of the level. Its order goes as
    far as the whole level's quota: how much of it is cut is known when the shards are joined."""
    halves: tuple[tuple[RankedUnit, ...], ...] = Field(default=(), exclude_if=operator.not_)
    """Of a shard: the orders that the even and the odd samples alone would choose; what one half
    chooses is judged on the other when the shards are joined."""
    predicted: PredictedDamage | None = None
    """Where there are output projections of all candidates."""

    @property
    def level(self) -> Level:
        """The level that was analysed."""
        return self.decision.key.level

    @model_validator(mode="after")
    def _orders_the_cut(self) -> Self:
        ordered = sorted((unit.layer_name, unit.index) for unit in self.order)
        targets = [(name, index) for name, lost in self.decision.units.items() for index in lost]
        targets += [(target.layer_name, 0) for target in self.decision.layers]
        if ordered != sorted(targets):
            raise InvalidField("order", "the units of the decision's targets", ordered[:5])
        return self
