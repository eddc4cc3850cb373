"""Every setup of docs/setups.md, run for real: measured, masked, cut, trained on, rolled back,
killed with SIGKILL and resumed, saved and loaded in another process.

``python tests/support/setups/setups.py [NAME ...]``, with tests/support, its nets and this folder
on PYTHONPATH, prints a line of JSON for each row of :mod:`setup_rows`; :func:`table` is the page.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from guarded import decide
from setup_frameworks import FRAMEWORKS
from setup_rows import RANK, SETUPS, TWO, Running
from torch import distributed

import elesh
from elesh.trainer import Evaluation, Recorder, Session, Surgeon
from leyline import ContractError, PrunedArchitecture

CELLS = (
    "record", "measure", "mask", "cut", "train on", "roll back", "resume after kill -9",
    "save and load elsewhere",
)  # fmt: skip
ROWS = (*SETUPS, *FRAMEWORKS)
SAMPLE = (*ROWS[::3], "gradient hooks that hold masks")
"""Rows of every kind, for CI."""
AWAY = "redis://127.0.0.1:1/0"
WORKS, SKIPPED = "works", ""


# Running


class Ended(Exception):
    """A setup is refused; what follows has no cell."""


def run(name: str) -> dict[str, str]:
    """The cells of a setup; where several processes train together, theirs, which must agree."""
    ranks = range(2 if name == TWO else 1)
    with tempfile.TemporaryDirectory() as top:
        folders = [Path(top) / str(rank) for rank in ranks]
        rows: list[dict[str, str]] = [{} for _ in ranks]
        for number, life in enumerate((first_life, second_life)):
            meeting = Path(top) / f"meeting-{number}"
            begun = [
                in_child(partial(life, name, folder), rank, len(ranks), meeting)
                for rank, folder in enumerate(folders)
            ]
            signals = [os.WTERMSIG(os.waitpid(pid, 0)[1]) for pid in begun]
            for row, folder in zip(rows, folders, strict=True):
                row |= read(folder / "cells")
            if set(signals) != {signal.SIGKILL} or any(r.get("cut") != WORKS for r in rows):
                break
        assert all(row == rows[0] for row in rows), rows
        return {cell: rows[0].get(cell, SKIPPED) for cell in CELLS}


def in_child(life: Callable[[Path], None], rank: int, ranks: int, meeting: Path) -> int:
    """Begin a life in a process of its own, which ends by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        try:
            folder: Path = life.args[1]  # type: ignore[attr-defined]
            folder.mkdir(exist_ok=True)
            RANK[0] = rank
            if ranks > 1:
                where = {"init_method": f"file://{meeting}", "rank": rank, "world_size": ranks}
                distributed.init_process_group("gloo", **where)
            life(folder / "cells")
        except BaseException:
            traceback.print_exc()
        os.kill(os.getpid(), signal.SIGKILL)
    return pid


def read(told: Path) -> dict[str, str]:
    return dict(json.loads(line) for line in told.read_text().splitlines())


@contextmanager
def cell(told: Path, name: str) -> Iterator[None]:
    """What becomes of a cell: it works, is refused before anything was changed, or raises."""
    try:
        yield
        said = WORKS
    except Ended as refused:
        said = f"refused: {refused}"
    except ContractError as error:
        said = f"refused: {str(error).partition('; nothing was changed')[0]}"
    except Exception as error:
        traceback.print_exc()
        said = f"raises {type(error).__name__}: {str(error)[:200]}"
    with told.open("a") as file:
        file.write(json.dumps([name, said]) + "\n")
    if said != WORKS:
        raise Ended(said)


_CALLS = count(1)


def good() -> Evaluation:
    """No two are bit for bit the same: a mask moves real ones."""
    return Evaluation(0.9, 0.1 + next(_CALLS) * 1e-9)


def bad() -> Evaluation:
    return Evaluation(0.1, 2.0)


def started(name: str, folder: Path) -> tuple[Running, Recorder, Surgeon, Session]:
    torch.manual_seed(0)
    running = SETUPS[name]()
    running.model.eval()
    recorder = Recorder(running.model, _example(running.inputs))
    surgeon = Surgeon(running.model, recorder.architecture, optimizer=running.optimizer)
    return running, recorder, surgeon, Session("run", AWAY, restore_dir=folder / "restore")


def _example(inputs: Any) -> Any:
    return tuple(x[:3] for x in inputs) if type(inputs) is tuple else inputs[:3]


def first_life(name: str, folder: Path, told: Path) -> None:
    if name in FRAMEWORKS:
        FRAMEWORKS[name]().first(folder, partial(cell, told))
        return
    with cell(told, "record"):
        running, recorder, surgeon, session = started(name, folder)
        session.resume(surgeon, **running.parts)
        running.train(2)
        if not any(group.prunable for group in surgeon.architecture.groups):
            raise Ended("nothing can be removed")
    whole = running.outputs()
    with cell(told, "measure"):
        bundle = recorder.measure([(running.inputs, running.labels)], epoch=1, run_id="run")
        assert bundle.channels or bundle.heads
        assert torch.equal(running.outputs(), whole), "measuring changed something"
    decision = _decision(surgeon.architecture, 1)
    with cell(told, "mask"):
        surgeon.mask(decision.units)
        masked = running.outputs()
        surgeon.unmask()
        assert not torch.equal(masked, whole), "the mask does not act"
        assert torch.equal(running.outputs(), whole), "the mask left something"
    with cell(told, "cut"):
        session.watch(1, good)
        outcome = session.apply(decision, surgeon, good)
        if outcome.result == "refused":
            assert torch.equal(running.outputs(), whole)
            raise Ended(outcome.detail)
        assert outcome.result == "applied", outcome.detail
        assert surgeon.architecture.parameters < surgeon.architecture.original_parameters
        torch.testing.assert_close(running.outputs(), masked, rtol=1e-2, atol=1e-2)
    with cell(told, "train on"):
        running.train(3)
        _require_alike(running)
    with cell(told, "roll back"):
        (outcome,) = session.watch(2, bad)
        assert outcome.result == "rolled_back"
        assert torch.equal(running.outputs(), whole), "not bit for bit"
        running.train(1)
    outcome = session.apply(_decision(surgeon.architecture, 2), surgeon, good)
    assert outcome.result == "applied", outcome.detail
    running.train(2)
    assert session.save(3)
    torch.save(running.outputs(), folder / "outputs")
    elesh.save(running.model, folder / "saved")
    os.kill(os.getpid(), signal.SIGKILL)


def second_life(name: str, folder: Path, told: Path) -> None:
    if name in FRAMEWORKS:
        FRAMEWORKS[name]().second(folder, partial(cell, told))
        return
    outputs = torch.load(folder / "outputs")
    with cell(told, "resume after kill -9"):
        running, _, surgeon, session = started(name, folder)
        assert session.resume(surgeon, **running.parts) == 3
        assert torch.equal(running.outputs(), outputs), "not bit for bit"
        running.train(1)
    with cell(told, "save and load elsewhere"):
        torch.manual_seed(5)
        other = SETUPS[name]()
        other.parts.clear()
        elesh.load(folder / "saved", other.model)
        other.model.eval()
        assert torch.equal(other.outputs()[0], outputs[0]), "not bit for bit"


def _require_alike(running: Running) -> None:
    """The processes that train together have the same parameters, bit for bit."""
    if distributed.is_initialized():
        mine = [p.detach() for p in running.model.parameters()]
        for p in mine:
            theirs = [torch.empty_like(p) for _ in range(distributed.get_world_size())]
            distributed.all_gather(theirs, p.contiguous())
            assert all(torch.equal(p, other) for other in theirs), "the processes drifted apart"


def _decision(architecture: PrunedArchitecture, number: int) -> Any:
    return decide(architecture, units=2, number=number)


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """The page."""
    notes: list[str] = []

    def shown(said: str) -> str:
        if said == SKIPPED:
            return ""
        if said == WORKS:
            return "yes"
        if said not in notes:
            notes.append(said)
        return f"{said.split(':')[0]} ({notes.index(said) + 1})"

    lines = [f"| {name} | " + " | ".join(shown(row[c]) for c in CELLS) + " |"
             for name, row in rows.items()]  # fmt: skip
    listed = "\n".join(f"{n}. {note}" for n, note in enumerate(notes, 1))
    return PAGE.format(
        head="| setup | " + " | ".join(CELLS) + " |",
        rule="|---" * (len(CELLS) + 1) + "|",
        rows="\n".join(lines),
        notes=f"\nRefused, before anything was changed:\n\n{listed}\n" if notes else "",
    )


PAGE = """# Setups

Written by `UPDATE=1 pytest tests/system/test_setups.py`, which runs every cell for real; do not
edit.

Under the mask outputs change and come back; after the cut the network computes what the masked
one did, and trains on; a rollback, and a resume after SIGKILL in a new process, bring outputs
(those of averages, too) back bit for bit; `elesh.load` in a new process computes bit for bit the
same. What is refused is so before anything was changed, with a reason that says what to do.

{head}
{rule}
{rows}
{notes}"""


def warm_up(names: Iterable[str]) -> None:
    """What every life imports and compiles first, done once: lives are forked from this process."""
    for name in FRAMEWORKS.keys() & set(names):
        FRAMEWORKS[name]()
    with tempfile.TemporaryDirectory() as folder:
        running, recorder, surgeon, session = started("torch.compile(model)", Path(folder))
        with session:
            session.resume(surgeon)
            running.train(1)
            recorder.measure([(running.inputs, running.labels)], epoch=1, run_id="run")
        elesh.save(running.model, Path(folder) / "saved")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        warm_up(sys.argv[1:] or ROWS)
    gc.collect()
    gc.freeze()
    for wanted in sys.argv[1:] or ROWS:
        with contextlib.redirect_stdout(sys.stderr):
            found = run(wanted)
        print(json.dumps({"setup": wanted, "cells": found}), flush=True)
