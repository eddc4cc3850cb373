"""What a server's error means for us: whether it is an outage, and what an operator can do. Pure.

Promises: an error reply that no code of ours expects is an outage (:class:`BusRefuses`), whatever
the server calls it. A server that refuses today may serve tomorrow; nothing ends because of it.
"""

from __future__ import annotations

from redis.exceptions import ResponseError

from elesh.bus.errors import BusRefuses

__all__ = ["code_of", "is_expected", "may_have_moved", "refusal"]

_EXPECTED = {
    "NOSCRIPT": frozenset({"EVALSHA", "EVALSHA_RO"}),
    "NOGROUP": frozenset({"XREADGROUP", "XPENDING", "XINFO"}),
    "BUSYGROUP": frozenset({"XGROUP"}),
    "no such key": frozenset({"XINFO"}),
}
"""Replies that callers handle themselves, and to which commands: to any other they are refusals."""
_MOVED = frozenset({"READONLY", "MOVED", "ASK", "MASTERDOWN", "CLUSTERDOWN", "UNBLOCKED"})
"""After these another node may be in charge."""
_NO_RIGHT = ("can't run this command", "ACL failure in script", "can't access at least one")
"""How servers say inside scripts that a right is missing; the code is ERR there."""
_HINTS = {
    "OOM": "it is full: give it memory (maxmemory) or let workers catch up",
    "READONLY": "it is a replica: name the master, or use redis+sentinel:// or redis+cluster://",
    "MOVED": "another node of the cluster has it: use redis+cluster://",
    "ASK": "it is moving to another node of the cluster",
    "NOREPLICAS": "bring its replicas back, or lower min-replicas-to-write",
    "MISCONF": "it cannot write to its disk: see the server's log",
    "NOPERM": "give the user its rights, see deploy/redis/users.acl",
    "WRONGTYPE": "one of Elesh's keys holds something else: rename or delete that key",
    "UNBLOCKED": "it ended a waiting read, as servers do when another node takes over",
    "LOADING": "it is loading its data",
    "BUSY": "a script has run too long there: SCRIPT KILL ends it",
    "MASTERDOWN": "it is a replica whose master is away",
    "CLUSTERDOWN": "part of the cluster is away: see CLUSTER INFO",
    "DENIED": "it is in protected mode: bind it and give it a password",
    "NOAUTH": "check user and password",
}
_OUT_OF_RANGE = "it has fewer databases: name one that it has, see its setting databases"
_UNKNOWN = "see the server's log"


def code_of(error: ResponseError) -> str:
    """The first word of the server's error; ``NOPERM`` also where a script is refused a right."""
    text = str(error)
    if any(words in text for words in _NO_RIGHT):
        return "NOPERM"
    code: str = getattr(error, "status_code", None) or text.partition(" ")[0]
    return code if code.isupper() else "ERR"


def is_expected(command: str, error: ResponseError) -> bool:
    """Whether the caller of ``command`` handles this reply: a group, script or key that is not
    there (yet)."""
    text = f"{code_of(error)} {error}"
    name = command.partition(" ")[0].upper()
    return any(words in text and name in commands for words, commands in _EXPECTED.items())


def may_have_moved(error: ResponseError) -> bool:
    """Whether the next connection should ask anew who is in charge."""
    return code_of(error) in _MOVED


def refusal(url: str, error: ResponseError) -> BusRefuses:
    """The outage that an error reply amounts to, with what to do about it."""
    code = code_of(error)
    hint = _OUT_OF_RANGE if "DB index" in str(error) else _HINTS.get(code, _UNKNOWN)
    reason = str(error) if code == "ERR" or str(error).startswith(code) else f"{code} {error}"
    return BusRefuses(url, code, reason, hint=hint)
