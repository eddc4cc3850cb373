"""A small training run for the tests of restore points, and decisions made by hand."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from trainer_nets import architecture_of, batches, build, example

from elesh.settings import Settings
from elesh.trainer import Evaluation, Recorder, Surgeon
from elesh.trainer.network.onednn import clear_of_onednn
from elesh.trainer.recovery.journal import MadeCut
from elesh.trainer.recovery.recovery import Recovery
from elesh.trainer.recovery.snapshot import Snapshot, Tracked, pack_tree
from elesh.trainer.session.apply import RefitData
from elesh.trainer.session.monitoring import MonitoredCuts
from leyline import (
    ChannelPruningTarget,
    IdempotencyKey,
    LayerPruningTarget,
    Level,
    Outcome,
    Phase,
    PrunedArchitecture,
    PruningOutcome,
    PruningStatistics,
    SafetyValidation,
    StructuralPruningDecision,
)

_EMA = get_ema_multi_avg_fn(0.9)


def _groups(model: nn.Module, count: int) -> list[dict[str, Any]]:
    """The parameters in so many groups with settings of their own."""
    parameters = list(model.parameters())
    return [{"params": parameters[i::count], "weight_decay": 0.01 * i} for i in range(count)]


class World:
    """A network with everything that a training script has around it; the same for each seed."""

    def __init__(
        self,
        name: str = "ResNet",
        architecture: PrunedArchitecture | None = None,
        restore_points: int = 1,
        averaged: bool = False,
    ) -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(7)
        self.model = build("ResNet").to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(_groups(self.model, 2 if averaged else 1), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 3])
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.generator = torch.Generator().manual_seed(3)
        averaging = {"multi_avg_fn": _EMA, "use_buffers": True}
        self.ema = AveragedModel(self.model, **averaging) if averaged else None
        known = architecture or architecture_of("ResNet")
        recorder = Recorder(self.model, example(), architecture=known)
        self.original = recorder.architecture
        self.surgeon = Surgeon(
            self.model, self.original, optimizer=self.optimizer, restore_points=restore_points
        )

    @property
    def parts(self) -> dict[str, Any]:
        parts = {"scheduler": self.scheduler, "scaler": self.scaler, "generator": self.generator}
        return parts | ({"ema": self.ema} if self.ema else {})

    @property
    def tracked(self) -> Tracked:
        return Tracked(self.surgeon, self.parts)

    def train(self, steps: int = 2) -> None:
        """Some steps that draw random numbers everywhere."""
        self.model.train()
        for inputs, labels in batches(steps):
            noise = torch.randn(inputs.shape, generator=self.generator) * random.random()
            self.optimizer.zero_grad()
            with clear_of_onednn(self.model):
                loss = nn.functional.cross_entropy(self.model(inputs + noise), labels)
                self.scaler.scale(loss * np.random.rand()).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema:
                self.ema.update_parameters(self.model)
        self.scheduler.step()
        self.model.eval()

    def digest(self) -> str:
        """Everything that restore points promise, and the sizes of the modules, as one hash."""
        snapshot = Snapshot.take(self.tracked)
        found = hashlib.sha256()
        for data in pack_tree(snapshot.state):
            found.update(data)
        found.update(snapshot.architecture.model_dump_json().encode())
        for name, module in self.model.named_modules():
            sizes = {k: v for k, v in vars(module).items() if type(v) is int}
            found.update(msgpack.packb([name, type(module).__name__, sorted(sizes.items())]))
        return found.hexdigest()


def decide(
    architecture: PrunedArchitecture,
    *,
    units: int = 2,
    number: int = 1,
    layers: tuple[str, ...] = (),
    groups: int = 2,
) -> StructuralPruningDecision:
    """An approved decision that takes the first ``units`` of the first ``groups`` groups."""
    prunable = [g for g in architecture.groups if g.prunable and g.size > units][:groups]
    targets = [
        ChannelPruningTarget(
            layer_name=g.name,
            channel_indices=tuple(range(units)),
            original_indices=g.origin[:units],
            importance=(0.1,) * units,
            channels_before=g.size,
            channels_after=g.size - units,
        )
        for g in prunable
        if g.level is Level.CHANNEL and units and (g.size - units) % g.unit_multiple == 0
    ]
    gone = [
        LayerPruningTarget(
            layer_name=name,
            importance=0.0,
            gradient_flow=1.0,
            similarity=1.0,
            skip_potential=1.0,
            skip_strategy="residual",
            architecture_impact=0.1,
        )
        for name in layers
    ]
    after = architecture.without({t.layer_name: t.channel_indices for t in targets})
    after = after.without_layers(layers) if layers else after
    level = Level.LAYER if layers and not targets else Level.CHANNEL
    key = IdempotencyKey(60, architecture.model_hash, f"ck-{number}", level)
    return StructuralPruningDecision(
        idempotency_key=str(key),
        run_id="run",
        epoch=60,
        model_hash=architecture.model_hash,
        channels=tuple(targets),
        layers=tuple(gone),
        statistics=PruningStatistics(
            scorer="output_projection",
            parameters_before=architecture.parameters,
            parameters_after=after.parameters,
            macs_before=architecture.macs,
            macs_after=after.macs,
            channels_before=100,
            channels_after=98,
            channels_original=100,
            quota=2,
            phase_limit=0.05,
            cumulative_ratio=0.02,
        ),
        safety=SafetyValidation(outcome=Outcome.GO, phase=Phase.CONSERVATIVE, gates=()),
        approved_for_application=True,
    )


def told(*accuracies: float) -> Any:
    """An ``evaluate`` that says these accuracies in turn, then the last one for ever.

    It draws random numbers, as real ones may.
    """
    left, calls = list(accuracies), count(1)

    def evaluate() -> Evaluation:
        torch.rand(1)
        accuracy = left.pop(0) if len(left) > 1 else left[0]
        # No two are bit for bit the same: a mask moves real ones.
        return Evaluation(accuracy, 1 - accuracy + next(calls) * 1e-9)

    return evaluate


class Run:
    """What a session has of a run, without a bus: its restore points and its cuts."""

    def __init__(self, folder: Path | None = None, **trainer: Any) -> None:
        settings = trainer_settings(**trainer)
        self.recovery = Recovery(folder, settings.trainer.restore_points)
        self.cuts = MonitoredCuts(settings, self.recovery)
        self.resume, self.save = self.recovery.resume, self.recovery.save
        self.watch = self.cuts.watch
        self.reported, self.close = self.recovery.reported, self.recovery.close

    def apply(
        self,
        decision: StructuralPruningDecision,
        surgeon: Surgeon,
        evaluate: Callable[[], Evaluation],
        known: Evaluation | None = None,
        **data: Any,
    ) -> PruningOutcome:
        return self.cuts.apply(decision, surgeon, evaluate, RefitData(**data), known)

    @property
    def monitored(self) -> tuple[MadeCut, ...]:
        return self.cuts.monitored

    @property
    def unreported(self) -> list[PruningOutcome]:
        return self.recovery.unreported


def trainer_settings(**trainer: Any) -> Settings:
    return Settings(trainer=trainer)


def outputs(world: World) -> Tensor:
    with torch.no_grad():
        return world.model(example())
