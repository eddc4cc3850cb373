"""The self-check of one checkpoint against the design document's accuracy targets.

Promises: every target of the settings has a check, in the document's order; one that cannot be
measured says by name what is missing and what to do. Nothing is decided and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from elesh.analysis.accuracy import AccuracyCheck, half_split_error, not_measured, sketch_error
from elesh.bus import Bus
from elesh.settings import AccuracyTargets, Settings
from leyline import CheckpointBundle, ContractError, TelemetryEvent
from leyline.streams import TELEMETRY

_WITHOUT_NETWORK = (
    "the checkpoint carries no network: export one with elesh.trainer.export.Exporter and save the "
    "bundle with it (docs/verification.md)"
)
_WITHOUT_TORCH = "torch is not installed here: pip install 'elesh[torch]'"
_NEED_THE_NETWORK = (
    "channel_importance_ranking",
    "attention_redundancy_detection",
    "layer_skip_potential",
)
UNITS = 64
"""Channels of a group that are masked one by one, if it has more."""


def validate(
    bundle: CheckpointBundle,
    settings: Settings,
    *,
    units: int = UNITS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[AccuracyCheck, ...]:
    """Check the importance of a checkpoint against what its network does on held-out samples.

    Args:
        units: at most so many channels of a group are masked one by one.
        progress: is called with how many of how many are done.
    """
    return (*_measured(bundle, settings, units, progress), _estimation(bundle, settings))


def _measured(
    bundle: CheckpointBundle, settings: Settings, units: int, progress: Callable[[int, int], None]
) -> tuple[AccuracyCheck, ...]:
    network, reason = bundle.network, _WITHOUT_NETWORK
    if network is not None and (find_spec("torch") is None or find_spec("safetensors") is None):
        network, reason = None, _WITHOUT_TORCH
    if network is not None:
        from elesh.program import accuracy
        from elesh.program.program import DOES_NOT_RUN

        try:
            bench = accuracy.open_bench(bundle, network)
            return (
                accuracy.ranking_check(bench, bundle, settings, units, progress),
                accuracy.redundancy_check(bench, bundle, settings),
                accuracy.gradient_flow_check(bench, network, bundle, settings),
            )
        except ContractError as error:
            reason = str(error)
        except DOES_NOT_RUN as error:
            reason = f"the program does not run: {type(error).__name__}: {error}"
    targets: AccuracyTargets = settings.accuracy_targets
    return tuple(not_measured(name, getattr(targets, name), reason) for name in _NEED_THE_NETWORK)


def _estimation(bundle: CheckpointBundle, settings: Settings) -> AccuracyCheck:
    name, wanted = (
        "structured_pruning_accuracy",
        settings.accuracy_targets.structured_pruning_accuracy,
    )
    found = sketch_error(bundle, settings)
    if found is None:
        return not_measured(name, wanted, "the checkpoint has no importance above zero")
    error, units = found
    detail = (
        f"Taylor importance of {units} units, read from a sketch of {settings.sketch_width} x "
        f"{settings.sketch_depth} cells; half split: what the calibration samples leave open"
    )
    noise = half_split_error(bundle)
    return AccuracyCheck(name, wanted.metric, wanted.target, error, noise, detail)


async def publish_checks(
    bus: Bus, bundle: CheckpointBundle, checks: tuple[AccuracyCheck, ...], by: str
) -> None:
    """Tell the checks as telemetry of the checkpoint's run.

    Args:
        by: who measured.
    """
    figures: dict[str, float] = {}
    for check in checks:
        for part, value in (("", check.value), (".ceiling", check.ceiling)):
            if value is not None:
                figures[f"{check.name}{part}"] = value
    event = TelemetryEvent(
        step="validated",
        worker_id=by,
        idempotency_key=str(bundle.decision_key),
        run_id=bundle.metadata.run_id,
        epoch=bundle.metadata.epoch,
        at=await bus.clock.now(),
        figures=figures,
        detail="; ".join(f"{check.name} {check.verdict}" for check in checks),
    )
    await bus.publish(
        TELEMETRY, event, source="elesh", run_id=event.run_id, epoch=bundle.metadata.epoch
    )
