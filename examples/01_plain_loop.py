"""A plain PyTorch loop under Elesh: the ten lines that a training script needs are marked.

``python examples/01_plain_loop.py`` starts a server and a worker of its own, trains a small network
on handwritten digits, and says what was cut.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from elesh.demo import Digits, local_fleet
from elesh.trainer import Evaluation, Recorder, Session, Surgeon

EPOCHS, EVERY = 12, 2
SCHEDULE = {  # the design document's phases, shortened from 30 epochs each
    "validation_epochs": 2,
    "conservative_epochs": 3,
    "moderate_epochs": 3,
    "aggressive_epochs": 4,
}


def network() -> nn.Module:
    """Two convolutions with normalisation, then a classifier."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip


def main() -> None:
    """Train; every line marked with # Elesh is what Elesh needs."""
    torch.manual_seed(0)
    data, model = Digits.load(seed=0), network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    @torch.no_grad()
    def evaluate() -> Evaluation:
        model.eval()
        logits, labels = model(data.validation.images), data.validation.labels
        model.train()
        right = (logits.argmax(1) == labels).float().mean()
        return Evaluation(float(right), float(cross_entropy(logits, labels)))

    recorder = Recorder(model, data.train.images[:2])  # Elesh
    surgeon = Surgeon(model, recorder.architecture, optimizer=optimizer)  # Elesh
    with (
        local_fleet({"structured_pruning": {"safety_schedule": SCHEDULE}}) as (url, settings),
        Session("plain-loop", url, settings) as session,  # Elesh
    ):
        for epoch in range(1, EPOCHS + 1):
            for start in range(0, len(data.train), 64):
                images = data.train.images[start : start + 64]
                labels = data.train.labels[start : start + 64]
                optimizer.zero_grad()
                cross_entropy(model(images), labels).backward()
                optimizer.step()
            session.watch(epoch, evaluate)  # Elesh
            for decision in session.decisions():  # Elesh
                outcome = session.apply(decision, surgeon, evaluate)  # Elesh
                print(f"epoch {epoch}: {outcome.result} {outcome.detail}")
            if epoch % EVERY == 0:
                recorder.architecture = surgeon.architecture  # Elesh
                bundle = recorder.measure(data.calibration(), epoch=epoch, run_id="plain-loop")
                session.publish(bundle)  # Elesh
                session.wait(10)  # only because this run is so short
    before, after = surgeon.architecture.original_parameters, surgeon.architecture.parameters
    print(f"parameters {before} -> {after}, accuracy {evaluate().accuracy:.3f}")


if __name__ == "__main__":
    main()
