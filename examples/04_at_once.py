"""A trained network cut down to half of its multiply-accumulates, without a server or a worker.

``python examples/04_at_once.py`` trains a small network on handwritten digits, prunes it, prints
what that did, saves it, loads it again and writes it as an ONNX file where ``onnxscript`` is
installed.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import elesh
from elesh.demo import Digits
from elesh.demo.network import DigitsNet

EPOCHS = 12


def train(model: nn.Module, data: Digits) -> None:
    """Any training will do."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(data.train)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(data.train.images[rows]), data.train.labels[rows]).backward()
            optimizer.step()


def main() -> None:
    """Train, prune, save, load, export."""
    torch.manual_seed(0)
    data, model = Digits.load(seed=0), DigitsNet()
    train(model, data)

    @torch.no_grad()
    def evaluate() -> elesh.Evaluation:
        logits, labels = model(data.validation.images), data.validation.labels
        right = (logits.argmax(1) == labels).float().mean()
        return elesh.Evaluation(float(right), float(cross_entropy(logits, labels)))

    report = elesh.prune(model, data.calibration(), {"macs": 0.5}, evaluate=evaluate)
    print(report)
    size = report.before.parameters, report.after.parameters
    print(f"parameters {size[0]} -> {size[1]}, accuracy {report.after.accuracy:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        elesh.save(model, f"{folder}/pruned")
        again = elesh.load(f"{folder}/pruned", DigitsNet()).eval()
        images = data.held_out.images
        assert torch.equal(again(images), model.eval()(images))

        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(again, (images,), dynamic_shapes=({0: batch},))
        torch.export.save(program, f"{folder}/pruned.pt2")
        if find_spec("onnxscript"):
            torch.onnx.export(program, f=f"{folder}/pruned.onnx", dynamo=True)


if __name__ == "__main__":
    main()
