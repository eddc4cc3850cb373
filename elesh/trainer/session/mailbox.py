"""Two queues between the training thread and the bus thread, and the published messages that have
no answer yet.

Promises: neither side ever waits for the other; what does not fit, comes too late, or comes from a
process that has no such thread is refused, counted in ``missed`` and logged with its reason, so
that :meth:`Mailbox.post` says the truth. An answer that was lost (a failover, a stream that was
deleted or trimmed) is found in the record of its key; a message that was lost is published again;
one without an answer in its time ends with that reason. Each ends once. Other content under a key
that was published is refused. Nothing here talks to the bus, nor to the network.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from elesh.observe import SparseLines, get_logger, mark_failed, span
from leyline import (
    CheckpointBundle,
    CheckpointReady,
    Conflict,
    Message,
    RequestKey,
    StructuralAnalysisRequest,
)
from leyline.streams import Stream

_ITEMS, _BUNDLES = 64, 8
_FORKED = "this process was forked from the one that has the session: open one of its own here"
_lines = SparseLines(get_logger(__name__))


@dataclass(frozen=True)
class Outgoing:
    """Something to publish; a bundle's blobs are put first."""

    stream: Stream
    message: Message | CheckpointBundle
    carrier: Mapping[str, str]
    epoch: int
    event_id: str = ""
    request_id: str = ""

    @property
    def key(self) -> str:
        """The key of the decision that it leads to; empty if it leads to none."""
        if not isinstance(self.message, CheckpointBundle):
            return ""
        key = self.message.decision_key
        if self.request_id:
            key = RequestKey(key.epoch, key.model_hash, self.request_id).at(key.level)
        return str(key)


@dataclass(frozen=True)
class Incoming:
    """A message of the run, with its trace context."""

    message: Message
    carrier: Mapping[str, str]


@dataclass(frozen=True)
class Ended:
    """Something that will have no decision."""

    key: str
    reason: str


class Mailbox:
    """Two queues and the state of the line, safe to use from both threads."""

    def __init__(self) -> None:
        self.refused = ""
        """Why the run is not this trainer's; empty while it is, or is not known. Set by the bus's
        thread."""
        self.reused = ""
        """Who trained under the run's id before, in a sentence; empty if no run did. Set by the
        bus's thread."""
        self.connected = threading.Event()
        """Set once the bus has answered."""
        self._out: queue.Queue[Outgoing] = queue.Queue(_ITEMS)
        self._in: queue.SimpleQueue[Incoming | Ended] = queue.SimpleQueue()
        self.arrived = threading.Event()
        """Set while something has come that was not :meth:`received` yet."""
        self._bundles = threading.BoundedSemaphore(_BUNDLES)  # bundles are large
        self._count = threading.Lock()
        self._missed = 0
        self._process, self._closed = os.getpid(), False

    @property
    def forked(self) -> bool:
        """Whether this is a process that was forked from the one whose it is."""
        return os.getpid() != self._process

    @property
    def missed(self) -> int:
        """Messages that could not be queued or sent."""
        return self._missed

    # The training thread's side

    def post(self, item: Outgoing) -> bool:
        """Queue something; False, and counted as missed, if the queue is full, the session closed,
        this process a forked one, or the run not this trainer's."""
        if self.forked:
            return self.miss(item, _FORKED)
        if self._closed:
            return self.miss(item, "the session is closed")
        if self.refused:
            return self.miss(item, self.refused)
        large = isinstance(item.message, CheckpointBundle)
        if large and not self._bundles.acquire(blocking=False):
            return self.miss(item, "queue full of checkpoints")
        try:
            self._out.put_nowait(item)
        except queue.Full:
            if large:
                self._bundles.release()
            return self.miss(item, "queue full")
        return True

    def received(self) -> list[Incoming | Ended]:
        """What has come since the last call, in its order."""
        self.arrived.clear()
        found: list[Incoming | Ended] = []
        while True:
            try:
                found.append(self._in.get_nowait())
            except queue.Empty:
                return found

    # The bus's side

    @property
    def unsent(self) -> int:
        """How many items are queued."""
        return self._out.qsize()

    def take(self) -> Outgoing | None:
        """The next item to send, None if there is none."""
        try:
            item = self._out.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item.message, CheckpointBundle):
            self._bundles.release()
        return item

    def deliver(self, item: Incoming | Ended) -> None:
        """Leave a message, or the news that there will be none, for the training thread."""
        self._in.put(item)
        self.arrived.set()

    def miss(self, item: Outgoing, reason: str) -> bool:
        """Count and log an item that is not sent, and mark it in its trace; False."""
        with self._count:
            self._missed += 1
        attributes = {"elesh.key": item.key} if item.key else None
        name = f"missed {item.stream.name}"
        with span(name, carrier=item.carrier, attributes=attributes):
            mark_failed("not_published", reason)
        _lines.warning("not published", stream=item.stream.name, epoch=item.epoch, reason=reason)
        if item.key:
            self.deliver(Ended(item.key, f"not published: {reason}"))
        return False

    def close(self) -> None:
        """Take nothing more."""
        self._closed = True

    def miss_all(self, reason: str) -> None:
        """Count and log everything that is queued."""
        while (item := self.take()) is not None:
            self.miss(item, reason)


_FIRST_SECONDS, _LONGEST_SECONDS = 10.0, 120.0
"""Between looks for one answer: the first comes soon, the others ever later."""
_MOST = 512
_SLOW_SECONDS = 30.0
"""Most analyses are done by then."""
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
        """Record that a decision arrived; False if it had arrived before."""
        self._waiting.pop(key, None)
        if key in self._decided:
            return False
        self._decided[key] = None
        while len(self._decided) > 2 * _MOST:
            del self._decided[next(iter(self._decided))]
        return True

    def nobody_answers(self, published: Published) -> bool:
        """Whether this one waits for half a minute or more, and no decision has come so far."""
        return not self._decided and self._clock() - published.at >= _SLOW_SECONDS

    def ended(self, key: str) -> None:
        """Record that a message will have no decision."""
        self._waiting.pop(key, None)

    def due(self) -> list[Published]:
        """The messages to look for now; each is looked for again later."""
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
