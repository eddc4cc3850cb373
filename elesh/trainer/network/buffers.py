"""Buffers that are cut with channels: positions that are added to a stream, frozen statistics.

Promises: inside :func:`with_history` autograd follows such buffers as it does parameters, so that
the pass shows where each meets the channels; afterwards the modules hold what they held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .layers import channel_axes


@contextlib.contextmanager
def with_history(model: nn.Module) -> Iterator[Mapping[str, nn.Parameter]]:
    """Every buffer of several floating-point numbers in the ``state_dict``, by path, as a leaf of
    the autograd graph; not those that a known kind of layer has for its channels (running
    statistics)."""
    before = [(module, dict(module._buffers)) for module in model.modules()]
    made: dict[int, nn.Parameter] = {}
    found: dict[str, nn.Parameter] = {}
    try:
        for path, module in model.named_modules():
            own = {name for name, _ in channel_axes(module).outputs}
            for name, held in module._buffers.items():
                left = name not in own and name not in module._non_persistent_buffers_set
                if left and held is not None and held.is_floating_point() and held.numel() > 1:
                    leaf = made.setdefault(id(held), nn.Parameter(held))
                    module._buffers[name] = leaf
                    if not any(leaf is other for other in found.values()):
                        found[f"{path}.{name}".lstrip(".")] = leaf
        yield found
    finally:
        for module, buffers in before:
            module._buffers.clear()
            module._buffers.update(buffers)


class StaysFollowed(TorchFunctionMode):
    """While entered, code that takes the history away from what it makes of such a buffer alone
    (``positions[:n].requires_grad_(False)``, ``detach()``) is given that as it is."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        stops = function in _STOPS or function == _DATA
        if stops and args[0].grad_fn is not None and _of_leaves(args[0].grad_fn):
            return args[0]
        return function(*args, **(kwargs or {}))


_STOPS = (Tensor.requires_grad_, Tensor.detach)
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_NEAR = 8
"""From a buffer to where its history is taken away there are few operations."""


def _of_leaves(function: Any) -> bool:
    """Whether a value was made of one leaf, and nothing else, by few operations."""
    for _ in range(_NEAR):
        before = [source for source, _ in function.next_functions if source is not None]
        if len(before) != 1:
            return False
        function = before[0]
        if hasattr(function, "variable"):
            return True
    return False
