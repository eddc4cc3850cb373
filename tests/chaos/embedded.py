"""A trainer and a worker of the chaos driver on an embedded server, whose owner is restarted.

Whoever of the two started the server owns it, and the server ends with its owner. The driver kills
or stops the owner; the other one has to find the server again, or start it. As a program this is
the trainer: it notes what it asks for and what it hears of, a line each, and a process that follows
a killed one asks again for what was not answered, as a training run does that goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import psutil
from station import checkpoint

from elesh.bus import Bus, EmbeddedServer
from elesh.settings import BusSettings, Settings
from elesh.trainer import Session
from leyline import CheckpointBundle

__all__ = ["PARTITION", "Embedded"]

PARTITION = "embedded"
_RUN = "embedded"
_POLL = 0.25


@dataclass(frozen=True)
class Embedded:
    """Where the two are, how they start, and what they said."""

    folder: Path

    def environment(self) -> Mapping[str, str]:
        """For both: no URL, and a state folder of their own."""
        known = {name: value for name, value in os.environ.items() if name != "ELESH_REDIS_URL"}
        return known | {"ELESH_STATE_DIR": str(self.folder), "OMP_NUM_THREADS": "1"}

    def trainer(self, pause: float) -> list[str]:
        """The trainer's command."""
        self.folder.mkdir(parents=True, exist_ok=True)
        module = [sys.executable, "-m", "tests.chaos.embedded"]
        return [*module, "--folder", str(self.folder), "--pause", str(pause)]

    def worker(self, name: str, settings: Path) -> list[str]:
        """The worker's command; of the settings only the partition is another."""
        module = [sys.executable, "-m", "elesh.cli", "worker"]
        return [*module, "--settings", str(settings), "--name", name]

    def restart_owner(self, processes: list[subprocess.Popen[bytes]], chance: random.Random) -> str:
        """Kill or stop whichever of these processes owns the server; which one, and how."""
        with suppress(OSError, ValueError, KeyError, psutil.NoSuchProcess):
            place = json.loads((self.folder / "redis" / "server.json").read_text())
            owner = psutil.Process(place["pid"]).ppid()
            for process in processes:
                if process.pid == owner:
                    number = chance.choice([signal.SIGKILL, signal.SIGTERM])
                    process.send_signal(number)
                    what = "worker" if "worker" in psutil.Process(owner).cmdline() else "trainer"
                    return f"{what} by {number.name}"
        return "(nobody)"

    def finish(self) -> None:
        """Have the trainer ask for nothing new."""
        (self.folder / "finish").touch()

    def bus(self) -> Bus:
        """The bus of the two; the driver owns the server if nobody else does."""
        url = EmbeddedServer(self.folder).lasting_url
        return Bus.open(url, BusSettings(partition=PARTITION, max_blob_bytes=1 << 30))

    def asked(self) -> frozenset[str]:
        """Keys that the trainer asked for."""
        return frozenset(str(bundle(int(n)).decision_key) for n in self._noted("asked"))

    def answered(self) -> frozenset[str]:
        """Keys that it heard the end of."""
        return frozenset(self._noted("heard"))

    def numbers(self) -> tuple[list[int], int]:
        """Checkpoints without an answer, and the number of the next new one."""
        asked = [int(number) for number in dict.fromkeys(self._noted("asked"))]
        heard = self.answered()
        left = [n for n in asked if str(bundle(n).decision_key) not in heard]
        return left, max(asked, default=-1) + 1

    def note(self, what: str, which: object) -> None:
        """Add a line to the notes."""
        with (self.folder / "notes").open("a") as notes:
            notes.write(f"{what} {which}\n")

    def _noted(self, what: str) -> Iterator[str]:
        file = self.folder / "notes"
        for line in file.read_text().splitlines() if file.exists() else ():
            kind, _, which = line.partition(" ")
            if kind == what and which:
                yield which


def bundle(number: int) -> CheckpointBundle:
    """The checkpoint of a number: the same from every process."""
    made = checkpoint()
    names = {"checkpoint_id": f"ck-{_RUN}-{number}", "run_id": _RUN}
    return replace(made, metadata=made.metadata.model_copy(update=names))


def main() -> None:
    """Publish and listen until killed; nothing new after ``finish``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--pause", type=float, required=True)
    options = parser.parse_args()
    here = Embedded(options.folder)
    settings = Settings(bus=BusSettings(partition=PARTITION))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    told: set[str] = set()
    with Session(_RUN, "", settings, restore_dir=options.folder / "points") as session:
        left, following = here.numbers()
        new = count(following)
        while left or not (options.folder / "finish").exists():
            number = left.pop(0) if left else next(new)
            here.note("asked", number)
            session.publish(bundle(number))
            _listen(here, session, options.pause, told)
        while True:
            _listen(here, session, _POLL, told)


def _listen(here: Embedded, session: Session, seconds: float, told: set[str]) -> None:
    end = time.monotonic() + seconds
    while (rest := end - time.monotonic()) > 0:
        session.wait(min(rest, _POLL))
        decided = [decision.idempotency_key for decision in session.decisions()]
        for key in {*decided, *session.failed} - told:
            here.note("heard", key)
            told.add(key)


if __name__ == "__main__":
    main()
