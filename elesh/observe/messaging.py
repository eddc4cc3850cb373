"""OpenTelemetry's conventions for messaging, as far as spans of this house use them.

A span is named ``{operation} {stream}`` and has the attributes that :func:`messaging` returns.
Creating a message is PRODUCER, sending, receiving and settling are CLIENT (the context that
travels is the creation's), processing is CONSUMER.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["messaging"]

Operation = Literal["create", "send", "receive", "process", "settle"]


def messaging(
    operation: Operation,
    stream: str,
    *,
    entry_id: str = "",
    group: str = "",
    server: tuple[str, int] | None = None,
) -> dict[str, str | int | float | bool]:
    """The attributes of a span of one operation on one message of a stream.

    Args:
        server: address and port of the server that was spoken to; a socket's path has port 0.
    """
    attributes: dict[str, str | int | float | bool] = {
        "messaging.system": "redis",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": stream,
    }
    if server is not None:
        attributes["server.address"] = server[0]
        if server[1]:
            attributes["server.port"] = server[1]
    if entry_id:
        attributes["messaging.message.id"] = entry_id
    if group:
        attributes["messaging.consumer.group.name"] = group
    return attributes
