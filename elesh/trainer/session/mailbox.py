"""Two queues between the training thread and the bus's thread.

Promises: neither side ever waits for the other; what does not fit, comes too late, or comes from a
process that has no such thread is refused, counted in ``missed`` and logged with its reason, so
that :meth:`Mailbox.post` says the truth. It knows nothing of the bus, nor of the network.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from elesh.observe import SparseLines, get_logger, mark_failed, span
from leyline import CheckpointBundle, Message, RequestKey
from leyline.streams import Stream

__all__ = ["Ended", "Incoming", "Mailbox", "Outgoing"]

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
