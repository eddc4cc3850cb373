"""The pictures of docs/architecture.md, drawn from the code by ``python -m docs.generate``.

``rooms.svg``: the floors that import-linter holds (pyproject.toml) with the packages on each, and
what each package's first line says of it. ``checkpoint.svg``: the way of a checkpoint; every step
names a function that has to exist.
"""

from __future__ import annotations

import ast
import itertools
import tomllib
from dataclasses import dataclass
from html import escape
from pathlib import Path

from docs.drawing import box, label, svg, wrapped

__all__ = ["WAY", "Step", "checkpoint", "require", "rooms"]

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """One step of a checkpoint's way."""

    lane: str
    """``trainer``, ``bus``, ``worker`` or ``child``."""
    text: str
    code: str
    """``path/of/file.py:function`` or ``:Class.method``, below the repository's root."""


WAY = (
    Step(
        "trainer",
        "measure one calibration pass",
        "elesh/trainer/calibration/recorder.py:Recorder.measure",
    ),
    Step(
        "trainer",
        "publish blobs and event, off the training thread",
        "elesh/trainer/session/session.py:Session.publish",
    ),
    Step("bus", "append the event once for its id", "elesh/bus/core.py:Bus.publish"),
    Step("worker", "claim entries, renew leases", "elesh/worker/leases.py:Leases.claim"),
    Step(
        "worker", "admit: bytes become valid work, or a dead letter", "elesh/bus/admission.py:admit"
    ),
    Step("worker", "small: run at once; large: plan parts", "elesh/worker/fan_out.py:FanOut.plan"),
    Step(
        "worker",
        "fetch blobs, ask the child, fall back",
        "elesh/worker/executor.py:AnalysisExecutor.decide",
    ),
    Step(
        "child",
        "analyse a level: score, order, select",
        "elesh/analysis/levels/analyze_level.py:draft_level",
    ),
    Step("child", "join the levels into one pruning set", "elesh/analysis/decision/join.py:joined"),
    Step(
        "child",
        "verify on held-out data, shorten",
        "elesh/analysis/pruning_set/draft.py:Draft.verify",
    ),
    Step(
        "worker",
        "commit: store, publish, acknowledge",
        "elesh/worker/result_handler.py:ResultHandler.commit",
    ),
    Step(
        "bus",
        "all at once, if owner and fingerprint are the same",
        "elesh/bus/core.py:Bus.commit",
    ),
    Step(
        "trainer",
        "restore point, mask, evaluate, cut",
        "elesh/trainer/session/session.py:Session.apply",
    ),
    Step(
        "trainer",
        "monitor the cut for some epochs, roll back if accuracy falls",
        "elesh/trainer/session/session.py:Session.watch",
    ),
    Step(
        "worker",
        "hear the outcome: breaker, run state",
        "elesh/worker/result_handler.py:ResultHandler.record_outcome",
    ),
)

_LANES = {
    "trainer": "Training run",
    "bus": "Redis Streams",
    "worker": "Worker: supervisor",
    "child": "Worker: compute child",
}


def rooms() -> str:
    """The floors, the highest first; a file imports only from floors below its own."""
    contract = tomllib.loads((_ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    parts, y = [], 44
    for layer in contract["contracts"][0]["layers"]:
        packages = [name.strip() for name in layer.split("|")]
        wide = 112 // len(packages)
        rows = max(len(_lines(package, wide)) for package in packages)
        height, width = 30 + 16 * rows, 940 / len(packages)
        for n, package in enumerate(packages):
            x = 20 + n * width
            parts.append(box(x, y, width - 8, height, "room"))
            parts.append(label(x + 12, y + 20, package, "title"))
            parts += [
                label(x + 12, y + 38 + 16 * row, line, "note")
                for row, line in enumerate(_lines(package, wide))
            ]
        y += height + 10
    head = label(20, 28, "Imports go down only", "title")
    return svg(980, y + 10, head + "".join(parts), "The floors of the packages")


def checkpoint() -> str:
    """The way of a checkpoint, a lane for each process.

    Raises:
        ValueError: if a step names a function that is not there.
    """
    for step in WAY:
        require(step.code)
    lanes, width, row = list(_LANES), 240, 64
    height = 70 + row * len(WAY)
    parts = [
        box(20 + n * width, 40, width - 10, height - 50, "floor") for n in range(len(lanes))
    ] + [label(32 + n * width, 30, title, "title") for n, title in enumerate(_LANES.values())]
    places = []
    for n, step in enumerate(WAY):
        x, y = 28 + lanes.index(step.lane) * width, 52 + n * row
        places.append((x + (width - 26) / 2, y))
        parts.append(f"<g><title>{escape(step.code)}</title>\n")
        parts.append(box(x, y, width - 26, row - 16, step.lane))
        words = wrapped(step.text, 28)
        parts += [label(x + 10, y + 19 + 16 * k, line, "") for k, line in enumerate(words)]
        parts.append("</g>\n")
    for (x1, y1), (x2, y2) in itertools.pairwise(places):
        bottom = y1 + row - 16
        middle = bottom + 8
        bend = (
            f"M{x1} {bottom} V{middle} H{x2} V{y2 - 1}" if x1 != x2 else f"M{x1} {bottom} V{y2 - 1}"
        )
        parts.append(f'<path class="arrow" d="{bend}"/>')
    return svg(20 + width * len(lanes), height + 10, "".join(parts), "The way of a checkpoint")


def require(code: str) -> None:
    """See that a function or class is there.

    Args:
        code: ``path/of/file.py:function`` or ``:Class.method``, below the repository's root.

    Raises:
        ValueError: if it is not.
    """
    file, name = code.split(":")
    body = ast.parse((_ROOT / file).read_text()).body
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = [node for node in body if isinstance(node, kinds) and node.name == part]
        if not found:
            raise ValueError(f"there is no {code}")
        body = found[0].body


def _lines(package: str, width: int) -> list[str]:
    """The packages inside a package, or what its first line says."""
    top = package.split(".")[0]
    folder = (_ROOT / "contracts" if top == "leyline" else _ROOT) / package.replace(".", "/")
    inner = sorted(p.name for p in folder.iterdir() if (p / "__init__.py").exists())
    return wrapped("rooms: " + ", ".join(inner) if inner else _promise(folder), width)


def _promise(folder: Path) -> str:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("``", "")
