"""``elesh profile``: what a network's layers take on this machine, as a table for budgets."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from elesh.operate.tables import compact

from .common import console, fail

app = typer.Typer()


@app.command()
def profile(
    target: Annotated[
        str, typer.Argument(help="module:callable that gives the network, e.g. mine.nets:build.")
    ],
    shape: Annotated[str, typer.Option(help="Shape of one batch of inputs, e.g. 1,3,224,224.")],
    out: Annotated[Path, typer.Option(help="Where the table goes (JSON).")] = Path("latency.json"),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of measurement.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU.")] = 1,
) -> None:
    """Measure each layer at several sizes on this machine, for budgets of latency."""
    import torch

    from elesh.trainer import Recorder
    from elesh.trainer.latency import channel_step, measure_latency

    torch.set_num_threads(threads)
    model = _built(target)
    inputs = torch.randn(*_sizes(shape))
    recorder = Recorder(model, inputs)
    with console.status("measuring"):
        table = measure_latency(model, inputs, recorder.architecture, rounds=rounds)
    out.write_text(table.model_dump_json(indent=1))
    figures = ("microseconds", "at the smallest size")
    shown = compact("layer", *figures, figures=figures, title=table.device)
    for layer in sorted(table.layers, key=lambda layer: -layer.seconds[-1])[:20]:
        shown.add_row(
            layer.layer, f"{layer.seconds[-1] * 1e6:.1f}", f"{layer.seconds[0] * 1e6:.1f}"
        )
    console.print(shown)
    console.print(f"{table.total_seconds * 1e6:.1f} microseconds in all; table in {out}")
    step = channel_step(inputs.device)
    console.print(f"this device computes {step} channels at once: round_to: {step} wastes none")


def _built(target: str) -> Any:
    module, _, name = target.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # a program's own folder stands there, not the caller's
    try:
        return getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        fail(f"{target}: expected module:callable without arguments: {error}")


def _sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        fail(f"--shape {text}: expected whole numbers with commas, for example 1,3,224,224")
