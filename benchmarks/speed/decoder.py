"""Time and memory to record, measure, analyse and cut a decoder of a billion parameters.

    python -m benchmarks.speed.decoder [--blocks 22] [--width 2048] [--samples 8] [--tokens 32]

A Llama with random weights in bfloat16 (by default that of TinyLlama's configuration: 1.1 billion
parameters) goes through a Recorder, ``measure``, ``analyze``, a cut of a share of the units of
every group, and its undoing; each step is told in CPU seconds, in plain forward and backward
passes of the same two sequences, and by the most memory that it held beyond what was held before
it. Needs transformers. Prints figures, asserts nothing.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from elesh.analysis import analyze
from elesh.settings import Settings
from elesh.trainer import Recorder, Surgeon

from .billion import Peak, resident

VOCABULARY = 32000


def decoder(blocks: int, width: int) -> nn.Module:
    """A Llama of this depth and width, with grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
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
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


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


def plain_pass(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """CPU seconds of a forward and backward pass, gradients of all weights."""
    begun = time.process_time()
    model(**batch).logits.float().sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return time.process_time() - begun


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.2, help="of every group, what is cut")
    parser.add_argument("--refit", action="store_true", help="measure for weight reconstruction")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = decoder(asked.blocks, asked.width)
    ids = torch.randint(VOCABULARY, (asked.samples, asked.tokens))
    batches = [({"input_ids": two}, two) for two in ids.split(2)]
    example = batches[0][0]
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {size / 1e9:.2f} GB")
    with told("plain pass"):
        plain = plain_pass(model, example)
    with told("recorder", plain):
        recorder = Recorder(model, example)
    architecture = recorder.architecture
    with told("measure", plain * len(batches)):
        bundle = recorder.measure(batches, epoch=120, reconstruct=asked.refit)
    with told("analyse", plain):
        decision = analyze(bundle, Settings())
    print(f"decision: {decision.statistics.parameters_after:,} of the parameters left")
    covariance = bundle.covariance
    del bundle, decision
    surgeon = Surgeon(model, architecture, restore_points=1)
    units = {
        group.name: list(range(int(asked.share * group.size)))
        for group in architecture.groups
        if group.prunable and int(asked.share * group.size)
    }
    state = {name: tensor.sum(dtype=torch.float64) for name, tensor in model.state_dict().items()}
    with told("cut", plain):
        surgeon.cut(units)
    left = sum(p.numel() for p in model.parameters())
    print(f"cut: {left:,} parameters left")
    with told("plain pass of the cut"):
        plain_pass(model, example)
    with told("undo", plain):
        surgeon.undo()
    now = {name: tensor.sum(dtype=torch.float64) for name, tensor in model.state_dict().items()}
    print("as before" if now == state else "NOT as before")
    del covariance


if __name__ == "__main__":
    main()
