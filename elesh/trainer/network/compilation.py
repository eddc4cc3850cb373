"""Compiled networks: unwrapped when they are given, run uncompiled while hooks are on them,
compiled anew after their structure changed.

A compiled function keeps what it was compiled from: it does not see hooks that come later, and it
is no longer compiled after a few changes of shape (``recompile_limit``). Promises: where nothing
was compiled in this process, nothing of the compiler is imported.
"""

from __future__ import annotations

import sys
import weakref
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["Uncompiled", "compile_anew", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, where ``torch.compile(network)``, or a wrapper for several processes or
    devices, was given."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def compile_anew() -> None:
    """Have everything that was compiled in this process compiled again when it is next called."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class Uncompiled:
    """While any of these is entered, compiled networks run uncompiled in this process.

    They may be left in any order; the last one restores the compiler's stance of before. One that
    is never left ends with its network: a masked network that is gone stops no compiler.
    """

    _entered = 0
    _stance: Any = None

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._leave: weakref.finalize[[], nn.Module] | None = None

    def __enter__(self) -> Uncompiled:
        if self._leave is None and "torch._dynamo" in sys.modules:
            if not Uncompiled._entered:
                Uncompiled._stance = torch.compiler.set_stance("force_eager")
            Uncompiled._entered += 1
            self._leave = weakref.finalize(self._model, Uncompiled._one_left)
            self._leave.atexit = False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        if self._leave is not None:
            self._leave()
            self._leave = None

    @staticmethod
    def _one_left() -> None:
        Uncompiled._entered -= 1
        if not Uncompiled._entered:
            stance, Uncompiled._stance = Uncompiled._stance, None
            stance.__exit__(None, None, None)
