"""A console that serves in this process, and a plain client of it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from urllib.parse import urlencode

import uvicorn
from station import PATIENCE

from elesh.console.app import console_app
from elesh.settings import Settings

TOKEN = "correct horse battery"


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    text: str


class Site:
    """One client of a console: keeps its cookie, as a browser does."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.cookie = ""
        self._port = port

    def get(self, path: str, **headers: str) -> Answer:
        return self._ask("GET", path, "", headers)

    def post(self, path: str, form: Mapping[str, str], **headers: str) -> Answer:
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        return self._ask("POST", path, urlencode(form), kind | headers)

    def sign_in(self, token: str = TOKEN) -> Answer:
        """Sign in; the answer."""
        answer = self.post("/login", {"token": token})
        if "set-cookie" in answer.headers:
            self.cookie = answer.headers["set-cookie"].split(";")[0]
        return answer

    def proof(self, path: str = "/fleet") -> str:
        """The proof that a form of this session carries."""
        found = re.search(r'name="proof" value="([0-9a-f]+)"', self.get(path).text)
        assert found, f"no form on {path}"
        return found[1]

    def _ask(self, method: str, path: str, body: str, headers: Mapping[str, str]) -> Answer:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=60)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookie:
            sent["Cookie"] = self.cookie
        connection.request(method, path, body, sent)
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        return Answer(reply.status, {k.lower(): v for k, v in reply.getheaders()}, text)


@contextmanager
def serving_console(url: str, settings: Settings) -> Iterator[Site]:
    """The console of the bus at ``url`` on a free port."""
    config = uvicorn.Config(console_app(url, settings), port=0, log_level="warning")
    server = uvicorn.Server(config)
    started = threading.Event()

    async def startup(sockets: object = None) -> None:
        await uvicorn.Server.startup(server, sockets)  # type: ignore[arg-type]
        started.set()

    server.startup = startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(PATIENCE)
    try:
        yield Site(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
