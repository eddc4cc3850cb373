"""The console over HTTP: pages that any client on the network may read, actions for operators.

Promises: reading never changes anything; an action needs a session of the token and the proof of
its form (or the token as a bearer); every action is recorded with the operator's name and
ends in the audit log. Nothing is loaded from elsewhere, and the content security policy says so.
An open page that asks again gets the parts that changed, and nothing where none did.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from elesh.bus import Bus, BusUnavailable
from elesh.observe.metrics import setup_metrics
from elesh.operate.actions import BREAKERS, reset_breaker, trip_breaker
from elesh.operate.replay import Replayed, Selection, replay
from elesh.settings import Settings, SettingsError
from elesh.worker.telemetry.monitor import FleetFigures, register_fleet
from leyline import ContractError, IdempotencyKey, Level

from .access import COOKIE, OperatorAccess
from .decision import decision_view
from .export import checkpoint_rows, comparison, decision_rows, run_facts, to_csv
from .lists import RESULTS, Wanted, decisions_of, paged, problems, run_row, runs_of
from .pages import Rendered, asset, render
from .reading import Reader
from .runs import RunView, decision_row, run_view

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
_LEVELS = [level.value for level in Level if level is not Level.PARAMETER]
_CHOICES = {"outcomes": RESULTS, "levels": _LEVELS}
_DEAD_LETTERS, _LINKS = 20, 100
"""Rows of a page of dead letters, and of the audit log."""
_OTHERS = 200
"""Other runs that are offered for a comparison; any may be typed."""
_ASSETS = {"console.css": "text/css", "console.js": "text/javascript", "icon.svg": "image/svg+xml"}
Page = Callable[[Request], Awaitable[Response]]
Action = Callable[[dict[str, str], str], Awaitable[str]]


class Console:
    """The pages and actions of one console."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._url = url
        self._settings = settings
        self._access = OperatorAccess(_token(settings), settings.console.session_seconds)
        self._reader: Reader | None = None
        self._figures = _figures()
        self._born = secrets.token_hex(8)
        """Of this process; versions that another process counted mean nothing here."""

    def routes(self) -> list[Route]:
        """Every page and action."""
        pages: dict[str, Page] = {
            "/": self.overview,
            "/runs/{run}": self.run,
            "/decisions": self.decisions,
            "/compare": self.compare,
            "/export/decisions.csv": self.export_decisions,
            "/export/{run}/{file}": self.export_run,
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
            Route("/live", _alive, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]

    @contextlib.asynccontextmanager
    async def connected(self, _: Starlette) -> AsyncIterator[None]:
        """Holds the connection to the bus; every page tries again if the bus is away."""
        try:
            yield
        finally:
            if self._reader is not None:
                await self._reader.close()

    # Pages

    async def overview(self, request: Request) -> Response:
        """What is broken, and where each run stands."""
        reader = await self._reading(request)
        history, fleet = await reader.refresh(), await reader.fleet()
        wanted = Wanted.of(request.query_params)

        def values() -> dict[str, Any]:
            recent = history.recent()
            chosen = paged(runs_of(history, wanted), wanted.page)
            return {
                "problems": problems(fleet, map(run_row, recent)),
                "fleet": fleet,
                "newest": run_view(recent[0]) if recent and not wanted.filters else None,
                "total": len(recent),
                "list": chosen,
                "rows": [run_row(run) for run in chosen.rows],
                "let_go": history.let_go,
                "wanted": wanted,
            }

        return self._live(request, "overview.html", (history.version, fleet.version), values)

    async def run(self, request: Request) -> Response:
        """One run: what was gained, where, what held it back, and its decisions."""
        reader = await self._reading(request)
        history = await reader.refresh()
        name = request.path_params["run"]
        run = await reader.run(name)
        if run is None:
            return self._missing(request, f"no run {name} is known here")
        wanted = Wanted.of(request.query_params, run=name)

        def values() -> dict[str, Any]:
            chosen = paged(decisions_of([run], wanted), wanted.page)
            others = [each.run_id for each in history.recent()[:_OTHERS] if each.run_id != name]
            return {
                "run": run_view(run),
                "list": chosen,
                "rows": [decision_row(*each) for each in chosen.rows],
                "others": others,
                "wanted": wanted,
            }

        return self._live(request, "run.html", (run.version,), values)

    async def decisions(self, request: Request) -> Response:
        """The decisions of all runs."""
        reader = await self._reading(request)
        history = await reader.refresh()
        wanted = Wanted.of(request.query_params)

        def values() -> dict[str, Any]:
            chosen = paged(decisions_of(history.runs.values(), wanted), wanted.page)
            rows = [decision_row(*each) for each in chosen.rows]
            return {"list": chosen, "rows": rows, "wanted": wanted}

        return self._live(request, "decisions.html", (history.version,), values)

    async def compare(self, request: Request) -> Response:
        """Two runs beside each other."""
        reader = await self._reading(request)
        await reader.refresh()
        views: list[RunView] = []
        versions: list[int] = []
        for name in (request.query_params.get("a", ""), request.query_params.get("b", "")):
            run = await reader.run(name)
            if run is None:
                return self._missing(request, f"no run {name} is known here")
            views.append(run_view(run))
            versions.append(run.version)
        a, b = views
        return self._live(
            request,
            "compare.html",
            tuple(versions),
            lambda: {"a": a, "b": b, "figures": comparison(a, b)},
        )

    async def decision(self, request: Request, replayed: Replayed | None = None) -> Response:
        """One decision: why it is as it is, and what came of it."""
        reader = await self._reading(request)
        key = IdempotencyKey.parse(request.path_params["key"])
        history = await reader.refresh()
        context = await reader.context(key)
        if context is None:
            return self._missing(request, f"no decision is recorded for {key}")
        run = history.runs.get(context.decision.run_id)

        def values() -> dict[str, Any]:
            view = decision_view(context, run.outcomes.get(str(key), []) if run else [])
            return {
                "view": view,
                "spans": context.spans,
                "replayed": replayed,
                "moved": replayed.moved if replayed else [],
            }

        outcomes = len(run.outcomes.get(str(key), ())) if run else 0
        version = (outcomes, len(context.spans), context.missing)
        if replayed is not None:  # the answer to a form: it is not asked for again
            return self._page(request, "decision.html", **values())
        return self._live(request, "decision.html", version, values)

    async def fleet(self, request: Request) -> Response:
        """Workers, streams, breakers."""
        reader = await self._reading(request)
        history, fleet = await reader.refresh(), await reader.fleet()

        def values() -> dict[str, Any]:
            return {
                "fleet": fleet,
                "changes": history.transitions,
                "runs": [run.run_id for run in history.recent()[:_OTHERS]],
                "breaker_levels": [level.value for level in BREAKERS],
            }

        changes = len(history.transitions)
        newest = history.transitions[0].at if changes else None
        return self._live(request, "fleet.html", (fleet.version, changes, newest), values)

    async def dead(self, request: Request) -> Response:
        """Dead letters, newest first."""
        letters = (await self._reading(request)).bus.dead_letters
        before = request.query_params.get("before", "")
        found = await letters.newest(_DEAD_LETTERS + 1, before=before)
        total = await letters.open()
        version = (total, *((each.entry_id, each.redriven_as) for each in found))

        def values() -> dict[str, Any]:
            older = found[_DEAD_LETTERS - 1].entry_id if len(found) > _DEAD_LETTERS else ""
            shown = found[:_DEAD_LETTERS]
            return {"dead_letters": shown, "older": older, "before": before, "total": total}

        return self._live(request, "dead.html", version, values)

    async def audit(self, request: Request) -> Response:
        """Entries of the audit log, newest first."""
        reader = await self._reading(request)
        head = (await reader.bus.audit.head()).number
        wanted = request.query_params.get("until", "")
        last = min(head, int(wanted)) if wanted.isdecimal() and len(wanted) < 12 else head
        links = await reader.audited(last, _LINKS)

        def values() -> dict[str, Any]:
            return {"links": links, "head": head, "last": last, "older": max(0, last - _LINKS)}

        return self._live(request, "audit.html", (last, head if last == head else 0), values)

    async def export_decisions(self, request: Request) -> Response:
        """The decisions that a list shows, all of them, as CSV."""
        history = await (await self._reading(request)).refresh()
        chosen = decisions_of(history.runs.values(), Wanted.of(request.query_params))
        return _file(to_csv(decision_rows(chosen)), "text/csv", "decisions.csv")

    async def export_run(self, request: Request) -> Response:
        """One run's decisions or checkpoints as CSV, or everything as JSON."""
        reader = await self._reading(request)
        await reader.refresh()
        name, file = request.path_params["run"], request.path_params["file"]
        run = await reader.run(name)
        if run is None:
            return self._missing(request, f"no run {name} is known here")
        if file == "run.json":
            return _file(json.dumps(run_facts(run), indent=1), "application/json", f"{name}.json")
        if file == "checkpoints.csv":
            return _file(to_csv(checkpoint_rows(run)), "text/csv", f"{name}-{file}")
        if file == "decisions.csv":
            rows = decision_rows(decisions_of([run], Wanted.of(request.query_params, run=name)))
            return _file(to_csv(rows), "text/csv", f"{name}-{file}")
        return self._missing(request, f"{file}: expected run.json, checkpoints.csv, decisions.csv")

    async def metrics(self, _: Request) -> Response:
        """The bus's own figures, for Prometheus: they are there with no worker at all."""
        with contextlib.suppress(BusUnavailable):
            await self._figures.refresh((await self._reading()).bus)
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST, headers=_HEADERS)

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
        if (refused := await self._unless_known(request, form.get("token", ""))) is not None:
            return refused
        self._access.end(request.cookies.get(COOKIE, ""))
        answer = RedirectResponse(_local(form.get("back", "/")), 303)
        seconds = round(self._settings.console.session_seconds)
        answer.set_cookie(COOKIE, self._access.session(), max_age=seconds, httponly=True,
                          samesite="strict", secure=request.url.scheme == "https")  # fmt: skip
        return answer

    async def logout(self, request: Request) -> Response:
        """End the session."""
        refused, _ = await self._allowed(request)
        if refused is not None:
            return refused
        self._access.end(request.cookies.get(COOKIE, ""))
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

    async def _unless_known(self, request: Request, token: str) -> Response | None:
        """How a token that is not this console's is refused; None for the right one."""
        address = _address(request)
        if (seconds := self._access.waits(address)) > 0:
            text = f"too many wrong tokens from {address}: wait {seconds:.0f} s"
            answer = self._refused(request, text, 429)
            answer.headers["Retry-After"] = f"{seconds + 1:.0f}"
            return answer
        if self._access.knows(token, address):
            return None
        await asyncio.sleep(0.5)  # guessing is slow; right answers are not
        return self._refused(request, "that is not the token of this console: acting needs it")

    async def _allowed(self, request: Request) -> tuple[Response | None, dict[str, str]]:
        """The form of a request that may act, else how it is refused."""
        form = await _form(request)
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return await self._unless_known(request, token), form
        cookie = request.cookies.get(COOKIE, "")
        if self._access.proves(cookie, form.get("proof", "")):
            return None, form
        return self._refused(request, "acting needs the token: sign in first"), form

    async def _reading(self, request: Request | None = None) -> Reader:
        """The reader; open tabs share what it read last, a page load or an action reads anew."""
        if self._reader is None:
            settings = self._settings
            bus = await Bus.connect(self._url, settings.bus, settings.breaker)
            self._reader = Reader(bus, settings)
        if request is None or "elesh-live" not in request.headers:
            self._reader.renew()
        return self._reader

    def _live(
        self,
        request: Request,
        template: str,
        version: tuple[object, ...],
        values: Callable[[], dict[str, Any]],
    ) -> Response:
        """A page that an open tab asks for again: whole, its changed parts, or nothing.

        Args:
            version: differs where the page would; looked at before anything is rendered.
            values: what the template shows.
        """
        until = self._reader.until if self._reader else None
        acting = self._access.holds(request.cookies.get(COOKIE, ""))
        text = repr((self._born, version, until, acting)).encode()
        live = hashlib.sha256(text).hexdigest()[:16]
        asked = request.headers.get("elesh-live", "")
        if asked == live:
            return Response(status_code=304, headers=_HEADERS)
        # Only the same site's own script reads this, and sessions' cookies are strict: no one
        # else can have a page made beside a secret of it and watch how well it compresses.
        page = self._rendered(request, template, live=live, until=until, **_CHOICES, **values())
        if not asked:
            return HTMLResponse(page.text, headers=_HEADERS)
        known = dict(
            each.partition("=")[::2] for each in request.headers.get("elesh-parts", "").split()
        )
        fresh = {name: part for name, part in page.parts.items() if known.get(name) != part[0]}
        return JSONResponse(
            {"version": live, "parts": list(page.parts), "html": fresh}, headers=_HEADERS
        )

    def _page(self, request: Request, template: str, status: int = 200, **values: Any) -> Response:
        return HTMLResponse(self._rendered(request, template, **values).text, status, _HEADERS)

    def _rendered(self, request: Request, template: str, **values: Any) -> Rendered:
        cookie = request.cookies.get(COOKIE, "")
        acting = self._access.holds(cookie)
        return render(
            template,
            path=request.url.path,
            acting=acting,
            may_act=self._access.may_act,
            proof=self._access.proof(cookie) if acting else "",
            now=self._reader.bus.clock.latest() if self._reader else None,
            **values,
        )

    def _missing(self, request: Request, what: str) -> Response:
        # It may yet come: an open page asks again.
        return self._page(request, "message.html", 404, title="Not here", text=what, live="none")

    def _refused(self, request: Request, why: str, status: int = 403) -> Response:
        return self._page(request, "message.html", status, title="Refused", text=why)


def console_app(url: str, settings: Settings) -> Starlette:
    """The console of the bus at ``url`` as an ASGI application.

    Raises:
        SettingsError: if the token is too short to protect anything.
    """
    console = Console(url, settings)
    return Starlette(
        routes=console.routes(),
        lifespan=console.connected,
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.console.hosts)),
            Middleware(GZipMiddleware, compresslevel=6),
        ],
    )


async def serve_console(
    url: str, settings: Settings, host: str, port: int, ready: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; ``ready`` is called with the address once it listens.

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
    """A page that says what is wrong instead of a stack: the bus is away, or a name is unknown."""

    async def served(request: Request) -> Response:
        try:
            return await page(request)
        except BusUnavailable as error:
            status, title, text = 503, "The bus is away", str(error)
        except ContractError as error:
            status, title, text = 400, "That cannot be", str(error)
        if request.headers.get("elesh-live"):
            return Response(text, status, _HEADERS)
        live = "none" if request.method == "GET" and status == 503 else ""
        body = render("message.html", path=request.url.path, acting=False, may_act=False, proof="",
                      title=title, text=text, live=live)  # fmt: skip
        return HTMLResponse(body.text, status, _HEADERS)

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
    """The client's address."""
    return request.client.host if request.client else "unknown"


def _local(path: str) -> str:
    """A path on this site; anything else is the first page."""
    return path if path.startswith("/") and not path.startswith(("//", "/\\")) else "/"


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _ASSETS:
        return Response("no such file", 404)
    return Response(asset(name), media_type=_ASSETS[name], headers=_HEADERS)


def _file(text: str, kind: str, name: str) -> Response:
    """A text to keep under a name, which is a run's and so a plain one."""
    disposition = f'attachment; filename="{name}"'
    return Response(text, media_type=kind, headers=_HEADERS | {"Content-Disposition": disposition})


@functools.cache
def _figures() -> FleetFigures:
    """The bus's figures of this process, read at every scrape."""
    figures = FleetFigures()
    if setup_metrics("elesh-console", "console", prometheus=True):
        register_fleet(figures)
    return figures


async def _alive(_: Request) -> Response:
    return Response("ok")
