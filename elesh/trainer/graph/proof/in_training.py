"""Proves what only training mode shows: that layers called only there (auxiliary heads) read the
channels that were found.

Promises: everything runs as in training but for normalisations and dropout, which would differ
between two runs by themselves; the copy is left in evaluation mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from elesh.trainer.network.calling import call, device_of, summary, tensors_in
from elesh.trainer.network.state import seed_generators
from leyline import GateSite, PrunedArchitecture

from .trial import Trial, TrialCuts
from .waypoints import apart

__all__ = ["without_refuted_in_training"]


def without_refuted_in_training(
    trial: Trial, architecture: PrunedArchitecture, sites: Mapping[str, Sequence[GateSite]]
) -> PrunedArchitecture:
    """The architecture, groups marked with a reason where masking and cutting differ in training.

    Args:
        sites: by group, where its channels enter layers that only training calls.
    """
    names = [name for name in sites if architecture.group[name].prunable]
    if not names or not _differ(trial, architecture, sites, names):
        return architecture
    found = {name: _differ(trial, architecture, sites, [name]) for name in names}
    groups = [
        group.model_copy(update={"prunable": False, "reason": found[group.name]})
        if found.get(group.name)
        else group
        for group in architecture.groups
    ]
    return PrunedArchitecture.unchecked(architecture.tensors, architecture.layers, tuple(groups))


def _differ(
    trial: Trial,
    architecture: PrunedArchitecture,
    sites: Mapping[str, Sequence[GateSite]],
    names: Collection[str],
) -> str:
    """Why these groups cannot be cut in training mode; empty if they can."""
    groups = [
        group.model_copy(update={"sites": (*group.sites, *sites[group.name])})
        if group.name in names
        else group
        for group in architecture.groups
    ]
    whole = PrunedArchitecture.unchecked(architecture.tensors, architecture.layers, tuple(groups))
    cuts, rng = TrialCuts(trial.copied, whole), np.random.default_rng(0)
    sizes = {name: whole.group[name].size for name in names}
    units = {name: rng.permutation(n)[: max(1, n // 2)].tolist() for name, n in sizes.items()}
    readers = ", ".join(dict.fromkeys(site.module for name in names for site in sites[name]))
    try:
        with cuts.masked(units):
            masked = _outputs(trial)
        with cuts.cut(units):
            cut = _outputs(trial)
    except Exception as error:  # Whatever the user's network raises.
        return f"training does not run without some of what {readers} reads: {summary(error)}"
    if reason := apart(masked, cut):
        return f"masking and cutting differ in training ({reason}): {readers} reads it"
    return ""


def _outputs(trial: Trial) -> list[Tensor]:
    seed_generators(device_of(trial.copied), 0)
    example = trial.example_in_training
    with torch.no_grad(), _training(trial.copied):
        outputs = tensors_in(call(trial.copied, example)) if example is not None else []
    return [tensor for tensor in outputs if tensor.is_floating_point()]


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode for all modules that have parts."""
    for module in model.modules():
        module.training = any(True for _ in module.children())
    try:
        yield
    finally:
        model.eval()
