"""A trainer of the chaos driver that listens: what it published and what it heard of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from itertools import count

from station import checkpoint

from elesh.settings import BusSettings, Settings
from elesh.trainer import Session

__all__ = ["Listener"]

_RUN = "listener"


@dataclass
class Listener:
    """One session through all faults, in the driver's process."""

    url: str
    partition: str
    pause: float
    """Seconds between its checkpoints."""
    asked: set[str] = field(default_factory=set)
    """Keys of what it published."""
    answered: set[str] = field(default_factory=set)
    """Keys whose decision it heard, or of which it was told that there will be none."""

    async def run(self, over: asyncio.Event, patience: float) -> None:
        """Publish until ``over``, then wait for what is still to be heard."""
        settings = Settings(bus=BusSettings(partition=self.partition))
        with Session(_RUN, self.url, settings) as session:
            for number in count():
                if over.is_set():
                    break
                bundle = checkpoint()
                names = {"checkpoint_id": f"ck-{_RUN}-{number}", "run_id": _RUN}
                named = replace(bundle, metadata=bundle.metadata.model_copy(update=names))
                if session.publish(named):
                    self.asked.add(str(named.decision_key))
                self._hear(session)
                try:
                    await asyncio.wait_for(over.wait(), self.pause)
                except TimeoutError:
                    continue
            loop = asyncio.get_running_loop()
            deadline = loop.time() + patience
            while not self.answered >= self.asked and loop.time() < deadline:
                await asyncio.sleep(0.25)
                self._hear(session)

    def _hear(self, session: Session) -> None:
        self.answered.update(decision.idempotency_key for decision in session.decisions())
        self.answered.update(session.failed)
