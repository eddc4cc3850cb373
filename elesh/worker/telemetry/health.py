"""A worker's health and metrics over HTTP, served by the supervisor in its own event loop.

    /health/elesh/{worker_id}/structured_analysis   the design document's page: 200, or 503 and why
    /ready      200 if it can take work, else 503 and why
    /live       200 as long as the supervisor turns
    /metrics    for Prometheus

Promises: that it answers at all is what liveness means; nothing here touches signals, the child or
the bus, but ``/metrics``, which asks the bus for the fleet's figures and goes on without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from elesh.settings import SettingsError

from .status import Status

__all__ = ["application", "listening", "serving"]

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
