"""A checkpoint's folder: what was saved is what is loaded, and what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import leyline as ll
from contracts import examples
from leyline.arrays import pack_arrays
from leyline.network.bundle import statistics_arrays

CHANNELS, GATES, LAYERS, HEADS = examples.STATISTICS


def bundle(**changes: Any) -> ll.CheckpointBundle:
    parts: dict[str, Any] = {
        "metadata": examples.METADATA,
        "architecture": examples.ARCHITECTURE,
        "channels": {"a": CHANNELS},
        "gates": {"a": GATES},
        "levels": (ll.Level.CHANNEL, ll.Level.HEAD),
        "parameters": ll.AnalysisParameters(round_to=8),
    }
    return ll.CheckpointBundle(**parts | changes)


def same(one: ll.CheckpointBundle, other: ll.CheckpointBundle) -> bool:
    return (one.document, one.blobs()) == (other.document, other.blobs())


@pytest.mark.parametrize("gates", [{"a": GATES}, {}])
@pytest.mark.parametrize("heads", [{"a": HEADS}, {}])
def test_a_saved_bundle_is_loaded_as_it_was(tmp_path: Path, gates: Any, heads: Any) -> None:
    saved = bundle(gates=gates, heads=heads)
    folder = saved.save(tmp_path / "new" / "checkpoint")
    loaded = ll.CheckpointBundle.load(folder)
    assert same(loaded, saved)
    assert np.array_equal(loaded.channels["a"].taylor_importance, CHANNELS.taylor_importance)


def test_figures_that_are_unknown_survive_the_folder(tmp_path: Path) -> None:
    metadata = examples.METADATA.model_copy(update={"accuracy": float("nan"), "loss": None})
    loaded = ll.CheckpointBundle.load(bundle(metadata=metadata).save(tmp_path))
    assert loaded.metadata.accuracy is not None
    assert np.isnan(loaded.metadata.accuracy)
    assert loaded.metadata.loss is None


def test_saving_over_an_older_bundle_leaves_nothing_of_it(tmp_path: Path) -> None:
    bundle(heads={"a": HEADS}).save(tmp_path)
    bundle(gates={}).save(tmp_path)
    loaded = ll.CheckpointBundle.load(tmp_path)
    assert (loaded.gates, loaded.heads) == ({}, {})


def test_the_key_is_that_of_the_checkpoint() -> None:
    assert bundle().key(ll.Level.CHANNEL) == examples.KEY


def edit(file: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d["metadata"].update(epoch="31"), "metadata.epoch"),
        (lambda d: d["metadata"].update(epoch=31.0), "metadata.epoch"),
        (lambda d: d["metadata"].update(epoch=-1), "metadata.epoch"),
        (lambda d: d["metadata"].pop("run_id"), "metadata.run_id"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d.update(levels=["neuron"]), "levels.0"),
        (lambda d: d["metadata"].update(model_hash="0" * 16), "metadata.model_hash"),
        (lambda d: d["architecture"].update(model_hash="0" * 16), "architecture.model_hash"),
    ],
)
def test_what_is_wrong_in_the_document_is_told_with_file_and_field(
    tmp_path: Path, change: Callable[[Any], object], field: str
) -> None:
    edit(bundle().save(tmp_path) / "checkpoint.json", change)
    with pytest.raises(ll.ContractError) as caught:
        ll.CheckpointBundle.load(tmp_path)
    assert caught.value.field == f"{tmp_path / 'checkpoint.json'}: {field}"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"metadata": "\\ud800"}'])
def test_a_document_that_is_no_json_is_told_with_its_file(tmp_path: Path, content: bytes) -> None:
    (bundle().save(tmp_path) / "checkpoint.json").write_bytes(content)
    with pytest.raises(ll.ContractError, match=r"checkpoint\.json"):
        ll.CheckpointBundle.load(tmp_path)


@pytest.mark.parametrize("name", ["statistics", "gates"])
def test_a_damaged_blob_is_told_with_its_file(tmp_path: Path, name: str) -> None:
    file = bundle().save(tmp_path) / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ll.Malformed) as caught:
        ll.CheckpointBundle.load(tmp_path)
    assert caught.value.field.startswith(f"{file}: {name}")


@pytest.mark.parametrize("name", ["checkpoint.json", "statistics.safetensors"])
def test_a_missing_file_is_told(tmp_path: Path, name: str) -> None:
    (bundle().save(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        ll.CheckpointBundle.load(tmp_path)


def importance(layer: str, count: int) -> ll.ChannelImportanceData:
    ones = np.ones(count, "f4")
    return ll.ChannelImportanceData(
        layer_name=layer,
        taylor_importance=ones,
        magnitude_importance=ones,
        activation_frequency=ones,
    )


def test_statistics_of_a_group_that_is_not_there_are_refused_by_name() -> None:
    with pytest.raises(ll.InvalidField) as caught:
        bundle(channels={"c": importance("c", 3)})
    assert caught.value.field == "statistics.c"


def test_statistics_of_another_size_than_the_group_are_refused_by_name() -> None:
    with pytest.raises(ll.ShapeMismatch, match=r"statistics\.a: expected 3 units, found 4"):
        bundle(channels={"a": importance("a", 4)})


def test_statistics_under_another_name_than_their_own_are_refused() -> None:
    with pytest.raises(ll.InvalidField, match=r"statistics\.a\.layer_name"):
        bundle(channels={"a": importance("b", 3)})


def test_gates_of_different_numbers_of_samples_are_refused() -> None:
    vector = np.ones(3, "f4")
    other = ll.GateStatistics(
        layer_name="b",
        projections=np.ones((7, 3), "f4"),
        first_order=vector,
        second_order=vector,
    )
    with pytest.raises(ll.ShapeMismatch, match="the same number of samples"):
        bundle(gates={"a": GATES, "b": other})


def test_nan_importance_in_a_blob_is_told_with_layer_field_and_place(tmp_path: Path) -> None:
    file = bundle().save(tmp_path) / "statistics.safetensors"
    data = bytearray(pack_arrays(statistics_arrays([CHANNELS])))
    place = data.index(CHANNELS.taylor_importance.tobytes())
    data[place + 4 : place + 8] = np.array([np.nan], "<f4").tobytes()
    file.write_bytes(bytes(data))
    with pytest.raises(ll.NotFinite, match=r"a/taylor_importance\[1\]"):
        ll.CheckpointBundle.load(tmp_path)


def layered() -> ll.PrunedArchitecture:
    """The example with a block around its first convolution."""
    plain = examples.ARCHITECTURE
    block = ll.LayerBlock(
        name="stage.0",
        kind="conv",
        depth=0.5,
        strategy="residual",
        skip_potential=0.95,
        branch="a",
        entry="a",
        dim=1,
        stand_ins=(ll.StandIn(module="a", kind="zero"),),
        tensors=("a.weight", "a_bn.running_mean"),
    )
    return ll.PrunedArchitecture.build(
        plain.tensors, plain.layers, plain.groups, blocks=(block,), history=plain.history
    )


def with_layers(architecture: ll.PrunedArchitecture, **changes: Any) -> ll.CheckpointBundle:
    metadata = examples.METADATA.model_copy(update={"model_hash": architecture.model_hash})
    parts = {"layers": {"stage.0": LAYERS}} | changes
    return bundle(metadata=metadata, architecture=architecture, **parts)


def test_layer_statistics_are_saved_and_loaded_and_removed_again(tmp_path: Path) -> None:
    saved = with_layers(layered())
    loaded = ll.CheckpointBundle.load(saved.save(tmp_path))
    assert same(loaded, saved)
    assert loaded.blobs().get("layers") == saved.blobs().get("layers") is not None
    bundle().save(tmp_path)
    assert ll.CheckpointBundle.load(tmp_path).layers == {}


def test_layer_statistics_that_fit_no_block_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ll.InvalidField, match=r"layers\.stage\.0"):
        bundle(layers={"stage.0": LAYERS})
    with pytest.raises(ll.InvalidField, match=r"layers\.other\.layer_name"):
        with_layers(layered(), layers={"other": LAYERS})
    gone = layered().without_layers(["stage.0"])
    with pytest.raises(ll.InvalidField, match="present in the architecture"):
        with_layers(gone, channels={}, gates={})
    folder = with_layers(layered()).save(tmp_path)
    (folder / "layers.safetensors").write_bytes(b"")
    with pytest.raises(ll.ContractError, match=r"layers\.safetensors"):
        ll.CheckpointBundle.load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("taylor", -1.0), ("gradient_flow", 1.1), ("similarity", -1.1), ("second_order", -0.1)],
)
def test_layer_statistics_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ll.InvalidField, match=f"stage.0/{field}"):
        ll.LayerStatistics(**{**LAYERS.model_dump(), field: np.array([value], "f4")})
    with pytest.raises(ll.ShapeMismatch, match=f"stage.0/{field}"):
        ll.LayerStatistics(**{**LAYERS.model_dump(), field: np.zeros(2, "f4")})


def test_a_layers_name_may_hold_slashes_and_dots() -> None:
    item = importance("block/1.conv", 2)
    data = pack_arrays(statistics_arrays([item]))
    assert data == pack_arrays(
        {
            f"block/1.conv/{name}": getattr(item, name)
            for name in ("taylor_importance", "magnitude_importance", "activation_frequency")
        }
    )
    read = ll.network.bundle.unpack_statistics(ll.ChannelImportanceData, data, "statistics")
    assert list(read) == ["block/1.conv"]
