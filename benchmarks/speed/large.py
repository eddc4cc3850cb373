"""Time and memory to record, measure, analyse, verify and cut large networks, without training.

    python -m benchmarks.speed.large --net resnet50 --samples 64
    python -m benchmarks.speed.large --net bert --samples 64 --tokens 64
    python -m benchmarks.speed.large --net llama --samples 8 --tokens 32

Random weights: torchvision's ResNet-50 on images of 224 x 224, transformers' BERT-base with a head
for classes, or a Llama in bfloat16 (by default that of TinyLlama's configuration: 1.1 billion
parameters). Each goes through a Recorder, ``measure``, ``analyze``, an export and a verified
analysis of it (on half of the samples, of which that takes 32, and without a limit of time), a cut
of a share of the units of every group (refitted, where ``measure`` kept what that takes), and its
undoing. What the network answers is taken for right. Each step is told in CPU seconds, in plain
forward and backward passes over the same samples, and by the most memory that it held beyond what
was held before it. The Llama is neither refitted nor verified: statistics and a second copy have no
room beside it. Prints figures, asserts nothing.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from elesh.analysis import analyze
from elesh.program.network_verifier import NetworkVerifier
from elesh.settings import Settings
from elesh.trainer import Recorder, Surgeon
from elesh.trainer.export import Exporter, calibration_inputs

from .billion import Peak, resident

VOCABULARY = 30_000
"""Tokens that every vocabulary has."""


def resnet50(asked: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The network and images."""
    from torchvision.models import resnet50 as build

    return build(weights=None), torch.randn(asked.samples, 3, asked.pixels, asked.pixels)


def bert(asked: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """BERT-base (110 million parameters) with ten classes, and sequences."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_labels=10)), sequences(asked)


def llama(asked: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """A Llama of this depth and width, with grouped queries, and sequences."""
    from transformers import LlamaConfig, LlamaForCausalLM

    blocks, width = asked.blocks, asked.width
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 512),
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config), sequences(asked)
    finally:
        torch.set_default_dtype(before)


def sequences(asked: argparse.Namespace) -> Tensor:
    """[samples, tokens] drawn alike."""
    return torch.randint(VOCABULARY, (asked.samples, asked.tokens))


NETS = {"resnet50": resnet50, "bert": bert, "llama": llama}


class Logits(nn.Module):
    """A network of transformers that returns its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, T] to logits."""
        return torch.as_tensor(self.network(input_ids=input_ids).logits)


@contextmanager
def told(step: str, plain: float = 0.0) -> Iterator[None]:
    """Print what the block took."""
    gc.collect()
    held, begun = resident()[0], time.process_time()
    with Peak() as peak:
        yield
    spent = time.process_time() - begun
    passes = f"{spent / plain:6.1f} passes" if plain else " " * 13
    most, left = (peak.anonymous - held) / 1e9, (resident()[0] - held) / 1e9
    print(
        f"{step:24} {spent:7.1f} s {passes}  at most {most:5.2f} GB more, {left:5.2f} stay",
        flush=True,
    )


def plain_pass(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """CPU seconds of forward and backward passes over all samples, gradients of all weights."""
    begun = time.process_time()
    for inputs, _ in batches:
        model(inputs).float().sum().backward()
        for parameter in model.parameters():
            parameter.grad = None
    return time.process_time() - begun


@torch.no_grad()
def answered(model: nn.Module, inputs: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches with what the network answers as labels. Random weights answer one class to
    everything, so what they say on average is taken out of the last bias before."""
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    if last.bias is not None:
        last.bias -= torch.cat([model(part) for part in inputs.split(size)]).mean(0)
    return [(part, model(part).argmax(-1)) for part in inputs.split(size)]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=tuple(NETS), default="resnet50")
    parser.add_argument("--blocks", type=int, default=22, help="of the Llama")
    parser.add_argument("--width", type=int, default=2048, help="of the Llama")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--pixels", type=int, default=224, help="of an image")
    parser.add_argument("--tokens", type=int, default=128, help="of a sequence")
    parser.add_argument("--share", type=float, default=0.2, help="of every group, what is cut")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = NETS[asked.net](asked)
    llama, size = asked.net == "llama", 2 if asked.net == "llama" else 16
    model = (model if asked.net == "resnet50" else Logits(model)).eval()
    count = sum(p.numel() for p in model.parameters())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{count:,} parameters, {held / 1e9:.2f} GB; {len(inputs)} samples")
    batches = answered(model, inputs, size)
    with told("plain pass"):
        plain = plain_pass(model, batches)
    with told("recorder", plain):
        recorder = Recorder(model, inputs[:2])
    architecture = recorder.architecture
    with told("measure", plain):
        bundle = recorder.measure(batches, epoch=119, reconstruct=not llama)
    with told("analyse", plain):
        decision = analyze(bundle, Settings())
    print(f"decision: {decision.statistics.parameters_after:,} of the parameters left")
    if not llama:
        verified(model, bundle, batches, plain)
    covariance: Any = bundle.covariance
    del bundle, decision
    surgeon = Surgeon(model, architecture, restore_points=1)
    units = {
        group.name: list(range(int(asked.share * group.size)))
        for group in architecture.groups
        if group.prunable and int(asked.share * group.size)
    }
    state = {name: tensor.sum(dtype=torch.float64) for name, tensor in model.state_dict().items()}
    with told("cut", plain):
        surgeon.cut(units, reconstruct=covariance)
    left = sum(p.numel() for p in model.parameters())
    print(f"cut: {left:,} parameters left")
    with told("plain pass of the cut", plain):
        plain_pass(model, batches)
    with told("undo", plain):
        surgeon.undo()
    now = {name: tensor.sum(dtype=torch.float64) for name, tensor in model.state_dict().items()}
    print("as before" if now == state else "NOT as before")


def verified(
    model: nn.Module, bundle: Any, batches: list[tuple[Tensor, Tensor]], plain: float
) -> None:
    """Export the network and decide once more, as a worker does that measures its proposals."""
    middle = max(1, len(batches) // 2)
    held_out = [torch.cat(column) for column in zip(*batches[:middle], strict=True)]
    with told("export", plain):
        network = Exporter(model).export(
            bundle.architecture, (held_out[0], held_out[1]), calibration_inputs(batches[middle:])
        )
    bundle = replace(bundle, network=network)
    measuring = NetworkVerifier(bundle, Settings(), math.inf)
    with told("analyse and verify", plain):
        decision = analyze(bundle, Settings(), verify=measuring)
    found = decision.safety.verification
    why = "; ".join(f"{each.rung}: {each.reason}" for each in decision.fallbacks)
    how = f"not measured ({why})" if found is None else f"{found.measurements} measurements"
    print(f"decision: {decision.statistics.parameters_after:,} of the parameters left, {how}")


if __name__ == "__main__":
    main()
