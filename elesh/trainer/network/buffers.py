"""Buffers that go with channels: positions that are added to a stream, frozen statistics.

Promises: inside :func:`with_history` autograd follows such buffers as it does parameters, so that
the pass shows where each meets the channels; afterwards the modules hold what they held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn

from .layers import channel_axes

__all__ = ["with_history"]


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
