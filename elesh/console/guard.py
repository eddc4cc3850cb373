"""Who may act: sessions of operators who know the token, and proof that a form is ours.

Promises: secrets are compared in constant time; a session is a random name signed with the token,
so nothing is stored and a new token ends all; every form carries a proof bound to its session, so
another site cannot post it. Without a token nobody can act.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

__all__ = ["COOKIE", "Guard"]

COOKIE = "elesh_session"


class Guard:
    """Checks of one console."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    @property
    def may_act(self) -> bool:
        """Whether anybody can become an operator at all."""
        return bool(self._token)

    def knows(self, token: str) -> bool:
        """Whether this is the token."""
        return self.may_act and hmac.compare_digest(_digest(token.encode()), _digest(self._token))

    def session(self) -> str:
        """A new session's cookie."""
        name = secrets.token_hex(16)
        return f"{name}.{self._sign('session', name)}"

    def holds(self, cookie: str) -> bool:
        """Whether a cookie is a session of this token."""
        name, _, signature = cookie.partition(".")
        wanted = self._sign("session", name)
        return self.may_act and hmac.compare_digest(signature.encode(), wanted.encode())

    def proof(self, cookie: str) -> str:
        """What a form of a session has to carry."""
        return self._sign("form", cookie)

    def proves(self, cookie: str, proof: str) -> bool:
        """Whether a form was made for this session."""
        return self.holds(cookie) and hmac.compare_digest(
            proof.encode(), self.proof(cookie).encode()
        )

    def _sign(self, purpose: str, text: str) -> str:
        return hmac.new(self._token, f"{purpose}:{text}".encode(), hashlib.sha256).hexdigest()


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
