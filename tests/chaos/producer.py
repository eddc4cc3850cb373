"""A producer of the chaos driver: publishes small checkpoints and notes what was acknowledged.

Each line of the note file is an event that the server said it has; the audit holds it to that.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from dataclasses import replace
from itertools import count
from pathlib import Path

from head_networks import checkpoint as heads_checkpoint
from head_networks import transformer
from station import checkpoint, ready

from elesh.bus import Bus, until_available
from elesh.settings import BusSettings
from leyline import CheckpointBundle, Level
from leyline.streams import CHECKPOINTS


def main() -> None:
    """Publish until killed."""
    parser = argparse.ArgumentParser()
    for name in ("--url", "--partition", "--name", "--acknowledged"):
        parser.add_argument(name, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--pause", type=float, required=True)
    parser.add_argument("--slow", type=float, required=True)
    asyncio.run(_publish(parser.parse_args()))


async def _publish(options: argparse.Namespace) -> None:
    chance = random.Random(f"{options.seed}:{options.name}")
    bus = await Bus.connect_when_available(options.url, BusSettings(partition=options.partition))
    assert bus is not None
    single, joint = _bundles()
    with Path(options.acknowledged).open("a") as notes:  # noqa: ASYNC230 - a line now and then
        for number in count():
            bundle = joint if chance.random() < 0.2 else single
            note = chance.choices(["", f"sleep {options.slow}", "die", "raise"], [960, 15, 15, 10])[
                0
            ]
            made = _named(bundle, f"{options.name}-{number}", note)
            for copy in range(2 if chance.random() < 0.1 else 1):
                event_id = f"{options.name}-{number}-{copy}"
                await until_available(lambda m=made, e=event_id: _send(bus, m, e))
                notes.write(event_id + "\n")
                notes.flush()
            await asyncio.sleep(chance.uniform(0.5, 1.5) * options.pause)


def _bundles() -> tuple[CheckpointBundle, CheckpointBundle]:
    """One checkpoint that asks for channels, and one that asks for channels and heads."""
    whole = heads_checkpoint(transformer(8))
    return checkpoint(), replace(whole, levels=(Level.CHANNEL, Level.HEAD))


def _named(bundle: CheckpointBundle, name: str, note: str) -> CheckpointBundle:
    metadata = bundle.metadata.model_copy(update={"checkpoint_id": f"ck-{name}", "note": note})
    return replace(bundle, metadata=metadata)


async def _send(bus: Bus, bundle: CheckpointBundle, event_id: str) -> None:
    event = await ready(bus, bundle)
    await bus.publish(
        CHECKPOINTS,
        event,
        source="chaos",
        event_id=event_id,
        run_id=bundle.metadata.run_id,
        epoch=bundle.metadata.epoch,
    )


if __name__ == "__main__":
    main()
