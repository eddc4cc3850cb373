"""Measures public architectures one by one, each in a process of its own, and writes the page.

    python -m benchmarks.zoo [--results FILE] [--limit SECONDS] [--here] [--page] [NAME ...]

Every result is one line of JSON at the end of FILE; networks that are in it already are passed by,
so that a run can be ended and taken up again. ``--here`` measures in this process: quicker for
small networks, but without a limit. ``--page`` writes the table of
docs/architectures.md from FILE. Needs torchvision, timm, transformers and torch-pruning.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from .networks import NAMES, build
from .page import write

_RESULTS = Path(__file__).with_name("measured.jsonl")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="library/network; default: all")
    parser.add_argument("--results", type=Path, default=_RESULTS)
    parser.add_argument("--limit", type=float, default=900, help="seconds for one network")
    parser.add_argument("--page", action="store_true", help="write the docs page, measure nothing")
    parser.add_argument("--here", action="store_true", help="no processes, no limit of time")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_measured(given.names[0])))
    elif given.page:
        write(_read(given.results))
    else:
        known = {row["name"] for row in _read(given.results)}
        for name in given.names or NAMES:
            if name not in known:
                row = _measured(name) if given.here else _in_a_process(name, given.limit)
                with given.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(name, {k: v for k, v in row.items() if k != "left_alone"}, flush=True)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _in_a_process(name: str, limit: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.zoo", "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"took more than {limit:.0f} s"}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["ended"])[-1]
        return {"name": name, "error": f"{last[:200]} (exit {done.returncode})"}


def _measured(name: str) -> dict[str, Any]:
    import torch

    from . import ours, peer

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": name}
    model, inputs = build(name)
    try:
        row |= ours.examine(model, inputs)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
    if "error" not in row:
        model, inputs = build(name)
        row["peer"] = peer.examine(model, inputs, row["output_layers"])
    return row


if __name__ == "__main__":
    main()
