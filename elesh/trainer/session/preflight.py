"""The preflight: tries, when a run begins, what it will need of network, optimizers and parts.

Promises: everything is tried on copies, but for one evaluation and one mask, after which network
and random states are what they were; it takes about as long as one evaluation and a few training
steps; what was found is a table, and nothing was changed where it says that something fails.
"""

from __future__ import annotations

import contextlib
import copy
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elesh.trainer.graph.hazards import train_once, trainable_example
from elesh.trainer.network.calling import Inputs, call, device_of, map_tensors, tensors_in
from elesh.trainer.network.onednn import clear_of_onednn
from elesh.trainer.network.state import preserve_state, seed_generators
from elesh.trainer.network.traversal import deep_copied
from elesh.trainer.recovery.snapshot import Snapshot, Tracked, pack_tree, unpack_tree
from elesh.trainer.surgery.optimizer_trial import copied_optimizers
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import InvalidField, Level, PreflightCheck, PrunedArchitecture

from .apply import Evaluate, preserving

Report = tuple[PreflightCheck, ...]
_COLUMNS = 80
_INDENTED = textwrap.TextWrapper(_COLUMNS, initial_indent=" " * 6, subsequent_indent=" " * 6)


class _Skipped(Exception):
    """A check has nothing to work on."""


def preflight(
    surgeon: Surgeon,
    inputs: Inputs | None = None,
    evaluate: Evaluate | None = None,
    parts: Mapping[str, Any] | None = None,
) -> Report:
    """Try what the run will need.

    Args:
        surgeon: of the network, with the optimizers.
        inputs: a small batch to call and to train the network with.
        evaluate: as it will be given to ``apply`` and ``watch``; called once.
        parts: what restore points hold beside network and optimizers, by name.
    """
    subject = _Subject(surgeon, inputs, evaluate, parts or {})
    return tuple(_tried(name, check) for name, check in subject.checks())


def require_passed(report: Report) -> None:
    """Refuse to begin where a check failed.

    Raises:
        InvalidField: naming the first of them.
    """
    for check in report:
        if check.result == "failed":
            hint = f"{check.detail}; nothing was changed; preflight=False starts the run anyway"
            raise InvalidField(f"preflight.{check.name}", "ok", "a failure", hint=hint)


def table(report: Report) -> str:
    """The checks, one a line of at most 80 columns; a longer detail stands below its check."""
    width = max((len(check.name) for check in report), default=0)
    lines = ["Elesh preflight"]
    for check in report:
        result = check.result.replace("_", " ")
        line = f"  {check.name:<{width}}  {result:<7}  {check.seconds:5.2f} s"
        if len(line) + 2 + len(check.detail) <= _COLUMNS and "\n" not in check.detail:
            lines.append(f"{line}  {check.detail}".rstrip())
        else:
            lines += [line, *_INDENTED.wrap(check.detail)]
    return "\n".join(lines)


def _tried(name: str, check: Callable[[], str]) -> PreflightCheck:
    begun = time.perf_counter()
    try:
        result, detail = "ok", check()
    except _Skipped as reason:
        result, detail = "not_run", str(reason)
    except Exception as error:  # Whatever the user's code raises is the finding.
        result, detail = "failed", f"{type(error).__name__}: {error}"[:500]
    seconds = round(time.perf_counter() - begun, 3)
    return PreflightCheck.model_validate(
        {"name": name, "result": result, "detail": detail, "seconds": seconds}
    )


_REASONS = 3
"""Where nothing is prunable, so many of the largest groups say why."""


class _Subject:
    """What is tried."""

    def __init__(
        self,
        surgeon: Surgeon,
        inputs: Inputs | None,
        evaluate: Evaluate | None,
        parts: Mapping[str, Any],
    ) -> None:
        self._surgeon, self._evaluate, self._parts = surgeon, evaluate, parts
        device = device_of(surgeon.model)
        self._inputs = None
        if inputs is not None:
            self._inputs = map_tensors(lambda x: x.detach().clone().to(device), inputs)

    def checks(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """By name, in order."""
        yield "evaluate", self._evaluates
        yield "mask", self._masks
        for level in (Level.CHANNEL, Level.HEAD, Level.LAYER):
            yield f"training after a cut of a {level.value}", self._trains_after(level)
        yield "optimizers and averages", self._covered
        yield "restore points", self._restores

    def _evaluates(self) -> str:
        if self._evaluate is None:
            raise _Skipped("no evaluate was given")
        found = preserving(self._evaluate, self._surgeon.model)()
        if not found.finite:
            text = f"accuracy {found.accuracy:g}, loss {found.loss:g}"
            raise InvalidField("evaluate", "finite figures", text)
        return f"accuracy {found.accuracy:.4f}, loss {found.loss:.4f}"

    def _masks(self) -> str:
        units, layers = self._some()
        names = [*units, *layers]
        if not names:
            groups = sorted(self._surgeon.architecture.groups, key=lambda g: g.size, reverse=True)
            reasons = dict.fromkeys(f"{g.name}: {g.reason}" for g in groups if g.reason)
            raise _Skipped("; ".join(["nothing is prunable", *list(reasons)[:_REASONS]])[:500])
        surgeon = self._surgeon
        with preserve_state(surgeon.model, 0), torch.no_grad():
            plain = self._outputs(surgeon.model)
            try:
                surgeon.mask(units)
                surgeon.mask_layers(layers)
                masked = self._outputs(surgeon.model)
            finally:
                surgeon.unmask()
        if all(torch.equal(a, b) for a, b in zip(plain, masked, strict=True)):
            raise InvalidField(
                "a mask", "other outputs", f"the same with {', '.join(names)} masked"
            )
        return f"{', '.join(names)}: outputs change"

    def _some(self, level: Level | None = None) -> tuple[dict[str, range], list[str]]:
        """Half of a group of channels, else of heads, or one layer; the first there is."""
        now = self._surgeon.architecture
        for kind in (Level.CHANNEL, Level.HEAD) if level is None else (level,):
            for group in now.groups:
                if group.prunable and group.level is kind and group.size > group.unit_multiple:
                    count = max(group.size // 2 // group.unit_multiple, 1) * group.unit_multiple
                    return {group.name: range(min(count, group.size - group.unit_multiple))}, []
        if level in (None, Level.LAYER):
            for block in now.blocks:
                if block.prunable and not block.removed:
                    return {}, [block.name]
        return {}, []

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        if self._inputs is None:
            raise _Skipped("no example inputs are known")
        seed_generators(device_of(model), 0)
        return [t for t in tensors_in(call(model, self._inputs)) if t.is_floating_point()]

    def _trains_after(self, level: Level) -> Callable[[], str]:
        def check() -> str:
            units, layers = self._some(level)
            if not units and not layers:
                raise _Skipped("none is prunable")
            if self._inputs is None:
                raise _Skipped("no example inputs are known")
            surgeon = self._copied().surgeon
            with preserve_state(surgeon.model, 0):
                example, _ = trainable_example(surgeon.model, self._inputs)
                if example is None:
                    raise _Skipped("the network does not run in training mode with the example")
                _step(surgeon, example)
                before = _finite(surgeon.model)
                if units:
                    surgeon.cut(units)
                else:
                    surgeon.cut_layers(layers)
                _step(surgeon, example)
                if before and not _finite(surgeon.model):
                    raise InvalidField("the next step", "finite weights", "NaN or infinity")
                return "; ".join([*units, *layers, *surgeon.notes])

        return check

    def _covered(self) -> str:
        surgeon = self._surgeon
        blocked = surgeon.blocked()
        average = surgeon.unnamed_average() if blocked else ""
        if blocked and blocked != average:
            raise InvalidField("the surgeon", "all that a cut must reach", "less", hint=blocked)
        # One that is made before it is needed, or of no further use, must not end the run.
        text = f"nothing is cut until it is named: {average}; " if average else ""
        held = {id(p) for group in surgeon.optimizers.groups() for p in group["params"]}
        if not surgeon.optimizers.all:
            raise _Skipped(
                text + "the surgeon has no optimizer: nothing is trained, or it will not be cut"
            )
        if surgeon.optimizers.masters:
            return f"{text}{', '.join(surgeon.optimizers.names)} with parameters of its own"
        cut = {part.tensor for g in surgeon.architecture.groups if g.prunable for part in g.slices}
        missing = [
            name
            for name, p in surgeon.model.named_parameters()
            if name in cut and p.requires_grad and id(p) not in held
        ]
        text += ", ".join(surgeon.optimizers.names)
        if missing:
            return f"{text}; in none of them, but cut: {', '.join(missing[:5])}"
        return f"{text}: all that is prunable and trained"

    def _restores(self) -> str:
        units, layers = self._some()
        tracked = self._copied()
        surgeon = tracked.surgeon
        with preserve_state(surgeon.model, 0):
            self._fill_optimizers(surgeon)
            before = Snapshot.take(tracked)
            packed = pack_tree(before.state)
            if units:
                surgeon.cut(units)
            if layers:
                surgeon.cut_layers(layers)
            Snapshot(before.architecture, unpack_tree(*packed)).put_back(tracked)
            after = pack_tree(Snapshot.take(tracked).state)
        if after != packed:
            raise InvalidField("restore points", "the state that was saved", "another state")
        return ", ".join(["network", *surgeon.optimizers.names, *self._parts])

    def _fill_optimizers(self, surgeon: Surgeon) -> None:
        """Their state begins with the first step."""
        if self._inputs is not None:
            example, _ = trainable_example(surgeon.model, self._inputs)
            if example is not None:
                _step(surgeon, example)

    def _copied(self) -> Tracked:
        """Network, optimizers and parts, copied together."""
        memo: dict[int, Any] = {}
        try:
            with torch.inference_mode(False):
                model = deep_copied(self._surgeon.model, memo)
                optimizers = copied_optimizers(self._surgeon.optimizers, memo)
                parts = copy.deepcopy(dict(self._parts), memo)
                surgeon = _OfCopy(model, self._surgeon.architecture, optimizers)
                return Tracked(surgeon, parts)
        except Exception as error:
            raise _Skipped(f"something of it cannot be copied: {error}"[:300]) from error


class _OfCopy(Surgeon):
    """For a new copy: nothing else can train it, so nobody searches the process."""

    def __init__(
        self, model: nn.Module, architecture: PrunedArchitecture, optimizers: list[Any]
    ) -> None:
        super().__init__(model, architecture, restore_points=0)
        if optimizers:
            self.optimizers = self._cuttable(optimizers)
            self._views_changed()


def _step(surgeon: Surgeon, example: Inputs) -> None:
    """One training step: the mean square of the outputs is made smaller."""
    model = surgeon.model
    seed_generators(device_of(model), 0)
    model.train()
    try:
        with clear_of_onednn(model):
            outputs = [t for t in tensors_in(call(model, example)) if t.requires_grad]
            if not outputs:
                train_once(model, example)
                return
            loss = torch.stack([t.float().square().mean() for t in outputs]).sum()
            torch.autograd.backward(loss)
        for optimizer in surgeon.optimizers.given:
            with contextlib.suppress(TypeError):  # It asks for a closure: the surgeon tried that.
                optimizer.step()
    finally:
        model.eval()
    for parameter in model.parameters():
        parameter.grad = None


def _finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.is_floating_point())
