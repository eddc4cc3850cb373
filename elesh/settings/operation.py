"""How the fleet runs, what is observed, who is trusted on the bus, and how the trainer guards a
run. Not part of the design document's block."""

from __future__ import annotations

from typing import Literal

from pydantic import ByteSize, Field, SecretStr

from ._base import Section


class SecuritySettings(Section):
    """Who is trusted on the bus, and how blobs are stored; see docs/security.md."""

    keyring: str = ""
    """Path of the keyring file; empty: entries are neither signed nor checked."""
    require_signatures: bool = True
    """With a keyring, whether entries without a signature are refused."""
    blob_key: str = ""
    """Id of the keyring's HMAC key that encrypts blobs; empty: blobs are stored plain."""


class BreakerSettings(Section):
    """When a level's circuit breaker opens and how it recovers."""

    failures: int = Field(default=3, ge=1)
    """This many failures in a row (of the analysis, of a safety gate, or rollbacks) open the
    breaker."""
    recovery_seconds: float = Field(default=30.0, gt=0)
    """Time after which one probe in the fleet may try again."""


class BusSettings(Section):
    """How workers and trainers meet on Redis."""

    url: str = ""
    """Redis URL; empty: the embedded server."""
    partition: str = Field(default="main", pattern=r"^[A-Za-z0-9_\-]{1,32}$")
    """Name of the partition; trainers and workers must use the same one. It is part of every key.
    """
    lease_seconds: float = Field(default=15.0, gt=0)
    """An entry is taken from a worker that did not renew its lease for this long."""
    max_deliveries: int = Field(default=4, ge=1)
    """An entry that was delivered more often without success becomes a dead letter."""
    blob_ttl_seconds: int = Field(default=7200, ge=60)
    """How long blobs (statistics, networks, masks) are kept."""
    record_ttl_seconds: int = Field(default=7 * 86400, ge=60)
    """How long the record of a decision is kept; for so long a key has only one decision."""
    max_blob_bytes: ByteSize = Field(default=ByteSize(2 << 30), ge=1)
    """Larger blobs are refused before they are read."""
    security: SecuritySettings = SecuritySettings()
    """Who is believed, and how blobs are stored."""
    blob_folder: str = ""
    """Folder of the files that ``file:`` references may name; empty: none."""


class WorkerSettings(Section):
    """Limits of one worker."""

    window_seconds: float | None = Field(default=None, gt=0)
    """The checkpoint window of this worker, if shorter than ``analysis_timeout``."""
    memory_limit: ByteSize = Field(default=ByteSize(4 << 30), ge=1 << 20)
    """Memory that the compute child may use; beyond it the analysis falls back to channels."""
    drain_seconds: float = Field(default=30.0, gt=0)
    """How long a draining worker may finish what it began."""
    threads: int = Field(default=1, ge=1)
    """Threads of one analysis, at most ``parallel_analysis_threads``. Results do not depend on it.
    """


class ConsoleSettings(Section):
    """The web console: where it listens, and who may act."""

    host: str = "127.0.0.1"
    """Address that it listens on."""
    port: int = Field(default=8765, ge=0, le=65535)
    """Port that it listens on; 0: any free one."""
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    """Host names that browsers may use; others are refused."""
    token: SecretStr = SecretStr("")
    """Token that an operator needs to act, at least 16 characters; empty: nobody can act."""
    session_seconds: float = Field(default=8 * 3600.0, gt=0)
    """How long an operator stays signed in."""


class AuditSettings(Section):
    """How the audit log is written; every worker writes it."""

    file: str = ""
    """Append-only file on the worker's host that also gets every entry; empty: none."""


class ObserveSettings(Section):
    """What a worker or trainer reports: traces, health, heartbeats."""

    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of checkpoints that are traced; ``OTEL_TRACES_SAMPLER`` overrides it."""
    trace_file_size: ByteSize = Field(default=ByteSize(16 << 20), ge=0)
    """Size of each of the two files that ``elesh trace`` reads; 0: none is kept."""
    heartbeat_seconds: float = Field(default=5.0, gt=0)
    """Time between two updates of a worker in the worker registry."""
    health_host: str = "127.0.0.1"
    """Address that a worker's health and metrics are served on."""
    health_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of a worker's health and metrics; 0: any free one; none: not served."""


class TrainerSettings(Section):
    """Limits of one training session."""

    watch_epochs: int = Field(default=3, ge=0)
    """Length of the monitoring window after a cut, in reports of accuracy (``Session.watch``); 0:
    none."""
    rollback: Literal["immediate", "progressive", "atomic"] = "immediate"
    """``immediate``: back to before the first cut whose trigger fired; ``progressive``: to older
    and older restore points until one validates; ``atomic``: only the newest cut."""
    cut_accuracy_drop: float = Field(default=0.005, ge=0, le=1)
    """Accuracy that one cut may cost at once, by the trainer's evaluation under the mask. A
    decision that may cost more is shortened, down to an eighth. The cost is estimated from
    accuracy, loss and changes of answers, plus two standard errors (decision 0104). 1: decisions
    are cut whole or not at all."""
    time_share: float = Field(default=0.1, ge=0, le=10)
    """Share of the training's time that Elesh may take on its thread. Beyond it a checkpoint
    measures fewer calibration samples (128, or one for every unit of the widest group; a table as
    many as usual) and reuses the last evaluation since the checkpoint before, and monitored cuts
    are judged at checkpoints or before the next cut. Safety checks are never skipped. 0: no limit,
    and the same samples in every run."""
    restore_points: int = Field(default=4, ge=2)
    """Number of restore points that are kept; more only while monitored cuts need them."""
    claim_seconds: float = Field(default=15.0, gt=0)
    """A run is free again if its trainer does not renew its claim for this long."""
    reconstruct: bool = True
    """After a cut the layers that read the kept units are refitted from the calibration pass."""
    reconstruct_skip: tuple[str, ...] = ()
    """Layers, by path, that are not refitted."""
