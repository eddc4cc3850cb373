"""How the fleet runs: breakers, the bus, workers. No part of the design document's block."""

from __future__ import annotations

from pydantic import ByteSize, Field

from ._base import Section


class BreakerSettings(Section):
    """When a level's circuit breaker opens and how it recovers."""

    failures: int = Field(default=3, ge=1)
    recovery_seconds: float = Field(default=30.0, gt=0)


class BusSettings(Section):
    """How workers and trainers meet on Redis."""

    url: str = ""
    """Redis URL; empty: the embedded server."""
    partition: str = Field(default="main", pattern=r"^[A-Za-z0-9_\-]{1,32}$")
    lease_seconds: float = Field(default=15.0, gt=0)
    max_deliveries: int = Field(default=4, ge=1)
    blob_ttl_seconds: int = Field(default=7200, ge=60)
    record_ttl_seconds: int = Field(default=7 * 86400, ge=60)
    stream_length: int = Field(default=100_000, ge=100)
    max_blob_bytes: ByteSize = Field(default=ByteSize(2 << 30), ge=1)
    blob_folder: str = ""
    """Folder whose files ``file:`` references may name; empty: none."""


class WorkerSettings(Section):
    """Limits of one worker."""

    window_seconds: float = Field(default=300.0, gt=0)
    """The checkpoint window: an analysis that takes longer is stopped."""
    memory_limit: ByteSize = Field(default=ByteSize(4 << 30), ge=1 << 20)
    """What the compute child may use, in bytes; over it the analysis falls back to channels."""
    prefetch: int = Field(default=1, ge=1, le=64)
    """Entries that a worker holds at once; it serves one at a time."""
    drain_seconds: float = Field(default=30.0, gt=0)
    threads: int = Field(default=1, ge=1)
