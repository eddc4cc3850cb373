"""``elesh demo``: server, workers and trainer at once; ``elesh trainer``: the trainer alone."""

from __future__ import annotations

import json
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from elesh.bus import masked, shared_server
from elesh.observe import shutdown_tracing
from elesh.settings import Settings
from elesh.trainer import Session
from leyline import Level

from .fleet import console_beside, fleet
from .screen import Screen, report_tables, size_of
from .training import Report, Training, total_channels

_CHECKPOINTS = 12
_ANSWER_SECONDS = 180.0
"""So long a demo waits once for answers that do not come."""


@dataclass(frozen=True)
class Demo:
    """The options of a run."""

    epochs: int | None = None
    """None: the whole schedule of the settings and four epochs more."""
    workers: int = 2
    seed: int = 0
    url: str = ""
    settings_file: Path | None = None
    json_file: Path | None = None
    every: int | None = None
    """Epochs between checkpoints; None: about twelve checkpoints in all."""
    run_id: str = ""
    fail: int = 0
    """How many checkpoints to publish with spoiled statistics."""
    provoked: bool = False
    """Whether one epoch is trained on wrong labels, so that a cut is rolled back."""
    console: bool = False
    """Whether a web console is served beside it."""


def run_demo(demo: Demo, console: Console) -> int:
    """Everything on this machine: the embedded server unless a URL is given, workers, training."""
    # SIGTERM ends a demo as Ctrl-C does: its workers and its server end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = _folder()
    settings, settings_file = demo_settings(demo, folder)
    with (
        _server(demo.url or settings.bus.url, console) as url,
        console_beside(url, settings_file, console, wanted=demo.console),
    ):
        console.print(f"starting {demo.workers} workers (logs in {folder})", highlight=False)
        with fleet(url, demo.workers, settings_file, folder) as serving:
            if serving < demo.workers:
                console.print(
                    f"the bus at {masked(url)} does not answer: workers and trainer go on trying, "
                    "training goes on",
                    highlight=False,
                )
            code = _train(demo, settings, settings_file, url, console, paced=True)
    return code


def run_trainer(demo: Demo, console: Console) -> int:
    """The simulated trainer alone; workers run elsewhere."""
    settings, settings_file = demo_settings(demo, _folder())
    return _train(demo, settings, settings_file, demo.url or settings.bus.url, console)


def demo_settings(demo: Demo, folder: Path) -> tuple[Settings, Path | None]:
    """The settings of a run, and the file that the workers read.

    Without a file but with ``--epochs``, the schedule is shortened in proportion, so that every
    phase is passed through.
    """
    if demo.settings_file is not None or demo.epochs is None:
        return Settings.load(demo.settings_file), demo.settings_file
    lengths = shortened(demo.epochs)
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({"elesh": {"structured_pruning": {"safety_schedule": lengths}}}))
    return Settings.load(path), path


def shortened(epochs: int) -> dict[str, int]:
    """Phase lengths in the document's proportions that end a little before ``epochs``."""
    names = ("validation_epochs", "conservative_epochs", "moderate_epochs", "aggressive_epochs")
    return dict.fromkeys(names, max(1, min(30, (epochs - 1) // 4)))


def _folder() -> Path:
    """A folder for logs; kept, since logs are wanted most after a failure."""
    return Path(tempfile.mkdtemp(prefix="elesh-demo-"))


@contextmanager
def _server(url: str, console: Console) -> Iterator[str]:
    url = url or os.environ.get("ELESH_REDIS_URL", "")
    if url:
        yield url
        return
    with shared_server() as embedded:
        console.print("embedded server is up", highlight=False)
        yield embedded


def _train(
    demo: Demo,
    settings: Settings,
    settings_file: Path | None,
    url: str,
    console: Console,
    *,
    paced: bool = False,
) -> int:
    epochs = demo.epochs or settings.structured_pruning.safety_schedule.total_epochs + 4
    every = demo.every or max(1, epochs // _CHECKPOINTS)
    run_id = demo.run_id or f"demo-{demo.seed}-{secrets.token_hex(4)}"
    begun = time.monotonic()
    with Session(run_id, url, settings) as session:
        # Data, network and the proof of its groups take a moment: time to connect.
        training = Training(
            session,
            settings,
            epochs=epochs,
            every=every,
            seed=demo.seed,
            spoiled=demo.fail,
            provoked=demo.provoked,
            paced=paced,
            answer_seconds=_ANSWER_SECONDS if paced else 10.0,
        )
        with Screen(console, epochs) as screen:
            report = training.run(screen)
    report.missed = session.missed  # known for good only now: closing sends what it can
    shutdown_tracing()
    now = training.surgeon.architecture
    for table in report_tables(report, training.original, now):
        console.print(table)
    took = f"run {run_id}: {epochs} epochs in {time.monotonic() - begun:.0f} s"
    if report.waited >= 1:
        took += f", {report.waited:.0f} s of them waiting for workers"
    console.print(took, highlight=False)
    with_settings = f" --settings {settings_file}" if settings_file else ""
    if key := report.applied:
        console.print(
            f"why the last cut was made: elesh explain {key}", highlight=False, soft_wrap=True
        )
        console.print(f"how long it took: elesh trace {key}", highlight=False, soft_wrap=True)
    again = f"analysed again: elesh replay --run {run_id}{with_settings}"
    console.print(again, highlight=False, soft_wrap=True)
    if demo.json_file is not None:
        figures = report_figures(report, training)
        demo.json_file.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def report_figures(report: Report, training: Training) -> dict[str, Any]:
    """The figures of the tables, for machines."""
    original, now = training.original, training.surgeon.architecture
    return {
        "run_id": training.session.run_id,
        "epochs": training.epochs,
        "seed": training.seed,
        "accuracy_before": report.before.accuracy,
        "accuracy_after": report.after.accuracy,
        "loss_before": report.before.loss,
        "loss_after": report.after.loss,
        "parameters_before": original.parameters,
        "parameters_after": now.parameters,
        "macs_before": original.macs,
        "macs_after": now.macs,
        "channels_before": total_channels(original),
        "channels_after": total_channels(now),
        "channels_by_group": {
            group.name: [group.size, size_of(now, group.name)]
            for group in original.groups
            if group.level is Level.CHANNEL
        },
        "decisions": [
            {
                "key": decision.idempotency_key,
                "epoch": decision.epoch,
                "level": decision.key.level.value,
                "approved": decision.approved_for_application,
                "reason": decision.rejection_reason,
                "outcome": report.outcomes[decision.idempotency_key].result,
                "detail": report.outcomes[decision.idempotency_key].detail,
                "units": {name: list(units) for name, units in decision.units.items()},
                "accuracy_masked": report.outcomes[decision.idempotency_key].accuracy_masked,
                "predicted_shift": decision.statistics.predicted_shift,
            }
            for decision in report.decisions
        ],
        "cuts": [{**asdict(cut), "inside": cut.inside} for cut in report.cuts],
        "failed": report.failed,
        "unanswered": report.unanswered,
        "missed": report.missed,
    }
