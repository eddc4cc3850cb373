"""What a checkpoint of a large network costs: record, measure, analyse, cut.

    python -m benchmarks.speed.large [--limit SECONDS] [resnet50 bert llama]

Random weights. Every network in a process of its own, one thread; every step's processor time, and
by how much it raised the process's peak memory; ``pass`` is one forward and backward pass of the
same samples. Results are lines of JSON in ``--out``; a network that has one is not measured again.
Nothing is verified: answers of random weights prove nothing. ``llama`` is measured without
reconstruction: the second moments of what enters its readers would take 20 GB. Needs torchvision
and transformers.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from elesh.analysis import analyze
from elesh.settings import Settings
from elesh.trainer import Recorder, Surgeon
from leyline import CheckpointBundle, Level

T = TypeVar("T")
_SHARE = 0.1
"""Of the units, that go."""


def resnet50() -> tuple[nn.Module, Tensor, Tensor]:
    """ResNet-50 on eight pictures of 224 x 224."""
    model = import_module("torchvision.models").resnet50()
    return model, torch.randn(8, 3, 224, 224), torch.arange(8)


def bert() -> tuple[nn.Module, Any, Tensor]:
    """BERT-base as a classifier of eight texts of 128 tokens."""
    library = import_module("transformers")
    model = library.BertForSequenceClassification(library.BertConfig())
    return model, _text(30522, 128), torch.arange(8) % 2


def llama() -> tuple[nn.Module, Any, Tensor]:
    """A decoder of a billion parameters on eight texts of 32 tokens."""
    library = import_module("transformers")
    config = library.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=20,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
    )
    inputs = _text(config.vocab_size, 32)
    return library.LlamaForCausalLM(config), inputs, inputs["input_ids"]


def _text(words: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, words, (8, length))}


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any, Tensor]]] = {
    "resnet50": resnet50,
    "bert": bert,
    "llama": llama,
}
"""By the name on the command line."""


class Steps:
    """Time and memory of one step after another."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    def of(self, name: str, work: Callable[[], T]) -> T:
        """Do it and write down what it took."""
        gc.collect()
        before, begun = _peak(), time.process_time()
        result = work()
        self.found[name] = {
            "seconds": time.process_time() - begun,
            "peak_mb_more": (_peak() - before) / 1e6,
        }
        print(name, self.found[name], file=sys.stderr, flush=True)
        return result


def _peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(name: str) -> dict[str, Any]:
    """All steps of one network."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs, labels = NETWORKS[name]()
    model.eval()
    steps, refit = Steps(), name != "llama"
    own = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    steps.of("pass", lambda: _pass(model, inputs, labels))
    recorder = steps.of("record", lambda: Recorder(model, inputs))
    batches = [(inputs, labels)]
    bundle: CheckpointBundle = steps.of(
        "measure", lambda: recorder.measure(batches, epoch=119, reconstruct=refit, ahead=0)
    )
    settings = Settings.model_validate(
        {
            "structured_pruning": {
                "safety_schedule": {"aggressive_limit": _SHARE},
                "channel_analysis": {"max_predicted_shift": 1e9, "safety_margin": 0.0},
            },
            "verification": {"rounds": 1},
        }
    )
    free = replace(bundle, levels=(Level.CHANNEL,))
    plan = steps.of("analyse", lambda: analyze(free, settings))
    units = plan.units or _first(bundle)
    surgeon = steps.of("surgeon", lambda: Surgeon(model, recorder.architecture, restore_points=0))
    covariance = getattr(bundle, "covariance", None)
    steps.of("cut", lambda: surgeon.cut(units, reconstruct=covariance))
    with torch.no_grad():
        _called(model, inputs)
    return {
        "name": name,
        "parameters": recorder.architecture.parameters,
        "weights_mb": own,
        "units": sum(map(len, units.values())),
        "chosen_by": "ours" if plan.units else "place",
        "outcome": plan.rejection_reason,
        "steps": steps.found,
        "torch": torch.__version__,
    }


def _called(model: nn.Module, inputs: Any) -> Any:
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found.logits if hasattr(found, "logits") else found


def _pass(model: nn.Module, inputs: Any, labels: Tensor) -> None:
    logits = _called(model, inputs)
    loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)


def _first(bundle: CheckpointBundle) -> dict[str, list[int]]:
    """A tenth of every group's units: random weights may leave nothing to choose."""
    groups = [group for group in bundle.architecture.groups if group.prunable]
    counts = {g.name: int(_SHARE * g.size) // g.unit_multiple * g.unit_multiple for g in groups}
    return {name: list(range(count)) for name, count in counts.items() if count}


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(NETWORKS))
    parser.add_argument("--limit", type=float, default=900, help="seconds for one network")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measured(asked.names[0])))
        return
    known = asked.out.read_text().splitlines() if asked.out.exists() else []
    for name in asked.names:
        if name in {json.loads(line)["name"] for line in known}:
            continue
        command = [sys.executable, "-m", "benchmarks.speed.large", "--one", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=asked.limit, check=True)
        with asked.out.open("ab") as file:
            file.write(done.stdout.strip().splitlines()[-1] + b"\n")


if __name__ == "__main__":
    main()
