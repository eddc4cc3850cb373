"""Every key of the design document's YAML block acts: changed alone, something that people or
machines see is different, or ``elesh config check`` names the key as advisory.

The block is taken verbatim; a key of it without a probe here fails the test. What is seen is
never a settings object: it is a decision, a message, a mask, a plan, a printed line, an outcome.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import head_networks
import layer_networks
import networks
import numpy as np
import proved_networks
import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from elesh.analysis import ImportanceTracker, analyze
from elesh.analysis.importance.tracker import measurements_of
from elesh.analysis.sketch.parameter_masks import Marking, analyze_parameters
from elesh.bus.admission import Work
from elesh.cli import app
from elesh.operate.validate import validate
from elesh.settings import Settings, SettingsError
from elesh.trainer.session.apply import Evaluation, apply_decision
from elesh.trainer.weight_masks import ParameterTracker, ask_for_masks
from elesh.worker.executor import AnalysisExecutor
from elesh.worker.fan_out import parts_of
from leyline import (
    AnalysisRequest,
    BlobRef,
    CheckpointBundle,
    IdempotencyKey,
    Level,
    StructuralPruningDecision,
)

DESIGN = Path(__file__).parent / "data" / "design.yaml"
Seen = Callable[[Settings], Any]


@dataclass(frozen=True)
class Probe:
    """A new value, and where the difference is seen."""

    value: Any
    seen: Seen
    beside: Mapping[str, Any] | None = None
    """What has to change in the same section with it (weights must sum to 1)."""


def decision(settings: Settings, bundle: CheckpointBundle, level: Level) -> Any:
    """What a decision does and why: never the limits that it repeats from its settings."""
    decided = analyze(bundle, settings, level=level)
    targets = [*decided.channels, *decided.attention_heads]
    pairs = [(t.layer_name, p.kept, p.removed) for t in targets for p in t.redundancy_pairs]
    scores = [t.importance for t in decided.channels]
    scores += [t.head_importance for t in decided.attention_heads]
    layers = [target.layer_name for target in decided.layers]
    return decided.units, layers, scores, pairs, decided.approved_for_application


def channels(epoch: int = 60, **vectors: bool) -> Seen:
    """Of 40 channels in two groups, by projections or by the three vectors."""
    bundle = networks.bundle(networks.chain((24, 20)), epoch=epoch, **vectors)
    return lambda settings: decision(settings, bundle, Level.CHANNEL)


def alike(settings: Settings) -> Any:
    """Two of 24 channels are .9 alike."""
    bundle = networks.bundle(networks.chain((24,)), gates=False)
    data = bundle.channels["g0"]
    correlations = np.eye(24, dtype=np.float32)
    correlations[3, 7] = correlations[7, 3] = 0.9
    data = data.model_copy(update={"channel_correlations": correlations})
    return decision(settings, replace(bundle, channels={"g0": data}), Level.CHANNEL)


def heads(epoch: int = 90, similarity: float = 0.0, *, gates: bool = False) -> Seen:
    """Of two attentions with six heads each, two of them alike to a degree."""
    architecture = head_networks.transformer(6, 6)
    pattern = np.eye(6, dtype=np.float32)
    pattern[1, 4] = pattern[4, 1] = similarity
    data = {
        group.name: head_networks.patterns(group.name, 6, similarity=pattern)
        for group in architecture.groups
    }
    bundle = head_networks.checkpoint(architecture, epoch, gates=gates, heads=data)
    return lambda settings: decision(settings, bundle, Level.HEAD)


def layers(epoch: int = 100) -> Seen:
    """Of ten residual blocks of which three can go."""
    bundle = layer_networks.network(cheap=(2, 4, 6), epoch=epoch)
    return lambda settings: decision(settings, bundle, Level.LAYER)


class StandIn:
    """What a surgeon does, without a network."""

    def __init__(self, bundle: CheckpointBundle) -> None:
        self.architecture, self.model = bundle.architecture, nn.Identity()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def applied(bundle: CheckpointBundle, level: Level, drop: float) -> Seen:
    """What the trainer does with an approved decision whose mask costs so much accuracy."""

    def seen(settings: Settings) -> Any:
        figures = iter([0.9, 0.9 - drop, 0.9 - drop])
        decided: StructuralPruningDecision = analyze(bundle, level=level)
        assert decided.approved_for_application, decided.rejection_reason
        return apply_decision(
            decided,
            StandIn(bundle),
            lambda: Evaluation(figure := next(figures), 1 - figure),
            triggers=settings.structured_pruning.rollback_triggers,
        ).result

    return seen


def planned(*arguments: str) -> Seen:
    """What ``elesh plan`` prints with a settings file."""

    def seen(settings: Settings) -> str:
        file = Path(settings.audit.file)
        file.write_text(yaml.safe_dump({"elesh": given(settings)}))
        done = CliRunner().invoke(app, ["plan", *arguments, "--settings", str(file)])
        assert done.exit_code == 0, done.output
        return done.output

    return seen


def given(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(
        mode="json", include={"analysis_workers_per_gpu", "analysis_timeout"}
    )


def parts(settings: Settings) -> int:
    """Into how many parts a level is split whose statistics are large."""
    bundle = networks.bundle(networks.chain((20,) * 16))
    blob = BlobRef(uri="redis:x", size=2 << 30, sha256="0" * 64)
    work = Work(
        bundle.decision_key, "", bundle.document, {"statistics.safetensors": blob}, "run", 300.0,
        datetime.now(UTC),
    )  # fmt: skip
    return len(parts_of(work, settings))


def tracked() -> ParameterTracker:
    """The parameters of a small network, some of which are dead."""
    return parameters(Settings(statistical_samples=500))


def parameters(settings: Settings) -> ParameterTracker:
    torch.manual_seed(0)
    inputs, labels = torch.randn(3, 32, 40), torch.randint(0, 3, (3, 32))
    inputs[:, :, 20:] *= 1e-6
    model = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3))
    tracker = ParameterTracker(model, settings=settings)
    tracker.observe(list(zip(inputs, labels, strict=True)))
    return tracker


def sketched(settings: Settings) -> Any:
    """Width, depth and samples of what the trainer sends of its parameters."""
    known = parameters(settings).export()
    return known.sketch.width, known.sketch.depth, sum(map(len, known.samples.values()))


class Letterbox:
    """A bus that keeps what is published."""

    def __init__(self) -> None:
        self.blobs, self.published = self, list[AnalysisRequest]()

    async def put(self, data: bytes, *_: Any, **__: Any) -> BlobRef:
        return BlobRef(uri="redis:x", size=len(data), sha256="0" * 64)

    async def publish(self, _: Any, message: AnalysisRequest, **__: Any) -> None:
        self.published.append(message)


def masked(settings: Settings) -> Any:
    """How many parameters the masks of such a request mark, and how many masks are made."""
    known = tracked().export()
    bus: Any = Letterbox()
    asyncio.run(
        ask_for_masks(bus, [known], request_id="r", epoch=3, model_hash="0" * 16, settings=settings)
    )
    (request,) = bus.published
    masks, report = analyze_parameters(
        IdempotencyKey(3, "0" * 16, "r", Level.PARAMETER),
        known.parameters,
        known.sketch,
        {name: np.asarray(values, np.float64) for name, values in known.samples.items()},
        Marking(request.marking_threshold, request.confidence_threshold),
    )
    return report.marked, len(masks.masks)


def blobs(count: int) -> dict[int, bytes]:
    """The importance of so many checkpoints as it is kept in Redis."""
    bundle = networks.bundle(networks.chain((24, 20)))
    found = {}
    for epoch in range(1, count + 1):
        metadata = bundle.metadata.model_copy(update={"epoch": epoch})
        found[epoch] = measurements_of(replace(bundle, metadata=metadata), 500)
    return found


def remembered(settings: Settings) -> int:
    """How many of six checkpoints a worker's history has."""
    tracker = ImportanceTracker.of_epochs("run", blobs(6), settings.importance_history_epochs)
    return len(tracker.epochs(networks.chain((24, 20)).groups[0]))


def kept_bytes(settings: Settings) -> list[int]:
    """How many bytes of a run's history a worker keeps."""
    asked: list[int] = []
    guard = SimpleNamespace(requires_signatures=True)
    bus: Any = SimpleNamespace(guard=guard, history=lambda epochs, nbytes: asked.append(nbytes))
    reports: Any = None
    with TemporaryDirectory() as folder:
        AnalysisExecutor(bus, settings, reports, Path(folder))
    return asked


def checked(name: str) -> Seen:
    """What ``elesh validate`` finds of one target."""

    def seen(settings: Settings) -> Any:
        bundle = proved_networks.perceptron().bundle
        (check,) = (c for c in validate(bundle, settings, units=4) if c.name == name)
        return check

    return seen


def warned(settings: Settings) -> Any:
    raise AssertionError("this key is advisory: nothing to see")


_CHANNEL = "structured_pruning.channel_analysis"
_HEAD = "structured_pruning.attention_analysis"
_LAYER = "structured_pruning.layer_analysis"
_SCHEDULE = "structured_pruning.safety_schedule"
_ROLLBACK = "structured_pruning.rollback_triggers"
_CUT = networks.bundle(networks.chain((200, 200)), epoch=60)
_HEADS_CUT = head_networks.checkpoint(head_networks.transformer(8, 8))
_MIX = channels(gates=False)
PROBES: dict[str, Probe] = {
    "analysis_workers_per_gpu": Probe(7, planned("1000", "--gpus", "3")),
    "layers_per_worker": Probe(4, parts),
    "sketch_width": Probe(5000, sketched),
    "sketch_depth": Probe(4, sketched),
    "importance_history_epochs": Probe(4, remembered),
    f"{_CHANNEL}.taylor_weight": Probe(0.7, _MIX, {"magnitude_weight": 0.1}),
    f"{_CHANNEL}.magnitude_weight": Probe(0.1, _MIX, {"frequency_weight": 0.4}),
    f"{_CHANNEL}.frequency_weight": Probe(0.4, _MIX, {"taylor_weight": 0.3}),
    f"{_CHANNEL}.redundancy_threshold": Probe(0.85, alike),
    f"{_CHANNEL}.min_channels_per_layer": Probe(24, channels()),
    f"{_HEAD}.entropy_weight": Probe(0.5, heads(), {"diversity_weight": 0.1}),
    f"{_HEAD}.diversity_weight": Probe(0.5, heads(), {"gradient_weight": 0.2}),
    f"{_HEAD}.gradient_weight": Probe(0.6, heads(), {"entropy_weight": 0.1}),
    f"{_HEAD}.similarity_threshold": Probe(0.85, heads(similarity=0.9)),
    f"{_HEAD}.min_heads_per_layer": Probe(6, heads()),
    f"{_LAYER}.taylor_threshold": Probe(0.0001, layers()),
    f"{_LAYER}.similarity_threshold": Probe(0.995, layers()),
    f"{_LAYER}.skip_potential_threshold": Probe(0.96, layers()),
    f"{_LAYER}.max_layer_removal_ratio": Probe(0.1, layers()),
    f"{_SCHEDULE}.validation_epochs": Probe(60, channels(60)),
    f"{_SCHEDULE}.conservative_epochs": Probe(300, channels(60)),
    f"{_SCHEDULE}.moderate_epochs": Probe(300, heads(90)),
    f"{_SCHEDULE}.aggressive_epochs": Probe(5, layers(100)),
    f"{_ROLLBACK}.channel_accuracy_drop": Probe(0.04, applied(_CUT, Level.CHANNEL, 0.03)),
    f"{_ROLLBACK}.head_accuracy_drop": Probe(0.05, applied(_HEADS_CUT, Level.HEAD, 0.04)),
    f"{_ROLLBACK}.layer_accuracy_drop": Probe(
        0.07, applied(layer_networks.network(), Level.LAYER, 0.06)
    ),
    "analysis_timeout": Probe(60, planned("1000000000")),
    "marking_threshold": Probe(1e-3, masked),
    "confidence_threshold": Probe(1.0, masked),
    "analysis_cache_size": Probe(1000, kept_bytes),
    "parallel_analysis_threads": Probe(2, warned),
    "statistical_samples": Probe(100, sketched),
    "accuracy_targets.channel_importance_ranking.metric": Probe(
        "spearman", checked("channel_importance_ranking")
    ),
    "accuracy_targets.attention_redundancy_detection.metric": Probe("other", warned),
    "accuracy_targets.layer_skip_potential.metric": Probe("other", warned),
    "accuracy_targets.structured_pruning_accuracy.metric": Probe("other", warned),
} | {
    f"accuracy_targets.{name}.target": Probe(0.5, checked(name))
    for name in (
        "channel_importance_ranking",
        "attention_redundancy_detection",
        "layer_skip_potential",
        "structured_pruning_accuracy",
    )
}
ONE_VALUE = {key for key, probe in PROBES.items() if probe.value == "other"}
"""Only the document's value is known: another is an error that names the key."""


def leaves(section: Any, path: tuple[str, ...] = ()) -> list[str]:
    if not isinstance(section, dict):
        return [".".join(path)]
    return [leaf for key, value in section.items() for leaf in leaves(value, (*path, key))]


def document() -> dict[str, Any]:
    return yaml.safe_load(DESIGN.read_text())


def changed(folder: Path, key: str | None) -> Path:
    """A file of the document's block with this one key changed."""
    block = document()
    if key is not None:
        section, probe = block["elesh"], PROBES[key]
        *path, leaf = key.split(".")
        for name in path:
            section = section[name]
        assert section[leaf] != probe.value
        section |= {leaf: probe.value, **(probe.beside or {})}
    # Not the document's: a place where probes may write.
    block["elesh"]["audit"] = {"file": str(folder / "scratch.yaml")}
    file = folder / f"{key}.yaml"
    file.write_text(yaml.safe_dump(block))
    return file


def advised(file: Path) -> str:
    done = CliRunner().invoke(app, ["config", "check", str(file)], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    return done.output


def test_every_key_of_the_document_has_a_probe() -> None:
    keys = leaves(document()["elesh"])
    assert len(keys) == 40
    assert sorted(keys) == sorted(PROBES)


@pytest.mark.parametrize("key", sorted(PROBES))
@pytest.mark.sampled
def test_a_changed_key_changes_what_is_seen_or_is_named_as_advisory(
    key: str, tmp_path: Path
) -> None:
    file, probe = changed(tmp_path, key), PROBES[key]
    if key in ONE_VALUE:
        with pytest.raises(SettingsError, match=rf"{key}: Input should be"):
            Settings.load(file)
        return
    if probe.seen is warned:
        assert f"advisory: {key}: " in advised(file)
        return
    before, after = Settings.load(changed(tmp_path, None)), Settings.load(file)
    first = probe.seen(before)
    assert probe.seen(copy.deepcopy(before)) == first, "the probe itself is steady"
    assert probe.seen(after) != first


def test_a_cap_that_is_reached_is_not_advisory(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("elesh: {parallel_analysis_threads: 2, worker: {threads: 4}}")
    assert "advisory" not in advised(file)
    assert Settings.load(file).threads == 2
