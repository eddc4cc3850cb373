"""Every reader of untrusted bytes, by name, with sound bytes to begin from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from elesh.analysis import CountMinSketch, ImportanceTracker, element_keys
from elesh.bus.admission import admit, read
from elesh.program.program import Program
from elesh.security import Keyring, seal, unseal
from elesh.trainer import Recorder
from elesh.trainer.export import Exporter
from leyline import (
    ChannelImportanceData,
    CheckpointBundle,
    GateStatistics,
    HeadImportanceData,
    LayerStatistics,
    Message,
    encode,
    read_envelope,
    unwrap,
    wrap,
)
from leyline.codec import decode
from leyline.network.bundle import unpack_statistics
from leyline.streams import MESSAGES

VECTORS = Path(__file__).parents[2] / "contracts" / "vectors"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
_KEY, _HASH = bytes(32), "0123456789abcdef"

Reader = Callable[[bytes], object]


def _message(data: bytes) -> object:
    return unwrap(read_envelope(data))


def _work(data: bytes) -> object:
    return admit(read(data), window=300.0, now=NOW)


def _statistics(kind: type[Message]) -> Reader:
    return lambda data: unpack_statistics(kind, data, "statistics")


def _sketch() -> bytes:
    sketch = CountMinSketch(50, 3)
    sketch.add(element_keys(_HASH, np.arange(40)), np.ones(40))
    return sketch.to_bytes()


@cache
def checkpoint() -> CheckpointBundle:
    """A small checkpoint that carries its network, in a phase that prunes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).eval()
    inputs, labels = torch.randn(64, 6), torch.arange(64) % 3
    recorder = Recorder(model, inputs[:2])
    bundle = recorder.measure([(inputs, labels)], epoch=60, run_id="run")
    return replace(bundle, network=Exporter(model).export(recorder.architecture, (inputs, labels)))


def _program() -> bytes:
    network = checkpoint().network
    assert network is not None
    return network.program


def _enveloped() -> list[bytes]:
    """Every golden message in an envelope."""
    return [
        encode(wrap(decode(kind, (VECTORS / f"{name}.bin").read_bytes()), source="fuzz", now=NOW))
        for name, kind in MESSAGES.items()
    ]


def readers() -> Mapping[str, tuple[Reader, list[bytes]]]:
    """Each reader with the sound bytes that mutations start from."""
    kinds = (ChannelImportanceData, GateStatistics, LayerStatistics, HeadImportanceData)
    blobs: dict[str, tuple[Reader, list[bytes]]] = {
        kind.__name__: (
            _statistics(kind),
            [(VECTORS / f"{kind.__name__}.safetensors").read_bytes()],
        )
        for kind in kinds
    }
    enveloped = _enveloped()
    return blobs | {
        "program": (Program.read, [_program()]),
        "message": (_message, enveloped),
        "work": (_work, enveloped),
        "sketch": (CountMinSketch.from_bytes, [_sketch()]),
        "tracker": (ImportanceTracker.from_bytes, [ImportanceTracker(5).to_bytes()]),
        "sealed": (
            lambda data: unseal(data, {"k": _KEY}, _HASH),
            [seal(b"content" * 9, "k", _KEY, _HASH)],
        ),
        "signature": (
            lambda data: Keyring({}).check("decisions", b"envelope", data, NOW),
            [b"v1:key:c2lnbmF0dXJl"],
        ),
    }
