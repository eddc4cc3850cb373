"""Commands about decisions: make one from a folder, explain one, replay recorded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elesh.bus import Bus
from elesh.observe import setup_tracing
from elesh.settings import Settings
from leyline import Level

from .common import RedisOption, SettingsOption, console, fail, on_bus

app = typer.Typer()


@app.command()
def analyze(
    folder: Annotated[Path, typer.Argument(help="A checkpoint bundle that a Recorder saved.")],
    settings: SettingsOption = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as JSON.")] = False,
    level: Annotated[
        Level | None, typer.Option(help="What may be removed; default: what the checkpoint asks.")
    ] = None,
) -> None:
    """Decide on a saved checkpoint, without any bus."""
    from elesh import CheckpointBundle
    from elesh import analyze as decide
    from elesh.explanation import print_decision
    from elesh.verification import verifier

    bundle = CheckpointBundle.load(folder)
    loaded = Settings.load(settings)
    verify = verifier(bundle, loaded)
    decision = decide(bundle, settings=loaded, level=level, threads=threads, verify=verify)
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
    decision = on_bus(redis, settings, lambda bus, _: recorded_decision(bus, key))
    if decision is None:
        fail(f"{what}: no decision is recorded for this key")
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
        setup_tracing("elesh-replay", run or key or "all", loaded.observe)
        total = same = 0
        async for item in replay_events(bus, loaded, Selection(key, run, epoch)):
            print_replayed(console, item, loaded, diff=diff)
            total, same = total + 1, same + item.identical
        return total, same

    total, same = on_bus(redis, settings, run_all)
    if not total:
        fail("nothing was selected that is still in the streams")
    console.print(f"{same} of {total} bit-identical")
    raise typer.Exit(0 if same == total else 1)
