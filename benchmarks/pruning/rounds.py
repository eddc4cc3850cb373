"""Chosen at once against chosen in rounds on the masked network: accuracy without fine-tuning.

    python -m benchmarks.pruning.rounds --nets resnet,concat,vgg --seeds 0 1 2 3 4

The worker's own code on a published network: statistics and calibration inputs are the first 512
training images, held-out data half of the test images; accuracy is on the other half. "Kept" is the
share of the proposed channels that the verifier measured as safe under the limits of the aggressive
phase, "kept, accuracy" the accuracy with just those masked.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common.report import arguments, bars, show, write
from benchmarks.common.subjects import Subject
from elesh.analysis import analyze
from elesh.program import verifier
from elesh.settings import Settings
from elesh.trainer import Surgeon
from elesh.trainer.export import Exporter, calibration_inputs
from leyline import CheckpointBundle, StructuralPruningDecision

SHARES = (0.2, 0.3, 0.4)
SAMPLES = 512
ROUNDS = {"at once": 1, "4 rounds": 4, "8 rounds": 8}


def settings(share: float, rounds: int, *, limited: bool) -> Settings:
    """That allow this share in one go; unless ``limited`` whatever it costs."""
    free = {"accuracy_drop": 1.0, "loss_rise": 1e9}
    verification: dict[str, Any] = {"rounds": rounds}
    if not limited:
        verification |= {
            "channel": dict.fromkeys(("conservative", "moderate", "aggressive"), free),
            "accuracy_retention": 0.0,
            "class_accuracy_drop": 1.0,
            "gradient_flow_change": 1e9,
        }
    return Settings.model_validate(
        {
            "structured_pruning": {
                "safety_schedule": {"aggressive_limit": share},
                "channel_analysis": {
                    "min_channels_per_layer": 4,
                    "safety_margin": 0.0,
                    "max_predicted_shift": 1e9,
                },
            },
            "verification": verification,
        }
    )


def checkpoint(subject: Subject) -> tuple[CheckpointBundle, torch.Tensor, torch.Tensor]:
    """The checkpoint with its network, and images that nobody has seen with their labels."""
    batches = [(x[:SAMPLES], y[:SAMPLES]) for x, y in _whole(subject.calibration)]
    x, y = _whole(subject.test)[0]
    middle = len(x) // 2
    bundle = subject.tools()[0].measure(batches, epoch=119)
    network = Exporter(subject.model).export(
        subject.architecture, (x[:middle], y[:middle]), calibration_inputs(batches)
    )
    return replace(bundle, network=network), x[middle:], y[middle:]


def _whole(batches: Sequence[tuple[Any, Any]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]


def decide(
    bundle: CheckpointBundle, share: float, rounds: int, *, limited: bool
) -> StructuralPruningDecision:
    """What a worker decides."""
    chosen = settings(share, rounds, limited=limited)
    return analyze(bundle, chosen, verify=verifier(bundle, chosen))


def measured(subject: Subject) -> dict[str, dict[str, float]]:
    """By row and column of the table."""
    bundle, x, y = checkpoint(subject)
    surgeon = Surgeon(subject.model, subject.architecture, restore_points=0)

    def accuracy(units: Mapping[str, Sequence[int]]) -> float:
        surgeon.mask(units)
        with torch.no_grad():
            right = float((subject.model(x).argmax(1) == y).float().mean())
        surgeon.unmask()
        return right

    rows: dict[str, dict[str, float]] = {}
    for name, rounds in ROUNDS.items():
        row = rows.setdefault(name, {})
        for share in SHARES:
            begun = time.process_time()
            whole = decide(bundle, share, rounds, limited=False)
            found = whole.safety.verification
            if found is None or found.kept < found.proposed or found.rounds != rounds:
                raise RuntimeError(f"{name}: {whole.rejection_reason or whole.fallbacks}")
            row[f"{share:.0%}"] = accuracy(whole.units)
            row["seconds"] = time.process_time() - begun
            safe = decide(bundle, share, rounds, limited=True)
            row[f"{share:.0%} kept"] = sum(map(len, safe.units.values())) / max(1, found.proposed)
            row[f"{share:.0%} kept, accuracy"] = accuracy(safe.units)
    rows["whole"] = dict.fromkeys(row, accuracy({}))
    return rows


def main() -> None:
    """Measure and print, net by net."""
    parser = arguments(__doc__.splitlines()[0], ("resnet", "concat", "vgg"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for net in asked.nets:
        found = [
            measured(Subject.trained(net, seed, asked.epochs, asked.cache)) for seed in asked.seeds
        ]
        figures[net] = found
        columns = list(found[0]["at once"])
        show(
            f"{net}, {len(asked.seeds)} seeds, whole {bars([f['whole']['20%'] for f in found])}",
            ["chosen", *columns],
            [
                [name, *(bars([rows[name][column] for rows in found]) for column in columns)]
                for name in ROUNDS
            ],
        )
        write(asked.json, figures)


if __name__ == "__main__":
    main()
