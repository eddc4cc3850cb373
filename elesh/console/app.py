"""The console over HTTP: pages that anybody on the network may read, actions for operators.

Promises: reading never changes anything; an action needs a session of the token and the proof of
its form (or the token as a bearer); every action is told on the bus with the operator's name and
ends in the audit log. Nothing is loaded from elsewhere, and the content security policy says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from elesh.bus import Bus, BusUnavailable
from elesh.operate.actions import BREAKERS, reset_breaker, trip_breaker
from elesh.operate.replay import Replayed, Selection, replay
from elesh.settings import Settings, SettingsError
from leyline import ContractError, IdempotencyKey, Level

from .decision import decision_view
from .guard import COOKIE, Guard
from .overview import overview, run_view
from .pages import asset, render
from .reading import Reader

__all__ = ["console_app", "serve_console"]

_LONGEST_FORM = 8192
_SHORTEST_TOKEN = 16
_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_ASSETS = {"console.css": "text/css", "console.js": "text/javascript", "icon.svg": "image/svg+xml"}
Page = Callable[[Request], Awaitable[Response]]
Action = Callable[[dict[str, str], str], Awaitable[str]]


class Console:
    """The pages and actions of one console."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._url = url
        self._settings = settings
        self._guard = Guard(_token(settings), settings.console.session_seconds)
        self._reader: Reader | None = None

    def routes(self) -> list[Route]:
        """Every page and action."""
        pages: dict[str, Page] = {
            "/": self.overview,
            "/runs/{run}": self.run,
            "/decisions/{key}": self.decision,
            "/fleet": self.fleet,
            "/dead": self.dead,
            "/audit": self.audit,
        }
        actions: dict[str, Action] = {
            "/breakers/trip": self.trip,
            "/breakers/reset": self.reset,
            "/dead/redrive": self.redrive,
            "/dead/drop": self.drop,
        }
        return [
            *(Route(path, _safe(page), methods=["GET"]) for path, page in pages.items()),
            *(Route(path, self._acting(act), methods=["POST"]) for path, act in actions.items()),
            Route("/decisions/{key}/replay", _safe(self.replay), methods=["POST"]),
            Route("/login", _safe(self.login), methods=["POST"]),
            Route("/logout", _safe(self.logout), methods=["POST"]),
            Route("/static/{name}", _static, methods=["GET"]),
            Route("/live", _live, methods=["GET"]),
        ]

    @contextlib.asynccontextmanager
    async def connected(self, _: Starlette) -> AsyncIterator[None]:
        """Holds the connection to the bus; a bus that is away is asked again by every page."""
        try:
            yield
        finally:
            if self._reader is not None:
                await self._reader.bus.close()

    # Pages

    async def overview(self, request: Request) -> Response:
        """What runs do, and what is broken."""
        reader = await self._reading()
        view = overview(await reader.refresh(), await reader.fleet())
        return self._page(request, "overview.html", view=view)

    async def run(self, request: Request) -> Response:
        """One run: its time line and decisions."""
        history = await (await self._reading()).refresh()
        run = history.runs.get(request.path_params["run"])
        if run is None:
            return self._missing(request, f"no run {request.path_params['run']} is known here")
        reader = await self._reading()
        view = run_view(run, (await reader.fleet()).at)
        return self._page(request, "run.html", run=view)

    async def decision(self, request: Request, replayed: Replayed | None = None) -> Response:
        """One decision: why it is as it is, and what came of it."""
        reader = await self._reading()
        key = IdempotencyKey.parse(request.path_params["key"])
        context = await reader.context(key)
        if context is None:
            return self._missing(request, f"no decision is recorded for {key}")
        history = await reader.refresh()
        run = history.runs.get(context.decision.run_id)
        view = decision_view(context, run.outcomes.get(str(key), []) if run else [])
        return self._page(
            request, "decision.html", view=view, spans=context.spans, replayed=replayed
        )

    async def fleet(self, request: Request) -> Response:
        """Workers, streams, breakers."""
        reader = await self._reading()
        history = await reader.refresh()
        changes = list(reversed(history.transitions))
        return self._page(request, "fleet.html", fleet=await reader.fleet(), changes=changes,
                          runs=[run.run_id for run in history.recent()],
                          levels=[level.value for level in BREAKERS])  # fmt: skip

    async def dead(self, request: Request) -> Response:
        """Dead letters, newest first."""
        dead_letters = await (await self._reading()).bus.dead_letters.newest(None)
        return self._page(request, "dead.html", dead_letters=dead_letters)

    async def audit(self, request: Request) -> Response:
        """The newest entries of the audit log, newest first."""
        links = await (await self._reading()).audited()
        return self._page(request, "audit.html", links=links[::-1])

    # Actions

    async def trip(self, form: dict[str, str], by: str) -> str:
        """Open a breaker."""
        bus = (await self._reading()).bus
        await trip_breaker(bus, form["run"], Level(form["level"]), by, form.get("reason", ""))
        return "/fleet#breakers"

    async def reset(self, form: dict[str, str], by: str) -> str:
        """Close a breaker."""
        bus = (await self._reading()).bus
        await reset_breaker(bus, form["run"], Level(form["level"]), by, form.get("reason", ""))
        return "/fleet#breakers"

    async def redrive(self, form: dict[str, str], by: str) -> str:
        """Publish a dead letter's original again."""
        await (await self._reading()).bus.dead_letters.redrive(
            form["entry"], by, form.get("reason", "")
        )
        return "/dead"

    async def drop(self, form: dict[str, str], by: str) -> str:
        """Delete a dead letter."""
        await (await self._reading()).bus.dead_letters.drop(
            form["entry"], by, form.get("reason", "")
        )
        return "/dead"

    async def replay(self, request: Request) -> Response:
        """Analyse a decision's checkpoint again and compare; publishes nothing, but computes."""
        refused, _ = await self._allowed(request)
        if refused is not None:
            return refused
        key = IdempotencyKey.parse(request.path_params["key"])
        bus = (await self._reading()).bus
        # The numerics run in a compute child: other pages go on being served.
        found = [item async for item in replay(bus, self._settings, Selection(str(key)))]
        replayed = found[0] if found else None
        return await self.decision(request, replayed)

    async def login(self, request: Request) -> Response:
        """Begin a session with the token."""
        form = await _form(request)
        if (refused := await self._stranger(request, form.get("token", ""))) is not None:
            return refused
        self._guard.end(request.cookies.get(COOKIE, ""))
        answer = RedirectResponse(_local(form.get("back", "/")), 303)
        seconds = round(self._settings.console.session_seconds)
        answer.set_cookie(COOKIE, self._guard.session(), max_age=seconds, httponly=True,
                          samesite="strict", secure=request.url.scheme == "https")  # fmt: skip
        return answer

    async def logout(self, request: Request) -> Response:
        """End the session."""
        refused, _ = await self._allowed(request)
        if refused is not None:
            return refused
        self._guard.end(request.cookies.get(COOKIE, ""))
        answer = RedirectResponse("/", 303)
        answer.delete_cookie(COOKIE)
        return answer

    # What they share

    def _acting(self, act: Action) -> Page:
        async def page(request: Request) -> Response:
            refused, form = await self._allowed(request)
            if refused is not None:
                return refused
            operator = f"console@{_address(request)}"
            try:
                return RedirectResponse(await act(form, operator), 303)
            except (KeyError, ValueError) as error:
                if isinstance(error, ContractError):
                    raise
                return self._refused(request, f"the form lacks or spoils {error}", 400)

        return _safe(page)

    async def _stranger(self, request: Request, token: str) -> Response | None:
        """How a token that is not this console's is refused; None for the right one."""
        address = _address(request)
        if (seconds := self._guard.waits(address)) > 0:
            text = f"too many wrong tokens from {address}: wait {seconds:.0f} s"
            answer = self._refused(request, text, 429)
            answer.headers["Retry-After"] = f"{seconds + 1:.0f}"
            return answer
        if self._guard.knows(token, address):
            return None
        await asyncio.sleep(0.5)  # guessing is slow; right answers are not
        return self._refused(request, "that is not the token of this console: acting needs it")

    async def _allowed(self, request: Request) -> tuple[Response | None, dict[str, str]]:
        """The form of a request that may act, else how it is refused."""
        form = await _form(request)
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return await self._stranger(request, token), form
        cookie = request.cookies.get(COOKIE, "")
        if self._guard.proves(cookie, form.get("proof", "")):
            return None, form
        return self._refused(request, "acting needs the token: sign in first"), form

    async def _reading(self) -> Reader:
        if self._reader is None:
            settings = self._settings
            bus = await Bus.connect(self._url, settings.bus, settings.breaker)
            self._reader = Reader(bus, settings)
        return self._reader

    def _page(self, request: Request, template: str, status: int = 200, **values: Any) -> Response:
        cookie = request.cookies.get(COOKIE, "")
        acting = self._guard.holds(cookie)
        text = render(
            template,
            path=request.url.path,
            acting=acting,
            may_act=self._guard.may_act,
            proof=self._guard.proof(cookie) if acting else "",
            **values,
        )
        tag = f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'
        if status == 200 and request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=_HEADERS | {"ETag": tag})
        return HTMLResponse(text, status, _HEADERS | {"ETag": tag})

    def _missing(self, request: Request, what: str) -> Response:
        return self._page(request, "message.html", 404, title="Not here", text=what)

    def _refused(self, request: Request, why: str, status: int = 403) -> Response:
        return self._page(request, "message.html", status, title="Refused", text=why)


def console_app(url: str, settings: Settings) -> Starlette:
    """The console of the bus at ``url`` as an ASGI application.

    Raises:
        SettingsError: if the token is too short to keep anybody out.
    """
    console = Console(url, settings)
    return Starlette(
        routes=console.routes(),
        lifespan=console.connected,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.console.hosts))],
    )


async def serve_console(
    url: str, settings: Settings, host: str, port: int, ready: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; ``ready`` is told the address once it listens.

    Raises:
        SettingsError: if it cannot listen there.
    """
    with _listening(host, port) as listener:
        bound = listener.getsockname()
        name = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        config = uvicorn.Config(
            console_app(url, settings), log_level="warning", access_log=False, server_header=False
        )
        ready(f"http://{name}:{bound[1]}")
        await uvicorn.Server(config).serve(sockets=[listener])


def _token(settings: Settings) -> str:
    token = settings.console.token.get_secret_value()
    if 0 < len(token) < _SHORTEST_TOKEN:
        raise SettingsError(
            f"console.token: expected at least {_SHORTEST_TOKEN} characters or none, found "
            f"{len(token)}"
        )
    return token


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise SettingsError(
            f"console: cannot listen on {host}:{port}: {error.strerror}; choose another --port"
        ) from None


def _safe(page: Page) -> Page:
    """A page that says what is wrong instead of a stack: the bus is away, or a name is none."""

    async def served(request: Request) -> Response:
        try:
            return await page(request)
        except BusUnavailable as error:
            status, title, text = 503, "The bus is away", str(error)
        except ContractError as error:
            status, title, text = 400, "That cannot be", str(error)
        body = render("message.html", path=request.url.path, acting=False, may_act=False, proof="",
                      title=title, text=text)  # fmt: skip
        return HTMLResponse(body, status, _HEADERS)

    return served


async def _form(request: Request) -> dict[str, str]:
    """The fields of a small urlencoded form; anything larger is cut off and so refused."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _LONGEST_FORM:
            return {}
    fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
    return {name: values[0] for name, values in fields.items()}


def _address(request: Request) -> str:
    """Who asks."""
    return request.client.host if request.client else "unknown"


def _local(path: str) -> str:
    """A path on this site; anything else is the first page."""
    return path if path.startswith("/") and not path.startswith(("//", "/\\")) else "/"


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _ASSETS:
        return Response("no such file", 404)
    return Response(asset(name), media_type=_ASSETS[name], headers=_HEADERS)


async def _live(_: Request) -> Response:
    return Response("ok")
