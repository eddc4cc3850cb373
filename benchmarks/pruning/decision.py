"""What one decision in a run costs the training thread, in plain forward and backward passes.

    python -m benchmarks.pruning.decision --width 8 --pixels 12

The ResNet-50 of :mod:`.passes`, its made-up images, and as many validation samples as calibration
samples. A checkpoint is measured, exported and analysed here; the decision then takes the way that
it takes in ``session.apply``: restore points, mask, layers solved one behind the other, evaluation,
cut, evaluation, and the loss of the held-out samples that the checkpoint carries. As many of the
samples are measured as a run measures that is within its share of time. A plain pass over all
calibration samples is timed just before, in CPU time; all figures are in such passes. The analysis
is not the training thread's and does not count.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.common.report import show, write
from elesh.analysis import analyze
from elesh.safety import Measured
from elesh.settings import Settings
from elesh.trainer import Evaluation, Recorder, Surgeon
from elesh.trainer.calibration.recorder import enough_samples
from elesh.trainer.export import Exporter, calibration_inputs
from elesh.trainer.recovery.recovery import Recovery
from elesh.trainer.recovery.snapshot import Tracked
from elesh.trainer.session import apply
from elesh.trainer.session.apply import _Check
from elesh.trainer.session.monitoring import MonitoredCuts
from elesh.trainer.surgery.reconstruction.after_cut import reestimate_batch_statistics
from leyline import Budget, Level, Reconstructed

from .passes import ResNet50, cpu_seconds, made_up, timed

__all__ = ["PARTS", "measured"]

PARTS: dict[str, tuple[Any, str]] = {
    "outputs before": (_Check, "_keep_outputs"),
    "layer by layer": (_Check, "_solve_layers"),
    "batch statistics": (apply, "estimated_batch_statistics"),
    "evaluations": (_Check, "_measure"),
    "restore points": (Recovery, "put"),
}
"""What of applying is timed by itself."""
_LOSS_SAMPLES, _PROOF = 128, 128
_EVERYTHING = dict.fromkeys(("conservative_limit", "moderate_limit", "aggressive_limit"), 1.0)
_SETTINGS = Settings.model_validate(
    {
        "structured_pruning": {
            "safety_schedule": _EVERYTHING,
            "rollback_triggers": {"channel_accuracy_drop": 1.0},
            "channel_analysis": {"safety_margin": 0.0, "max_predicted_shift": 1e30},
        },
        "verification": {"rounds": 1, "kept_share": 0.0},
        "trainer": {"cut_accuracy_drop": 1.0},
    }
)


def measured(width: int, pixels: int, samples: int, batch: int, left: float) -> dict[str, float]:
    """Plain passes of one decision that leaves this share of the MACs, and of its parts."""
    torch.manual_seed(0)
    model = ResNet50(width)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    (images, labels), unseen = (made_up(samples, pixels, seed) for seed in (1, 2))
    batches = list(zip(images.split(batch), labels.split(batch), strict=True))

    def plain() -> None:
        for inputs, wanted in batches:
            optimizer.zero_grad()
            cross_entropy(model(inputs), wanted).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def evaluate() -> Evaluation:
        model.eval()
        outputs = torch.cat([model(part) for part in unseen[0].split(batch)])
        model.train()
        right = (outputs.argmax(1) == unseen[1]).float().mean()
        return Evaluation(float(right), float(cross_entropy(outputs, unseen[1])))

    for inputs, wanted in batches:
        optimizer.zero_grad()
        cross_entropy(model(inputs), wanted).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    reestimate_batch_statistics(model, batches)
    recorder = Recorder(model, images[:2])
    surgeon = Surgeon(model, recorder.architecture, optimizer=optimizer, restore_points=0)
    exporter, proof = Exporter(model), made_up(_PROOF, pixels, 3)

    def export() -> None:
        exporter.export(surgeon.architecture, proof, calibration_inputs(batches))

    export()  # the first one traces
    before = min(cpu_seconds(plain) for _ in range(2))
    found: dict[str, Any] = {}

    def keep(name: str, work: Callable[[], object]) -> float:
        return cpu_seconds(lambda: found.__setitem__(name, work())) / before

    figures = {
        "measuring": keep(
            "bundle",
            lambda: recorder.measure(
                batches,
                epoch=120,
                batch_statistics=True,
                loss_samples=_LOSS_SAMPLES,
                max_samples=enough_samples(recorder.architecture),
            ),
        ),
        "export": keep("", export),
        "evaluation before": keep("now", evaluate),
    }
    bundle = found["bundle"]
    asked = bundle.parameters.model_copy(update={"budget": Budget(resource="macs", at_most=left)})
    bundle = replace(bundle, parameters=asked, levels=(Level.CHANNEL,))
    decision = analyze(bundle, _SETTINGS, threads=1, verify=lambda x: Measured(x.order))
    refitted = Reconstructed(applied=True, batch_statistics=True)
    decision = decision.model_copy(update={"reconstruction": refitted})
    parts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, timed(PARTS, parts):
        recovery = Recovery(Path(folder) / "run", 4, 1.0)
        recovery.resume(Tracked(surgeon, {}), None)
        applied = keep(
            "outcome",
            lambda: MonitoredCuts(_SETTINGS, recovery).apply(
                decision,
                surgeon,
                evaluate,
                apply.RefitData(bundle.covariance, batches=batches, held_out=[proof]),
                known=found["now"],
            ),
        )
    if found["outcome"].result != "applied":
        raise SystemExit(f"nothing was cut: {found['outcome'].detail}")
    figures |= {part: parts.get(part, 0.0) / before for part in PARTS}
    figures["the rest"] = applied - sum(figures[part] for part in PARTS)
    return {"plain_seconds": before, "passes": sum(figures.values()), **figures}


def main() -> None:
    """Print the decision and its parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=12)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--left", type=float, default=0.93, help="of the MACs")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    figures = measured(asked.width, asked.pixels, asked.samples, asked.batch, asked.left)
    rows = [[name, f"{value:.2f}"] for name, value in figures.items() if name != "plain_seconds"]
    plain = figures["plain_seconds"]
    show(f"one decision; a plain pass takes {plain:.2f} s", ["", "plain passes"], rows)
    write(asked.json, figures)


if __name__ == "__main__":
    main()
