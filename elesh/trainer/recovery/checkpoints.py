"""The architecture of a cut network, stored in a framework's checkpoint beside its weights.

Promises: a checkpoint of a network that was never cut is just what it would be without Elesh; one
of a cut network says how it was cut, and loading either brings the network, its averages and its
optimizers to that structure before a tensor is filled. It is compressed JSON; reading runs no code.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from elesh.observe import get_logger
from elesh.trainer.network.layers import named_tensors
from elesh.trainer.surgery.lineage import Lineage, lineage_of, replayed
from elesh.trainer.surgery.optimizers import Optimizers
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import InvalidField, Malformed, PrunedArchitecture, PruningRecord, TensorDescriptor

KEY = "elesh.architecture"
"""The name under which a checkpoint holds it."""

_FORMAT = 1
_log = get_logger(__name__)


def pack(model: nn.Module) -> Tensor | None:
    """The cuts of a network as bytes [B] uint8; None if it was never cut."""
    lineage = lineage_of(model)
    if lineage is None or not lineage.now.history:
        return None
    document = {
        "format": _FORMAT,
        "original": lineage.original.model_dump(mode="json"),
        "history": [record.model_dump(mode="json") for record in lineage.now.history],
    }
    packed = zlib.compress(json.dumps(document, separators=(",", ":")).encode())
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def unpack(packed: Tensor) -> Lineage:
    """The two ends of the cuts of :func:`pack`.

    Raises:
        Malformed: if the bytes are not that.
    """
    try:
        document = json.loads(zlib.decompress(packed.cpu().numpy().tobytes()))
        if document["format"] != _FORMAT:
            raise Malformed(KEY, f"format {_FORMAT}", document["format"])
        original = PrunedArchitecture.model_validate_json(
            json.dumps(document["original"]), strict=True
        )
        history = [
            PruningRecord.model_validate_json(json.dumps(record), strict=True)
            for record in document["history"]
        ]
    except (zlib.error, ValueError, KeyError, TypeError, ValidationError) as error:
        raise Malformed(KEY, "the architecture of a cut network", str(error)) from None
    return Lineage(original, replayed(original, history))


def cut_like(model: nn.Module, packed: Tensor) -> None:
    """Cut a freshly built network as the one of a checkpoint was; its weights are to follow.

    Raises:
        ShapeMismatch: if it is not the network that the checkpoint's was before its first cut.
    """
    lineage = unpack(packed)
    Surgeon(model, lineage.original, restore_points=0).replay(lineage.now.history)


def bring(surgeon: Surgeon, packed: Tensor | None) -> bool:
    """Give the surgeon's network the structure of a checkpoint, back or forth; the weights are to
    follow.

    Args:
        packed: what the checkpoint says; None: its network was never cut.

    Returns:
        Whether anything had to change.

    Raises:
        InvalidField: if the checkpoint is of another network.
    """
    known = lineage_of(surgeon.model)
    now = surgeon.architecture
    original = known.original if known is not None else now
    lineage = Lineage(original, original) if packed is None else unpack(packed)
    if lineage.original.model_hash != original.model_hash:
        raise InvalidField(
            "checkpoint",
            f"one of this network (architecture {original.model_hash} before its first cut)",
            f"one of another ({lineage.original.model_hash})",
        )
    return _move(surgeon, lineage.now)


def _move(surgeon: Surgeon, there: PrunedArchitecture) -> bool:
    if there.model_hash == surgeon.architecture.model_hash:
        return False
    surgeon.move_to(there)
    _log.info(
        "network brought to the structure of a checkpoint",
        cuts=len(there.history),
        parameters=there.parameters,
    )
    return True


def _warn_of_empty(surgeon: Surgeon, before: PrunedArchitecture, state: Mapping[str, Any]) -> None:
    """Say which parameters have another size than before and no content in what is loaded: files
    of weights are loaded one by one, and scripts load some of the weights."""
    model, here = surgeon.model, {tensor.path: tensor.shape for tensor in before.tensors}
    moved = {
        tensor.path
        for tensor in surgeon.architecture.tensors
        if tensor.kind != "buffer" and here.get(tensor.path) != tensor.shape
    }
    every = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(every[path]) for path in state.keys() & every.keys()}
    if empty := [path for path in sorted(moved & every.keys()) if id(every[path]) not in filled]:
        what = "parameters have the sizes of before the cuts and no content until it is loaded, too"
        _log.warning(what, parameters=", ".join(empty))


class _Left:
    """What a structure that a load left had beside its weights, for scripts that load others (an
    average, the best so far) for an evaluation only, and then their own again."""

    def __init__(self, surgeon: Surgeon) -> None:
        optimizers = surgeon.optimizers
        self._architecture = surgeon.architecture.model_hash
        self._states = [(each, dict(each.state)) for each in optimizers.stateful()]
        self._copies = {place: t.detach().clone() for place, t in _beside(surgeon).items()}
        self._loaded: dict[str, float] = {}

    def loads(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Remember what the network is given in its place."""
        for path, tensor in model.named_parameters():
            if isinstance(state.get(path), Tensor):
                self._loaded[path] = _sum(state[path].to(tensor))

    def untrained(self, model: nn.Module) -> bool:
        """Whether nothing was trained since."""
        if any(optimizer.state for optimizer, _ in self._states):
            return False
        now = dict(model.named_parameters())
        return all(path in now and _sum(now[path]) == was for path, was in self._loaded.items())

    def put_back(self, surgeon: Surgeon) -> None:
        """Give optimizers and copies what they had, if the network has this structure again."""
        if surgeon.architecture.model_hash != self._architecture:
            return
        for optimizer, states in self._states:
            optimizer.state.update(states)
        surgeon.optimizers.refresh()
        for place, tensor in _beside(surgeon).items():
            if place in self._copies:  # others came meanwhile
                tensor.data.copy_(self._copies[place])


def _beside(surgeon: Surgeon) -> dict[tuple[str, int, str], Tensor]:
    """The tensors of averages and other copies, and of single precision masters: by who keeps them,
    the number of the copy there, and the path."""
    found = {("masters", -1, path): tensor for path, tensor in surgeon.optimizers.masters.items()}
    copies = surgeon.copies
    for name in dict.fromkeys(copy.name for copy in copies):
        for number, copy in enumerate(copy for copy in copies if copy.name == name):
            found.update({(name, number, path): t for path, t in copy.tensors().items()})
    return found


def _sum(tensor: Tensor) -> float:
    return float(tensor.detach().double().sum())


class Loading:
    """A hook that brings a surgeon's network to the structure of every ``state_dict`` it loads.

    Optimizers and averages begin anew then; they have again what they had once the network is
    given back the structure that it was trained in, and was not trained meanwhile.

    Args:
        surgeon: who changes the structure; an earlier one of the same network changes nothing any
            more, and lets its optimizers go.
    """

    def __init__(self, surgeon: Surgeon) -> None:
        self.surgeon = surgeon
        self._left: _Left | None = None
        for earlier in _loadings(surgeon.model):
            earlier.end()
            if earlier.surgeon is not surgeon:
                earlier.surgeon.optimizers = Optimizers(None, {})
        model: Any = surgeon.model  # the method has no types
        self._handle = model.register_load_state_dict_pre_hook(self)

    @staticmethod
    def is_followed(surgeon: Surgeon) -> bool:
        """Whether there is a hook for this surgeon already."""
        return any(each.surgeon is surgeon for each in _loadings(surgeon.model))

    def end(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Called before tensors are filled."""
        packed = state.pop(prefix + KEY, None)
        if module is not self.surgeon.model:  # a copy of it, which the surgeon moves along
            return
        here = {path[len(prefix) :]: t for path, t in state.items() if path.startswith(prefix)}
        if packed is None and _fits(here, named_tensors(module)):
            return
        leaves, came = _Left(self.surgeon), self._left
        untrained = came is not None and came.untrained(module)
        if packed is not None:
            changed = bring(self.surgeon, packed)
        else:
            changed = self._bring_to_what_fits(here)
        if not changed:
            return
        self.surgeon.fill_copies(here)
        if came is not None and untrained:
            came.put_back(self.surgeon)
        leaves.loads(module, here)
        self._left = leaves

    def _bring_to_what_fits(self, state: Mapping[str, Any]) -> bool:
        """A state without its architecture, as in a script's best weights, has one that this
        network had before."""
        known = lineage_of(self.surgeon.model)
        had = [*([known.original] if known else []), *self.surgeon.architectures]
        for architecture in had:  # the largest first
            if all(_has(state, tensor) for tensor in architecture.tensors):
                return _move(self.surgeon, architecture)
        before = self.surgeon.architecture
        changed = bring(self.surgeon, None)
        _warn_of_empty(self.surgeon, before, state)
        return changed

    def __deepcopy__(self, memo: dict[int, Any]) -> Loading:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()  # a pickled network has no surgeon


def _loadings(model: nn.Module) -> list[Loading]:
    hooks = [getattr(each, "hook", each) for each in model._load_state_dict_pre_hooks.values()]
    return [each for each in hooks if isinstance(each, Loading)]


class _Nothing:
    """What a pickled :class:`Loading` becomes."""

    def __call__(self, *args: Any) -> None:
        pass


def _has(state: Mapping[str, Any], described: TensorDescriptor) -> bool:
    tensor = state.get(described.path)
    return isinstance(tensor, Tensor) and tuple(tensor.shape) == described.shape


def _fits(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    return all(
        not isinstance(value, Tensor) or path not in tensors or value.shape == tensors[path].shape
        for path, value in state.items()
    )
