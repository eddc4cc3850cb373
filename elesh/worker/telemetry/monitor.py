"""A worker's monitor: checks its child and its bus, and reports health over HTTP and as gauges.

    /health/elesh/{worker_id}/structured_analysis   the design document's page: 200, or 503 and why
    /ready      200 if it can take work, else 503 and why
    /live       200 as long as the supervisor turns
    /metrics    for Prometheus

Gauges are read at every scrape; their names without the prefix ``elesh`` are the design document's.

Promises: readiness turns red, with the reason, within ten seconds of a child that is wedged or dead
and of a bus that does not answer; nothing here can hold up the worker or fail it, or touches
signals, the child or the bus, but ``/metrics``, which asks the bus for the fleet's figures and goes
on without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from elesh.bus import Backlog, Bus, BusUnavailable, repeatedly
from elesh.bus.state.runs import BreakerView, State
from elesh.observe import SparseLines, get_logger
from elesh.observe.metrics import Reading, gauge, setup_metrics, shutdown_metrics
from elesh.observe.tracing import is_exported
from elesh.settings import ObserveSettings, SettingsError
from elesh.worker.compute.protocol import Finding
from leyline import Level
from leyline.streams import DEAD, STREAMS

from .reports import Condition, Status

_STATES: tuple[State, ...] = ("half_open", "open")
_BREAKER_LEVELS = (Level.CHANNEL, Level.HEAD, Level.LAYER)
_LOOKED_AT = frozenset({stream.name for stream in STREAMS if stream.group} | {DEAD.name})

_OF_WORKER: Mapping[str, tuple[str, Callable[[Status], float]]] = {
    "structured_analysis_completion_rate": (
        "Share of this worker's analyses that gave a result.",
        lambda status: status.completion_rate,
    ),
    "peak_memory_usage": (
        "Highest resident bytes of the compute child.",
        lambda status: status.peak_memory,
    ),
    "analysis_duration_p95": (
        "95th percentile of the seconds of the last thousand analyses.",
        lambda status: status.duration_p95,
    ),
    "elesh.ready": (
        "1 if the worker can take work, else 0.",
        lambda status: status.condition.ready,
    ),
}
_OF_STREAM: Mapping[str, tuple[str, Callable[[Backlog], float | None]]] = {
    "elesh.stream.length": (
        "Entries in the stream.",
        lambda backlog: backlog.length,
    ),
    "elesh.stream.lag": (
        "Entries that were never delivered to the workers' group.",
        lambda backlog: backlog.waiting,
    ),
    "elesh.stream.pending": (
        "Entries delivered and not yet acknowledged.",
        lambda backlog: backlog.pending,
    ),
    "elesh.stream.oldest_seconds": (
        "Age of the oldest entry that is not done; 0 if all are.",
        lambda backlog: backlog.oldest_seconds or 0.0,
    ),
    "elesh.stream.lease_age_seconds": (
        "The longest time since the lease of a pending entry was renewed; 0 without any.",
        lambda backlog: backlog.lease_seconds or 0.0,
    ),
}


@dataclass
class FleetFigures:
    """What the bus said last of its streams, breakers and shed messages."""

    backlog: Mapping[str, Backlog] = field(default_factory=dict)
    breakers: list[BreakerView] = field(default_factory=list)
    shed: Mapping[str, int] = field(default_factory=dict)

    async def refresh(self, bus: Bus) -> None:
        """Ask again; the old figures stay if the bus is away."""
        with contextlib.suppress(BusUnavailable):
            self.backlog = await bus.registry.backlog()
            self.breakers = await bus.breakers.show()
            self.shed = await bus.shed()

    def of_streams(self, read: Callable[[Backlog], float | None]) -> list[Reading]:
        """A figure of every stream that has a group, and of the dead letters."""
        found = {name: read(backlog) for name, backlog in self.backlog.items()}
        return [
            (value, {"stream": name})
            for name, value in found.items()
            if name in _LOOKED_AT and value is not None
        ]

    def of_breakers(self) -> list[Reading]:
        """How many breakers are not closed, by level and state; whose, ``elesh status`` says."""
        counts = Counter((view.level, view.state) for view in self.breakers)
        return [
            (counts[level, state], {"level": level.value, "state": state})
            for level in _BREAKER_LEVELS
            for state in _STATES
        ]

    def of_shed(self) -> list[Reading]:
        """Messages that were shed so far, by stream and priority."""
        parts = [(name.partition(":"), count) for name, count in self.shed.items()]
        return [
            (count, {"stream": stream, "priority": priority})
            for (stream, _, priority), count in parts
        ]


def register_worker(status: Status) -> None:
    """Have the figures of a worker read from here on."""

    def of_worker(read: Callable[[Status], float]) -> Callable[[], list[Reading]]:
        return lambda: [(read(status), {})]

    for name, (description, read) in _OF_WORKER.items():
        gauge(name, description, of_worker(read))
    gauge(
        "multi_level_accuracy",
        "By level, the share of approved cuts that the trainer's own check confirmed.",
        lambda: [(share, {"level": level}) for level, share in status.confirmed().items()],
    )


def register_fleet(figures: FleetFigures) -> None:
    """Have the figures of the bus read from here on, by its callers."""

    def of_stream(read: Callable[[Backlog], float | None]) -> Callable[[], list[Reading]]:
        return lambda: figures.of_streams(read)

    for name, (description, read_stream) in _OF_STREAM.items():
        gauge(name, description, of_stream(read_stream))
    gauge(
        "elesh.shed",
        "Messages that found no room, since the partition began; by stream and priority.",
        figures.of_shed,
    )
    gauge(
        "elesh.breakers",
        "Breakers of runs that are not closed; by level and state.",
        figures.of_breakers,
    )


_STOP_SECONDS = 2.0


def application(status: Status, refresh: Callable[[], Awaitable[None]]) -> Starlette:
    """The pages of one worker; ``refresh`` is awaited before metrics are read."""

    async def structured_analysis(request: Request) -> Response:
        if request.path_params["worker_id"] != status.worker_id:
            return JSONResponse({"error": f"this is worker {status.worker_id}"}, 404)
        condition = status.condition
        page = {
            "status": "healthy" if condition.ready else "unhealthy",
            "why": condition.why,
            "metrics": {
                "structured_analysis_completion_rate": status.completion_rate,
                "multi_level_accuracy": status.confirmed(),
                "peak_memory_usage": status.peak_memory,
                "analysis_duration_p95": status.duration_p95,
            },
            "worker": status.state().model_dump(exclude={"heard_at"}),
        }
        return JSONResponse(page, 200 if condition.ready else 503)

    async def ready(_: Request) -> Response:
        condition = status.condition
        page = {"ready": condition.ready, "why": condition.why, "child": condition.child}
        return JSONResponse(page, 200 if condition.ready else 503)

    async def live(_: Request) -> Response:
        return JSONResponse({"live": True, "doing": status.doing})

    async def metrics(_: Request) -> Response:
        await refresh()
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return Starlette(
        routes=[
            Route("/health/elesh/{worker_id}/structured_analysis", structured_analysis),
            Route("/ready", ready),
            Route("/live", live),
            Route("/metrics", metrics),
        ]
    )


def listening(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one.

    Raises:
        SettingsError: if the address cannot be had; it names the setting.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise SettingsError(
            f"observe.health_port: expected a free port of {host}, found {port}: {error.strerror}; "
            "0 takes any free one"
        ) from None


@contextlib.asynccontextmanager
async def serving(app: Starlette, listener: socket.socket) -> AsyncIterator[str]:
    """Serve ``app`` for the length of the block; yields its URL."""
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none")
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        server.should_exit = True
        await asyncio.wait({task}, timeout=_STOP_SECONDS)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM is the worker's: it drains, and its health is served meanwhile."""
        yield


_PROBE_SECONDS = 1.0
_LIVES = 3
"""A worker is forgotten when it has missed so many heartbeats."""
_log = get_logger(__name__)
_lines = SparseLines(_log)


class Monitor:
    """Watches one worker for as long as :meth:`running` lasts.

    Args:
        probe: the health of the compute child, seen from outside.
    """

    def __init__(
        self, bus: Bus, settings: ObserveSettings, status: Status, probe: Callable[[], Finding]
    ) -> None:
        self._bus, self._settings, self._status, self._probe = bus, settings, status, probe
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
        """Once a second: probe child and bus."""
        found, status = self._probe(), self._status
        before, silent = status.condition, asyncio.get_running_loop().time() - self._heard
        if status.doing in ("starting", "draining"):
            why: str = status.doing
        elif not (why := found.why):
            away = silent > self._settings.heartbeat_seconds + _PROBE_SECONDS
            why = "the bus does not serve" if away else status.lacks
        child = "starting" if status.doing == "starting" else found.child
        after = status.condition = Condition(child, not why, why)
        if after.why != before.why and before.why != "starting":
            log = _log.info if after.ready else _log.warning
            log("ready" if after.ready else "not ready", why=after.why or "-")
        return _PROBE_SECONDS

    async def _heartbeat(self) -> float:
        """Every heartbeat: write to the worker registry."""
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
