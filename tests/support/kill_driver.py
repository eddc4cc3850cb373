"""Kills a trainer process at seeded moments of apply and rollback, and looks how it resumes.

``python tests/support/kill_driver.py --moments 100 --seed 0``, with tests/support and its nets on
PYTHONPATH (see the Makefile), prints one JSON object a line; the exit code is 1 if any resumed
state is neither that of before nor that of after, bit for bit.

A moment is an event of the interpreter (a call or a return, of Python or C functions) in the middle
of the action, counted in a rehearsal. A third each is drawn from all of them, from those of our own
files, and from the system calls that write. The run has two groups of parameters, an average of the
weights, a gradient scaler and a scheduler.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from guarded import Run, World, decide, told

_WRITES = {"fsync", "rename", "replace", "write", "truncate", "mkdir", "open", "flush", "rmdir"}


@dataclass(frozen=True)
class Scenario:
    """An action, and the folder as it is before it."""

    name: str
    mode: str
    act: Callable[[Run, World], object]


def apply(opened: Run, world: World) -> object:
    decision = decide(world.surgeon.architecture, number=2, layers=("blocks.2",))
    return opened.apply(decision, world.surgeon, told(0.9))


def roll_back(opened: Run, world: World) -> object:
    return opened.watch(62, told(0.5, 0.9))


SCENARIOS = (
    Scenario("apply", "immediate", apply),
    Scenario("rollback", "immediate", roll_back),
    Scenario("progressive", "progressive", roll_back),
)


def open_run(scenario: Scenario, folder: Path) -> Run:
    return Run(folder, rollback=scenario.mode)


def prepare(scenario: Scenario, folder: Path) -> World:
    """A run that trained, cut once and trained on; its folder lies ready to be copied."""
    world = World(averaged=True)
    opened = open_run(scenario, folder)
    opened.resume(world.tracked)
    world.train()
    opened.save(60)
    opened.apply(decide(world.surgeon.architecture), world.surgeon, told(0.9))
    world.train()
    opened.save(61)
    opened.close()
    return world


def in_child(action: Callable[[], object]) -> int:
    """Run an action in a forked process; the signal that ended it, 0 if it came to its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def run(scenario: Scenario, world: World, folder: Path, profile: Any) -> None:
    """The action in this process, every event of it told to ``profile``."""
    opened = open_run(scenario, folder)
    opened.resume(world.tracked)
    sys.setprofile(profile)
    try:
        scenario.act(opened, world)
    finally:
        sys.setprofile(None)


def rehearse(scenario: Scenario, world: World, folder: Path) -> tuple[list[Sequence[int]], str]:
    """The moments to draw from (all, ours, writes), and the state after."""
    seen = {"count": 0}
    ours: list[int] = []
    writes: list[int] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        seen["count"] += 1
        if event.startswith("c_") and getattr(argument, "__name__", "") in _WRITES:
            writes.append(seen["count"])
        if "/elesh/trainer/" in frame.f_code.co_filename:
            ours.append(seen["count"])

    run(scenario, world, folder, profile)
    return [range(1, seen["count"] + 1), ours, writes], world.digest()


def resumed(scenario: Scenario, folder: Path) -> tuple[str, set[str]]:
    """The state in which a fresh process goes on (resuming twice must not change it), and what it
    reports of the second decision."""
    digests = set()
    for _ in range(2):
        world = World(architecture=ORIGINAL, averaged=True)
        opened = open_run(scenario, folder)
        opened.resume(world.tracked)
        digests.add(world.digest())
        told = {o.result for o in opened.unreported if ":ck-2:" in o.idempotency_key}
        opened.close()
    assert len(digests) == 1
    return digests.pop(), told


def kill_at(moment: int) -> Callable[[Any, str, Any], None]:
    left = [moment]

    def profile(frame: Any, event: str, argument: Any) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return profile


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as top:
        for number, scenario in enumerate(SCENARIOS):
            share = arguments.moments // len(SCENARIOS)
            share += number < arguments.moments % len(SCENARIOS)
            rng = random.Random(arguments.seed * 10 + number)
            for line in kills(scenario, Path(top) / scenario.name, share, rng):
                bad += line["side"] == "NEITHER" or line["signal"] != signal.SIGKILL
                print(json.dumps(line), flush=True)
    return bool(bad)


def kills(
    scenario: Scenario, base: Path, moments: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """So many kills of one action, and on which side each left the run."""
    world = prepare(scenario, base)
    rehearsal, folder = base.with_suffix(".rehearsal"), base.with_suffix(".killed")
    shutil.copytree(base, rehearsal)
    before = resumed(scenario, rehearsal)[0]
    run(scenario, world, rehearsal, None)  # what is done once has been done then
    shutil.rmtree(rehearsal)
    shutil.copytree(base, rehearsal)
    drawn, after = rehearse(scenario, world, rehearsal)
    assert before != after
    for i in range(moments):
        moments_left, ended = drawn[i % len(drawn)], 0
        while not ended:  # An action may end before a late moment of its rehearsal comes.
            moment = rng.choice(moments_left)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(base, folder)
            ended = in_child(partial(run, scenario, world, folder, kill_at(moment)))
            moments_left = [earlier for earlier in moments_left if earlier < moment]
        digest, told = resumed(scenario, folder)
        side = {before: "before", after: "after"}.get(digest, "NEITHER")
        if "applied" in told and side == "before":
            side = "NEITHER"  # others would believe in a cut that is not there
        shutil.rmtree(folder)
        yield {
            "scenario": scenario.name,
            "moment": moment,
            "of": len(drawn[0]),
            "side": side,
            "signal": ended,
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what imports left need not be looked through for living optimizers
    logging.getLogger("elesh").addHandler(logging.NullHandler())
    ORIGINAL = World().original
    sys.exit(main())
