"""Budgets of the original network, and how far a network is from them. Pure, except that it times
the layers for a latency budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from torch import nn

from elesh.analysis.budgets.knapsack import resource_model
from elesh.trainer.network.calling import Inputs
from leyline import Budget, InvalidField, LatencyTable, PrunedArchitecture
from leyline.messages.parameters import Resource

from .arguments import require_share
from .latency import measure_latency

_SHARE = "a share of the original network, above 0 and at most 1"


@dataclass(frozen=True)
class ResourceUse:
    """How far a budget was reached."""

    resource: str
    asked: float
    """Share of the original network that may be left."""
    reached: float
    """Share that is left."""

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.reached <= self.asked + 1e-9


def shares_of(budget: Any) -> dict[Resource, float]:
    """What is asked for, by resource.

    Raises:
        InvalidField: if that is nothing, a resource is not known, or a share is not within 0 and 1.
    """
    known = get_args(Resource)
    if not isinstance(budget, Mapping) or not budget:
        expected = f'a share for at least one of {known}, as in {{"macs": 0.5}}'
        raise InvalidField("budget", expected, budget)
    asked: dict[Resource, float] = {}
    for name, share in budget.items():
        if name not in known:
            raise InvalidField("budget", f"one of {known}", name)
        require_share(f"budget.{name}", share, _SHARE, least=math.ulp(0.0))
        asked[cast("Resource", name)] = float(share)
    return asked


@dataclass(frozen=True)
class Goals:
    """What may be left of each resource."""

    original: PrunedArchitecture
    """Before the first cut."""
    asked: Mapping[Resource, float]
    """Shares of the original."""
    table: LatencyTable | None = None
    """The latency table of the original's layers, for a latency budget."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example: Inputs,
        now: PrunedArchitecture,
        original: PrunedArchitecture,
        budget: Mapping[str, float],
    ) -> Goals:
        """The goals of a request; the network's layers are timed if latency is among them.

        Raises:
            InvalidField: if there is none, a resource is not known, or a share is not within 0 and
            1.
        """
        asked = shares_of(budget)
        if "latency" in asked and now.history:
            expected = "a network that was not cut before, whose layers can be timed"
            raise InvalidField("budget.latency", expected, f"{len(now.history)} cuts")
        table = measure_latency(model, example, now) if "latency" in asked else None
        return cls(original, asked, table)

    def left(self, now: PrunedArchitecture) -> dict[Resource, float]:
        """The share of each resource that a network takes, of what the original does."""
        return {
            name: self._total(now, name) / max(self._total(self.original, name), 1e-30)
            for name in self.asked
        }

    def uses(self, now: PrunedArchitecture) -> tuple[ResourceUse, ...]:
        """How far every budget was reached."""
        return tuple(ResourceUse(n, self.asked[n], share) for n, share in self.left(now).items())

    def met(self, now: PrunedArchitecture) -> bool:
        """Whether all are."""
        return all(use.met for use in self.uses(now))

    def next(self, now: PrunedArchitecture, progress: float) -> Budget | None:
        """The budget of the next cut: of the resource that is furthest from its goal.

        Args:
            progress: 0 to 1, how far towards the whole budget; the way is geometric, so that every
                round takes an equal share of what the one before has left.

        Returns:
            A share of the original network, so that no more goes than is asked for (of latency,
            which falls in stairs, of the *present* one); None where all goals of this progress
            are met.
        """
        left = self.left(now)
        goals = {name: share**progress for name, share in self.asked.items()}
        name = max(goals, key=lambda n: left[n] / goals[n])
        if left[name] <= goals[name]:
            return None
        if name == "latency":
            share = goals[name] / left[name]
            return Budget(resource=name, at_most=share, latency=self._table_now(now, name))
        whole = self._total(self.original, name)
        return Budget(resource=name, at_most=goals[name], of="original", original=whole)

    def budgets(self, now: PrunedArchitecture) -> tuple[Budget, ...]:
        """All goals as budgets of the original network, for a request."""
        return tuple(
            Budget(
                resource=name,
                at_most=share,
                latency=self._table_now(now, name),
                of="original",
                original=self._total(self.original, name),
            )
            for name, share in self.asked.items()
        )

    def _total(self, architecture: PrunedArchitecture, name: Resource) -> float:
        budget = Budget(resource=name, at_most=1.0, latency=self._table_now(architecture, name))
        return resource_model(architecture, budget).total({})

    def _table_now(self, now: PrunedArchitecture, name: Resource) -> LatencyTable | None:
        """The table for a network that was cut: what no layer explains takes as long as before."""
        if name != "latency" or self.table is None:
            return None
        rows = tuple(row for row in self.table.layers if _weight(now, row.layer) in now.tensor)
        first = Budget(resource="latency", at_most=1.0, latency=self.table)
        fixed = resource_model(self.original, first).fixed
        table = self.table.model_copy(update={"layers": rows, "total_seconds": 0.0})
        inside = resource_model(now, first.model_copy(update={"latency": table})).total({})
        return table.model_copy(update={"total_seconds": fixed + inside})


def _weight(architecture: PrunedArchitecture, layer: str) -> str:
    weights = {x.name: x.weight for x in architecture.layers}
    return weights.get(layer) or f"{layer}.weight"
