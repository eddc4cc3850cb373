"""The bus: Redis Streams with leases, one decision a key, blobs by claim check, breakers.

Start reading at :mod:`elesh.bus.core`, then :mod:`.streams.consumer_groups` (leases, reaping) and
:mod:`.streams.fan_out`. The server is any Redis 7 or newer, or the embedded one of
:mod:`elesh.bus.server.embedded`.
"""

from elesh.bus.server.client import (
    Backoff,
    OutageLog,
    cancelled,
    repeatedly,
    require_address,
    until_available,
)
from elesh.bus.server.embedded import EmbeddedServer, embedded_server, server_url, shared_server
from elesh.bus.state.audit import AuditHead, AuditLog, audit_envelope
from elesh.bus.state.blobs import BlobStore
from elesh.bus.state.registry import Backlog, Registry, WorkerState
from elesh.bus.state.runs import BreakerStore, BreakerView, HistoryStore, Holder, RunStore
from elesh.bus.streams.consumer_groups import SHED_FROM, Reap
from elesh.bus.streams.dead_letters import DeadLetterEntry, DeadLetters, Redriven, operator_action
from elesh.bus.streams.fan_out import Plan, Planned, Stored
from elesh.bus.streams.records import (
    Commit,
    CommitOutcome,
    Delivery,
    DeliveryHistory,
    Pending,
    Record,
    moment,
    read_dead_letter,
)

from .core import Bus
from .errors import BadAddress, BusRefuses, BusUnavailable, Overloaded, RunClaimed, masked
from .guard import Guard, unframed

__all__ = [
    "Backoff",
    "BadAddress",
    "BusRefuses",
    "OutageLog",
    "cancelled",
    "operator_action",
    "repeatedly",
    "require_address",
    "AuditHead",
    "AuditLog",
    "Backlog",
    "BlobStore",
    "BreakerStore",
    "BreakerView",
    "Bus",
    "BusUnavailable",
    "DeadLetters",
    "Delivery",
    "EmbeddedServer",
    "DeliveryHistory",
    "Guard",
    "HistoryStore",
    "Holder",
    "DeadLetterEntry",
    "Overloaded",
    "RunClaimed",
    "Pending",
    "Plan",
    "Planned",
    "Record",
    "Redriven",
    "Registry",
    "RunStore",
    "SHED_FROM",
    "CommitOutcome",
    "Commit",
    "Stored",
    "Reap",
    "audit_envelope",
    "WorkerState",
    "embedded_server",
    "masked",
    "moment",
    "read_dead_letter",
    "server_url",
    "shared_server",
    "unframed",
    "until_available",
]
