"""From a checkpoint in memory to the event or request that points at its blobs."""

from __future__ import annotations

from elesh.bus import Bus
from leyline import CheckpointBundle, CheckpointReady, RequestKey, StructuralAnalysisRequest

__all__ = ["with_blobs"]


async def with_blobs(
    bus: Bus, bundle: CheckpointBundle, request_id: str
) -> CheckpointReady | StructuralAnalysisRequest:
    """Put the blobs and return the event or request that points at them."""
    statistics = await bus.blobs.put(bundle.statistics_blob())
    gates, layers, heads = [
        None if blob is None else await bus.blobs.put(blob)
        for blob in (bundle.gates_blob(), bundle.layers_blob(), bundle.heads_blob())
    ]
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
    )
