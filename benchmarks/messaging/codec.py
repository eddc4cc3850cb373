"""What wrapping and serialising costs, beside plain msgpack of the same dicts.

    python benchmarks/messaging/codec.py

The platform's figures: wrapping below 20 us, serialising a request below 120 us. A request that
carries the architecture of a ResNet-50 is far larger than what they were set for; it must encode
and decode well within 100 ms and stay below the 8 MB of a message.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise

import msgpack

import leyline as ll
from leyline.codec import MAX_MESSAGE_BYTES

SMALL = (16, 32, 32, 64)
_BLOCKS = ((64, 256, 3), (128, 512, 4), (256, 1024, 6), (512, 2048, 3))
RESNET = (64, *(w for mid, out, times in _BLOCKS for _ in range(times) for w in (mid, mid, out)))


def architecture(widths: Sequence[int]) -> ll.PrunedArchitecture:
    """A plain chain of convolutions with batch norm; a group for each."""
    names = [f"layer{i}.conv" for i in range(len(widths))]
    tensors, layers, groups = [], [], []
    chain = pairwise([(3, ""), *zip(widths, names, strict=True), (10, "fc")])
    for (previous, _), (width, name) in chain:
        shape = (width, previous) if name == "fc" else (width, previous, 3, 3)
        tensors.append(ll.TensorDescriptor(path=f"{name}.weight", shape=shape, dtype="float32"))
        layers.append(
            ll.LayerDescriptor(name=name, kind="conv2d", weight=f"{name}.weight", positions=49)
        )
    norms = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    for width, (name, consumer) in zip(widths, pairwise([*names, "fc"]), strict=True):
        slices = [ll.TensorSlice(tensor=f"{name}.weight", dim=0)]
        for norm in norms:
            path = f"{name}.{norm}"
            tensors.append(ll.TensorDescriptor(path=path, shape=(width,), dtype="float32"))
            slices.append(ll.TensorSlice(tensor=path, dim=0))
        slices.append(ll.TensorSlice(tensor=f"{consumer}.weight", dim=1))
        groups.append(
            ll.PruningGroup(
                name=name,
                layers=(name,),
                original_size=width,
                origin=tuple(range(width)),
                slices=tuple(slices),
                sites=(ll.GateSite(module=consumer, dim=1),),
            )
        )
    return ll.PrunedArchitecture.build(tuple(tensors), tuple(layers), tuple(groups))


def request(widths: Sequence[int]) -> ll.StructuralAnalysisRequest:
    """A request about a network of these widths."""
    described = architecture(widths)
    metadata = ll.CheckpointMetadata(
        run_id="run", checkpoint_id="ck", epoch=31, model_hash=described.model_hash
    )
    blob = ll.BlobRef(uri="redis:statistics", size=1 << 20, sha256="0" * 64)
    return ll.StructuralAnalysisRequest(
        request_id="rq",
        idempotency_key=str(ll.RequestKey(31, described.model_hash, "rq")),
        current_architecture=described,
        timeout=timedelta(minutes=5),
        metadata=metadata,
        statistics=blob,
        gates=blob,
    )


def microseconds(call: Callable[[], object], seconds: float = 1.0) -> float:
    """Median of one call over about a second."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def compare(name: str, ours: float, plain: float, target: str) -> None:
    """One line: ours, msgpack alone, their ratio, the target."""
    print(f"{name:34} {ours:10.1f} us {plain:10.1f} us {ours / plain:6.1f}x  {target}")


def main() -> None:
    """Print the table."""
    print(f"{'':34} {'leyline':>13} {'msgpack':>13} {'ratio':>7}  target")
    outcome = ll.PruningOutcome(
        idempotency_key=f"31:{'0' * 16}:ck:channel", run_id="run", epoch=31, result="applied"
    )
    envelope = ll.wrap(outcome, source="benchmark")
    fields = envelope.model_dump(mode="json")
    wrapping = microseconds(lambda: ll.wrap(outcome, source="benchmark"))
    packing = microseconds(lambda: msgpack.packb(msgpack.unpackb(ll.encode(outcome))))
    payload = microseconds(lambda: ll.encode(outcome))
    compare("wrap an outcome, payload included", wrapping, packing, "")
    print(f"{'wrap alone':34} {wrapping - payload:10.1f} us {'':29} < 20 us")
    compare(
        "encode an envelope",
        microseconds(lambda: ll.encode(envelope)),
        microseconds(lambda: msgpack.packb(fields)),
        "",
    )
    for name, widths in (("4 layers", SMALL), ("ResNet-50", RESNET)):
        message = request(widths)
        data = ll.encode(message)
        plain = msgpack.unpackb(data)
        print(f"request, {name}: {sum(widths)} channels, {len(data)} bytes")
        target = "< 120 us" if widths is SMALL else "< 100 ms with decode"
        compare(
            "  encode",
            microseconds(lambda message=message: ll.encode(message)),
            microseconds(lambda plain=plain: msgpack.packb(plain)),
            target,
        )
        compare(
            "  decode, checked and hashed",
            microseconds(lambda data=data: ll.decode(ll.StructuralAnalysisRequest, data)),
            microseconds(lambda data=data: msgpack.unpackb(data)),
            "",
        )
        if len(data) > MAX_MESSAGE_BYTES:
            raise SystemExit(f"{name}: {len(data)} bytes are over the limit of a message")


if __name__ == "__main__":
    main()
