"""One real demo run, recorded once for all tests of all test processes that only look at it.

Its trainer waits for each checkpoint's decision, as that of any demo does: what is decided and
applied does not depend on how fast the machine is. The first checkpoint is spoiled, and one of the
two workers is killed while it holds an entry. As a script this is ``elesh`` with more patience and
a demo of fewer layers. ``ELESH_RECORDED=whole`` records the demo as users see it, by the document's
schedule: for pictures.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from collector import Collector, collecting
from command import Done, elesh, elesh_process
from shared import once
from station import Station

from elesh.bus import embedded_server
from leyline.streams import DECISIONS

PATIENCE = 700.0
WHOLE = os.environ.get("ELESH_RECORDED") == "whole"
EPOCHS, EVERY, SEED = (120, 10, 0) if WHOLE else (6, 1, 11)
_SCHEDULE = {
    "validation_epochs": 2,  # the first checkpoint is spoiled
    "conservative_epochs": 1,
    "moderate_epochs": 1,
    "aggressive_epochs": 1,
}
_SETTINGS: dict[str, Any] = {
    "bus": {"lease_seconds": 2.0},
    "observe": {"heartbeat_seconds": 0.2},
}
if not WHOLE:
    _SETTINGS |= {
        "structured_pruning": {"safety_schedule": _SCHEDULE},
        # So short a run is too unsteady for its accuracy to be judged.
        "trainer": {"watch_epochs": 0},
    }


@dataclass(frozen=True)
class Recorded:
    """A finished demo: its figures, traces and output, and a server with all that it left."""

    url: str
    settings: Path
    """What trainer and workers were told."""
    home: Path
    """Where the run kept its spans; looked for under ``ELESH_STATE_DIR``."""
    figures: dict[str, Any]
    collector: Collector
    output: str

    @property
    def run_id(self) -> str:
        return str(self.figures["run_id"])

    @property
    def environment(self) -> dict[str, str]:
        """For commands that shall look at this run."""
        return {"ELESH_REDIS_URL": self.url, "ELESH_STATE_DIR": str(self.home)}

    def elesh(self, *arguments: str) -> Done:
        """A command that looks at this run."""
        return elesh(*arguments, environment=self.environment)


@contextmanager
def recorded_run(own: Path) -> Iterator[Recorded]:
    """The run that the first to ask makes, on a server of one's own.

    Args:
        own: an empty folder of this process: what it does to the server, no other one sees.
    """
    folder = once("recorded", _record)
    shutil.copytree(folder / "server", own / "server")
    collector = Collector()
    collector.spans = pickle.loads((folder / "spans.pickle").read_bytes())
    with embedded_server(own / "server") as url:
        yield Recorded(
            url,
            folder / "settings.yaml",
            folder / "home",
            json.loads((folder / "out.json").read_text()),
            collector,
            (folder / "output.txt").read_text(),
        )


def small_demo(*arguments: str, environment: Mapping[str, str]) -> Done:
    """``elesh demo`` with half of its layers, on its own."""
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return elesh_process("demo", *arguments, environment=paths | dict(environment), of=(__file__,))


def _record(folder: Path) -> None:
    (folder / "settings.yaml").write_text(yaml.safe_dump({"elesh": _SETTINGS}))
    command = [
        sys.executable, __file__, "demo", "--epochs", str(EPOCHS), "--every", str(EVERY),
        "--seed", str(SEED), "--workers", "2", "--fail", "1", "--console",
        "--settings", str(folder / "settings.yaml"),
        "--json", str(folder / "out.json"),
    ]  # fmt: skip
    with (
        embedded_server(folder / "server") as url,
        collecting() as collector,
        (folder / "output.txt").open("w") as output,
    ):
        environment = os.environ | {
            "ELESH_REDIS_URL": url,
            "ELESH_STATE_DIR": str(folder / "home"),
            "ELESH_CONSOLE__PORT": "0",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        demo = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            _kill_one_at_work(Station(url, "main", folder), demo)
            code = demo.wait(800)
        finally:
            demo.kill()
            demo.wait()
        assert code == 0, (folder / "output.txt").read_text()
        spans = list(collector.spans)
    (folder / "spans.pickle").write_bytes(pickle.dumps(spans))


def _kill_one_at_work(station: Station, demo: subprocess.Popen[bytes]) -> None:
    """Kill a worker, with its child, while it analyses something."""

    def on_its_way() -> bool:
        return demo.poll() is not None or len(station.read(DECISIONS)) >= 2

    station.wait_for(on_its_way, "the run to be on its way", PATIENCE)
    if demo.poll() is not None:
        return
    states = station.on_bus(lambda bus: bus.registry.workers())
    workers = {state.pid: psutil.Process(state.pid) for state in states}
    children = {pid: worker.children()[0] for pid, worker in workers.items()}
    for child in children.values():
        child.suspend()  # whoever takes the next checkpoint does not finish it

    def at_work() -> int | None:
        """The worker that has a checkpoint. Its child is stopped: an entry that it has held for so
        long, it cannot have settled; and what it had to say of it so far would be out, since
        batches of spans wait half a second."""
        states = station.on_bus(lambda bus: bus.registry.workers())
        held = (s for s in states if s.key and s.child == "wedged" and time.time() - s.since > 3)
        return next((state.pid for state in held), None)

    pid = station.wait_for(at_work, "a worker to be at work", PATIENCE)
    workers.pop(pid).kill()
    for pid in workers:
        children[pid].resume()


def _main() -> None:
    """``elesh``, whose demo is as patient as these tests and has half of its layers."""
    import elesh.demo.run as demo
    import elesh.demo.training as training
    from elesh.cli import main
    from elesh.demo.network import DigitsNet

    demo._ANSWER_SECONDS = PATIENCE
    smaller = {} if WHOLE else {"blocks": (2, 1), "layers": 1}
    training.DigitsNet = lambda **asked: DigitsNet(**asked | smaller)  # type: ignore[misc, assignment]
    main()


if __name__ == "__main__":
    _main()
