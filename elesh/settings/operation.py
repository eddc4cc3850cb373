"""How the fleet runs, what is observed, who is trusted on the bus, and how the trainer guards a
run. Not part of the design document's block."""

from __future__ import annotations

from typing import Literal

from pydantic import ByteSize, Field, SecretStr

from ._base import Section


class SecuritySettings(Section):
    """Who is believed on the bus, and how blobs are stored; see docs/security.md."""

    keyring: str = ""
    """Path of the keyring file; empty: entries are neither signed nor checked."""
    require_signatures: bool = True
    """With a keyring, whether entries without a signature are refused."""
    blob_key: str = ""
    """Id of the HMAC key of the keyring whose secret seals blobs; empty: blobs are stored plain."""


class BreakerSettings(Section):
    """When a level's circuit breaker opens and how it recovers."""

    failures: int = Field(default=3, ge=1)
    """So many in a row (of the analysis, of a safety gate, or a rollback) open it."""
    recovery_seconds: float = Field(default=30.0, gt=0)
    """After so long one probe in the fleet may try again."""


class BusSettings(Section):
    """How workers and trainers meet on Redis."""

    url: str = ""
    """Redis URL; empty: the embedded server."""
    partition: str = Field(default="main", pattern=r"^[A-Za-z0-9_\-]{1,32}$")
    """Trainers and workers meet in one; all its keys have it in their name."""
    lease_seconds: float = Field(default=15.0, gt=0)
    """Seconds after which an entry is taken from a worker that does not renew its lease."""
    max_deliveries: int = Field(default=4, ge=1)
    """An entry that was delivered more often without an end becomes a dead letter."""
    blob_ttl_seconds: int = Field(default=7200, ge=60)
    """How long blobs (statistics, networks, masks) are kept."""
    record_ttl_seconds: int = Field(default=7 * 86400, ge=60)
    """How long the record of a decision is kept, and with it the promise of one decision a key."""
    max_blob_bytes: ByteSize = Field(default=ByteSize(2 << 30), ge=1)
    """Larger blobs are refused before they are read."""
    security: SecuritySettings = SecuritySettings()
    """Who is believed, and how blobs are stored."""
    blob_folder: str = ""
    """Folder whose files ``file:`` references may name; empty: none."""


class WorkerSettings(Section):
    """Limits of one worker."""

    window_seconds: float | None = Field(default=None, gt=0)
    """The checkpoint window: an analysis that takes longer is stopped. None, or more than
    ``analysis_timeout``: that."""
    memory_limit: ByteSize = Field(default=ByteSize(4 << 30), ge=1 << 20)
    """What the compute child may use, in bytes; over it the analysis falls back to channels."""
    drain_seconds: float = Field(default=30.0, gt=0)
    """How long a worker that has to end may go on with what it has begun."""
    threads: int = Field(default=1, ge=1)
    """Threads of one analysis, at most ``parallel_analysis_threads``; the result does not depend on
    them."""


class ConsoleSettings(Section):
    """The web console: where it listens, and who may act."""

    host: str = "127.0.0.1"
    """Address that it listens on."""
    port: int = Field(default=8765, ge=0, le=65535)
    """Port that it listens on; 0: any free one."""
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    """Names that browsers may call it by; others are refused."""
    token: SecretStr = SecretStr("")
    """What an operator has to know to act, at least 16 characters; empty: none can."""
    session_seconds: float = Field(default=8 * 3600.0, gt=0)
    """How long an operator who signed in stays signed in."""


class AuditSettings(Section):
    """How the audit log is written; every worker writes it."""

    file: str = ""
    """Append-only file on the worker's host that gets every entry too; empty: none."""


class ObserveSettings(Section):
    """What is reported of a worker or a trainer: traces, health, heartbeats."""

    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of checkpoints that are traced; ``OTEL_TRACES_SAMPLER`` overrides it."""
    trace_file_size: ByteSize = Field(default=ByteSize(16 << 20), ge=0)
    """Bytes of each of the two files that ``elesh trace`` reads; 0: none is kept."""
    heartbeat_seconds: float = Field(default=5.0, gt=0)
    """Seconds between two entries of a worker in the worker registry."""
    health_host: str = "127.0.0.1"
    """Address that a worker's health and metrics are served on."""
    health_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of a worker's health and metrics; 0: any free one; none: not served."""


class TrainerSettings(Section):
    """Limits of one training session."""

    watch_epochs: int = Field(default=3, ge=0)
    """Reports of accuracy (``Session.watch``) that a cut must stand; 0: none."""
    rollback: Literal["immediate", "progressive", "atomic"] = "immediate"
    """``immediate``: to before the first cut whose trigger fired; ``progressive``: to ever older
    restore points until one validates; ``atomic``: only the newest cut is taken back."""
    cut_accuracy_drop: float = Field(default=0.005, ge=0, le=1)
    """What one cut may cost at once, by the trainer's own evaluation under the mask; a decision
    that may cost more is shortened, to an eighth at the least. What it costs is told from accuracy,
    loss and how answers move, and two standard errors are added (decision 0104). 1: decisions are
    cut whole or not at all."""
    time_share: float = Field(default=0.1, ge=0, le=10)
    """Share of the training's time that its thread may give to Elesh. Beyond it a checkpoint
    measures fewer calibration samples (128, or as many as the widest group has units; of a table
    no fewer than else) and says what was evaluated last since the one before, and monitored cuts
    are judged at checkpoints or where the next is cut; what makes a cut safe is done all the same.
    0: any, and the same samples in every run."""
    restore_points: int = Field(default=4, ge=2)
    """How many are kept; more only while monitored cuts need them."""
    claim_seconds: float = Field(default=15.0, gt=0)
    """Seconds after which a run is free again if its trainer does not renew its claim."""
    reconstruct: bool = True
    """Cuts are followed by refitting what reads the kept units, from the calibration pass."""
    reconstruct_skip: tuple[str, ...] = ()
    """Layers, by path, that keep their weights all the same."""
