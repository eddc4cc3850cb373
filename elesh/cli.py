"""The command line: one verb a capability, errors in one line with exit code 1."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.console import Console

from elesh.bus import Bus, BusUnavailable, server_url
from elesh.observe import setup_logging, setup_tracing, shutdown_tracing
from elesh.settings import Settings, SettingsError
from leyline import ContractError, Level

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Elesh says, at checkpoints of a training run, which parts of the network can be removed.",
)
breaker = typer.Typer(no_args_is_help=True, help="Circuit breakers, one a run and level.")
dead = typer.Typer(no_args_is_help=True, help="Messages that could not be served.")
app.add_typer(breaker, name="breaker")
app.add_typer(dead, name="dead")

T = TypeVar("T")
console = Console(highlight=False)
complaints = Console(stderr=True, highlight=False)

RedisOption = Annotated[
    str,
    typer.Option(
        "--redis",
        envvar="ELESH_REDIS_URL",
        show_envvar=True,
        help="Redis URL; without one, an embedded server that is found again.",
    ),
]
SettingsOption = Annotated[
    Path | None, typer.Option("--settings", envvar="ELESH_SETTINGS", help="Settings file (YAML).")
]
JsonLogs = Annotated[bool, typer.Option("--json-logs", help="Log lines as JSON.")]


@app.command()
def demo(
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs; default: the whole schedule.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of data, weights and batches.")] = 0,
    every: Annotated[int | None, typer.Option(min=1, help="Epochs between checkpoints.")] = None,
    redis: RedisOption = "",
    settings: SettingsOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
) -> None:
    """Train a real network on real digits under Elesh, from server to tables, on this machine."""
    from elesh.demo import Demo, run_demo  # torch: only where it is needed

    setup_logging(level="WARNING")
    raise typer.Exit(
        run_demo(Demo(epochs, workers, seed, redis, settings, json_file, every), console)
    )


@app.command()
def trainer(
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs; default: the whole schedule.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of data, weights and batches.")] = 0,
    every: Annotated[int | None, typer.Option(min=1, help="Epochs between checkpoints.")] = None,
    redis: RedisOption = "",
    settings: SettingsOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    run_id: Annotated[str, typer.Option(help="Name of the run; default: a new one.")] = "",
) -> None:
    """The simulated trainer alone; workers run elsewhere."""
    from elesh.demo import Demo, run_trainer

    setup_logging()
    plan = Demo(epochs, 0, seed, redis, settings, json_file, every, run_id)
    raise typer.Exit(run_trainer(plan, console))


@app.command()
def worker(
    redis: RedisOption = "",
    settings: SettingsOption = None,
    name: Annotated[str, typer.Option(help="Name of this worker; default: host and digits.")] = "",
    json_logs: JsonLogs = False,
) -> None:
    """Serve checkpoints until SIGTERM, which drains."""
    from elesh.worker import serve

    setup_logging("json" if json_logs else "plain")
    loaded = Settings.load(settings)

    async def run() -> None:
        async with server_url(redis or loaded.bus.url) as url:
            await serve(url, loaded, name)

    setup_tracing("elesh-worker", name or f"pid-{os.getpid()}")
    try:
        asyncio.run(run())
    finally:
        shutdown_tracing()


@app.command()
def analyze(
    folder: Annotated[Path, typer.Argument(help="A checkpoint bundle that a Recorder saved.")],
    settings: SettingsOption = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as JSON.")] = False,
    level: Annotated[Level, typer.Option(help="What may be removed.")] = Level.CHANNEL,
) -> None:
    """Decide on a saved checkpoint, without any bus."""
    from elesh import CheckpointBundle
    from elesh import analyze as decide
    from elesh.explanation import print_decision

    decision = decide(
        CheckpointBundle.load(folder),
        settings=Settings.load(settings),
        level=level,
        threads=threads,
    )
    if as_json:
        console.print_json(decision.model_dump_json())
    else:
        print_decision(console, decision)


@app.command()
def explain(
    what: Annotated[str, typer.Argument(help="The key of a decision, or a bundle's folder.")],
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Say why a decision is as it is: targets, scores, partners, what was spared, gates."""
    from elesh.explanation import print_decision

    if Path(what).is_dir():
        analyze(Path(what), settings, threads=1)
        return
    from elesh.replay import recorded_decision
    from leyline import IdempotencyKey

    key = IdempotencyKey.parse(what)
    decision = _on_bus(redis, settings, lambda bus, _: recorded_decision(bus, key))
    if decision is None:
        _fail(f"{what}: no decision is recorded for this key")
    print_decision(console, decision)


@app.command()
def replay(
    key: Annotated[
        str, typer.Argument(help="Key of a decision; empty: all that is selected.")
    ] = "",
    run: Annotated[str, typer.Option(help="Only this run.")] = "",
    epoch: Annotated[int | None, typer.Option(help="Only this epoch.")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show every field that differs.")] = False,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Analyse recorded events again, publish nothing, and compare with what was decided."""
    from elesh.explanation import print_replayed
    from elesh.replay import Selection
    from elesh.replay import replay as replay_events

    async def run_all(bus: Bus, loaded: Settings) -> tuple[int, int]:
        total = same = 0
        async for item in replay_events(bus, loaded, Selection(key, run, epoch)):
            print_replayed(console, item, loaded, diff=diff)
            total, same = total + 1, same + item.identical
        return total, same

    total, same = _on_bus(redis, settings, run_all)
    if not total:
        _fail("nothing was selected that is still in the streams")
    console.print(f"{same} of {total} bit-identical")
    raise typer.Exit(0 if same == total else 1)


@breaker.command("show")
def breaker_show(redis: RedisOption = "", settings: SettingsOption = None) -> None:
    """All breakers that ever counted a failure."""
    from elesh.explanation import breaker_table

    views = _on_bus(redis, settings, lambda bus, _: bus.breakers.show())
    console.print(breaker_table(views) if views else "no breaker has counted a failure")


@breaker.command("reset")
def breaker_reset(
    run: Annotated[str, typer.Argument(help="The run.")],
    level: Annotated[Level, typer.Argument(help="The level.")] = Level.CHANNEL,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Close a breaker and forget its failures."""
    _on_bus(redis, settings, lambda bus, _: bus.breakers.reset(run, level))
    console.print(f"breaker of {run} at level {level.value}: closed")


@breaker.command("trip")
def breaker_trip(
    run: Annotated[str, typer.Argument(help="The run.")],
    level: Annotated[Level, typer.Argument(help="The level.")] = Level.CHANNEL,
    reason: Annotated[str, typer.Option(help="Why; shown in every rejected decision.")] = "by hand",
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Open a breaker: nothing of this level is approved until it is reset or recovers."""
    _on_bus(redis, settings, lambda bus, _: bus.breakers.trip(run, level, reason))
    console.print(f"breaker of {run} at level {level.value}: open ({reason})")


@dead.command("list")
def dead_list(redis: RedisOption = "", settings: SettingsOption = None) -> None:
    """Every dead letter: where it stood, the class of error, and the reason."""
    from elesh.explanation import dead_letters, dead_table

    letters = _on_bus(redis, settings, lambda bus, _: dead_letters(bus))
    console.print(dead_table(letters) if letters else "no dead letters")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the settings."""
    console.print_json(json.dumps(Settings.model_json_schema()))


def _on_bus(
    redis: str, settings: Path | None, action: Callable[[Bus, Settings], Awaitable[T]]
) -> T:
    """Run ``action`` with a bus that is closed afterwards."""
    loaded = Settings.load(settings)

    async def run() -> T:
        async with server_url(redis or loaded.bus.url) as url:
            bus = await Bus.connect(url, loaded.bus, loaded.breaker)
            try:
                return await action(bus, loaded)
            finally:
                await bus.close()

    return asyncio.run(run())


def _fail(reason: str) -> NoReturn:
    complaints.print(f"[red]error:[/] {reason}", soft_wrap=True)
    raise typer.Exit(1)


def main() -> None:
    """Run the command line; expected errors are one line on standard error and exit code 1."""
    try:
        app()
    except (SettingsError, ContractError, BusUnavailable, FileNotFoundError) as error:
        complaints.print(f"[red]error:[/] {error}", soft_wrap=True, markup=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
