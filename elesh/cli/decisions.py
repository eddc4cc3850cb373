"""Commands about decisions: make one from a folder, explain one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elesh.observe.terminal import escape
from elesh.settings import Settings
from leyline import Level

from .common import AsJson, RedisOption, SettingsOption, console, fail, on_bus, print_json, working

app = typer.Typer()


@app.command()
def analyze(
    folder: Annotated[Path, typer.Argument(help="A checkpoint bundle that a Recorder saved.")],
    settings: SettingsOption = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: AsJson = False,
    level: Annotated[
        Level | None, typer.Option(help="What may be removed; default: what the checkpoint asks.")
    ] = None,
) -> None:
    """Decide on a saved checkpoint, without any bus."""
    from elesh import CheckpointBundle
    from elesh import analyze as decide
    from elesh.operate.explain import print_decision
    from elesh.program import verifier

    bundle = CheckpointBundle.load(folder)
    loaded = Settings.load(settings)
    verify = verifier(bundle, loaded)
    with working("analysing"):
        decision = decide(bundle, settings=loaded, level=level, threads=threads, verify=verify)
    if as_json:
        print_json(decision.model_dump(mode="json"))
    else:
        print_decision(console, decision, bundle)


@app.command()
def explain(
    what: Annotated[str, typer.Argument(help="The key of a decision, or a bundle's folder.")],
    every: Annotated[
        bool, typer.Option("--all", help="Every unit, gate and reason, not just a screenful.")
    ] = False,
    as_json: AsJson = False,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Say why a decision is as it is: targets, scores, partners, units kept, gates."""
    from elesh.operate.explain import print_decision

    if Path(what).is_dir():
        analyze(Path(what), settings, as_json=as_json)
        return
    from elesh.operate.decision_context import decision_context
    from leyline import IdempotencyKey

    key = IdempotencyKey.parse(what)
    found = on_bus(redis, settings, lambda bus, loaded: decision_context(bus, loaded, key))
    if found is None:
        fail(f"{what}: no decision is recorded for this key")
    if as_json:
        print_json(found.decision.model_dump(mode="json"))
        return
    print_decision(console, found.decision, found.bundle, found.tracker, whole=every)
    if found.missing:
        console.print(f"  without the checkpoint's own figures: {escape(found.missing)}")
