"""A cut network in a folder: ``save`` it in one process, ``load`` it exactly in another.

The folder holds ``weights.safetensors`` (all parameters and buffers by path) and
``architecture.json`` (the network before its first cut, every cut since, and what its layers are).
Nothing is pickled, and nothing that is read is run: the caller builds the network as it was before
it was cut, and ``load`` cuts it.

Promises: outputs of the loaded network are bit for bit those of the saved one; a file that is
damaged, or that belongs to another network, is refused by name before the given network has
changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

import safetensors.torch
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from elesh.trainer.arguments import require_network
from elesh.trainer.graph.hazards import require_initialised
from elesh.trainer.network.layers import require_fit
from elesh.trainer.network.sizes import HEAD_SIZES, SIZES
from elesh.trainer.network.state import trainable
from elesh.trainer.recovery.files import write_durably
from elesh.trainer.surgery.bypass import Bypass
from elesh.trainer.surgery.lineage import lineage_of, remember, replayed
from elesh.trainer.surgery.optimizers import other_optimizers
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import (
    DigestMismatch,
    InvalidField,
    Malformed,
    PrunedArchitecture,
    PruningRecord,
    ShapeMismatch,
    UnsupportedVersion,
)
from leyline.base import Message

Network = TypeVar("Network", bound=nn.Module)

_FORMAT = 1
_WEIGHTS, _ARCHITECTURE = "weights.safetensors", "architecture.json"
_FREE = frozenset({"training", "inplace", "momentum", "p", "device", "dtype", *SIZES, *HEAD_SIZES})
"""Settings of layers that a cut changes, or that outputs in evaluation mode do not depend on."""


class SavedNetwork(Message):
    """``architecture.json``."""

    format: Literal[1] = 1
    weights: str
    """SHA-256 of the file of weights."""
    original: PrunedArchitecture
    """Before the first cut."""
    history: tuple[PruningRecord, ...] = ()
    """All cuts, oldest first."""
    model_hash: str
    """Of the architecture after them."""
    layers: dict[str, str] = Field(default_factory=dict)
    """Type and settings of every leaf module that is still there."""
    strides: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """Of tensors that do not lie in memory row by row: a kernel may add up in another order."""


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write a network that was cut (by ``elesh.prune``, ``elesh.attach`` or a Surgeon), or may be.

    Args:
        model: a network, wrapped or compiled or not; nothing of it changes.
        folder: created if it does not exist; an earlier save there is replaced.

    Returns:
        The folder.

    Raises:
        InvalidField: if the network's cuts are unknown, or it holds state that is no tensor.
        ShapeMismatch: if other code changed it since.
    """
    require_network(model)
    model, folder = unwrapped(model), Path(folder)
    require_initialised(model)
    lineage = lineage_of(model)
    if lineage is None:
        hint = "pass the network that elesh.prune, elesh.attach or a Surgeon was given"
        raise InvalidField("model", "a network whose cuts are known", "none known", hint=hint)
    require_fit(model, lineage.now)
    _refuse_extra_state(model)
    tensors = _tensors(model)
    weights = safetensors.torch.save(
        {path: tensor.detach().cpu().contiguous().clone() for path, tensor in tensors.items()}
    )
    saved = SavedNetwork(
        weights=hashlib.sha256(weights).hexdigest(),
        original=lineage.original,
        history=lineage.now.history,
        model_hash=lineage.now.model_hash,
        layers=_layers(model),
        strides={p: t.stride() for p, t in tensors.items() if not t.is_contiguous()},
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / _WEIGHTS, weights, shared=True)
    write_durably(folder / _ARCHITECTURE, saved.model_dump_json().encode(), shared=True)
    return folder


def load(folder: str | Path, model: Network) -> Network:
    """Cut a freshly built network as the saved one was, and fill in its weights.

    Args:
        folder: written by :func:`save`.
        model: built as it was before its first cut (``MyNet()``, ``AutoModel.from_config(...)``);
            its weights do not matter; compiled or wrapped, or not. It stays on its device and takes
            the dtypes of what was saved.

    Returns:
        ``model``, cut. It can be trained, cut further and saved again.

    Raises:
        Malformed, DigestMismatch, UnsupportedVersion: if the folder does not hold a complete saved
            network.
        ShapeMismatch, InvalidField: if it holds another network; the first layer or tensor that
            differs is named. ``model`` was not changed then.
    """
    require_network(model)
    folder = Path(folder)
    saved, weights = _read(folder)
    architecture = replayed(saved.original, saved.history)
    if architecture.model_hash != saved.model_hash:
        raise DigestMismatch(str(folder), saved.model_hash, architecture.model_hash)
    network = unwrapped(model)
    require_initialised(network)
    _require_same_network(network, saved)
    _require_same_tensors(network, architecture, weights)
    if trained := other_optimizers(network, (), stateful=True):
        hint = "make the optimizer after elesh.load, or clear its state: it is of other weights"
        found = f"state in {type(trained[0]).__name__}"
        raise InvalidField("model", "a network that no optimizer has trained", found, hint=hint)
    made_to_infer = any(parameter.is_inference() for parameter in network.parameters())
    with contextlib.nullcontext() if made_to_infer else trainable():
        surgeon = Surgeon(network, saved.original, restore_points=0)
        surgeon.replay(saved.history)
        for path, tensor in _tensors(network).items():
            if path in weights:
                _fill(tensor, weights[path].clone(), saved.strides.get(path))
    remember(network, surgeon.architecture, saved.original)
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside ``torch.compile`` and the wrappers of data-parallel training."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _read(folder: Path) -> tuple[SavedNetwork, dict[str, Tensor]]:
    """Both files, each known to be what was written."""
    try:
        document = json.loads((folder / _ARCHITECTURE).read_bytes())
        weights = (folder / _WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise Malformed(str(folder), "a network saved by elesh.save", str(error)) from None
    version = document.get("format") if isinstance(document, dict) else None
    if isinstance(version, int) and version > _FORMAT:
        raise UnsupportedVersion(f"{folder / _ARCHITECTURE}: format", f"{_FORMAT}", version)
    try:
        saved = SavedNetwork.model_validate_json((folder / _ARCHITECTURE).read_bytes(), strict=True)
    except ValidationError as error:
        raise Malformed(str(folder / _ARCHITECTURE), "a saved network", str(error)) from None
    if (found := hashlib.sha256(weights).hexdigest()) != saved.weights:
        raise DigestMismatch(str(folder / _WEIGHTS), saved.weights, found)
    try:
        return saved, safetensors.torch.load(weights)
    except SafetensorError as error:
        raise Malformed(str(folder / _WEIGHTS), "safetensors", str(error)) from None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, those too that no ``state_dict`` holds, each once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _fill(tensor: Tensor, saved: Tensor, stride: tuple[int, ...] | None) -> None:
    """Give a tensor the content, dtype and layout of the saved one; it stays on its device."""
    content = saved.to(tensor.device)
    if stride is not None:
        content = torch.empty_strided(
            content.shape, stride, dtype=content.dtype, device=content.device
        ).copy_(content)
    tensor.data = content


def _refuse_extra_state(model: nn.Module) -> None:
    """State that is no tensor would be lost."""
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            where = f"model.{path}" if path else "model"
            found = f"{type(module).__name__}.get_extra_state"
            hint = "save it yourself beside the folder, and load it after elesh.load"
            raise InvalidField(where, "state of tensors only", found, hint=hint)


def _layers(model: nn.Module) -> dict[str, str]:
    """Type and settings of every module without parts, by path; bypass modules of removed ones
    not."""
    return {
        path: _described(module)
        for path, module in model.named_modules()
        if path and not list(module.children()) and not isinstance(module, Bypass)
    }


def _described(module: nn.Module) -> str:
    """For example ``Conv2d(dilation=(1, 1), padding=(1, 1), stride=(2, 2))``."""
    if not type(module).__module__.startswith("torch.nn."):
        return type(module).__qualname__
    settings = {
        name: value
        for name, value in sorted(vars(module).items())
        if name not in _FREE and not name.startswith("_") and _is_plain(value)
    }
    return f"{type(module).__qualname__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))


def _require_same_network(model: nn.Module, saved: SavedNetwork) -> None:
    """The given network is, as far as can be seen, the saved one before its first cut."""
    hint = "build the network as it was before it was cut, with the same settings"
    found = dict(model.named_modules())
    for path, expected in saved.layers.items():
        there = _described(found[path]) if path in found else "no such module"
        if there != expected:
            raise InvalidField(f"model.{path}", expected, there, hint=hint)
    try:
        require_fit(model, saved.original)
    except ShapeMismatch as error:
        raise ShapeMismatch(error.field, error.expected, error.found, hint=hint) from None


def _require_same_tensors(
    model: nn.Module, architecture: PrunedArchitecture, weights: Mapping[str, Tensor]
) -> None:
    """There is a content of the right shape for every tensor that the cut network will have."""
    for descriptor in architecture.tensors:
        tensor = weights.get(descriptor.path)
        if tensor is None or tuple(tensor.shape) != descriptor.shape:
            found = "none" if tensor is None else f"shape {tuple(tensor.shape)}"
            expected = f"a tensor of shape {descriptor.shape}"
            raise ShapeMismatch(f"{_WEIGHTS}: {descriptor.path}", expected, found)
    own = _tensors(model)
    for path in weights.keys() - {descriptor.path for descriptor in architecture.tensors}:
        if path not in own:
            raise ShapeMismatch(f"model.{path}", "a buffer", "no such tensor")
