"""How many files and functions one checkpoint passes, from publish to the applied decision.

    python -m benchmarks.reading.checkpoint [--list] [--runs 3]

A small network is trained on digits beside one worker. The second checkpoint in a pruning phase is
traced in the trainer, the worker's supervisor and its compute child: every function of elesh and
leyline that is called between ``publish`` and the end of ``apply`` counts once. What the clock
calls meanwhile (heartbeats, renewals, the audit's copy) is another thing each time: what counts is
called in every one of several runs. Comprehensions and lambdas count with the function that holds
them. What a compute child calls from when the network runs in it is counted apart, too: that is the
measuring of cuts, which a checkpoint without a network does not pass.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

TRACER = Path(__file__).parent / "tracer"
SCHEDULE = {
    "validation_epochs": 1,
    "conservative_epochs": 2,
    "moderate_epochs": 2,
    "aggressive_epochs": 4,
}
PACKAGES = ("elesh", "leyline")
Function = tuple[str, str]
"""File below the packages' folder, and the function's qualified name."""


def main() -> None:
    """Trace in a process of its own, so that the trainer is traced, too."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--list", action="store_true", help="print every function")
    arguments.add_argument("--runs", type=int, default=3, help="trainings that are compared")
    arguments.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.train:
        _train(Path(os.environ["ELESH_TRACED"]))
        return
    runs = [_traced() for _ in range(given.runs)]
    whole = set.intersection(*(before | network for before, network in runs))
    without = set.intersection(*(before for before, _ in runs))
    if given.list:
        for file, function in sorted(whole):
            print(f"{file}\t{function}\t{'' if (file, function) in without else 'network'}")
    print(f"until the network runs in the compute child: {_counted(without)}")
    print(f"with the measuring of cuts: {_counted(whole)}")


def _counted(functions: set[Function]) -> str:
    return f"{len({file for file, _ in functions})} files, {len(functions)} functions"


def _traced() -> tuple[set[Function], set[Function]]:
    """What one training with its worker calls, and what of it once the network has run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "switch").write_text("0")
        paths = [str(TRACER), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "ELESH_TRACED": name,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", __spec__.name, "--train"]
        subprocess.run(command, env=environment, check=True)
        return _called(folder)


def _called(folder: Path) -> tuple[set[Function], set[Function]]:
    found = set[Function](), set[Function]()
    for calls in folder.glob("*.calls"):
        for line in calls.read_text().rstrip("\0").splitlines():
            file, when, name = line.split("\t")
            parts = Path(file).parts
            root = next(
                n
                for n, part in enumerate(parts)
                if part in PACKAGES and parts[n - 1] not in PACKAGES
            )
            found[when == "network"].add(("/".join(parts[root:]), name.split(".<locals>")[0]))
    return found


def _switch(folder: Path, state: bytes) -> None:
    """Write in place: the byte is mapped, and a truncated file has none to read."""
    with (folder / "switch").open("r+b") as file:
        file.write(state)


def _train(folder: Path) -> None:
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    from elesh.demo import Digits, local_fleet
    from elesh.trainer import Evaluation, Recorder, Session, Surgeon
    from elesh.trainer.export import Exporter
    from leyline import Level

    torch.manual_seed(0)
    data = Digits.load(seed=0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(4):
        for rows in torch.randperm(len(data.train)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(data.train.images[rows]), data.train.labels[rows]).backward()
            optimizer.step()

    @torch.no_grad()
    def evaluate() -> Evaluation:
        model.eval()
        logits, labels = model(data.validation.images), data.validation.labels
        model.train()
        right = (logits.argmax(1) == labels).float().mean()
        return Evaluation(float(right), float(cross_entropy(logits, labels)))

    recorder = Recorder(model, data.train.images[:2])
    surgeon = Surgeon(model, recorder.architecture, optimizer=optimizer)
    block = {"structured_pruning": {"safety_schedule": SCHEDULE}}
    with local_fleet(block) as (url, settings), Session("traced", url, settings) as session:
        for epoch in (4, 6):  # the first one loads what is loaded once
            recorder.architecture = surgeon.architecture
            bundle = recorder.measure(data.calibration(), epoch=epoch, run_id="traced")
            held_out = (data.validation.images, data.validation.labels)
            network = Exporter(model).export(recorder.architecture, held_out, data.train.images)
            levels = (Level.CHANNEL, Level.LAYER)
            if epoch == 6:
                _switch(folder, b"1")
            session.publish(replace(bundle, network=network, levels=levels))
            session.wait(120)
            outcomes = [session.apply(d, surgeon, evaluate) for d in session.decisions()]
        _switch(folder, b"2")
        print(f"epoch {epoch}: {[f'{o.result} {o.detail}' for o in outcomes]}")


if __name__ == "__main__":
    main()
