"""Who may act: sessions of operators who know the token, and tokens that protect forms.

Promises: secrets are compared in constant time; a session is a random name that the server keeps,
and ends at logout, after its time, or with the process; every form carries a proof bound to its
session, so another site cannot post it; an address that gave wrong tokens too often is refused
for a while, right tokens included. Without a token no action is possible.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable

COOKIE = "elesh_session"
_MOST_SESSIONS = 1000
_WRONG = 5
"""Wrong tokens from one address within ``_SECONDS``; then it has to wait."""
_SECONDS = 60.0
_MOST_ADDRESSES = 10_000


class OperatorAccess:
    """Who may act on one console.

    Args:
        token: what operators know; empty: no action is possible.
        seconds: how long a session lasts.
        clock: seconds that never jump.
    """

    def __init__(
        self, token: str, seconds: float = 3600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._token = token.encode()
        self._seconds, self._clock = seconds, clock
        self._key = secrets.token_bytes(32)
        self._ends: OrderedDict[str, float] = OrderedDict()
        self._wrong: OrderedDict[str, deque[float]] = OrderedDict()

    @property
    def may_act(self) -> bool:
        """Whether there is a way to become an operator."""
        return bool(self._token)

    def waits(self, address: str) -> float:
        """Seconds that an address has to wait before a token of it is looked at; 0: none."""
        wrong = self._wrong.get(address)
        if wrong is None or len(wrong) < _WRONG:
            return 0.0
        return max(0.0, wrong[0] + _SECONDS - self._clock())

    def knows(self, token: str, address: str = "") -> bool:
        """Whether this is the token; False too for an address that has to wait."""
        if not self.may_act or self.waits(address):
            return False
        if hmac.compare_digest(_digest(token.encode()), _digest(self._token)):
            self._wrong.pop(address, None)
            return True
        self._wrong.setdefault(address, deque(maxlen=_WRONG)).append(self._clock())
        self._wrong.move_to_end(address)
        while len(self._wrong) > _MOST_ADDRESSES:
            self._wrong.popitem(last=False)
        return False

    def session(self) -> str:
        """A new session's cookie."""
        cookie = secrets.token_hex(32)
        self._ends[cookie] = self._clock() + self._seconds
        while len(self._ends) > _MOST_SESSIONS:
            self._ends.popitem(last=False)
        return cookie

    def holds(self, cookie: str) -> bool:
        """Whether a cookie is a session that has not ended."""
        ends = self._ends.get(cookie)
        if ends is None or not self.may_act:
            return False
        if self._clock() >= ends:
            self.end(cookie)
            return False
        return True

    def end(self, cookie: str) -> None:
        """End a session; its cookie is worth nothing from then on."""
        self._ends.pop(cookie, None)

    def proof(self, cookie: str) -> str:
        """What a form of a session has to carry."""
        return hmac.new(self._key, b"form:" + cookie.encode(), hashlib.sha256).hexdigest()

    def proves(self, cookie: str, proof: str) -> bool:
        """Whether a form was made for this session."""
        return self.holds(cookie) and hmac.compare_digest(
            proof.encode(), self.proof(cookie).encode()
        )


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
