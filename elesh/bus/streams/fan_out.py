"""Fan-out: a checkpoint as parts on the work stream, their results, and the one join.

Promises: planning, storing a result and queueing the join are one atomic step each, fenced by the
ownership of the entry that led to it and idempotent under redelivery. A part has one result, the
first; a plan has one join, queued by the part that completes it or by its deadline. What a plan
leaves in Redis goes when its decision is committed, else with its time to live.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

import msgpack

from elesh.bus.scripts import Shared, Store
from leyline import (
    AnalysisItem,
    IdentityMismatch,
    ItemResult,
    JoinItem,
    Malformed,
    Message,
    decode,
    encode,
    stable_hash,
    wrap,
)
from leyline.errors import brief
from leyline.streams import WORK

from .records import CONTEXT, Delivery, entry_fields

_SOURCE = "elesh"
_LONG_AGO = datetime.fromtimestamp(0, UTC)


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
    """The plan does not exist (it is decided or expired)."""
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
    deadline: datetime = _LONG_AGO
    """When it is joined whatever parts are there, by the server's clock."""


class PlanStore(Store):
    """The plans of a partition."""

    def __init__(self, shared: Shared, seconds: int) -> None:
        super().__init__(shared)
        self._seconds = seconds
        self._shared = [self._keys.stream(WORK), self._keys.named("deadlines")]

    async def plan(
        self,
        group: str,
        consumer: str,
        delivery: Delivery,
        plan: Plan,
        items: Sequence[AnalysisItem],
        *,
        window_seconds: float,
        run_id: str = "",
    ) -> Planned:
        """Make the checkpoint of ``delivery`` into parts; they have ``window_seconds`` for all."""
        now = await self._clock.now()
        at = round((now + timedelta(seconds=window_seconds)).timestamp() * 1000)
        # Under this worker's signature; the checkpoint is under its trainer's.
        facts: bytes = msgpack.packb([plan.key, plan.fingerprint, plan.items, plan.origin, at])
        place = self._keys.named("plan", plan.key)
        signed = self._guard.frame(place, facts)
        join = self._framed(JoinItem(plan=plan.key), plan.key, "join", run_id)
        fields: list[str | bytes | int] = [
            *("envelope", plan.envelope, "join", join, "total", len(items)),
            *("items", " ".join(plan.items), "origin", plan.origin, "facts", signed),
            *(part for name in CONTEXT for part in (name, plan.carrier.get(name, ""))),
        ]
        args: list[str | bytes | int] = [group, consumer, delivery.entry_id, plan.key]
        args += [plan.fingerprint, self._seconds, round(window_seconds * 1000)]
        args += [len(fields), *fields]
        for item in items:
            entry = entry_fields(self._framed(item, plan.key, item.name, run_id), plan.carrier)
            args += [len(entry), *entry]
        keys = [self._keys.stream(delivery.stream), place]
        keys += [self._keys.named("record", plan.key), *self._shared]
        return Planned((await self._scripts.run("plan", keys, args)).decode())

    async def is_planned(self, key: str) -> bool:
        """Whether a key has a plan whose decision is not committed yet."""
        return bool(await self._client.exists(self._keys.named("plan", key)))

    async def load(self, key: str) -> Plan | None:
        """The plan of a key; None if it was joined and committed, or never made.

        Raises:
            Unsigned, BadSignature, NotAuthorized: if it was not made by a key that may decide.
            Malformed: if it is not a plan.
        """
        place = self._keys.named("plan", key)
        stored: Any = await self._client.hgetall(place)
        if b"envelope" not in stored:
            return None
        facts = self._guard.check(place, stored.get(b"facts", b"")).content
        carrier = {
            name: stored.get(name.encode(), b"").decode(errors="replace") for name in CONTEXT
        }
        try:
            named, fingerprint, items, origin, at = msgpack.unpackb(facts)
            plan = Plan(
                key=named,
                fingerprint=fingerprint,
                envelope=stored[b"envelope"],
                carrier={name: value for name, value in carrier.items() if value},
                items=tuple(items),
                origin=origin,
                deadline=datetime.fromtimestamp(at / 1000, UTC),
            )
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
            raise Malformed(f"plan {key}", "the facts of a plan", brief(facts)) from None
        if plan.key != key:
            raise IdentityMismatch(f"plan {key}", key, brief(plan.key))
        return plan

    async def store(
        self,
        group: str,
        consumer: str,
        delivery: Delivery,
        plan: Plan,
        item: AnalysisItem,
        result: ItemResult,
    ) -> Stored:
        """Store a part's result and acknowledge its entry."""
        signed = self._guard.frame(self._result(plan, item.name), encode(result))
        keys = [self._keys.stream(delivery.stream), *self.served_keys(item.plan)]
        args: list[str | bytes | int] = [group, consumer, delivery.entry_id]
        args += [item.plan, item.name, signed]
        verdict = await self._scripts.run("store", [*keys, *self._shared], args)
        return Stored(verdict.decode())

    async def results(self, plan: Plan) -> dict[str, ItemResult]:
        """The results that are there, by the name of their part.

        Raises:
            Unsigned, BadSignature, NotAuthorized: if one is not by a key that may decide, for this
                part of this content.
        """
        name = self._keys.named("results", plan.key)
        stored: Any = await self._client.hmget(name, list(plan.items))
        results = {}
        for name, framed in zip(plan.items, stored, strict=True):
            if framed is not None:
                data = self._guard.check(self._result(plan, name), framed).content
                results[name] = decode(ItemResult, data, field=f"result {name} of {plan.key}")
        return results

    def _result(self, plan: Plan, part: str) -> str:
        """Where a part's result stands, for its signature: the same key may come again with other
        content."""
        return f"{self._keys.named('results', plan.key)}#{part}#{plan.fingerprint}"

    async def join_overdue(self, key: str) -> bool:
        """Queue the join of a plan past its deadline; False if it was queued before."""
        keys = [self._keys.named("plan", key), *self._shared]
        return bool(await self._scripts.run("overdue", keys, [key]))

    def served_keys(self, key: str) -> tuple[str, str]:
        """The keys of a plan and its results, to be deleted with the step that ends it."""
        return self._keys.named("plan", key), self._keys.named("results", key)

    def _framed(self, message: Message, key: str, name: str, run_id: str) -> bytes:
        event_id = f"work-{stable_hash(key, name)}"
        envelope = wrap(
            message,
            source=_SOURCE,
            event_id=event_id,
            correlation_id=key,
            run_id=run_id,
            now=self._clock.latest(),
        )
        return self._guard.frame(WORK, encode(envelope))
