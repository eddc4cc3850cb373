"""A decision in one sentence: what became of it, what it saves, and why if it does not.

Promises: pure; made from the fields of decision and outcomes, the same for terminal and console.
"""

from __future__ import annotations

from collections.abc import Sequence

from leyline import GateResult, PruningOutcome, StructuralPruningDecision

__all__ = ["gate_parts", "reasons", "removed", "result_of", "savings", "summary", "verdict"]

_LEVELS = ("channel", "head", "layer", "joint")


def result_of(decision: StructuralPruningDecision, outcomes: Sequence[PruningOutcome]) -> str:
    """What became of it: a result of the trainer, or ``approved`` or ``rejected``."""
    if outcomes:
        return str(outcomes[-1].result)
    return "approved" if decision.approved_for_application else "rejected"


def gate_parts(name: str) -> tuple[str, str]:
    """A gate's level, empty for one of the whole decision, and its own name."""
    level, dot, gate = name.partition(".")
    return (level if level != "joint" else "", gate) if dot and level in _LEVELS else ("", name)


def reasons(decision: StructuralPruningDecision) -> str:
    """Why a decision was rejected, each reason once with the levels that it holds for."""
    if decision.approved_for_application:
        return ""
    found: dict[str, list[str]] = {}
    for gate in decision.safety.gates:
        if not gate.passed:
            level, _ = gate_parts(gate.name)
            found.setdefault(_detail(gate), []).extend([level] if level else [])
    if not found:
        return decision.rejection_reason
    return "; ".join(
        f"{_listed([f'{level}s' for level in levels])}: {text}" if levels else text
        for text, levels in found.items()
    )


def removed(decision: StructuralPruningDecision) -> str:
    """What it removes, by level: ``30 channels and 2 heads``."""
    counts = {
        "channel": sum(len(target.channel_indices) for target in decision.channels),
        "head": sum(len(target.head_indices) for target in decision.attention_heads),
        "layer": len(decision.layers),
    }
    parts = [f"{n} {name}{'s' if n != 1 else ''}" for name, n in counts.items() if n]
    return _listed(parts) or "nothing"


def savings(decision: StructuralPruningDecision) -> str:
    """What removing it saves: parameters and MACs, with their shares."""
    s = decision.statistics
    return ", ".join(
        f"{before - after:,} {name} ({_share(before, after)}) fewer"
        for name, before, after in (
            ("parameters", s.parameters_before, s.parameters_after),
            ("MACs a sample", s.macs_before, s.macs_after),
        )
    )


def summary(decision: StructuralPruningDecision) -> str:
    """The sentence of a decision by itself, whatever its trainer made of it."""
    if not decision.approved_for_application:
        return f"Rejected, nothing is removed: {reasons(decision)}."
    return f"Approved: removes {removed(decision)}: {savings(decision)}."


def verdict(decision: StructuralPruningDecision, outcomes: Sequence[PruningOutcome] = ()) -> str:
    """The sentence; ``outcomes`` are what the trainer said, oldest first."""
    result = result_of(decision, outcomes)
    if not decision.approved_for_application:
        return summary(decision)
    cut = f"{removed(decision)}: {savings(decision)}"
    detail = outcomes[-1].detail if outcomes else ""
    if result == "applied":
        sentence = (
            f"Applied: removes {cut}{_really(decision, outcomes[0])}{_accuracy(outcomes[0])}."
        )
        return f"{sentence} {detail[:1].upper()}{detail[1:]}." if detail else sentence
    if result == "rolled_back":
        return f"Applied and then taken back: {detail or 'the trainer gave no reason'}."
    if result in ("refused", "rejected"):
        return f"Approved, but the trainer did not take it: {detail or 'no reason was given'}."
    return f"Approved; the trainer has not answered yet. It would remove {cut}."


def _really(decision: StructuralPruningDecision, outcome: PruningOutcome) -> str:
    """What went, where it is less than was decided: another cut had come between."""
    went = outcome.parameters_before - outcome.parameters_after
    statistics = decision.statistics
    if not 0 < went < statistics.parameters_before - statistics.parameters_after:
        return ""
    return f"; an earlier cut had taken part of it, {went:,} parameters were left to remove"


def _accuracy(outcome: PruningOutcome) -> str:
    # A report that ends a watch (0 checkpoints left) was measured later than the cut.
    after = outcome.accuracy_masked if outcome.watched == 0 else outcome.accuracy_after
    after = outcome.accuracy_masked if after is None else after
    before = outcome.accuracy_before
    if before is None or after is None or before != before or after != after:
        return ""
    return f"; held-out accuracy {before:.2%} before it and {after:.2%} after, by the trainer"


def _detail(gate: GateResult) -> str:
    if gate.detail:
        return gate.detail
    name = gate_parts(gate.name)[1].replace("_", " ")
    if gate.measured is None or gate.limit is None:
        return f"{name} failed"
    return f"{name} is {gate.measured:.4g}, the limit is {gate.limit:.4g}"


def _share(before: int, after: int) -> str:
    return f"{(before - after) / before:.1%}" if before else "0%"


def _listed(names: Sequence[str]) -> str:
    """``a, b and c``, each once."""
    names = list(dict.fromkeys(names))
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])
