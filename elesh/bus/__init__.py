"""The bus: Redis Streams with leases, one decision a key, blobs by claim check, breakers.

Start reading at :mod:`elesh.bus.core`. The server is anybody's Redis 7 or newer, or the embedded
one of :mod:`elesh.bus.embedded`.
"""

from .audit import AuditHead, AuditLog, audit_envelope
from .blobs import BlobStore
from .breakers import BreakerStore, BreakerView
from .client import until_available
from .core import Bus
from .embedded import EmbeddedServer, embedded_server, server_url
from .errors import BusUnavailable, masked
from .records import Delivery, Pending, Record, Settlement, Settling, read_letter

__all__ = [
    "AuditHead",
    "AuditLog",
    "BlobStore",
    "BreakerStore",
    "BreakerView",
    "Bus",
    "BusUnavailable",
    "Delivery",
    "EmbeddedServer",
    "Pending",
    "Record",
    "Settlement",
    "Settling",
    "audit_envelope",
    "embedded_server",
    "masked",
    "read_letter",
    "server_url",
    "until_available",
]
