"""Depth and width of transformers: what removing layers, heads, hidden units and width costs.

    python -m benchmarks.pruning.transformer --seeds 0 1 2
    python -m benchmarks.pruning.transformer --task vit --data digits.npz --kinds width

A small GPT on characters or a small vision transformer (tasks of ``benchmarks.training_run``) loses
a share of one kind of its parts, by our order and by the published criterion of that kind, as it is
and with our reconstruction; figures are what that adds to the test loss. "Least norm" goes by the
norm of all weights that go with a unit (Fang et al. 2023). ShortGPT (Men et al. 2024) ranks layers
by block influence, here of residual branches; Michel et al. 2019 rank heads by gate gradients;
Minitron (Muralidharan et al. 2024) ranks by activation norms, the same share of every layer; FLAP
(An et al. 2024) by fluctuation, standardised by layer, and leaves means in biases; SliceGPT
(Ashkboos et al. 2024) projects the stream on its principal components, which keeps a matrix at
every addition that a narrower network does not have.

Every seed is a line of JSON in ``--out``; one that has a line is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.common.criteria import lowest
from benchmarks.training_run.nets import Block, Gpt, Vit
from benchmarks.training_run.run import Run, loss_of, scored
from benchmarks.training_run.tasks import TASKS, Options, Split, Task
from elesh.analysis.levels.heads import HEADS
from elesh.analysis.levels.units import CHANNELS
from elesh.analysis.selection.choose import Scorer
from elesh.settings import StructuredPruning
from elesh.trainer import MeasuredCheckpoint, Recorder, Surgeon
from elesh.trainer.network.layers import named_tensors
from elesh.trainer.surgery.reconstruction.layer_by_layer import (
    outputs_before,
    solved_layer_by_layer,
)
from elesh.trainer.surgery.reconstruction.principal_components import turn_streams
from leyline import Level, Phase, PrunedArchitecture, PruningGroup

SHARES = (0.2, 0.5)
TESTED = 20_000
"""Predictions whose loss is measured: characters, or images as far as there are so many."""
KINDS = ("layers", "heads", "hidden units", "width")
_MINIMUM = {"heads": 1, "hidden units": 4, "width": 8}
Doubles = npt.NDArray[np.float64]
Scores = Mapping[str, Doubles]
Units = Mapping[str, Sequence[int]]
Figures = dict[str, dict[str, dict[str, dict[str, float]]]]
"""Loss added, by kind, method, ``plain`` or ``refitted``, and share."""


@dataclass
class Subject:
    """A trained transformer with its checkpoints: for who refits, and for who does not."""

    task: Task
    model: Gpt | Vit
    calibration: list[tuple[Tensor, Tensor]]
    refitting: MeasuredCheckpoint = field(init=False)
    masking: MeasuredCheckpoint = field(init=False)
    architecture: PrunedArchitecture = field(init=False)
    before: float = field(init=False)
    """Test loss of the whole network."""

    def __post_init__(self) -> None:
        recorder = Recorder(self.model, self.calibration[0][0][:2])
        self.refitting = recorder.measure(self.calibration, epoch=119)
        self.masking = recorder.measure(self.calibration, epoch=119, reconstruct=False)
        self.architecture = recorder.architecture
        self.before = scored(self.model, self.test).loss

    @property
    def test(self) -> Split:
        """As much test data as says enough."""
        data = self.task.test
        count = TESTED // max(1, data.labels[0].numel())
        return Split(data.inputs[:count], data.labels[:count])

    def groups(self, kind: str) -> list[PruningGroup]:
        """The groups whose units are of this kind."""
        found = [group for group in self.architecture.groups if group.prunable]
        heads = [group for group in found if group.level is Level.HEAD]
        channels = [group for group in found if group.level is Level.CHANNEL]
        wide = [group for group in channels if len(group.sites) > 1]
        hidden = [group for group in channels if len(group.sites) == 1]
        return {"heads": heads, "hidden units": hidden, "width": wide}[kind]

    def added(self, units: Units, refit: bool, layers: Sequence[str] = ()) -> float:
        """Test loss, in nats a character, that a copy without these units and layers has beyond
        the whole network; what reads the others is refitted as ``elesh.prune`` does, or not."""
        model = copy.deepcopy(self.model)
        surgeon = Surgeon(model, self.architecture, restore_points=0)
        inputs = torch.cat([inputs for inputs, _ in self.calibration])
        before = outputs_before(model, self.architecture, [(inputs, None)]) if refit else None
        if units:
            surgeon.cut(units, reconstruct=self.refitting.covariance if refit else None)
        if layers:
            surgeon.cut_layers(layers)
        if before is not None:
            solved_layer_by_layer(model, before.without(self.architecture, units))
        return scored(model, self.test).loss - self.before


def trained(kind: str, options: Options, seed: int, data: Path | None, cache: Path) -> Subject:
    """The transformer of this task and seed, trained once."""
    task = TASKS[kind](options, seed, data, kind)
    run = Run(task, seed, 1.0, options.epochs, {})
    name = "-".join(str(value) for value in vars(options).values())
    file = cache / f"{kind}-{seed}-{name}.pt"
    if file.exists():
        run.model.load_state_dict(torch.load(file, weights_only=True))
    else:
        run.train()
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(run.model.state_dict(), file)
    assert isinstance(run.model, (Gpt, Vit))
    return Subject(task, run.model.eval(), run.calibration)


# What enters the readers of units.


@torch.no_grad()
def entering(subject: Subject, modules: Sequence[str]) -> dict[str, Tensor]:
    """By module [samples, positions, C]: its inputs on the calibration data."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    handles = [
        subject.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0])
        )
        for name in modules
    ]
    for inputs, _ in subject.calibration:
        subject.model(inputs)
    for handle in handles:
        handle.remove()
    whole = {name: torch.cat(parts).double() for name, parts in seen.items()}
    return {name: x if x.ndim > 2 else x.unsqueeze(1) for name, x in whole.items()}


def reader(group: PruningGroup) -> str:
    """The module that reads the group's units."""
    return group.sites[0].module


def by_unit(values: Tensor, group: PruningGroup) -> Tensor:
    """[..., C] along the reader's inputs to [..., units, width]."""
    return values.reshape(*values.shape[:-1], group.size, -1)


# The published criteria: scores by group, higher is more important.


def least_norm(subject: Subject, groups: Sequence[PruningGroup]) -> Scores:
    """Squared norms of all weights that go with a unit."""
    tensors, found = named_tensors(subject.model), dict[str, Doubles]()
    for group in groups:
        found[group.name] = np.zeros(group.size)
        for part in group.slices:
            whole = tensors[part.tensor].detach().double().movedim(part.dim, 0)
            squares = whole.reshape(len(whole), -1).square().sum(1).numpy()
            for unit in range(group.size):
                found[group.name][unit] += squares[list(part.all_of([unit]))].sum()
    return found


def michel(subject: Subject, groups: Sequence[PruningGroup]) -> Scores:
    """Mean magnitude of the loss's gate gradients, divided by their norm in each layer."""
    rows = {g.name: subject.masking.heads[g.name].gradient_sensitivity for g in groups}
    return {name: row.astype(float) / float(np.linalg.norm(row)) for name, row in rows.items()}


def minitron(subject: Subject, groups: Sequence[PruningGroup]) -> Scores:
    """Norms of activations: the root mean square over samples of their means over positions. Of
    width: what leaves every normalisation, summed (Minitron, section 2.2)."""

    def size(values: Tensor) -> Doubles:
        found: Doubles = values.mean(1).square().mean(0).sqrt().numpy()
        return found

    if groups and len(groups[0].sites) > 1:
        seen = entering(subject, sorted({site.module for site in groups[0].sites}))
        return {groups[0].name: np.sum([size(x.abs()) for x in seen.values()], axis=0)}
    seen = entering(subject, [reader(group) for group in groups])
    return {g.name: size(by_unit(seen[reader(g)], g).norm(dim=-1)) for g in groups}


def flap(subject: Subject, groups: Sequence[PruningGroup]) -> Scores:
    """Variance of every input times the squared norm of its weights, standardised by layer."""
    seen, found = entering(subject, [reader(group) for group in groups]), dict[str, Doubles]()
    for group in groups:
        weight = subject.model.get_submodule(reader(group)).weight
        assert isinstance(weight, Tensor)
        fluctuation = seen[reader(group)].flatten(0, 1).var(0) * weight.detach().square().sum(0)
        row = by_unit(fluctuation, group).sum(-1)
        found[group.name] = ((row - row.mean()) / row.std()).numpy()
    return found


@contextmanager
def means_in_biases(subject: Subject, units: Units) -> Iterator[None]:
    """FLAP's compensation: a reader's bias takes up the mean of what it loses."""
    kept: list[tuple[Tensor, Tensor]] = []
    groups = subject.architecture.group
    seen = entering(subject, [reader(groups[name]) for name in units])
    for name, lost in units.items():
        module = subject.model.get_submodule(reader(groups[name]))
        assert isinstance(module, nn.Linear)
        mean = by_unit(seen[reader(groups[name])].flatten(0, 1).mean(0), groups[name]).clone()
        mean[[unit for unit in range(len(mean)) if unit not in set(lost)]] = 0
        kept.append((module.bias, module.bias.detach().clone()))
        module.bias.data += (module.weight.detach().double() @ mean.flatten()).float()
    try:
        yield
    finally:
        for bias, before in kept:
            bias.data.copy_(before)


# Units: ours and theirs, with and without reconstruction.


def ours(subject: Subject, kind: str, count: int, refit: bool) -> Units:
    """Our order."""
    bundle = subject.refitting if refit else subject.masking
    level = HEADS if kind == "heads" else CHANNELS
    settings, groups = StructuredPruning.model_validate(_least(kind)), subject.groups(kind)
    scorer: Scorer = "reconstruction" if refit else "output_projection"
    ranking = level.rank(bundle, settings, groups, scorer, Phase.AGGRESSIVE)
    return ranking.candidates.by_group(ranking.choose(count).units)


def _least(kind: str) -> dict[str, Any]:
    least = _MINIMUM[kind]
    return {
        "channel_analysis": {"min_channels_per_layer": least},
        "attention_analysis": {"min_heads_per_layer": least},
    }


def alike(groups: Sequence[PruningGroup], scores: Scores, share: float) -> Units:
    """The same share of every group, the lowest scores first."""
    return {g.name: np.argsort(scores[g.name])[: round(share * g.size)].tolist() for g in groups}


def of_units(subject: Subject, kind: str) -> dict[str, dict[str, dict[str, float]]]:
    """The figures of one kind of units."""
    groups = subject.groups(kind)
    total = sum(group.size for group in groups)
    chosen: dict[str, Callable[[float, bool], Units]] = {
        "ours": lambda share, refit: ours(subject, kind, round(share * total), refit),
        "least norm": lambda share, refit: alike(groups, least_norm(subject, groups), share),
        "Minitron": lambda share, refit: alike(groups, minitron(subject, groups), share),
    }

    def everywhere(criterion: Callable[..., Scores], share: float, refit: bool) -> Units:
        scores = criterion(subject, groups)
        return lowest(groups, scores, round(share * total), _MINIMUM[kind])

    if kind == "heads":
        chosen["Michel"] = partial(everywhere, michel)
    if kind != "width":
        chosen["FLAP"] = partial(everywhere, flap)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, choose in chosen.items():
        found[name] = {"plain": {}, "refitted": {}}
        for share in SHARES:
            for refit in (False, True):
                added = subject.added(choose(share, refit), refit)
                found[name]["refitted" if refit else "plain"][f"{share:.0%}"] = added
    if kind != "width":
        found["FLAP, means in biases"] = {"plain": {}}
        for share in SHARES:
            units = chosen["FLAP"](share, False)
            with means_in_biases(subject, units):
                found["FLAP, means in biases"]["plain"][f"{share:.0%}"] = subject.added(
                    units, False
                )
    else:
        found["ours, turned"] = _turned(subject)
        found["SliceGPT"] = {
            "plain": {f"{s:.0%}": sliced(subject, 1 - s) - subject.before for s in SHARES}
        }
    return found


def _turned(subject: Subject) -> dict[str, dict[str, float]]:
    """Ours, once the stream is turned to its principal components, as ``elesh.prune`` does."""
    model, example = copy.deepcopy(subject.model), subject.calibration[0][0][:2]
    if not turn_streams(model, subject.architecture, subject.calibration, example):
        raise RuntimeError("the stream was not turned")
    other = Subject(subject.task, model, subject.calibration)
    total = sum(group.size for group in other.groups("width"))
    return {
        how: {
            f"{share:.0%}": other.added(ours(other, "width", round(share * total), refit), refit)
            for share in SHARES
        }
        for how, refit in (("plain", False), ("refitted", True))
    }


# Layers.


def of_layers(subject: Subject) -> dict[str, dict[str, dict[str, float]]]:
    """The figures of whole residual branches."""
    layers = subject.masking.layers
    orders = {
        "ours": {name: float(np.square(x.projections).mean()) for name, x in layers.items()},
        "ShortGPT": {name: 1 - float(x.similarity[0]) for name, x in layers.items()},
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for method, costs in orders.items():
        order = sorted(costs, key=lambda name: costs[name])
        found[method] = {
            how: {
                f"{share:.0%}": subject.added({}, refit, order[: round(share * len(order))])
                for share in SHARES
            }
            for how, refit in (("plain", False), ("refitted", True))
        }
    return found


@torch.no_grad()
def sliced(subject: Subject, left: float) -> float:
    """Test loss with the stream, before every branch and the last normalisation, projected on its
    first principal components there: what SliceGPT computes, before it folds the projections into
    weights. Their covariance is of the network sliced so far."""
    model = subject.model
    kept = round(left * model.position.shape[-1])
    calibration = torch.cat([inputs for inputs, _ in subject.calibration])
    streams = [_centred(model.embedded(x)) for x in (calibration, subject.test.inputs)]

    def projected() -> list[Tensor]:
        rows = streams[0].flatten(0, 1).double()
        rows = rows / rows.square().mean(-1, keepdim=True).sqrt()
        _, vectors = torch.linalg.eigh(rows.T @ rows)
        basis = vectors[:, -kept:].float()
        return [x @ basis @ basis.T for x in streams]

    for block in model.blocks:
        assert isinstance(block, Block)
        streams = projected()
        streams = [_centred(x + block.attention(block.norm1(x))) for x in streams]
        streams = projected()
        streams = [_centred(x + block.down(torch.relu(block.up(block.norm2(x))))) for x in streams]
    return float(loss_of(model.answers(projected()[1]), subject.test.labels))


def _centred(x: Tensor) -> Tensor:
    """Less its mean over the width, which no LayerNorm sees."""
    return x - x.mean(-1, keepdim=True)


def measured(subject: Subject, kinds: Sequence[str]) -> Figures:
    """The tables of one network."""
    return {
        kind: of_layers(subject) if kind == "layers" else of_units(subject, kind) for kind in kinds
    }


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: loss added, mean over seeds and its standard error."""
    whole = statistics.fmean(line["before"] for line in lines)
    rows = [f"test loss {whole:.3f} before, {len(lines)} seeds", ""]
    head = "".join(f" {s:.0%} | {s:.0%}, refitted |" for s in SHARES)
    rows += [f"| what goes | by |{head}", "|---|---|" + "---|---|" * len(SHARES)]
    for kind in lines[0]["figures"]:
        for method in lines[0]["figures"][kind]:
            cells = []
            for share in (f"{s:.0%}" for s in SHARES):
                for how in ("plain", "refitted"):
                    own = [line["figures"][kind][method].get(how, {}).get(share) for line in lines]
                    cells.append(_told([value for value in own if value is not None]))
            rows.append(f"| {kind} | {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _told(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    return f"{statistics.fmean(values):.3f} ±{statistics.stdev(values) / len(values) ** 0.5:.3f}"


def main() -> None:
    """Measure what is not there yet, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=("gpt", "vit"), default="gpt")
    parser.add_argument("--kinds", type=lambda t: t.split(","), default=KINDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, value in {"epochs": 8, "samples": 4000, "width": 64, "depth": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--data", type=Path, help="digits: .npz with images and labels")
    cache = Path(tempfile.gettempdir()) / "elesh-benchmarks"
    parser.add_argument("--cache", type=Path, default=cache, help="folder for trained networks")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    options = Options(asked.epochs, asked.samples, width=asked.width, depth=asked.depth)
    told = [json.loads(t) for t in asked.out.read_text().splitlines()] if asked.out.exists() else []
    lines = []
    for seed in asked.seeds:
        what = {"task": asked.task, "kinds": list(asked.kinds), "seed": seed, **vars(options)}
        known = [line for line in told if line | what == line]
        if not known:
            subject = trained(asked.task, options, seed, asked.data, asked.cache)
            figures = measured(subject, asked.kinds)
            known = [{**what, "before": subject.before, "figures": figures}]
            with asked.out.open("a") as file:
                file.write(json.dumps(known[0]) + "\n")
        lines += known
    print(table(lines))


if __name__ == "__main__":
    main()
