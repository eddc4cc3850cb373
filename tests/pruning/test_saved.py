"""A cut network in a folder: exact in another process, and refused where it does not belong."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elesh
from elesh.demo.network import DigitsNet
from elesh.trainer import Recorder, Surgeon
from leyline import ContractError, DigestMismatch, InvalidField, Level, Malformed, ShapeMismatch

_IMAGES = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def cut_network() -> DigitsNet:
    """Channels, heads and a whole block are gone; its tensors lie in memory channels last."""
    torch.manual_seed(0)
    model = DigitsNet()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model(_IMAGES)  # batch statistics of its own
    surgeon = Surgeon(model, Recorder(model, _IMAGES[:2]).architecture)
    surgeon.cut({"stem.0": [1, 5], "stage1.0.conv1": [0, 2, 7]}, epoch=3, key="first")
    surgeon.cut({"stage1.0.conv1": [0], "transformer.attention": [2]}, epoch=5, key="second")
    surgeon.cut_layers(["stage1.1"], epoch=7, key="third")
    return model.eval()


@pytest.fixture(scope="module")
def network() -> DigitsNet:
    return cut_network()


@pytest.fixture
def folder(network: DigitsNet, tmp_path: Path) -> Path:
    return elesh.save(network, tmp_path / "pruned")


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_fresh_process_has_the_same_outputs_bit_for_bit(
    network: DigitsNet, folder: Path, tmp_path: Path
) -> None:
    torch.save(_IMAGES, tmp_path / "images.pt")
    script = (
        "import sys, torch, elesh\n"
        "from elesh.demo.network import DigitsNet\n"
        "torch.set_num_threads(int(sys.argv[4]))\n"
        "model = elesh.load(sys.argv[1], DigitsNet()).eval()\n"
        "torch.save(model(torch.load(sys.argv[2])), sys.argv[3])\n"
    )
    arguments = [folder, tmp_path / "images.pt", tmp_path / "outputs.pt", torch.get_num_threads()]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True, timeout=800)
    assert torch.equal(torch.load(tmp_path / "outputs.pt"), network(_IMAGES))


def test_a_copy_knows_how_its_original_was_cut(network: DigitsNet, tmp_path: Path) -> None:
    best = copy.deepcopy(network)
    loaded = elesh.load(elesh.save(best, tmp_path), DigitsNet()).eval()
    assert torch.equal(loaded(_IMAGES), network(_IMAGES))


def test_layout_and_dtype_come_back(network: DigitsNet, tmp_path: Path) -> None:
    half = copy.deepcopy(network).to(torch.float64)
    loaded = elesh.load(elesh.save(half, tmp_path), DigitsNet()).eval()
    images = _IMAGES.double()
    assert torch.equal(loaded(images), half(images))
    for name, parameter in half.named_parameters():
        assert loaded.get_parameter(name).stride() == parameter.stride()


def test_a_loaded_network_is_cut_further_and_saved_again(folder: Path, tmp_path: Path) -> None:
    from elesh.trainer.surgery.lineage import lineage_of

    model = elesh.load(folder, DigitsNet())
    known = lineage_of(model)
    assert known is not None
    Surgeon(model, known.now).cut({"stem.0": [0]}, epoch=9)
    again = elesh.load(elesh.save(model, tmp_path / "again"), DigitsNet())
    assert torch.equal(again.eval()(_IMAGES), model.eval()(_IMAGES))


def test_a_cut_network_that_is_looked_at_anew_keeps_its_history(
    network: DigitsNet, tmp_path: Path
) -> None:
    """By Recorder and Surgeon, as any run after ``elesh.prune`` or ``elesh.load`` does."""
    model = copy.deepcopy(network)
    now = Recorder(model, _IMAGES[:2], ignored_layers=["stem"]).architecture
    before = Recorder(DigitsNet(), _IMAGES[:2], ignored_layers=["stem"]).architecture
    assert [record.idempotency_key for record in now.history][-1] == "third"
    assert now.original_macs == before.macs > now.macs
    assert {g.name for g in now.groups if g.prunable} == {
        g.name for g in before.groups if g.prunable and not g.name.startswith("stage1.1")
    }
    assert not now.group["stem.0"].prunable
    assert {b.name for b in now.blocks if b.prunable and not b.removed} == {
        b.name for b in before.blocks if b.prunable and b.name != "stage1.1"
    }
    Surgeon(model, now).cut({"stage1.0.conv1": [0]}, epoch=9)
    again = elesh.load(elesh.save(model, tmp_path), DigitsNet())
    assert torch.equal(again.eval()(_IMAGES), model.eval()(_IMAGES))


def test_a_network_without_memory_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = DigitsNet()
    for call in (
        lambda: elesh.load(folder, model),
        lambda: elesh.save(model, tmp_path / "meta"),
        lambda: Recorder(model, _IMAGES[:2]),
    ):
        with pytest.raises(InvalidField, match=r"model\.position.*meta.*to_empty"):
            call()


def test_a_network_that_is_loaded_in_inference_mode_can_be_trained(folder: Path) -> None:
    model = DigitsNet()
    with torch.inference_mode():
        elesh.load(folder, model)
        made_inside = elesh.load(folder, DigitsNet()).eval()
        assert torch.equal(made_inside(_IMAGES), elesh.load(folder, DigitsNet()).eval()(_IMAGES))
    torch.autograd.backward(model(_IMAGES).sum())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_network_that_an_optimizer_has_trained_is_not_loaded_into(folder: Path) -> None:
    """The optimizer's moments are of the weights and shapes before."""
    model = DigitsNet()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.autograd.backward(model(_IMAGES).sum())
    optimizer.step()
    before = state_of(model)
    with pytest.raises(InvalidField, match=r"AdamW; make the optimizer after elesh\.load"):
        elesh.load(folder, model)
    assert same(before, state_of(model))
    optimizer.state.clear()
    optimizer.zero_grad()
    torch.autograd.backward(elesh.load(folder, model)(_IMAGES).sum())
    optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_scripted_and_exported_networks_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(4, 8)
    for made, kind in (
        (torch.jit.script(model), "scripted"),
        (nn.Sequential(torch.jit.script(model)), "scripted"),
        (torch.export.export(model, (x,)).module(), "exported"),
    ):
        with pytest.raises(InvalidField, match=f"a {kind} one; give the network"):
            Recorder(made, x)


def test_parameters_stay_the_objects_that_an_optimizer_holds(folder: Path) -> None:
    model = DigitsNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    elesh.load(folder, model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(parameter) for parameter in model.parameters()} <= held


@pytest.mark.parametrize(
    "other",
    [
        lambda: DigitsNet(width=32),
        lambda: DigitsNet(classes=11),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10)),
        lambda: with_stride(DigitsNet()),
        lambda: cut_network(),
    ],
    ids=["wider", "other classes", "another class", "same shapes, other stride", "cut already"],
)
def test_another_network_is_refused_before_it_changes(folder: Path, other: object) -> None:
    model = other()  # type: ignore[operator]
    before = state_of(model)
    with pytest.raises((InvalidField, ShapeMismatch), match="as it was before it was cut"):
        elesh.load(folder, model)
    assert same(state_of(model), before)


def with_stride(model: DigitsNet) -> DigitsNet:
    model.stage1[0].conv1.stride = (2, 2)  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("file", ["weights.safetensors", "architecture.json"])
@pytest.mark.parametrize("damage", ["cut short", "one byte", "gone", "of another save"])
def test_damaged_files_are_refused_before_anything_changes(
    network: DigitsNet, folder: Path, tmp_path: Path, file: str, damage: str
) -> None:
    path = folder / file
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "of another save":
        other = copy.deepcopy(network)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        path.write_bytes((elesh.save(other, tmp_path / "other") / file).read_bytes())
    elif damage == "one byte":
        place = data.index(b"original_indices") + 20 if file.endswith("json") else len(data) - 3
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    else:
        path.write_bytes(data[:-5])
    model = DigitsNet()
    before = state_of(model)
    with pytest.raises(ContractError):
        elesh.load(folder, model)
    assert same(state_of(model), before)


def test_a_history_that_was_changed_is_noticed(folder: Path) -> None:
    path = folder / "architecture.json"
    document = json.loads(path.read_text())
    document["history"][0]["original_indices"] = [1, 6]
    path.write_text(json.dumps(document))
    with pytest.raises(DigestMismatch):
        elesh.load(folder, DigitsNet())


def test_a_later_format_is_refused_by_name(folder: Path) -> None:
    path = folder / "architecture.json"
    document = json.loads(path.read_text()) | {"format": 2, "something": "new"}
    path.write_text(json.dumps(document))
    with pytest.raises(ContractError, match="format"):
        elesh.load(folder, DigitsNet())


def test_a_network_that_nobody_cut_is_not_saved_as_if(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match=r"elesh\.prune"):
        elesh.save(DigitsNet(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_network_that_somebody_else_changed_is_not_saved(tmp_path: Path) -> None:
    model = cut_network()
    model.head = nn.Linear(24, 3)
    with pytest.raises(ShapeMismatch, match=r"head\.weight"):
        elesh.save(model, tmp_path)


def test_undone_cuts_are_not_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DigitsNet()
    surgeon = Surgeon(model, Recorder(model, _IMAGES[:2]).architecture)
    surgeon.cut({"stem.0": [0]})
    surgeon.undo()
    loaded = elesh.load(elesh.save(model.eval(), tmp_path), DigitsNet()).eval()
    assert torch.equal(loaded(_IMAGES), model(_IMAGES))


@pytest.mark.slow
def test_a_compiled_network_is_loaded_into(network: DigitsNet, folder: Path) -> None:
    compiled = torch.compile(DigitsNet().eval(), backend="eager")
    assert elesh.load(folder, compiled) is compiled
    assert torch.equal(compiled(_IMAGES), network(_IMAGES))


def test_a_folder_without_a_network_is_malformed(tmp_path: Path) -> None:
    with pytest.raises(Malformed, match=r"elesh\.save"):
        elesh.load(tmp_path, DigitsNet())


def test_a_cut_network_is_exported_by_torch(network: DigitsNet) -> None:
    program = torch.export.export(network, (_IMAGES,))
    assert torch.equal(program.module()(_IMAGES), network(_IMAGES))


@pytest.mark.slow
def test_a_cut_network_computes_the_same_as_onnx(network: DigitsNet, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (_IMAGES,), dynamic_shapes=batch)
    torch.onnx.export(program, f=tmp_path / "cut.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "cut.onnx")
    (name,) = [each.name for each in session.get_inputs()]
    for images in (_IMAGES, _IMAGES[:3]):
        (found,) = session.run(None, {name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), network(images), atol=1e-5, rtol=1e-5)


def test_a_model_from_pretrained_is_cut_saved_and_built_again_from_its_configuration(
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        image_size=8, patch_size=4, num_channels=1, attn_implementation="eager",
    )  # fmt: skip
    kind = transformers.AutoModelForImageClassification
    kind.from_config(config).save_pretrained(tmp_path / "uncut")
    model = kind.from_pretrained(tmp_path / "uncut").eval()
    inputs = {"pixel_values": _IMAGES}
    surgeon = Surgeon(model, Recorder(model, {"pixel_values": _IMAGES[:2]}).architecture)
    heads = next(g for g in surgeon.architecture.groups if g.prunable and g.level is Level.HEAD)
    hidden = next(g for g in surgeon.architecture.groups if g.prunable and g.size == 24)
    surgeon.cut({heads.name: [1], hidden.name: range(5)})
    elesh.save(model, tmp_path / "pruned")
    again = elesh.load(tmp_path / "pruned", kind.from_config(model.config)).eval()
    assert sum(p.numel() for p in again.parameters()) < config_size(kind, tmp_path / "uncut")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def config_size(kind: Any, folder: Path) -> int:
    return sum(p.numel() for p in kind.from_pretrained(folder).parameters())
