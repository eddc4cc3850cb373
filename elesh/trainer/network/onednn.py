"""A bug of PyTorch that narrow networks meet, and how to avoid it.

On processors with AVX2 and no AVX-512, oneDNN (PyTorch 2.13) writes past its buffer in the weight
gradient of a strided 1 x 1 convolution that reads fewer than 8 channels stored last. A cut that
leaves so few makes the next training step end the process, which nothing can catch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

SAFE_CHANNELS = 8
"""What such a convolution has to read at least."""


def narrowing_is_unsafe(model: nn.Module) -> bool:
    """Whether the fault is met once a group of this network is narrower than ``SAFE_CHANNELS``."""
    return _concerned() and bool(_strided(model)) and _stores_channels_last(model)


@contextlib.contextmanager
def clear_of_onednn(model: nn.Module) -> Iterator[None]:
    """Without oneDNN inside, if the network is so narrow that a training step could abort."""
    if _concerned() and any(m.in_channels // m.groups < SAFE_CHANNELS for m in _strided(model)):
        enabled = bool(torch.backends.mkldnn.enabled)
        torch.backends.mkldnn.set_flags(_enabled=False)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            torch.backends.mkldnn.set_flags(_enabled=enabled)  # type: ignore[no-untyped-call]
    else:
        yield


def _concerned() -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available) and torch.backends.cpu.get_cpu_capability() == "AVX2"


def _strided(model: nn.Module) -> list[nn.Conv2d]:
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
        and tuple(module.kernel_size) == (1, 1)
        and max(module.stride) > 1
        and module.weight.device.type == "cpu"
    ]


def _stores_channels_last(model: nn.Module) -> bool:
    return any(
        p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in model.parameters()
    )
