"""The command line: one verb a capability, errors in one line with exit code 1."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from elesh.bus import Bus, BusUnavailable, server_url
from elesh.observe import setup_logging, setup_tracing, shutdown_tracing
from elesh.settings import Settings, SettingsError, workers_needed
from leyline import ContractError, Level
from leyline.streams import STREAMS

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Elesh says, at checkpoints of a training run, which parts of the network can be removed.",
)
breaker = typer.Typer(no_args_is_help=True, help="Circuit breakers, one a run and level.")
dead = typer.Typer(no_args_is_help=True, help="Messages that could not be served.")
config = typer.Typer(no_args_is_help=True, help="Settings: what is in force, and what can be.")
app.add_typer(breaker, name="breaker")
app.add_typer(dead, name="dead")
app.add_typer(config, name="config")

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
Epochs = Annotated[
    int | None, typer.Option(min=1, help="Epochs; default: the whole schedule and four more.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of data, weights and batches.")]
Every = Annotated[int | None, typer.Option(min=1, help="Epochs between checkpoints.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]
JsonLogs = Annotated[bool, typer.Option("--json-logs", help="Log lines as JSON.")]


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
        int, typer.Option(min=0, help="Spoil the first N checkpoints, to watch the breaker.")
    ] = 0,
) -> None:
    """Train a real network on real digits under Elesh, from server to tables, on this machine."""
    from elesh.demo import Demo, run_demo  # torch: only where it is needed

    setup_logging(level="WARNING")
    plan = Demo(epochs, workers, seed, redis, settings, json_file, every, fail=fail)
    raise typer.Exit(run_demo(plan, console))


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

    bundle = CheckpointBundle.load(folder)
    decision = decide(bundle, settings=Settings.load(settings), level=level, threads=threads)
    if as_json:
        console.print_json(decision.model_dump_json())
    else:
        print_decision(console, decision, bundle)


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
    run: Annotated[str, typer.Argument(help="The run; without one, every breaker.")] = "",
    level: Annotated[Level, typer.Argument(help="The level.")] = Level.CHANNEL,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Close breakers and forget their failures."""

    async def reset(bus: Bus, _: Settings) -> list[tuple[str, Level]]:
        known = [(view.run_id, view.level) for view in await bus.breakers.show()]
        chosen = [(run, level)] if run else known
        for each in chosen:
            await bus.breakers.reset(*each)
        return chosen

    for name, which in _on_bus(redis, settings, reset):
        console.print(f"breaker of {name} at level {which.value}: closed")


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
def events(
    stream: Annotated[str, typer.Option(help="Only this stream, by its short name.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Print what is in the streams, oldest first, one line an event."""
    from elesh.explanation import event_lines

    known = {each.name: each for each in STREAMS}
    if stream and stream not in known:
        _fail(f"--stream {stream}: expected one of {', '.join(known)}")
    chosen = [known[stream]] if stream else list(STREAMS)

    async def run(bus: Bus, _: Settings) -> None:
        async for line in event_lines(bus, chosen, follow=follow):
            console.print(line, soft_wrap=True)

    with contextlib.suppress(KeyboardInterrupt):
        _on_bus(redis, settings, run)


@app.command()
def plan(
    parameters: Annotated[int, typer.Argument(min=1, help="Parameters of the network.")],
    seconds: Annotated[float, typer.Option(help="The checkpoint window.")] = 300.0,
    levels: Annotated[int, typer.Option(min=1, help="Levels of analysis.")] = 3,
    rate: Annotated[int, typer.Option(min=1, help="Parameters a second a worker.")] = 500_000,
) -> None:
    """Say how many workers a network needs: W >= ceil(P / (R * T * L))."""
    console.print(f"{workers_needed(parameters, rate, seconds, levels)} workers")


@config.command("show")
def config_show(settings: SettingsOption = None) -> None:
    """Print every setting in force: file, environment and defaults together."""
    console.print_json(Settings.load(settings).model_dump_json())


@config.command("check")
def config_check(file: Annotated[Path, typer.Argument(help="A settings file.")]) -> None:
    """Say whether a settings file can be used; every complaint names line and key."""
    Settings.load(file)
    console.print(f"{file}: ok", soft_wrap=True)


@config.command("schema")
def config_schema() -> None:
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
    complaints.print(f"[red]error:[/] {escape(reason)}", soft_wrap=True)
    raise typer.Exit(1)


def main() -> None:
    """Run the command line; expected errors are one line on standard error and exit code 1."""
    try:
        app()
    except FileNotFoundError as error:
        complaints.print(f"[red]error:[/] {error.filename}: there is no such file", soft_wrap=True)
        raise SystemExit(1) from None
    except (SettingsError, ContractError, BusUnavailable) as error:
        complaints.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
