"""Plans: a checkpoint as parts on the work stream, their results, and the one join.

Promises: planning, storing a result and queueing the join are one atomic step each, fenced by the
ownership of the entry that led to it and idempotent under redelivery. A part has one result, the
first; a plan has one join, queued by the part that completes it or by its deadline. What a plan
leaves in Redis goes when its decision is settled, else with its time to live.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from elesh.bus.guard import Guard
from elesh.bus.keys import Keys
from elesh.bus.scripts import Scripts
from elesh.bus.server.client import Client
from leyline import AnalysisItem, ItemResult, JoinItem, Message, decode, encode, stable_hash, wrap
from leyline.streams import WORK

from .consumer_groups import Groups
from .records import CONTEXT, Delivery, entry_fields

__all__ = ["Plan", "PlanStore", "Planned", "Stored"]

_SOURCE = "elesh"


class Planned(StrEnum):
    """What became of a plan."""

    PLANNED = "planned"
    DUPLICATE = "duplicate"
    """The same content was planned before; its parts are on their way."""
    CONFLICT = "conflict"
    """The key was planned for other content."""
    LOST = "lost"


class Stored(StrEnum):
    """What became of a part's result."""

    STORED = "stored"
    COMPLETED = "completed"
    """The set is complete and its join is queued."""
    DUPLICATE = "duplicate"
    GONE = "gone"
    """There is no such plan (any more)."""
    LOST = "lost"


@dataclass(frozen=True)
class Plan:
    """A checkpoint that was made into parts."""

    key: str
    fingerprint: str
    envelope: bytes
    """The checkpoint's, as it came, in its frame."""
    carrier: Mapping[str, str]
    items: tuple[str, ...]
    """Names of all parts."""
    origin: str = ""
    """Stream and entry that the checkpoint stood in."""


class PlanStore:
    """The plans of a partition."""

    def __init__(
        self,
        client: Client,
        scripts: Scripts,
        keys: Keys,
        groups: Groups,
        guard: Guard,
        seconds: int,
    ) -> None:
        self._client = client
        self._scripts = scripts
        self._keys = keys
        self._groups = groups
        self._guard = guard
        self._seconds = seconds
        self._shared = [keys.stream(WORK), keys.named("deadlines")]

    async def plan(
        self,
        group: str,
        consumer: str,
        delivery: Delivery,
        plan: Plan,
        items: Sequence[AnalysisItem],
        *,
        window_seconds: float,
    ) -> Planned:
        """Make the checkpoint of ``delivery`` into parts; they have ``window_seconds`` for all."""
        join = self._framed(JoinItem(plan=plan.key), plan.key, "join")
        fields: list[str | bytes | int] = [
            *("envelope", plan.envelope, "join", join, "total", len(items)),
            *("items", " ".join(plan.items), "origin", plan.origin),
            *(part for name in CONTEXT for part in (name, plan.carrier.get(name, ""))),
        ]
        args: list[str | bytes | int] = [group, consumer, delivery.entry_id, plan.key]
        args += [plan.fingerprint, self._seconds, round(window_seconds * 1000)]
        args += [len(fields), *fields]
        for item in items:
            entry = entry_fields(self._framed(item, plan.key, item.name), plan.carrier)
            args += [len(entry), *entry]
        known = [self._plan(plan.key), self._keys.named("record", plan.key)]
        keys = [self._groups.entry(delivery)[0], *known, *self._shared]
        return Planned(await self._scripts.plan(keys, args))

    async def load(self, key: str) -> Plan | None:
        """The plan of a key; None if it was joined and settled, or never made."""
        stored: Any = await self._client.hgetall(self._plan(key))
        if b"envelope" not in stored:
            return None
        text = {name: stored.get(name.encode(), b"").decode() for name in (*CONTEXT, "origin")}
        return Plan(
            key=key,
            fingerprint=stored[b"fingerprint"].decode(),
            envelope=stored[b"envelope"],
            carrier={name: text[name] for name in CONTEXT if text[name]},
            items=tuple(stored[b"items"].decode().split()),
            origin=text["origin"],
        )

    async def store(
        self,
        group: str,
        consumer: str,
        delivery: Delivery,
        item: AnalysisItem,
        result: ItemResult,
    ) -> Stored:
        """Store a part's result and acknowledge its entry."""
        keys = [self._groups.entry(delivery)[0], self._plan(item.plan), self._results(item.plan)]
        args: list[str | bytes | int] = [group, consumer, delivery.entry_id]
        args += [item.plan, item.name, encode(result)]
        return Stored(await self._scripts.store([*keys, *self._shared], args))

    async def results(self, key: str) -> dict[str, ItemResult]:
        """The results that are there, by the name of their part."""
        stored: Any = await self._client.hgetall(self._results(key))
        return {
            name.decode(): decode(ItemResult, result, field=f"result {name.decode()} of {key}")
            for name, result in sorted(stored.items())
        }

    async def join_overdue(self, key: str) -> bool:
        """Queue the join of a plan past its deadline; False if it was queued before."""
        return await self._scripts.overdue([self._plan(key), *self._shared], key)

    def served_keys(self, key: str) -> tuple[str, str]:
        """What a plan leaves in Redis: to be deleted with the step that ends it."""
        return self._plan(key), self._results(key)

    def _plan(self, key: str) -> str:
        return self._keys.named("plan", key)

    def _results(self, key: str) -> str:
        return self._keys.named("results", key)

    def _framed(self, message: Message, key: str, name: str) -> bytes:
        event_id = f"work-{stable_hash(key, name)}"
        envelope = wrap(message, source=_SOURCE, event_id=event_id, correlation_id=key)
        return self._guard.frame(WORK, encode(envelope))
