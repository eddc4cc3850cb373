"""What joined a network after a restore point was taken, and how it is treated when the point is
restored.

Promises: a network whose tensors are not those that its surgeon knows, or that layers have joined
which fit the cut network alone, is not gone back with, and nothing of it changes; averages, and
copies that the script updates, that the point has nothing of, named since or not at all, get the
network's structure and begin anew with its weights. Optimizers of that kind begin their state anew
(:func:`~elesh.trainer.surgery.optimizers.begin_others_anew`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from elesh.observe import get_logger
from elesh.trainer.network.calling import Inputs, call, example_of, summary
from elesh.trainer.network.layers import named_tensors, require_fit
from elesh.trainer.network.sizes import constants, size_names, sizes_of, take_sizes
from elesh.trainer.network.state import preserve_state
from elesh.trainer.surgery.averages import WeightCopy, unnamed_averages
from elesh.trainer.surgery.bypass import Bypass
from elesh.trainer.surgery.lineage import lineage_of
from elesh.trainer.surgery.surgeon import Surgeon
from elesh.trainer.surgery.tensors import replace_data
from elesh.trainer.surgery.unnamed import fixed_to_a_shape
from leyline import InvalidField, PrunedArchitecture

_log = get_logger(__name__)


@dataclass(frozen=True)
class Latecomers:
    """The averages of a network that a restore point has nothing of."""

    model: nn.Module
    averages: tuple[WeightCopy, ...]

    @classmethod
    def of(cls, surgeon: Surgeon, there: PrunedArchitecture, known: Collection[str]) -> Latecomers:
        """Look for them, before anything changes.

        Args:
            there: the architecture of the restore point.
            known: the names of what it has.

        Raises:
            ShapeMismatch: if tensors of the network are gone or have other shapes.
            InvalidField: if a gradient hook, or a layer that has joined, would not fit any more.
        """
        model, now = surgeon.model, surgeon.architecture
        require_fit(model, now, joined=True)
        shapes = {tensor.path: tensor.shape for tensor in there.tensors}
        moving = {t.path for t in now.tensors if shapes.get(t.path) != t.shape}
        if hooked := fixed_to_a_shape(model, moving):
            raise InvalidField(
                f"model.{hooked}",
                "gradient hooks that fit any shape",
                "one that holds a tensor of its shape",
                hint="let the hook make it of the gradient or of the parameter, or remove it",
            )
        if there.model_hash == now.model_hash:  # what the script keeps fits as it is
            return cls(model, ())
        _require_joined_to_fit(surgeon, there)
        late = [each for each in surgeon.copies if each.name not in known]
        late += unnamed_averages(model, surgeon.copies)
        late += surgeon.updated_copies(late)
        return cls(model, tuple(late))

    def begin_anew(self) -> None:
        """Make them copies of the network as it is."""
        tensors, lineage = named_tensors(self.model), lineage_of(self.model)
        names = size_names(lineage.now) if lineage is not None else frozenset()
        for average in self.averages:
            if average.module is not None:
                _shape_like(average.module, self.model.get_submodule(average.prefix))
            for path, tensor in average.tensors().items():
                replace_data(tensor, tensors[path].detach().to(tensor, copy=True))
            if average.module is not None:
                _size_like(average.module, self.model.get_submodule(average.prefix), names)
            _log.warning("an average begins anew with the network's weights", average=average.name)


def _require_joined_to_fit(surgeon: Surgeon, there: PrunedArchitecture) -> None:
    """Refuse parameters that are not the surgeon's and fit the network as it is now, but not
    ``there``: an adapter, a head, a norm behind a layer that was cut. The example is called with
    that structure, and the present is put back, bit for bit.

    Raises:
        InvalidField: naming them.
    """
    model, example = surgeon.model, example_of(surgeon.model)
    known = {tensor.path for tensor in surgeon.architecture.tensors}
    joined = [path for path, _ in model.named_parameters() if path not in known]
    if not joined or example is None or _fails(model, example):
        return
    present, gradients = surgeon.restore_point(), [(p, p.grad) for p in model.parameters()]
    surgeon.move_to(there)
    try:
        failed = _fails(model, example)
    finally:
        surgeon.bring_back(present)
        for parameter, gradient in gradients:
            parameter.grad = gradient
    if failed:
        raise InvalidField(
            f"model.{joined[0]}",
            "parameters that fit the network before the cut, too",
            f"{len(joined)} that came since and fit the cut network alone: {failed}",
            hint="add layers before a cut, or when it is monitored no more",
        )


def _fails(model: nn.Module, example: Inputs) -> str:
    """What a forward pass ends with, if it does not run through."""
    with preserve_state(model, 0), torch.no_grad():
        try:
            call(model, example)
        except Exception as error:
            return summary(error)
    return ""


def _shape_like(module: nn.Module, like: nn.Module) -> None:
    """Bring removed modules back where ``like`` has them."""
    for name, child in like.named_children():
        own = module._modules.get(name)
        if isinstance(own, Bypass) and not isinstance(child, Bypass):
            module._modules[name] = copy.deepcopy(child)
        elif own is not None:
            _shape_like(own, child)


def _size_like(module: nn.Module, like: nn.Module, names: Collection[str]) -> None:
    """Give all parts the constants, and the sizes in attributes of these names, of ``like``."""
    for path, theirs in like.named_modules():
        own = module.get_submodule(path)
        take_sizes(own, sizes_of(theirs, names))
        for name, constant in constants(theirs).items():
            own._buffers[name] = constant.clone()
