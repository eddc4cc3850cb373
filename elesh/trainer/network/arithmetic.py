"""The arithmetic of a network: in its own precision, and avoiding a bug of PyTorch.

Autocast, of the caller or of the network's own ``forward`` (Accelerate wraps it in one), rounds to
bfloat16: what is measured or exported under it says little about a unit.

On processors with AVX2 and no AVX-512, oneDNN (PyTorch 2.13) writes past its buffer in the weight
gradient of a strided 1 x 1 convolution that reads fewer than 8 channels stored last. A cut that
leaves so few makes the next training step end the process, which nothing can catch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .traversal import parameters_in

__all__ = ["SAFE_CHANNELS", "clear_of_onednn", "full_precision", "narrowing_is_unsafe"]

SAFE_CHANNELS = 8
"""What such a convolution has to read at least."""
_plain = threading.local()
"""How many blocks of :func:`full_precision` this thread is in."""
_switching = threading.Lock()
_blocks = 0
_enter, _exit = torch.autocast.__enter__, torch.autocast.__exit__


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """No autocast in this thread, neither on the network's devices nor on the processor.

    The network's own is left out, too, if all its parameters are in single precision or more:
    others may not fit their inputs without it.
    """
    parameters = parameters_in(model).values()
    floating = (p for p in parameters if p.is_floating_point())
    own = all(p.dtype.itemsize >= torch.float32.itemsize for p in floating)
    with contextlib.ExitStack() as stack:
        for kind in {parameter.device.type for parameter in parameters} | {"cpu"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if own:
            stack.enter_context(_without_autocast())
        yield


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """Blocks of autocast do nothing in this thread; other threads' do what they did."""
    global _blocks
    with _switching:
        _blocks += 1
        torch.autocast.__enter__, torch.autocast.__exit__ = _entered, _left  # type: ignore[method-assign]
    _plain.depth = getattr(_plain, "depth", 0) + 1
    try:
        yield
    finally:
        _plain.depth -= 1
        with _switching:
            _blocks -= 1
            if not _blocks:
                torch.autocast.__enter__, torch.autocast.__exit__ = _enter, _exit  # type: ignore[method-assign]


def _entered(block: torch.autocast) -> Any:
    return block if getattr(_plain, "depth", 0) else _enter(block)  # type: ignore[no-untyped-call]


def _left(block: torch.autocast, *error: Any) -> Any:
    return False if getattr(_plain, "depth", 0) else _exit(block, *error)


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
