"""A plain PyTorch loop under Elesh: the lines that a training script needs are marked.

``python examples/01_plain_loop.py`` starts a server and a worker of its own, trains a small network
on handwritten digits, says what was cut, and saves what is left.
"""

from __future__ import annotations

import tempfile

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import elesh
from elesh.demo import Digits, local_fleet

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
    def evaluate() -> elesh.Evaluation:
        logits, labels = model(data.validation.images), data.validation.labels
        right = (logits.argmax(1) == labels).float().mean()
        return elesh.Evaluation(float(right), float(cross_entropy(logits, labels)))

    def train_one_epoch() -> None:
        model.train()
        for rows in torch.randperm(len(data.train)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(data.train.images[rows]), data.train.labels[rows]).backward()
            optimizer.step()

    with (
        tempfile.TemporaryDirectory() as folder,
        local_fleet({"structured_pruning": {"safety_schedule": SCHEDULE}}) as (url, settings),
        elesh.attach(  # Elesh
            model,
            optimizer,
            run_id="plain-loop",
            calibration=data.calibration(),
            evaluate=evaluate,
            every=EVERY,
            url=url,  # a server of this script's own; left out: ELESH_REDIS_URL, else embedded
            settings=settings,
            restore_dir=folder,  # a real run keeps it, and goes on from there after a kill
        ) as pruning,
    ):
        for epoch in pruning.epochs(EPOCHS):  # Elesh
            train_one_epoch()
            for outcome in pruning.step(epoch):  # Elesh
                print(f"epoch {epoch}: {outcome.result} {outcome.detail}")
            if epoch % EVERY == 0:
                pruning.session.wait(10)  # only because this run is so short
        print(pruning)
        elesh.save(model, f"{folder}/pruned")  # Elesh
        again = elesh.load(f"{folder}/pruned", network()).eval()  # Elesh
        assert torch.equal(again(data.held_out.images), model.eval()(data.held_out.images))
    architecture = pruning.architecture
    before, after = architecture.original_parameters, architecture.parameters
    print(f"parameters {before} -> {after}, accuracy {evaluate().accuracy:.3f}")


if __name__ == "__main__":
    main()
