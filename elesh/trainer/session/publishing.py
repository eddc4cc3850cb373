"""From a checkpoint in memory to the event or request that points at its blobs, and what was
published and has no answer yet.

Promises: an answer that was lost (a failover, a stream that was deleted or trimmed) is found in the
record of its key; a message that was lost is published again; one without an answer in its time
ends with that reason. Each ends once. Other content under a key that was published is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from elesh.bus import Bus
from leyline import (
    CheckpointBundle,
    CheckpointReady,
    Conflict,
    RequestKey,
    StructuralAnalysisRequest,
)
from leyline.network.bundle import NETWORK_FILES

__all__ = ["MOST_TIMES", "Published", "Unanswered", "with_blobs"]


async def with_blobs(
    bus: Bus, bundle: CheckpointBundle, request_id: str
) -> CheckpointReady | StructuralAnalysisRequest:
    """Put the blobs and return the event or request that points at them."""
    architecture, metadata = bundle.architecture.model_hash, bundle.metadata
    blobs = bundle.blobs()
    if bundle.network is not None:
        blobs |= {name: getattr(bundle.network, name) for name in NETWORK_FILES}
    refs: dict[str, Any] = {}
    for name, data in blobs.items():
        codec: Literal["msgpack", "safetensors"]
        codec = "msgpack" if name == "program" else "safetensors"
        refs[name] = await bus.blobs.put(data, codec, architecture=architecture)
    if not request_id:
        return CheckpointReady(
            metadata=metadata,
            architecture=bundle.architecture,
            levels=bundle.levels,
            parameters=bundle.parameters,
            **refs,
        )
    return StructuralAnalysisRequest(
        request_id=request_id,
        idempotency_key=str(RequestKey(metadata.epoch, metadata.model_hash, request_id)),
        current_architecture=bundle.architecture,
        parameters=bundle.parameters,
        requirements=bundle.requirements,
        metadata=metadata,
        levels=bundle.levels,
        **refs,
    )


_FIRST_SECONDS, _LONGEST_SECONDS = 10.0, 120.0
"""Between looks for one answer: the first comes soon, the others ever later."""
_MOST = 512
MOST_TIMES = 3
"""Times that a message which vanished is published again."""


@dataclass(eq=False)
class Published:
    """A message on the bus."""

    key: str
    """Of the decision that it leads to."""
    message: CheckpointReady | StructuralAnalysisRequest
    epoch: int
    event_id: str
    entry: str
    """Where it stands on its stream."""
    lives: float
    """Seconds in which it is answered, or never."""
    carrier: Mapping[str, str] = field(default_factory=dict)
    """The context of the trace that it was created in."""
    at: float = 0.0
    next_look: float = 0.0
    pause: float = _FIRST_SECONDS
    again: int = 0
    """Times that it was published again."""


class Unanswered:
    """The messages of one run, by key."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[str, Published] = {}
        self._decided: dict[str, None] = {}
        self._contents: dict[str, str] = {}

    def require_same(self, key: str, content: str) -> None:
        """Refuse what the bus would take for a message that is there already.

        Args:
            content: fingerprint of what is to be published under ``key``.

        Raises:
            Conflict: if other content was published under it.
        """
        if self._contents.setdefault(key, content) != content:
            hint = "give other content another key: another epoch, or another request id"
            found = f"content {content[:16]}"
            raise Conflict("idempotency_key", f"what {key} was published with", found, hint=hint)
        while len(self._contents) > 2 * _MOST:
            del self._contents[next(iter(self._contents))]

    def add(self, published: Published) -> None:
        """A message is on the bus from now on."""
        now = self._clock()
        if not published.at:
            published.at = now
        published.next_look = now + published.pause
        if published.key not in self._decided:
            self._waiting[published.key] = published
        while len(self._waiting) > _MOST:
            del self._waiting[next(iter(self._waiting))]

    def decided(self, key: str) -> bool:
        """Its decision was heard; whether for the first time."""
        self._waiting.pop(key, None)
        if key in self._decided:
            return False
        self._decided[key] = None
        while len(self._decided) > 2 * _MOST:
            del self._decided[next(iter(self._decided))]
        return True

    def ended(self, key: str) -> None:
        """It will have no decision."""
        self._waiting.pop(key, None)

    def due(self) -> list[Published]:
        """Those to look for now; each is looked for again later."""
        now = self._clock()
        found = [each for each in self._waiting.values() if each.next_look <= now]
        for each in found:
            each.pause = min(2 * each.pause, _LONGEST_SECONDS)
            each.next_look = now + each.pause
        return found

    def hurry(self) -> None:
        """The bus was away: look for all of them soon."""
        for each in self._waiting.values():
            each.pause, each.next_look = _FIRST_SECONDS, self._clock()

    def is_over(self, published: Published) -> bool:
        """Whether its time is over."""
        return self._clock() - published.at > published.lives
