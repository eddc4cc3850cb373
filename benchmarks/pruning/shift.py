"""What a predicted shift of the outputs costs: how the limit ``max_predicted_shift`` was chosen.

    python -m benchmarks.pruning.shift --nets vgg,resnet,concat,vit --seeds 0 1 2 3 4

Cuts of 5 to 40% of the channels, chosen and predicted as the analysis does it, masked, on test
samples. By predicted shift (two standard errors included): the accuracy lost on average and at
most. By limit: which share of the harmless cuts within the schedule's 20% passes, and which share
of all the harmful ones does not; harmful are those that lose over two points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise

from benchmarks.common.report import arguments, show, write
from benchmarks.common.subjects import Subject
from elesh.analysis.levels.units import CHANNELS
from elesh.settings import ChannelAnalysis, StructuredPruning
from elesh.trainer import Surgeon
from leyline import Phase

SHARES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40)
EDGES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, float("inf"))
LIMITS = (0.05, 0.1, 0.15, 0.2, 0.3)
WITHIN, HARM = 0.20, 0.02


@dataclass(frozen=True)
class Cut:
    """One masked cut."""

    net: str
    share: float
    shift: float
    """Of the outputs' mean square, as predicted, two standard errors included."""
    lost: float
    """Test accuracy."""


def cuts(subject: Subject) -> Iterator[Cut]:
    """Every share of one network."""
    bundle = subject.tools()[0].measure(subject.calibration, epoch=1)
    settings = StructuredPruning(channel_analysis=ChannelAnalysis(min_channels_per_layer=4))
    ranking = CHANNELS.rank(bundle, settings, subject.groups, "output_projection", Phase.AGGRESSIVE)
    surgeon, whole = Surgeon(subject.model, subject.architecture), subject.accuracy()
    for share in SHARES:
        choice = ranking.decide(bundle, round(share * subject.units))
        prediction = choice.prediction
        if prediction is None:
            continue
        surgeon.mask(ranking.candidates.by_group(choice.selection.units))
        lost = whole - subject.accuracy()
        surgeon.unmask()
        shift = (
            prediction.output_error + 2 * prediction.standard_error
        ) / choice.output_mean_square
        yield Cut(subject.net, share, shift, lost)


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__.splitlines()[0], ("vgg", "resnet", "concat", "vit"))
    parser.add_argument("--samples", type=int, default=512, help="calibration samples")
    asked = parser.parse_args()
    found = [
        cut
        for net in asked.nets
        for seed in asked.seeds
        for cut in cuts(Subject.trained(net, seed, asked.epochs, asked.cache, asked.samples))
    ]
    write(asked.json, [asdict(cut) for cut in found])
    rows = []
    for low, high in pairwise(EDGES):
        lost = [cut.lost for cut in found if low <= cut.shift < high]
        if lost:
            mean = sum(lost) / len(lost)
            rows.append(
                [f"{low:.2f} to {high:.2f}", f"{len(lost)}", f"{mean:.4f}", f"{max(lost):.4f}"]
            )
    show(f"{len(found)} cuts", ["predicted shift", "cuts", "lost, mean", "lost, worst"], rows)
    harmless = [c for c in found if c.share <= WITHIN and c.lost <= HARM]
    harmful = [c for c in found if c.lost > HARM]
    rows = []
    for limit in LIMITS:
        passed = sum(c.shift <= limit for c in harmless) / max(len(harmless), 1)
        stopped = sum(c.shift > limit for c in harmful) / max(len(harmful), 1)
        rows.append([f"{limit:.2f}", f"{passed:.2f}", f"{stopped:.2f}"])
    show("limits", ["limit", "harmless that pass", "harmful that do not"], rows)


if __name__ == "__main__":
    main()
