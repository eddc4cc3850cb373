"""Cuts that are made harmful on purpose: how many does the worker refuse or shorten to harmless?

    python -m benchmarks.pruning.harmful --nets resnet,concat,vgg --seeds 0 1 2

A worker's proposal as it is, and ten times with a tenth of its units swapped for those that would
go last, at random places of the order. The worker measures each on held-out samples, refitted,
under the limits of the aggressive phase. Truth is the drop of accuracy on samples that nobody has
seen: harmful is what costs more than the limit, "missed" where what the worker kept does. The last
column counts the worker's intervals that have that drop inside.

Every network and share is a line of JSON in ``--out``; what has one is not measured again, so that
a command that was killed is simply given again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.report import arguments, show
from benchmarks.common.subjects import Subject
from benchmarks.pruning.rounds import checkpoint, settings
from elesh.analysis import analyze
from elesh.program import verifier
from elesh.safety import Entry, Measured, Proposal, strictest_limits
from elesh.trainer import MeasuredCheckpoint, Surgeon
from leyline import CheckpointBundle, Phase

SHARES = (0.2, 0.4, 0.6)
SWAPPED = 0.1
DRAWS = 10
ALL_BUT_THE_LAST = 0.9


def proposed(bundle: CheckpointBundle, share: float) -> Proposal:
    """What would be cut at this share if nothing were measured."""
    seen: list[Proposal] = []

    def take(proposal: Proposal) -> Measured:
        seen.append(proposal)
        return Measured(proposal.order)

    decision = analyze(bundle, settings(share, 1, limited=False), verify=take)
    if not seen:
        raise RuntimeError(f"nothing was proposed: {decision.rejection_reason}")
    return seen[0]


def swapped(proposal: Proposal, last: Sequence[Entry], rng: np.random.Generator) -> Proposal:
    """A tenth of the units replaced by some of the last, the order otherwise as it was."""
    order = list(proposal.order)
    count = max(1, round(SWAPPED * len(order)))
    places = rng.choice(len(order), count, replace=False)
    for place, unit in zip(places, rng.choice(len(last), count, replace=False), strict=True):
        order[place] = last[unit]
    return replace(proposal, order=tuple(order))


@dataclass(frozen=True)
class Case:
    """One set, and what became of it."""

    swapped: bool
    limit: float
    """Of the drop of accuracy, in the aggressive phase."""
    drop: float
    """Of the whole set, on samples that nobody has seen."""
    kept: float
    """Share of the set that the worker measured as safe."""
    kept_drop: float
    inside: bool | None
    """Whether the worker's interval has ``kept_drop``; None where nothing was kept."""


def cases(subject: Subject, shares: Sequence[float]) -> Iterator[tuple[float, list[Case]]]:
    """By share, all sets of one network."""
    bundle, x, y = checkpoint(subject)
    assert isinstance(bundle, MeasuredCheckpoint)
    bundle = replace(bundle, levels=(subject.level,))
    surgeon = Surgeon(subject.model, subject.architecture, restore_points=0)

    def accuracy(order: Sequence[Entry]) -> float:
        units: dict[str, list[int]] = {}
        for _, group, unit in order:
            units.setdefault(group, []).append(unit)
        surgeon.mask(units, reconstruct=bundle.covariance)
        with torch.no_grad():
            right = float((subject.model(x).argmax(1) == y).float().mean())
        surgeon.unmask()
        return right

    whole = accuracy(())
    early = set(proposed(bundle, ALL_BUT_THE_LAST).order)
    level = next(iter(early))[0]
    last = [
        (level, group.name, unit)
        for group in subject.groups
        for unit in range(group.size)
        if (level, group.name, unit) not in early
    ]
    for share in shares:
        found: list[Case] = []
        rng = np.random.default_rng([subject.seed, round(100 * share)])
        plain, chosen = proposed(bundle, share), settings(share, 1, limited=True)
        for proposal in (plain, *(swapped(plain, last, rng) for _ in range(DRAWS))):
            measured = verifier(bundle, chosen)(proposal)
            said, kept_drop = measured.verification, whole - accuracy(measured.kept)
            if said is None:
                raise RuntimeError(f"not measured: {measured.skipped}")
            interval = said.accuracy_drop_interval
            inside = interval.low <= kept_drop <= interval.high if measured.kept else None
            limits = strictest_limits(chosen.verification, {level}, Phase.AGGRESSIVE)
            found.append(
                Case(
                    proposal is not plain,
                    limits.accuracy_drop,
                    whole - accuracy(proposal.order),
                    len(measured.kept) / len(proposal.order),
                    kept_drop,
                    inside,
                )
            )
        yield share, found


def counted(found: Sequence[Case]) -> Mapping[str, Any]:
    """The figures of the table."""
    harmful = [case for case in found if case.drop > case.limit]
    harmless = [case for case in found if case.drop <= case.limit]
    missed = [case for case in harmful if case.kept_drop > case.limit]
    inside = [case.inside for case in found if case.inside is not None]
    return {
        "harmful sets": len(harmful),
        "refused": sum(not case.kept for case in harmful),
        "shortened to harmless": sum(case.kept > 0 for case in harmful) - len(missed),
        "missed": len(missed),
        "harmless sets": len(harmless),
        "refused for nothing": sum(not case.kept for case in harmless),
        "intervals inside": f"{sum(inside)} of {len(inside)}",
    }


Key = tuple[str, int, int, float]
"""Net, seed, epochs, share."""


def read(path: Path) -> dict[Key, list[Case]]:
    """What was measured so far."""
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    return {
        (line["net"], line["seed"], line["epochs"], line["share"]): [
            Case(**case) for case in line["cases"]
        ]
        for line in lines
    }


def main() -> None:
    """Measure what is not there yet, and print."""
    parser = arguments(__doc__.splitlines()[0], ("resnet", "concat", "vgg", "vit-heads"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for seed in asked.seeds:
        for net in asked.nets:
            known = read(asked.out)
            left = [share for share in SHARES if (net, seed, asked.epochs, share) not in known]
            if not left:
                continue
            subject = Subject.trained(net, seed, asked.epochs, asked.cache)
            for share, found in cases(subject, left):
                line = {"net": net, "seed": seed, "epochs": asked.epochs, "share": share}
                with asked.out.open("a") as file:
                    file.write(json.dumps(line | {"cases": [vars(case) for case in found]}) + "\n")
    measured = read(asked.out)
    by_net = {
        net: [case for (other, *_), found in measured.items() if other == net for case in found]
        for net in dict.fromkeys(net for net, *_ in measured)
    }
    by_net["all"] = [case for found in by_net.values() for case in found]
    tables = {net: counted(found) for net, found in by_net.items()}
    rows = [[net, *map(str, table.values())] for net, table in tables.items()]
    show(f"{len(measured)} networks and shares", ["net", *tables["all"]], rows)


if __name__ == "__main__":
    main()
