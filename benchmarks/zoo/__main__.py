"""Measures public architectures one by one, each in a process of its own, and writes the page.

    python -m benchmarks.zoo [--results FILE] [--limit SECONDS] [--here] [--alone] [NAME ...]
    python -m benchmarks.zoo --page [--results FILE]

Every result is one line of JSON at the end of FILE; networks that are in it already are passed by,
so that a run can be ended and taken up again. ``--here`` measures in this process: quicker for
small networks, but without a limit. ``--alone``: without torch-pruning. ``--page`` writes the table
of docs/architectures.md from FILE. Needs torchvision, timm, transformers and torch-pruning.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib
import json
import logging
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .networks import NAMES, build, jumps
from .page import write

_PEER_SECONDS = 100.0
_RESULTS = Path(__file__).with_name("measured.jsonl")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="library/network; default: all")
    parser.add_argument("--results", type=Path, default=_RESULTS)
    parser.add_argument("--limit", type=float, default=900, help="seconds for one network")
    parser.add_argument("--page", action="store_true", help="write the docs page, measure nothing")
    parser.add_argument("--here", action="store_true", help="no processes, no limit of time")
    parser.add_argument("--alone", action="store_true", help="without torch-pruning")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # The child ends, too.
    if given.page:
        write(_read(given.results))
    else:
        known = {row["name"] for row in _read(given.results)}
        _load()
        for name in given.names or NAMES:
            if name not in known:
                compare, limit = not given.alone, given.limit
                row = _measured(name, compare) if given.here else _apart(name, limit, compare)
                with given.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(name, {k: v for k, v in row.items() if k != "left_alone"}, flush=True)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _apart(name: str, limit: float, compare: bool) -> dict[str, Any]:
    """Measured by a child, which begins with the libraries loaded."""
    context = multiprocessing.get_context("fork")

    def work() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        other.send(_measured(name, compare))

    mine, other = context.Pipe(duplex=False)
    child = context.Process(target=work)
    child.start()
    other.close()
    row: dict[str, Any] = {"name": name, "error": f"took more than {limit:.0f} s"}
    try:
        if mine.poll(limit):
            row = mine.recv()
    except EOFError:
        child.join()
        row["error"] = f"the process ended ({child.exitcode})"
    finally:
        child.kill()
        child.join()
    return row


def _load() -> None:
    """Load the libraries, where they are installed; children collect no garbage of theirs."""
    for library in ("torch_pruning", "torchvision", "timm", "transformers", f"{__package__}.ours"):
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    gc.freeze()


def _measured(name: str, compare: bool) -> dict[str, Any]:
    import torch

    from . import ours, peer

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": name, "measured": datetime.date.today().isoformat()}
    model, inputs = build(name)
    try:
        row |= ours.examine(model, inputs, jumps(name))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
    if "error" not in row and compare:
        model, inputs = build(name)
        with _at_most(_PEER_SECONDS):
            row["peer"] = peer.examine(model, inputs, row["output_layers"])
    return row


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside after so many seconds of CPU: torch-pruning does not end on some
    networks."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


if __name__ == "__main__":
    main()
