"""The bus: Redis Streams with leases, one decision a key, blobs by claim check, breakers.

Start reading at :mod:`elesh.bus.core`, then :mod:`.groups` (leases), :mod:`.sweeping` and
:mod:`.plans` (fan-out). The server is anybody's Redis 7 or newer, or the embedded
one of :mod:`elesh.bus.embedded`.
"""

from .audit import AuditHead, AuditLog, audit_envelope
from .blobs import BlobStore
from .breakers import BreakerStore, BreakerView
from .client import until_available
from .core import Bus
from .embedded import EmbeddedServer, embedded_server, server_url
from .errors import BusUnavailable, Overloaded, RunClaimed, masked
from .guard import Guard, unframed
from .history import HistoryStore
from .letters import DeadLetters, Letter, Redriven
from .plans import Plan, Planned, Stored
from .records import Delivery, History, Pending, Record, Settlement, Settling, read_letter
from .registry import Backlog, Registry, WorkerState
from .runs import Holder, RunStore
from .shedding import SHED_FROM
from .sweeping import Sweep

__all__ = [
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
    "History",
    "Guard",
    "HistoryStore",
    "Holder",
    "Letter",
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
    "Settlement",
    "Settling",
    "Stored",
    "Sweep",
    "audit_envelope",
    "WorkerState",
    "embedded_server",
    "masked",
    "read_letter",
    "server_url",
    "unframed",
    "until_available",
]
