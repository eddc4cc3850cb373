"""From a checkpoint in memory to the event or request that points at its blobs."""

from __future__ import annotations

from dataclasses import replace

from elesh.bus import Bus
from leyline import (
    BlobRef,
    CheckpointBundle,
    CheckpointReady,
    IdempotencyKey,
    Level,
    NetworkExport,
    RequestKey,
    StructuralAnalysisRequest,
    stable_hash,
)

__all__ = ["in_attempt", "keys_of", "with_blobs"]


def in_attempt(bundle: CheckpointBundle, attempt: int) -> CheckpointBundle:
    """The bundle under an id of its own where its run's id was used before: what was decided for
    the checkpoint of another process is not the answer to this one."""
    if not attempt:
        return bundle
    name = "ck-" + stable_hash(bundle.metadata.checkpoint_id, str(attempt))
    return replace(bundle, metadata=bundle.metadata.model_copy(update={"checkpoint_id": name}))


def keys_of(bundle: CheckpointBundle, request_id: str) -> list[IdempotencyKey]:
    """The keys that decisions on a checkpoint, or on a request, may have."""
    metadata = bundle.metadata
    name = request_id or metadata.checkpoint_id
    return [IdempotencyKey(metadata.epoch, metadata.model_hash, name, level) for level in Level]


async def with_blobs(
    bus: Bus, bundle: CheckpointBundle, request_id: str
) -> CheckpointReady | StructuralAnalysisRequest:
    """Put the blobs and return the event or request that points at them."""
    architecture = bundle.architecture.model_hash
    statistics = await bus.blobs.put(bundle.statistics_blob(), architecture=architecture)
    gates, layers, heads = [
        None if blob is None else await bus.blobs.put(blob, architecture=architecture)
        for blob in (bundle.gates_blob(), bundle.layers_blob(), bundle.heads_blob())
    ]
    network = await _network(bus, bundle.network, architecture)
    metadata = bundle.metadata
    if not request_id:
        return CheckpointReady(
            metadata=metadata,
            architecture=bundle.architecture,
            statistics=statistics,
            gates=gates,
            layers=layers,
            heads=heads,
            levels=bundle.levels,
            parameters=bundle.parameters,
            program=network.get("program"),
            weights=network.get("weights"),
            held_out=network.get("held_out"),
        )
    return StructuralAnalysisRequest(
        request_id=request_id,
        idempotency_key=str(RequestKey(metadata.epoch, metadata.model_hash, request_id)),
        current_architecture=bundle.architecture,
        parameters=bundle.parameters,
        requirements=bundle.requirements,
        metadata=metadata,
        statistics=statistics,
        gates=gates,
        layers=layers,
        heads=heads,
        levels=bundle.levels,
        program=network.get("program"),
        weights=network.get("weights"),
        held_out=network.get("held_out"),
    )


async def _network(
    bus: Bus, network: NetworkExport | None, architecture: str
) -> dict[str, BlobRef]:
    """Put the blobs of the network, where there is one."""
    if network is None:
        return {}
    return {
        "program": await bus.blobs.put(network.program, codec="msgpack", architecture=architecture),
        "weights": await bus.blobs.put(network.weights, architecture=architecture),
        "held_out": await bus.blobs.put(network.held_out, architecture=architecture),
    }
