"""Which layers of a network can be removed whole.

Promises: a layer is the branch of a residual addition, with everything that only the branch uses;
it stays prunable only if, on a copy with random weights, masking and removing it (with all others
that passed) gave the same outputs, in training mode it runs, and every parameter that is left
still gets a gradient. Layers that overlap: the smallest is taken. All others say why not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from elesh.trainer.network.calling import Inputs
from elesh.trainer.network.layers import named_tensors
from leyline import LayerBlock, LayerDescriptor, PrunedArchitecture, StandIn
from leyline.network.blocks import BlockKind, SkipStrategy, inside

from .residual_branches import Branch, Pass, Trace

SKIP_POTENTIAL: dict[SkipStrategy, float] = {
    "identity": 1.0, "residual": 0.95, "linear_projection": 0.9, "conv_projection": 0.8,
}  # fmt: skip
"""How well each strategy can stand in for a layer (FACTS, "Selection")."""
_NO_ADDITION = "no residual addition around it: without it no identity path is left"


@dataclass(frozen=True)
class _Candidate:
    """A branch with what goes if it goes."""

    branch: str
    entry: str
    stand_ins: tuple[StandIn, ...]
    tensors: tuple[str, ...]
    strategy: SkipStrategy
    kind: BlockKind
    size: int
    """Parameters that go."""
    reason: str = ""


def find_blocks(
    model: nn.Module, inputs: Inputs, architecture: PrunedArchitecture, ignored: Collection[str]
) -> tuple[LayerBlock, ...]:
    """The blocks of a model that requires gradients everywhere, not proved yet.

    Args:
        ignored: modules that must stay.
    """
    candidates = _disjoint(list(_candidates(Trace(model, inputs), model)))
    candidates = [_respected(candidate, ignored) for candidate in candidates]
    covered = {path for candidate in candidates for path in candidate.tensors}
    order = [layer.name for layer in architecture.layers]
    blocks = [
        _block(name, candidate, order)
        for name, candidate in zip(_names(candidates), candidates, strict=True)
    ]
    blocks += [
        _lone(layer, model, order)
        for layer in architecture.layers
        if layer.weight and layer.weight not in covered
    ]
    return tuple(blocks)


def _candidates(trace: Trace, model: nn.Module) -> Iterator[_Candidate]:
    names = {id(p): path for path, p in model.named_parameters()}
    repeated = set[str]()
    for branch in trace.branches():
        paths = {names[n] for n in trace.dead(branch.contribution) if n in names}
        end = max(trace.made[branch.contribution], key=lambda one: one.left - one.entered)
        if paths:
            yield _candidate(trace, model, branch, paths)
        elif trace.times[end.path] > 1 and end.path not in repeated:
            repeated.add(end.path)
            own = {f"{end.path}.{n}" for n, _ in model.get_submodule(end.path).named_parameters()}
            if own:
                yield _candidate(trace, model, branch, own)


def _candidate(trace: Trace, model: nn.Module, branch: Branch, dead: set[str]) -> _Candidate:
    """What goes with a branch that alone uses the parameters ``dead``."""
    ends = sorted(trace.made[branch.contribution], key=lambda one: -(one.left - one.entered))
    own = [one for one in ends if trace.times[one.path] == 1] or ends
    end = next((one for one in own if _only(model, one.path, dead)), own[-1])
    block = _identity_block(trace, model, branch, dead)
    entry = _entry(trace, branch, end)
    reason = _refusal(trace, branch, end, entry)
    if block is not None:
        stand_ins: tuple[StandIn, ...] = (StandIn(module=block.path, kind="identity"),)
    else:
        stand_ins = _stand_ins(trace, model, end, dead)
    gone = [stand_in.module for stand_in in stand_ins]
    tensors = [t for t in named_tensors(model) if any(inside(t, module) for module in gone)]
    strategy: SkipStrategy = "identity" if block is not None else "residual"
    if not branch.reads_stream:
        strategy = _projection(trace, model, branch)
    return _Candidate(
        branch=end.path,
        entry=entry,
        stand_ins=stand_ins,
        tensors=tuple(tensors),
        strategy=strategy,
        kind=_kind(model, gone),
        size=sum(p.numel() for path, p in model.named_parameters() if path in tensors),
        reason=reason or _torn(model, gone, dead, set(tensors)),
    )


def _refusal(trace: Trace, branch: Branch, end: Pass, entry: str) -> str:
    """Why the branch cannot go, as far as the graph shows it."""
    if not branch.reads_stream:
        return "the other operand of the addition is no identity path but a layer of its own"
    if trace.times[end.path] > 1:
        return f"{end.path} is called {trace.times[end.path]} times in one forward pass"
    return "" if entry else "the stream before it is no module's input, so it cannot be measured"


def _torn(model: nn.Module, gone: Iterable[str], dead: set[str], tensors: set[str]) -> str:
    """Why modules and parameters do not go together."""
    if left := sorted(dead - tensors):
        return f"parameters of modules that must stay go with it: {', '.join(left[:5])}"
    shared = [path for path in gone if not _only(model, path, dead)]
    return f"parameters of {', '.join(shared)} are used elsewhere, too" if shared else ""


def _only(model: nn.Module, path: str, dead: Collection[str]) -> bool:
    """Whether all parameters of a module are dead."""
    return all(f"{path}.{name}" in dead for name, _ in model.get_submodule(path).named_parameters())


def _identity_block(
    trace: Trace, model: nn.Module, branch: Branch, dead: Collection[str]
) -> Pass | None:
    """The outermost module from the stream to the addition that holds nothing else."""
    found = [
        one
        for one in trace.passes
        if one.input == branch.stream
        and one.output is not None
        and one.output[0] is branch.addition
        and not one.extra_outputs
        and trace.times[one.path] == 1
        and _only(model, one.path, dead)
    ]
    return max(found, key=lambda one: one.left - one.entered, default=None)


def _entry(trace: Trace, branch: Branch, end: Pass) -> str:
    """The outermost module that was called once, with the stream, before the branch ended."""
    found = [
        one
        for one in trace.passes
        if one.input == branch.stream and one.entered <= end.entered and trace.times[one.path] == 1
    ]
    return min(found, key=lambda one: one.entered).path if found else ""


def _stand_ins(
    trace: Trace, model: nn.Module, end: Pass, dead: Collection[str]
) -> tuple[StandIn, ...]:
    """Zeros for the branch's end, identities for the largest other modules that are dead."""
    made = {one.path: one for one in trace.passes}
    found = [StandIn(module=end.path, kind="zero", extra_outputs=end.extra_outputs)]
    for path, module in model.named_modules():
        if not path or path not in made or any(inside(path, x.module) for x in found):
            continue
        if next(module.parameters(), None) is None or inside(end.path, path):
            continue
        if _only(model, path, dead):
            extra = made[path].extra_outputs
            found.append(StandIn(module=path, kind="identity", extra_outputs=extra))
    return tuple(found)


def _projection(trace: Trace, model: nn.Module, branch: Branch) -> SkipStrategy:
    modules = [model.get_submodule(one.path) for one in trace.made[branch.stream]]
    conv = any(isinstance(part, _ConvNd) for module in modules for part in module.modules())
    return "conv_projection" if conv else "linear_projection"


def _kind(model: nn.Module, gone: Iterable[str]) -> BlockKind:
    parts = [part for path in gone for part in model.get_submodule(path).modules()]
    names = [type(part).__name__.lower() for part in parts]
    if any("attention" in name or "attn" in name for name in names):
        return "attention"
    if any(isinstance(part, _ConvNd) for part in parts):
        return "conv"
    return "linear" if any(_multiplies(part) for part in parts) else "other"


def _multiplies(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and not _looks_up(module)


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _disjoint(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """In their order, those that overlap a smaller one that can go marked with the reason."""
    taken: dict[str, str] = {}
    kept: dict[int, _Candidate] = {}
    for number in sorted(range(len(candidates)), key=lambda i: (candidates[i].size, i)):
        candidate = candidates[number]
        other = next((taken[path] for path in candidate.tensors if path in taken), "")
        if other and not candidate.reason:
            candidate = replace(candidate, reason=f"holds a smaller removable layer ({other})")
        if not candidate.reason:
            taken |= dict.fromkeys(candidate.tensors, candidate.branch)
        kept[number] = candidate
    return [kept[number] for number in range(len(candidates))]


def _respected(candidate: _Candidate, ignored: Collection[str]) -> _Candidate:
    named = [
        name
        for name in ignored
        if any(inside(path, name) for path in (candidate.branch, *candidate.tensors))
    ]
    if candidate.reason or not named:
        return candidate
    return replace(candidate, reason=f"ignored: {', '.join(sorted(named))}")


def _names(candidates: Sequence[_Candidate]) -> list[str]:
    """The module around everything that goes, where that names one candidate only, else the end."""
    around = [_around([x.module for x in candidate.stand_ins]) for candidate in candidates]
    times, names = Counter(around), list[str]()
    for name, candidate in zip(around, candidates, strict=True):
        own = name if name and times[name] == 1 else candidate.branch
        number = 2
        while (unique := own if own not in names else f"{own}#{number}") in names:
            number += 1
        names.append(unique)
    return names


def _around(paths: Sequence[str]) -> str:
    parts = [path.split(".") for path in paths]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _block(name: str, candidate: _Candidate, order: Sequence[str]) -> LayerBlock:
    gone = [stand_in.module for stand_in in candidate.stand_ins]
    held = (i for i, layer in enumerate(order) if any(inside(layer, path) for path in gone))
    last = max(held, default=0)
    return LayerBlock(
        name=name,
        kind=candidate.kind,
        depth=last / max(1, len(order) - 1),
        strategy=candidate.strategy,
        skip_potential=SKIP_POTENTIAL[candidate.strategy],
        branch=candidate.branch,
        entry=candidate.entry,
        dim=1 if candidate.kind == "conv" else -1,
        stand_ins=candidate.stand_ins,
        tensors=candidate.tensors,
        prunable=not candidate.reason,
        reason=candidate.reason,
    )


def _lone(layer: LayerDescriptor, model: nn.Module, order: Sequence[str]) -> LayerBlock:
    """A layer with a weight that no residual addition passes by."""
    module: Any = dict(model.named_modules()).get(layer.name)
    conv = isinstance(module, _ConvNd)
    strategy: SkipStrategy = "conv_projection" if conv else "linear_projection"
    kind: BlockKind = "conv" if conv else "linear" if isinstance(module, nn.Linear) else "other"
    return LayerBlock(
        name=layer.name,
        kind=kind,
        depth=order.index(layer.name) / max(1, len(order) - 1),
        strategy=strategy,
        skip_potential=SKIP_POTENTIAL[strategy],
        tensors=(layer.weight,),
        prunable=False,
        reason=_NO_ADDITION,
    )
