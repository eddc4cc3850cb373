"""The monitor of one worker: looks at its child and its bus, and reports how it is.

Promises: readiness turns red, with the reason, within ten seconds of a child that is wedged or dead
and of a bus that does not answer; nothing here can hold up the worker or fail it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from elesh.bus import Bus, BusUnavailable, repeatedly
from elesh.observe import SparseLines, get_logger
from elesh.observe.metrics import setup_metrics, shutdown_metrics
from elesh.observe.tracing import is_exported
from elesh.settings import ObserveSettings
from elesh.worker.compute.heartbeat import Finding

from .gauges import FleetFigures, register_fleet, register_worker
from .health import application, listening, serving
from .status import Condition, Status

__all__ = ["Monitor"]

_PROBE_SECONDS = 1.0
_LIVES = 3
"""A worker is forgotten when it has missed so many heartbeats."""
_log = get_logger(__name__)
_lines = SparseLines(_log)


class Monitor:
    """Watches one worker for as long as :meth:`running` lasts.

    Args:
        look: how the compute child is, from outside.
    """

    def __init__(
        self, bus: Bus, settings: ObserveSettings, status: Status, look: Callable[[], Finding]
    ) -> None:
        self._bus, self._settings, self._status, self._look = bus, settings, status, look
        self._heard = 0.0
        self._figures = FleetFigures()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Probe, write heartbeats and serve health until the block ends, then unregister.

        Raises:
            SettingsError: if the port of ``observe.health_port`` cannot be had.
        """
        async with contextlib.AsyncExitStack() as stack:
            port = self._settings.health_port
            if setup_metrics("elesh-worker", self._status.worker_id, prometheus=port is not None):
                register_worker(self._status)
                register_fleet(self._figures)
                self._status.announce()
            if port is not None:
                app = application(self._status, self._refresh)
                listener = listening(self._settings.health_host, port)
                self._status.health_url = await stack.enter_async_context(serving(app, listener))
                _log.info("health", url=self._status.health_url)
            keeping = (
                repeatedly("watching", self._watch),
                repeatedly("heartbeat", self._heartbeat, self._bus.outage),
            )
            self._heard = asyncio.get_running_loop().time()
            tasks = [asyncio.create_task(each) for each in keeping]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                with contextlib.suppress(BusUnavailable):
                    await self._bus.registry.forget(self._status.worker_id)
                await asyncio.to_thread(shutdown_metrics)

    async def _watch(self) -> float:
        """Once a second: how are child and bus?"""
        before = self._status.condition
        after = self._condition(self._look())
        self._status.condition = after
        if after.why != before.why and before.why != "starting":
            tell = _log.info if after.ready else _log.warning
            tell("ready" if after.ready else "not ready", why=after.why or "-")
        return _PROBE_SECONDS

    def _condition(self, found: Finding) -> Condition:
        if self._status.doing == "starting":
            return Condition("starting", False, "starting")
        if self._status.doing == "draining":
            return Condition(found.child, False, "draining")
        if found.why:
            return Condition(found.child, False, found.why)
        silent = asyncio.get_running_loop().time() - self._heard
        if silent > self._settings.heartbeat_seconds + _PROBE_SECONDS:
            return Condition(found.child, False, "the bus does not serve")
        if self._status.lacks:
            return Condition(found.child, False, self._status.lacks)
        return Condition(found.child, True, "")

    async def _heartbeat(self) -> float:
        """Every heartbeat: tell the register."""
        seconds = self._settings.heartbeat_seconds
        other = await self._bus.registry.heartbeat(self._status.state(), seconds=_LIVES * seconds)
        self._heard = asyncio.get_running_loop().time()
        if other is not None:
            _lines.warning(
                "another worker has this name", name=other.worker_id, host=other.host, pid=other.pid
            )
        if is_exported("METRICS"):
            await self._refresh()
        return seconds

    async def _refresh(self) -> None:
        await self._figures.refresh(self._bus)
