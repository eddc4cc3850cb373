"""Commands that run something: the demo, the simulated trainer, a worker; and sizing of a fleet."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from elesh.bus import server_url
from elesh.observe import setup_logging, setup_tracing, shutdown_tracing
from elesh.operate.sizing import Load, size, size_report
from elesh.operate.tables import compact
from elesh.settings import Settings, workers_needed

from .common import (
    AsJson,
    Epochs,
    Every,
    JsonFile,
    JsonLogs,
    RedisOption,
    Seed,
    SettingsOption,
    console,
    fail,
    print_json,
)

app = typer.Typer()
_LONGEST_NAME = 128


@app.command()
def demo(
    epochs: Epochs = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    seed: Seed = 0,
    every: Every = None,
    redis: RedisOption = "",
    settings: SettingsOption = None,
    json_file: JsonFile = None,
    fail: Annotated[
        int, typer.Option(min=0, help="Corrupt the first N checkpoints, to see the breaker open.")
    ] = 0,
    with_console: Annotated[
        bool, typer.Option("--console", help="Serve the web console beside it.")
    ] = False,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Prune at once instead, without a server: macs=0.3, parameters=0.5."),
    ] = None,
) -> None:
    """Train a small network on digits under Elesh: server, workers, cuts, result tables."""
    from elesh.demo import Demo, run_budget, run_demo  # torch: only where it is needed

    setup_logging(level="WARNING")
    if budget:
        shares = dict(map(_share, budget))
        code = run_budget(shares, console, epochs=epochs, seed=seed, json_file=json_file)
        raise typer.Exit(code)
    plan = Demo(
        epochs,
        workers,
        seed,
        redis,
        settings,
        json_file,
        every,
        fail=fail,
        provoked=epochs is None and settings is None,
        console=with_console,
    )
    raise typer.Exit(run_demo(plan, console))


def _share(given: str) -> tuple[str, float]:
    """A resource and the share of it that may be left, from ``macs=0.3``."""
    name, _, share = given.partition("=")
    try:
        return name, float(share)
    except ValueError:
        raise typer.BadParameter(f"{given!r} is not like macs=0.3", param_hint="--budget") from None


@app.command()
def trainer(
    epochs: Epochs = None,
    seed: Seed = 0,
    every: Every = None,
    redis: RedisOption = "",
    settings: SettingsOption = None,
    json_file: JsonFile = None,
    run_id: Annotated[str, typer.Option(help="Name of the run; default: a new one.")] = "",
) -> None:
    """Run only the simulated trainer; workers run elsewhere."""
    from elesh.demo import Demo, run_trainer

    setup_logging()
    plan = Demo(epochs, 0, seed, redis, settings, json_file, every, run_id)
    raise typer.Exit(run_trainer(plan, console))


@app.command()
def worker(
    redis: RedisOption = "",
    settings: SettingsOption = None,
    name: Annotated[
        str, typer.Option(help="Name of this worker; default: host name and digits.")
    ] = "",
    json_logs: JsonLogs = False,
    end_with_input: Annotated[
        bool, typer.Option(help="Drain at the end of standard input, too.", hidden=True)
    ] = False,
) -> None:
    """Analyse checkpoints until SIGTERM, then drain."""
    from elesh.worker import serve, worker_name

    if end_with_input:
        threading.Thread(target=_drain_at_end_of_input, daemon=True).start()
    setup_logging("json" if json_logs else "plain")
    if len(name) > _LONGEST_NAME or not name.isprintable():
        fail(f"--name: expected at most {_LONGEST_NAME} printable characters")
    loaded, known_as = Settings.load(settings), name or worker_name()

    async def run() -> None:
        async with server_url(redis or loaded.bus.url) as url:
            await serve(url, loaded, known_as)

    setup_tracing("elesh-worker", known_as, loaded.observe)
    try:
        asyncio.run(run())
    finally:
        shutdown_tracing()


def _drain_at_end_of_input() -> None:
    """The other end of the pipe is closed by the process that started this one, or by its end."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


@app.command()
def plan(
    parameters: Annotated[int, typer.Argument(min=1, help="Parameters of the network.")],
    seconds: Annotated[
        float | None,
        typer.Option(min=1e-3, help="The checkpoint window; default: from the settings."),
    ] = None,
    levels: Annotated[int, typer.Option(min=1, help="Levels of analysis.")] = 3,
    rate: Annotated[int, typer.Option(min=1, help="Parameters a second a worker.")] = 500_000,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs that train; each gets its workers.")] = 0,
    runs: Annotated[int, typer.Option(min=0, help="Size a fleet for this many training runs.")] = 0,
    interval: Annotated[
        float, typer.Option(min=1e-3, help="With --runs: seconds between checkpoints of a run.")
    ] = 600.0,
    megabytes: Annotated[
        float, typer.Option(min=0, help="With --runs: megabytes of blobs a checkpoint.")
    ] = 10.0,
    analysis: Annotated[
        float, typer.Option(min=0, help="With --runs: seconds that a worker computes for one.")
    ] = 10.0,
    as_json: AsJson = False,
    settings: SettingsOption = None,
) -> None:
    """Say how many workers a network needs: W >= ceil(P / (R * T * L)). With --runs: servers,
    partitions, workers, memory and network for that many runs (docs/scaling.md)."""
    loaded = Settings.load(settings)
    window = loaded.window_seconds if seconds is None else seconds
    needed = workers_needed(parameters, rate, window, levels)
    wanted = max(needed, gpus * loaded.analysis_workers_per_gpu)
    if as_json:
        facts: dict[str, object] = {"workers": wanted, "by_size": needed, "window_seconds": window}
        if runs:
            facts["fleet"] = asdict(size(Load(runs, interval, megabytes, analysis), loaded.bus))
        print_json(facts)
        return
    console.print(f"{wanted} worker{'s' if wanted > 1 else ''}")
    if runs:
        load = Load(runs, interval, megabytes, analysis)
        console.print(size_report(load, size(load, loaded.bus)), highlight=False)
    if wanted > needed:
        each = loaded.analysis_workers_per_gpu
        console.print(
            f"{needed} by size; {each} for each of {gpus} GPUs (analysis_workers_per_gpu)"
        )


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
    """Time each layer at several sizes on this machine, for latency budgets."""
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
