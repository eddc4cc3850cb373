"""A checkpoint as one value: metadata, architecture and statistics, to blobs or a folder and back.

The folder holds ``checkpoint.json`` (metadata, architecture, levels, parameters),
``statistics.safetensors`` and, where measured, ``gates``, ``layers`` and ``heads.safetensors``;
with the network itself also ``program.msgpack``, ``weights`` and ``held_out.safetensors``. It is
what a recorder makes, what ``analyze`` reads, and what a CheckpointReady event points at.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt
from pydantic import ValidationError

from leyline.arrays import array_chunks, pack_arrays, unpack_arrays
from leyline.base import Message
from leyline.errors import (
    ContractError,
    IdentityMismatch,
    InvalidField,
    Malformed,
    NotFinite,
    ShapeMismatch,
    UnsupportedVersion,
    brief,
)
from leyline.identity import IdempotencyKey, Level, decided_level
from leyline.messages.checkpoint import CheckpointMetadata
from leyline.messages.parameters import AnalysisParameters, PerformanceRequirements

from .architecture import PrunedArchitecture
from .statistics import ChannelImportanceData, GateStatistics, HeadImportanceData, LayerStatistics

_M = TypeVar("_M", ChannelImportanceData, GateStatistics, LayerStatistics, HeadImportanceData)
_OPTIONAL = ("gates", "layers", "heads")
"""Blobs that a checkpoint may be without."""


class CheckpointDocument(Message):
    """The part of a bundle that is no array: ``checkpoint.json``."""

    metadata: CheckpointMetadata
    architecture: PrunedArchitecture
    levels: tuple[Level, ...] = (Level.CHANNEL,)
    parameters: AnalysisParameters = AnalysisParameters()
    requirements: PerformanceRequirements = PerformanceRequirements()


@dataclass(frozen=True)
class NetworkExport:
    """The network itself as three blobs, so that a worker can measure a cut before it says go.

    Opaque here: ``elesh.trainer.export`` writes and ``elesh.program`` reads them.
    """

    program: bytes
    """Msgpack: a graph of operators, without weights; the same for one architecture."""
    weights: bytes
    """Safetensors: parameters and buffers by path."""
    held_out: bytes
    """Safetensors: inputs and labels."""

    def save(self, folder: Path) -> None:
        """Write the three files."""
        for name, file in NETWORK_FILES.items():
            (folder / file).write_bytes(getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> NetworkExport | None:
        """Read them; None where one of them is not there."""
        files = [folder / file for file in NETWORK_FILES.values()]
        if not all(file.exists() for file in files):
            return None
        return cls(*(file.read_bytes() for file in files))


NETWORK_FILES = {
    "program": "program.msgpack",
    "weights": "weights.safetensors",
    "held_out": "held_out.safetensors",
}
"""Where a folder has the blobs of a NetworkExport."""
BLOB_FILES = {name: f"{name}.safetensors" for name in ("statistics", *_OPTIONAL)} | NETWORK_FILES
"""Where a folder has every blob that a checkpoint may carry."""


@dataclass(frozen=True)
class CheckpointBundle:
    """Everything that an analysis reads. ``channels``, ``gates`` and ``heads`` go by group name,
    ``layers`` by block name.

    Raises:
        IdentityMismatch: if metadata and architecture speak of different networks.
        ShapeMismatch, InvalidField: if statistics do not fit the architecture, naming the group.
    """

    metadata: CheckpointMetadata
    architecture: PrunedArchitecture
    channels: Mapping[str, ChannelImportanceData]
    gates: Mapping[str, GateStatistics] = field(default_factory=dict)
    levels: tuple[Level, ...] = (Level.CHANNEL,)
    parameters: AnalysisParameters = field(default_factory=AnalysisParameters)
    requirements: PerformanceRequirements = field(default_factory=PerformanceRequirements)
    layers: Mapping[str, LayerStatistics] = field(default_factory=dict)
    heads: Mapping[str, HeadImportanceData] = field(default_factory=dict)
    network: NetworkExport | None = None
    """The network itself, where the trainer gave it."""

    def __post_init__(self) -> None:
        if self.metadata.model_hash != self.architecture.model_hash:
            raise IdentityMismatch(
                "metadata.model_hash", self.architecture.model_hash, self.metadata.model_hash
            )
        sizes = [(name, x.layer_name, x.size) for name, x in self.channels.items()]
        sizes += [(name, x.layer_name, x.projections.shape[1]) for name, x in self.gates.items()]
        sizes += [(name, x.layer_name, x.size) for name, x in self.heads.items()]
        for name, layer, size in sizes:
            if name != layer:
                raise InvalidField(f"statistics.{name}.layer_name", name, layer)
            group = self.architecture.group.get(name)
            if group is None:
                raise InvalidField(
                    f"statistics.{name}", "the name of a group of the architecture", name
                )
            if group.size != size:
                raise ShapeMismatch(f"statistics.{name}", f"{group.size} units", size)
        samples = {gate.projections.shape[0] for gate in self.gates.values()}
        if len(samples) > 1:
            raise ShapeMismatch("gates", "the same number of samples in every group", samples)
        for name, data in self.layers.items():
            if name != data.layer_name:
                raise InvalidField(f"layers.{name}.layer_name", name, data.layer_name)
            block = self.architecture.block.get(name)
            if block is None or block.removed:
                expected = "the name of a block that is present in the architecture"
                raise InvalidField(f"layers.{name}", expected, name)
        samples = {len(data.projections) for data in self.layers.values()}
        if len(samples) > 1:
            raise ShapeMismatch("layers", "the same number of samples in every block", samples)

    def key(self, level: Level) -> IdempotencyKey:
        """The key of this checkpoint's decision at ``level``."""
        m = self.metadata
        return IdempotencyKey(m.epoch, m.model_hash, m.checkpoint_id, level)

    @property
    def decision_key(self) -> IdempotencyKey:
        """The key of this checkpoint's one decision: of its level, or ``joint`` for several."""
        return self.key(decided_level(self.levels))

    @property
    def document(self) -> CheckpointDocument:
        """The checkpoint without its arrays."""
        return CheckpointDocument(
            metadata=self.metadata,
            architecture=self.architecture,
            levels=self.levels,
            parameters=self.parameters,
            requirements=self.requirements,
        )

    def arrays(self) -> dict[str, dict[str, npt.NDArray[Any]]]:
        """The arrays of each blob: ``statistics`` always, ``gates``, ``layers`` and ``heads`` where
        there are any."""
        kinds: dict[str, Mapping[str, _Statistics]] = {
            "statistics": self.channels,
            "gates": self.gates,
            "layers": self.layers,
            "heads": self.heads,
        }
        return {
            name: statistics_arrays(items.values())
            for name, items in kinds.items()
            if items or name not in _OPTIONAL
        }

    def blobs(self) -> dict[str, bytes]:
        """:meth:`arrays` as safetensors bytes, by the names of :meth:`from_blobs`."""
        return {name: pack_arrays(arrays) for name, arrays in self.arrays().items()}

    @classmethod
    def from_blobs(
        cls,
        document: CheckpointDocument,
        statistics: bytes | memoryview,
        gates: bytes | memoryview | None = None,
        layers: bytes | memoryview | None = None,
        heads: bytes | memoryview | None = None,
        *,
        network: NetworkExport | None = None,
    ) -> CheckpointBundle:
        """The bundle of a document and its blobs; refuses what does not fit together."""
        return cls(
            metadata=document.metadata,
            architecture=document.architecture,
            channels=unpack_statistics(ChannelImportanceData, statistics, "statistics"),
            gates={} if gates is None else unpack_statistics(GateStatistics, gates, "gates"),
            levels=document.levels,
            parameters=document.parameters,
            requirements=document.requirements,
            layers={} if layers is None else unpack_statistics(LayerStatistics, layers, "layers"),
            heads={} if heads is None else unpack_statistics(HeadImportanceData, heads, "heads"),
            network=network,
        )

    def save(self, folder: str | Path) -> Path:
        """Write the folder, replacing an older bundle in it; returns its path."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        arrays = self.arrays()
        for name, own in arrays.items():
            _write(path / f"{name}.safetensors", array_chunks(own))
        gone = [f"{name}.safetensors" for name in _OPTIONAL if name not in arrays]
        for file_name in (*gone, *NETWORK_FILES.values()):
            (path / file_name).unlink(missing_ok=True)
        if self.network is not None:
            self.network.save(path)
        (path / "checkpoint.json").write_text(self.document.model_dump_json(indent=1))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> CheckpointBundle:
        """Read a folder that :meth:`save` wrote. Arrays are read from disk as they are used.

        Raises:
            FileNotFoundError: if a file of the bundle is not there.
            ContractError: if one is not what it should be, naming file and field.
        """
        path = Path(folder)
        files = {name: path / f"{name}.safetensors" for name in ("statistics", *_OPTIONAL)}
        try:
            return cls.from_blobs(
                _read_document(path / "checkpoint.json"),
                map_file(files["statistics"]),
                *(map_file(files[x]) if files[x].exists() else None for x in _OPTIONAL),
                network=NetworkExport.load(path),
            )
        except ContractError as error:
            file = files.get(error.field.partition(".")[0])
            raise error.inside(str(file or path / "checkpoint.json")) from None


def _read_document(path: Path) -> CheckpointDocument:
    try:
        return CheckpointDocument.model_validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        raise first_error(error, "") from None


def map_file(path: Path) -> memoryview:
    """A file's bytes without reading them: pages come from disk when they are looked at.

    The file may be unlinked or replaced meanwhile, but must not be shortened in place.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    """Replace a file: a reader that has mapped the older one keeps it as it was."""
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
    new.replace(path)


_Statistics = ChannelImportanceData | GateStatistics | LayerStatistics | HeadImportanceData


def statistics_arrays(items: Iterable[_Statistics]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of one blob, as ``<layer_name>/<field>``."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for item in items:
        for name in type(item).model_fields:
            value = getattr(item, name)
            if name != "layer_name" and value is not None:
                arrays[f"{item.layer_name}/{name}"] = value
    return arrays


def unpack_statistics(kind: type[_M], data: bytes | memoryview, field_name: str) -> dict[str, _M]:
    """The statistics of a blob by layer name."""
    arrays, _ = unpack_arrays(data, field=field_name)
    by_layer: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        layer, slash, part = name.rpartition("/")
        expected = f"<layer>/<field of {kind.__name__}>"
        if not slash or part == "layer_name":
            raise Malformed(f"{field_name}.{name}", expected, name)
        if part not in kind.model_fields:
            hint = "a newer trainer's, perhaps: upgrade the workers, then redrive it"
            raise UnsupportedVersion(f"{field_name}.{name}", expected, name, hint=hint)
        by_layer.setdefault(layer, {"layer_name": layer})[part] = array
    try:
        return {layer: kind(**parts) for layer, parts in by_layer.items()}
    except ValidationError as error:
        raise first_error(error, field_name) from None


def first_error(error: ValidationError, where: str) -> ContractError:
    """The first complaint of pydantic as one of our named errors."""
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
    if first["type"] == "missing":
        return InvalidField(path, "this field", "nothing")
    if first["type"] == "extra_forbidden":
        return InvalidField(path, "no field of this name", brief(first["input"]))
    expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    kind = NotFinite if first["type"] == "finite_number" else InvalidField
    return kind(path, expected, brief(first["input"]))
