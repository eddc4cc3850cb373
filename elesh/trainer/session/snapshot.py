"""Everything that training needs to go on from here: taken, put back, written and read.

Promises: after :meth:`Snapshot.put_back` weights, buffers, optimizer, schedulers, gradient scaler
and random states are bit for bit what they were when it was taken, and so is the structure of the
network, in this process or in a later one that built the network anew.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from elesh.trainer.surgery.surgeon import Surgeon
from elesh.trainer.surgery.tensors import replace_data
from leyline import InvalidField, PrunedArchitecture

from .trees import copy_tree, put_home

__all__ = ["Snapshot", "Stateful", "Tracked"]


class Stateful(Protocol):
    """A scheduler, a gradient scaler, or whatever else keeps its state this way."""

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take a state in."""


@dataclass(frozen=True)
class Tracked:
    """What a snapshot is taken of: the surgeon's network and optimizer, and parts by name."""

    surgeon: Surgeon
    parts: Mapping[str, Stateful | torch.Generator] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A point in a training run; its tensors are copies on the CPU."""

    architecture: PrunedArchitecture
    state: dict[str, Any]

    @classmethod
    def take(cls, tracked: Tracked) -> Snapshot:
        """A copy of the present.

        Raises:
            InvalidField: if a part's state holds what is neither a tensor nor a plain value.
        """
        surgeon = tracked.surgeon
        state = {
            "tensors": _tensors(surgeon.model),
            "optimizer": _optimizer_state(surgeon.optimizer),
            "parts": {name: _state_of(part) for name, part in tracked.parts.items()},
            "random": _random_states(),
        }
        return cls(surgeon.architecture, copy_tree(state, "training"))

    def put_back(self, tracked: Tracked) -> None:
        """Make this the present again; masks are taken off and gradients dropped.

        Raises:
            InvalidField: if the parts are not those of the snapshot, or the network does not
                descend from the same original. Nothing has been changed then.
        """
        self._require_same_parts(tracked)
        surgeon = tracked.surgeon
        surgeon.move_to(self.architecture)
        tensors = _tensors(surgeon.model)
        for path, saved in self.state["tensors"].items():
            if path not in tensors:
                raise InvalidField(f"restore point.{path}", "a tensor of the network", "none")
            _fill(tensors[path], saved)
        _set_optimizer(surgeon.optimizer, self.state["optimizer"])
        for name, part in tracked.parts.items():
            _set_state(part, put_home(self.state["parts"][name]))
        _set_random_states(self.state["random"])

    def _require_same_parts(self, tracked: Tracked) -> None:
        there = {
            "parts": sorted(tracked.parts),
            "optimizer groups": len(optimizer.param_groups)
            if (optimizer := tracked.surgeon.optimizer)
            else 0,
        }
        kept = {
            "parts": sorted(self.state["parts"]),
            "optimizer groups": len(self.state["optimizer"]),
        }
        for name, expected in kept.items():
            if there[name] != expected:
                hint = "resume with what the restore point was taken of"
                raise InvalidField(f"restore point.{name}", str(expected), there[name], hint=hint)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, those too that no ``state_dict`` holds, each once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _optimizer_state(optimizer: torch.optim.Optimizer | None) -> list[dict[str, Any]]:
    """The groups with their settings and, in the order of their parameters, the state of each."""
    if optimizer is None:
        return []
    return [
        {
            "settings": {key: value for key, value in group.items() if key != "params"},
            "states": [dict(optimizer.state.get(p) or {}) for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]


def _set_optimizer(optimizer: torch.optim.Optimizer | None, groups: list[dict[str, Any]]) -> None:
    # Not by load_state_dict: that casts moments to the parameter's dtype.
    if optimizer is None:
        return
    optimizer.state.clear()
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key in group.keys() - saved["settings"].keys() - {"params"}:
            del group[key]
        group.update(put_home(saved["settings"]))
        for parameter, state in zip(group["params"], saved["states"], strict=True):
            if state:
                optimizer.state[parameter] = put_home(state)


def _state_of(part: Stateful | torch.Generator) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _set_state(part: Stateful | torch.Generator, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        part.load_state_dict(state)


def _random_states() -> dict[str, Any]:
    """The states of the global generators of Python, NumPy and PyTorch."""
    accelerators = [device for device in (torch.cuda,) if device.is_available()]
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": [state for device in accelerators for state in device.get_rng_state_all()],
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _fill(tensor: Tensor, saved: Tensor) -> None:
    """Put content into a tensor of the model, with the layout that it had in memory."""
    content = saved.to(tensor.device)
    if tensor.shape == saved.shape and tensor.stride() != saved.stride():
        tensor.data = content.clone()
    else:
        replace_data(tensor, content.clone() if tensor.shape != saved.shape else content)
