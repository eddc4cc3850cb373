"""Averages that are part of the network: a teacher beside its student, as in BYOL, MoCo and DINO.

Promises: a frozen part that has the tensors of a trained part, and weights like its, loses what
that part loses; what is removed of the student names the teacher's tensors too, so that counts,
histories and restore points speak of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from elesh.trainer.network.layers import named_tensors
from leyline import GateSite, LayerBlock, PrunedArchitecture, PruningGroup, TensorSlice

from .averages import ALIKE, WeightCopy, likeness

__all__ = ["teachers_in", "with_teachers"]


def teachers_in(model: nn.Module) -> tuple[WeightCopy, ...]:
    """The frozen parts of a network that copy a trained part; the outermost ones."""
    if all(parameter.requires_grad for parameter in model.parameters()):
        return ()
    parts = [(path, module) for path, module in model.named_modules() if path]
    trained = [(path, module) for path, module in parts if _all(module, requires_grad=True)]
    found: list[WeightCopy] = []
    for path, module in parts:
        inside = any(path.startswith(f"{teacher.name}.") for teacher in found)
        if inside or not module._modules or not _all(module, requires_grad=False):
            continue
        shapes = _shapes(module)
        for student, other in trained:
            if type(other) is type(module) and _shapes(other) == shapes:
                copy = WeightCopy(path, module, student)
                if likeness(copy, model) > ALIKE:
                    found.append(copy)
                    break
    return tuple(found)


def with_teachers(
    architecture: PrunedArchitecture, teachers: Iterable[WeightCopy]
) -> PrunedArchitecture:
    """The architecture in which groups and blocks of students take their teachers' along."""
    for teacher in teachers:
        groups = {group.name: group for group in architecture.groups}
        blocks = {block.name: block for block in architecture.blocks}
        moved = _renaming(teacher)
        followed = {moved(name) for name in (*groups, *blocks) if moved(name) != name}
        architecture = PrunedArchitecture.build(
            architecture.tensors,
            architecture.layers,
            tuple(_joined(g, groups, moved) for g in groups.values() if g.name not in followed),
            blocks=tuple(_along(b, moved) for b in blocks.values() if b.name not in followed),
        )
    return architecture


def _renaming(teacher: WeightCopy) -> Callable[[str], str]:
    start, there = f"{teacher.prefix}.", f"{teacher.name}."

    def moved(name: str) -> str:
        return there + name[len(start) :] if name.startswith(start) else name

    return moved


def _joined(
    group: PruningGroup, groups: Mapping[str, PruningGroup], moved: Callable[[str], str]
) -> PruningGroup:
    """A student's group with the teacher's tensors, and with its sites where it is run."""
    slices: list[TensorSlice] = list(group.slices)
    for part in group.slices:
        other = part.model_copy(update={"tensor": moved(part.tensor)})
        if other not in slices:
            slices.append(other)
    other_group = groups.get(moved(group.name))
    sites: list[GateSite] = list(group.sites)
    if other_group is not None and other_group is not group:
        sites += [site for site in other_group.sites if site not in sites]
    return group.model_copy(update={"slices": tuple(slices), "sites": tuple(sites)})


def _along(block: LayerBlock, moved: Callable[[str], str]) -> LayerBlock:
    stand_ins = list(block.stand_ins)
    for part in block.stand_ins:
        other = part.model_copy(update={"module": moved(part.module)})
        if other not in stand_ins:
            stand_ins.append(other)
    tensors = dict.fromkeys([*block.tensors, *map(moved, block.tensors)])
    return block.model_copy(update={"stand_ins": tuple(stand_ins), "tensors": tuple(tensors)})


def _all(module: nn.Module, *, requires_grad: bool) -> bool:
    flags = [parameter.requires_grad for parameter in module.parameters()]
    return bool(flags) and all(flag is requires_grad for flag in flags)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {path: tuple(tensor.shape) for path, tensor in named_tensors(module).items()}
