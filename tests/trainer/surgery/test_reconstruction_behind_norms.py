"""Behind a normalisation over channels, a cut is ranked and refitted by what is left after it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from elesh.analysis.candidates import Candidates
from elesh.analysis.selection.reconstruction_order import ReconstructionOrder
from elesh.program.measure import Bench
from elesh.trainer import Recorder, Surgeon
from elesh.trainer.export import Exporter, calibration_inputs
from elesh.trainer.surgery.reconstruction.after_cut import reconstructed
from leyline import Level

WIDTH, LOST = 8, [1, 4]


class Stream(nn.Module):
    """A stream of correlated channels whose only reader sees it normalised."""

    def __init__(self, norm: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(12, WIDTH), norm
        self.last = nn.Linear(WIDTH, 5, bias=bias)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.add_(0.3 * torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.last(self.norm(self.first(x))))


def network(kind: str, bias: bool = True) -> tuple[Stream, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = Stream({"layer": nn.LayerNorm, "rms": nn.RMSNorm}[kind](WIDTH), bias).eval()
    x = torch.randn(2000, 12) * torch.linspace(0.2, 2, 12)
    return model, [(x, torch.randint(0, 5, (2000,)))]


def smallest_error(model: Stream, x: Tensor, whole: Tensor, lost: list[int]) -> float:
    """Of any reader of the channels that are kept, as they are after the cut."""
    kept = [unit for unit in range(WIDTH) if unit not in lost]
    cut = copy.deepcopy(model)
    cut.first.weight.data, cut.first.bias.data = (p.data[kept] for p in cut.first.parameters())
    for parameter in cut.norm.parameters():
        parameter.data = parameter.data[kept]
    if isinstance(cut.norm, (nn.LayerNorm, nn.RMSNorm)):
        cut.norm.normalized_shape = (len(kept),)
    rows = cut.norm(cut.first(x)).double()
    if model.last.bias is not None:
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    solved = torch.linalg.lstsq(rows, whole.double()).solution
    return float((rows @ solved - whole).square().sum(1).mean())


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_refitted_reader_is_nearly_the_best_there_is(kind: str, bias: bool) -> None:
    model, batches = network(kind, bias)
    recorder = Recorder(model, batches[0][0][:2])
    with torch.enable_grad():
        covariance = recorder.measure(batches, epoch=1).covariance
    x, whole = batches[0][0], model(batches[0][0])
    best = smallest_error(model, x, whole, LOST)
    surgeon = Surgeon(model, recorder.architecture)
    surgeon.mask({"first": LOST}, reconstruct=covariance)
    masked = model(x)
    surgeon.unmask()
    surgeon.cut({"first": LOST}, reconstruct=covariance)
    assert torch.allclose(model(x), masked, atol=1e-5)
    assert float((model(x) - whole).square().sum(1).mean()) < 1.15 * best


@torch.no_grad()
def test_no_channel_behind_a_layer_normalisation_is_free() -> None:
    """All have mean 0 together: given the others, each is known, until it is gone."""
    model, batches = network("layer")
    recorder = Recorder(model, batches[0][0][:2])
    with torch.enable_grad():
        bundle = recorder.measure(batches, epoch=1)
    x, whole = batches[0][0], model(batches[0][0])
    candidates = Candidates.of([recorder.architecture.group["first"]], 1)
    true = np.array([smallest_error(model, x, whole, [unit]) for unit in range(WIDTH)])
    # Directions are centred over the outputs, so one dimension of five is not seen.
    said = ReconstructionOrder(candidates, bundle.gates).costs
    assert (said > 0.3 * true).all()
    assert (said < 3 * true).all()
    assert np.corrcoef(said, true)[0, 1] > 0.9


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_worker_refits_as_the_trainer_does(kind: str) -> None:
    model, batches = network(kind)
    few = [(x[:512], y[:512]) for x, y in batches]
    recorder = Recorder(model, few[0][0][:2])
    bundle = recorder.measure(few, epoch=1)
    network_of = Exporter(model).export(bundle.architecture, few[0], calibration_inputs(few))
    refit = Bench(network_of, bundle.architecture).refitting(())
    found = refit.of([(Level.CHANNEL, "first", unit) for unit in LOST])
    assert bundle.covariance is not None
    own = reconstructed(model, bundle.architecture, {"first": LOST}, bundle.covariance)
    assert found.keys() == own.keys() == {"last.weight", "last.bias"}
    kept = [unit for unit in range(WIDTH) if unit not in LOST]
    assert torch.allclose(
        found["last.weight"][:, kept], own["last.weight"][:, kept], rtol=1e-3, atol=1e-4
    )
    assert torch.allclose(found["last.bias"], own["last.bias"], rtol=1e-3, atol=1e-4)
