"""What looking at public networks costs: passes and memory of a Recorder, passes of ``measure``.

    python -m benchmarks.zoo.costs [--time] [NAME ...]

Every network is one line of JSON at the end of ``costs.jsonl``; the page takes the last figure of
each kind. Much quicker than :mod:`benchmarks.zoo`, as nothing is cut; with ``--time`` memory, which
takes longest, is left out.
"""

from __future__ import annotations

import datetime
import gc
import json
import logging
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elesh.trainer import Recorder
from elesh.trainer.network.calling import call, main_output, tensors_in

from .networks import NAMES, build
from .ours import plain_pass

__all__ = ["RESULTS", "examine"]

RESULTS = Path(__file__).with_name("costs.jsonl")
_TURNS, _FEWEST_TURNS, _SECONDS = 5, 2, 8.0
"""So often everything is done, but no further turn begins after so many seconds."""


def examine(name: str, memory: bool = True) -> dict[str, Any]:
    """Figures of one network.

    Args:
        memory: whether that is measured, too.

    Returns:
        ``passes``: CPU time of making a Recorder in plain passes; ``memory``: the
        most bytes of tensors that it holds beyond the network, and ``plain_memory`` what a plain
        pass does, as shares of the parameters; ``measure``: CPU time of ``Recorder.measure`` over
        the example.
    """
    model, inputs = build(name)
    recorder = Recorder(model, inputs)
    works: dict[str, Callable[[], object]] = {"passes": lambda: Recorder(model, inputs)}
    row: dict[str, Any] = {"name": name}
    try:
        if (labels := _labels(model, inputs)) is not None:
            recorder.measure([(inputs, labels)], epoch=0)
            works["measure"] = lambda: recorder.measure([(inputs, labels)], epoch=0)
    except Exception as error:
        row["measure_error"] = f"{type(error).__name__}: {str(error)[:120]}"
    row |= _in_passes(works, lambda: plain_pass(model, inputs))
    if memory:
        row["memory"] = _memory(model, inputs, lambda: Recorder(model, inputs))
        row["plain_memory"] = _memory(model, inputs, lambda: plain_pass(model, inputs))
    return row


def _in_passes(
    works: Mapping[str, Callable[[], object]], passing: Callable[[], float]
) -> dict[str, float]:
    """CPU time of works in plain passes, by name: in turns, the least of each, as others may be at
    work on the machine."""
    least = dict.fromkeys(works, float("inf"))
    plain, begun = float("inf"), time.process_time()
    for turn in range(_TURNS):
        if turn >= _FEWEST_TURNS and time.process_time() - begun > _SECONDS:
            break
        plain = min(plain, passing())
        for name, work in works.items():
            started = time.process_time()
            work()
            least[name] = min(least[name], time.process_time() - started)
    plain = min(plain, passing())
    return {name: spent / plain for name, spent in least.items()}


def _labels(model: nn.Module, inputs: Any) -> Tensor | None:
    """The classes that the network finds for the example; None where it has no logits."""
    with torch.no_grad():
        logits = main_output(call(model, inputs))
    if not logits.is_floating_point() or logits.ndim < 2:
        return None
    return logits.movedim(1, -1).argmax(-1) if logits.ndim == 4 else logits.argmax(-1)


def _memory(model: nn.Module, inputs: Any, work: Callable[[], object]) -> float:
    held = [*model.parameters(), *model.buffers(), *tensors_in(inputs)]
    with Allocated(held) as allocated:
        work()
    return allocated.most / sum(p.numel() * p.element_size() for p in model.parameters())


class Allocated(TorchDispatchMode):
    """Counts the bytes of storages that operations make, as long as they live.

    Args:
        known: tensors that are there already.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._live = set[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self._known and address not in self._live:
            self._live.add(address)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._live.discard(address)
        self.now -= size


def main() -> None:
    """See the module."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    gc.freeze()
    names = [name for name in sys.argv[1:] if name != "--time"]
    for name in names or NAMES:
        try:
            row = examine(name, memory="--time" not in sys.argv[1:])
        except Exception as error:
            print(name, f"{type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        row["measured"] = datetime.date.today().isoformat()
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
