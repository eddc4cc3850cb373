"""Every setup of docs/setups.md, run for real: measured, masked, cut, trained on, rolled back,
killed with SIGKILL and resumed, saved and loaded in another process.

``python tests/support/setups.py [NAME ...]`` prints a line for each; :func:`table` is the page.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from guarded import decide
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import elesh
from elesh.trainer import Evaluation, Recorder, Session, Surgeon
from leyline import ContractError, PrunedArchitecture

CELLS = (
    "record", "measure", "mask", "cut", "train on", "roll back", "resume after kill -9",
    "save and load elsewhere",
)  # fmt: skip
AWAY = "redis://127.0.0.1:1/0"
WORKS, SKIPPED = "works", ""


@dataclass
class Running:
    """What a training script has around its network."""

    model: nn.Module
    """As the script calls it, and gives it to Elesh."""
    inputs: Any
    labels: Tensor
    optimizer: Any = None
    parts: dict[str, Any] = field(default_factory=dict)
    late: Callable[[], None] | None = None
    """Something that happens once, in the middle of training."""

    def loss(self) -> Tensor:
        outputs = _logits(call(self.model, self.inputs)).float()
        return nn.functional.cross_entropy(outputs, self.labels)

    def train(self, steps: int) -> None:
        self.model.train()
        for _ in range(steps):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            assert torch.isfinite(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            if isinstance(self.parts.get("ema"), AveragedModel):
                self.parts["ema"].update_parameters(self.model)
        self.model.eval()

    def optimizers(self) -> list[Any]:
        found = self.optimizer
        return list(found) if isinstance(found, (list, tuple)) else [found]

    def outputs(self) -> Tensor:
        with torch.no_grad():
            found = [_logits(call(self.model, self.inputs))]
            if isinstance(self.parts.get("ema"), nn.Module):
                found.append(_logits(call(self.parts["ema"], self.inputs)))
        return torch.stack(found)


def call(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs) if isinstance(inputs, tuple) and type(inputs) is tuple else model(inputs)


def _logits(outputs: Any) -> Tensor:
    found: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
    return found


# Networks


class Conv(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True)
        )
        self.second = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(16, 4)
        self.to(dtype)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.second(self.first(x)).mean((2, 3)))


Answer = namedtuple("Answer", "logits features")


class Named(Conv):
    def forward(self, x: Tensor) -> Any:
        features = self.second(self.first(x)).mean((2, 3))
        return Answer(self.head(features), features)


class Tied(nn.Module):
    """Two names of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(20, 16), nn.Linear(16, 24)
        self.back, self.out = nn.Linear(24, 16), nn.Linear(16, 20, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.back(torch.relu(self.hidden(self.embedding(x).mean(1)))))


class Padded(nn.Module):
    """PyTorch's encoder with a mask of padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.out(self.encoder(x, src_key_padding_mask=padding)[:, 0])


class Teaching(nn.Module):
    """A student with its slow average inside, as self-distillation has it."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Conv(), Conv()
        self.teacher.load_state_dict(self.student.state_dict())
        for parameter in self.teacher.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x) + 0.1 * self.teacher(x)


# Setups


def images(model: nn.Module, make: Callable[..., Any] | None = None, **given: Any) -> Running:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, 3, 8, 8, generator=generator).to(dtype)
    y = torch.randint(0, 4, (32,), generator=generator)
    optimizer = (make or partial(torch.optim.AdamW, lr=1e-2))(model.parameters())
    return Running(model, x, y, optimizer, **given)


def averaged() -> Running:
    running = images(Conv())
    average = AveragedModel(running.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    running.parts["ema"] = average
    return running


def compiled() -> Running:
    running = images(Conv())
    running.model = torch.compile(running.model, backend="eager")
    return running


def two_optimizers() -> Running:
    running = images(Conv())
    model = running.model
    assert isinstance(model, Conv)
    parameters = [*model.second.parameters(), *model.head.parameters()]
    running.optimizer = [
        torch.optim.SGD(model.first.parameters(), 0.05, momentum=0.9),
        torch.optim.AdamW(parameters, 1e-2),
    ]
    return running


def groups_added() -> Running:
    running = images(Conv())
    model = running.model
    assert isinstance(model, Conv)
    running.optimizer = torch.optim.AdamW(model.second.parameters(), 1e-2)
    running.optimizer.add_param_group({"params": list(model.head.parameters())})
    running.optimizer.add_param_group({"params": list(model.first.parameters()), "lr": 1e-3})
    return running


def scaled() -> Running:
    running = images(Conv())
    running.parts["scaler"] = torch.amp.GradScaler("cpu", init_scale=8.0)
    running.parts["scheduler"] = torch.optim.lr_scheduler.StepLR(running.optimizer, 2)
    running.parts["generator"] = torch.Generator().manual_seed(3)
    return running


def muon() -> Running:
    running = images(Conv())
    model = running.model
    assert isinstance(model, Conv)
    others = [p for n, p in model.named_parameters() if n != "head.weight"]
    first = torch.optim.Muon([model.head.weight], lr=1e-2)
    running.optimizer = [first, torch.optim.AdamW(others, 1e-2)]
    return running


def tied() -> Running:
    generator, model = torch.Generator().manual_seed(1), Tied()
    x = torch.randint(0, 20, (32, 6), generator=generator)
    return Running(model, x, x[:, 0], torch.optim.AdamW(model.parameters(), 1e-2))


def padded() -> Running:
    generator, model = torch.Generator().manual_seed(1), Padded()
    x = torch.randn(16, 5, 16, generator=generator)
    padding = torch.arange(5)[None] >= torch.randint(1, 6, (16, 1), generator=generator)
    y = torch.randint(0, 4, (16,), generator=generator)
    return Running(model, (x, padding), y, torch.optim.AdamW(model.parameters(), 1e-2))


SETUPS: Mapping[str, Callable[[], Running]] = {
    "one optimizer (AdamW)": lambda: images(Conv()),
    "SGD with momentum": lambda: images(Conv(), partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
    "foreach Adam, amsgrad": lambda: images(
        Conv(), partial(torch.optim.Adam, lr=1e-2, foreach=True, amsgrad=True)
    ),
    "Adafactor (factored moments)": lambda: images(Conv(), partial(torch.optim.Adafactor, lr=1e-2)),
    "Muon beside AdamW": muon,
    "two optimizers": two_optimizers,
    "groups added to the optimizer": groups_added,
    "scaler, scheduler, generator": scaled,
    "average of the weights (EMA), named": averaged,
    "teacher inside the network": lambda: images(Teaching()),
    "torch.compile(model)": compiled,
    "bfloat16 weights": lambda: images(Conv(torch.bfloat16)),
    "float64 weights": lambda: images(Conv(torch.float64)),
    "channels_last": lambda: images(Conv().to(memory_format=torch.channels_last)),
    "outputs as a named tuple": lambda: images(Named()),
    "tied weights": tied,
    "padded nn.TransformerEncoder": padded,
}


# Running


class Ended(Exception):
    """A setup is refused; what follows has no cell."""


def run(name: str) -> dict[str, str]:
    """The cells of a setup."""
    with tempfile.TemporaryDirectory() as folder:
        cells: dict[str, str] = {}
        for life in (first_life, second_life):
            ended = in_child(partial(life, name, Path(folder)), Path(folder) / "cells")
            cells |= read(Path(folder) / "cells")
            if ended != signal.SIGKILL or "cut" not in cells or cells["cut"] != WORKS:
                break
        return {cell: cells.get(cell, SKIPPED) for cell in CELLS}


def in_child(life: Callable[[Path], None], told: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            life(told)
        except BaseException:
            traceback.print_exc()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


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
        said = f"refused: {error}"
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    for wanted in sys.argv[1:] or list(SETUPS):
        print(wanted, json.dumps(run(wanted)), flush=True)
