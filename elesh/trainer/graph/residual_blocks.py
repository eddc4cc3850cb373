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

from elesh.trainer.network.calls import Call, Link
from elesh.trainer.network.layers import named_tensors
from elesh.trainer.network.sizes import common_parts, outwards
from leyline import LayerBlock, LayerDescriptor, StandIn
from leyline.network.blocks import BlockKind, SkipStrategy, inside

from .residual_branches import Branch, Trace, behind

SKIP_POTENTIAL: dict[SkipStrategy, float] = {
    "identity": 1.0, "residual": 0.95, "linear_projection": 0.9, "conv_projection": 0.8,
}  # fmt: skip
"""How well each strategy can replace a layer (FACTS, "Selection")."""
_NO_ADDITION = "no residual addition around it: without it no identity path is left"


@dataclass(frozen=True)
class _Candidate:
    """A branch with what goes if it goes."""

    branch: str
    contribution: Link
    entry: str
    stand_ins: tuple[StandIn, ...]
    tensors: tuple[str, ...]
    strategy: SkipStrategy
    kind: BlockKind
    size: int
    """Parameters that go."""
    reason: str = ""


class _Holdings:
    """What the modules of a model hold, looked up once."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.tensors = model, list(named_tensors(model))
        self.modules = dict(model.named_modules())
        named = dict(model.named_parameters())
        self.sizes = {path: parameter.numel() for path, parameter in named.items()}
        self.names = {id(parameter): path for path, parameter in named.items()}
        self._order: dict[str, int] = {}
        self._under: dict[str, dict[int, str]] = {}
        for number, (path, module) in enumerate(model.named_modules()):
            self._order[path] = number
            for name, parameter in module._parameters.items():
                for holder in outwards(path) if parameter is not None else ():
                    self._under.setdefault(holder, {}).setdefault(id(parameter), f"{path}.{name}")

    def under(self, path: str) -> set[str]:
        """Paths of the parameters inside a module, each once."""
        return set(self._under.get(path, {}).values())

    def only(self, path: str, dead: Collection[str]) -> bool:
        """Whether all parameters of a module are dead."""
        return all(name in dead for name in self._under.get(path, {}).values())

    def holders(self, dead: Iterable[str]) -> list[str]:
        """The modules around these parameters, in the order of the model's."""
        found = {holder for path in dead for holder in outwards(path.rpartition(".")[0])}
        return sorted(found, key=self._order.__getitem__)


def find_blocks(
    trace: Trace, model: nn.Module, layers: Sequence[LayerDescriptor], ignored: Collection[str]
) -> tuple[LayerBlock, ...]:
    """The blocks of a model, not proved yet.

    Args:
        trace: of a forward pass with gradients everywhere.
        layers: all layers of the model, in order of execution.
        ignored: modules that must stay.
    """
    held = _Holdings(model)
    candidates = _disjoint(list(_candidates(trace, held)))
    candidates = [_respected(candidate, ignored) for candidate in candidates]
    candidates = _nourished(trace, held, candidates)
    covered = {path for candidate in candidates for path in candidate.tensors}
    order = [layer.name for layer in layers]
    blocks = [
        _block(name, candidate, order)
        for name, candidate in zip(_names(candidates), candidates, strict=True)
    ]
    blocks += [
        _lone(layer, held, order)
        for layer in layers
        if layer.weight and layer.weight not in covered
    ]
    return tuple(blocks)


def _candidates(trace: Trace, held: _Holdings) -> Iterator[_Candidate]:
    names = held.names
    repeated = set[str]()
    for branch in trace.branches():
        paths = {names[n] for n in trace.dead(branch.contribution) if n in names}
        end = max(trace.made[branch.contribution], key=lambda one: one.left - one.entered)
        if paths:
            yield _candidate(trace, held, branch, paths)
        elif trace.times[end.name] > 1 and end.name not in repeated:
            repeated.add(end.name)
            own = held.under(end.name)
            if own:
                yield _candidate(trace, held, branch, own)


def _candidate(trace: Trace, held: _Holdings, branch: Branch, dead: set[str]) -> _Candidate:
    """What goes with a branch that alone uses the parameters ``dead``."""
    ends = sorted(trace.made[branch.contribution], key=lambda one: -(one.left - one.entered))
    own = [one for one in ends if trace.times[one.name] == 1] or ends
    end = next((one for one in own if held.only(one.name, dead)), own[-1])
    block = _identity_block(trace, held, branch, dead)
    entry = _entry(trace, branch, end)
    reason = _refusal(trace, branch, end, entry)
    if block is not None:
        stand_ins: tuple[StandIn, ...] = (StandIn(module=block.name, kind="identity"),)
    else:
        stand_ins = _stand_ins(trace, held, end, dead)
    gone = [stand_in.module for stand_in in stand_ins]
    within = tuple(f"{module}." for module in gone)
    tensors = [path for path in held.tensors if f"{path}.".startswith(within)]
    strategy: SkipStrategy = "identity" if block is not None else "residual"
    if not branch.reads_stream:
        strategy = _projection(trace, held.model, branch)
    return _Candidate(
        branch=end.name,
        contribution=branch.contribution,
        entry=entry,
        stand_ins=stand_ins,
        tensors=tuple(tensors),
        strategy=strategy,
        kind=_kind(held.model, gone),
        size=sum(held.sizes.get(path, 0) for path in tensors),
        reason=reason or _torn(held, gone, dead, set(tensors)),
    )


def _refusal(trace: Trace, branch: Branch, end: Call, entry: str) -> str:
    """Why the branch cannot go, as far as the graph shows it."""
    if not branch.reads_stream:
        return "the other operand of the addition is no identity path but a layer of its own"
    if trace.times[end.name] > 1:
        return f"{end.name} is called {trace.times[end.name]} times in one forward pass"
    return "" if entry else "the stream before it is no module's input, so it cannot be measured"


def _torn(held: _Holdings, gone: Iterable[str], dead: set[str], tensors: set[str]) -> str:
    """Why modules and parameters do not go together."""
    if left := sorted(dead - tensors):
        return f"parameters of modules that must stay go with it: {', '.join(left[:5])}"
    shared = [path for path in gone if not held.only(path, dead)]
    return f"parameters of {', '.join(shared)} are used elsewhere, too" if shared else ""


def _identity_block(
    trace: Trace, held: _Holdings, branch: Branch, dead: Collection[str]
) -> Call | None:
    """The outermost module from the stream to the addition that holds nothing else."""
    found = [
        one
        for one in trace.given.get(branch.stream, ())
        if one.made is not None
        and one.made[0] is branch.addition
        and not one.extra_outputs
        and trace.times[one.name] == 1
        and held.only(one.name, dead)
    ]
    return max(found, key=lambda one: one.left - one.entered, default=None)


def _entry(trace: Trace, branch: Branch, end: Call) -> str:
    """The outermost module that was called once, with the stream, before the branch ended."""
    found = [
        one
        for one in trace.given.get(branch.stream, ())
        if one.entered <= end.entered and trace.times[one.name] == 1
    ]
    return min(found, key=lambda one: one.entered).name if found else ""


def _stand_ins(
    trace: Trace, held: _Holdings, end: Call, dead: Collection[str]
) -> tuple[StandIn, ...]:
    """Zeros for the branch's end, identities for the largest other modules that are dead."""
    found = [StandIn(module=end.name, kind="zero", extra_outputs=end.extra_outputs)]
    for path in held.holders(dead):
        last = trace.last.get(path)
        if last is None or any(inside(path, x.module) for x in found) or inside(end.name, path):
            continue
        if held.only(path, dead):
            extra = last.extra_outputs
            found.append(StandIn(module=path, kind="identity", extra_outputs=extra))
    return tuple(found)


def _projection(trace: Trace, model: nn.Module, branch: Branch) -> SkipStrategy:
    modules = [model.get_submodule(one.name) for one in trace.made[branch.stream]]
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


def _nourished(trace: Trace, held: _Holdings, candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """In their order, with one marked for each parameter that no gradient would reach if all others
    went, too: the last of those that it acts through (a normalisation in front of branches in
    parallel)."""
    free = {number: one for number, one in enumerate(candidates) if not one.reason}
    gone = {path for one in free.values() for path in one.tensors}
    alive = trace.alive(one.contribution for one in free.values())
    barriers = alive.union(one.contribution[0] for one in free.values())
    starved = _parameters(held, trace.reached) - _parameters(held, alive) - gone
    marked = list(candidates)
    for number in sorted(free, reverse=True) if starved else ():
        end = free[number].contribution[0]
        starts = [function for function, _ in end.next_functions if function is not None]
        if fed := starved & _parameters(held, behind(starts, barriers)):
            reason = f"without it no gradient reaches {', '.join(sorted(fed)[:5])}"
            marked[number] = replace(candidates[number], reason=reason)
            starved -= fed
    return marked


def _parameters(held: _Holdings, functions: Iterable[Any]) -> set[str]:
    """Paths of the parameters that are among these functions."""
    found = (id(one.variable) for one in functions if hasattr(one, "variable"))
    return {held.names[number] for number in found if number in held.names}


def _names(candidates: Sequence[_Candidate]) -> list[str]:
    """The module around everything that goes, where that names one candidate only, else the end."""
    around = [".".join(common_parts(x.module for x in one.stand_ins)) for one in candidates]
    times, names = Counter(around), list[str]()
    for name, candidate in zip(around, candidates, strict=True):
        own = name if name and times[name] == 1 else candidate.branch
        number = 2
        while (unique := own if own not in names else f"{own}#{number}") in names:
            number += 1
        names.append(unique)
    return names


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


def _lone(layer: LayerDescriptor, held: _Holdings, order: Sequence[str]) -> LayerBlock:
    """A layer with a weight that no residual addition passes by."""
    module: Any = held.modules.get(layer.name)
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
