"""A cut that was taken back is refused while its evidence stands, and only then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import joint_networks
import networks
from hypothesis import given
from hypothesis import strategies as st

from elesh.analysis import analyze
from elesh.safety import fingerprint_of, rolled_back_cut, rolled_back_gate
from elesh.settings import Settings
from leyline import (
    Level,
    Outcome,
    PruningOutcome,
    RolledBackCut,
    StructuralPruningDecision,
    decode,
    encode,
)

SETTINGS = Settings(structured_pruning={"channel_analysis": {"max_predicted_shift": 1e9}})


def decision(cuts: Sequence[RolledBackCut] = ()) -> StructuralPruningDecision:
    bundle = networks.bundle(networks.chain([40, 48, 32]), epoch=60)
    made = analyze(bundle, SETTINGS, taken_back=cuts)
    assert cuts or made.approved_for_application, made.rejection_reason
    return made


def taken_back(of: StructuralPruningDecision, **changes: Any) -> RolledBackCut:
    outcome = PruningOutcome(
        idempotency_key=of.idempotency_key,
        run_id="run",
        epoch=of.epoch,
        result="rolled_back",
        rolled_back_epoch=62,
        detail="accuracy fell",
    )
    return rolled_back_cut(of, outcome).model_copy(update=changes)


def rescored(of: StructuralPruningDecision, factor: float) -> StructuralPruningDecision:
    """The same cut with one of its scores changed, and its shift with it."""
    first, *others = of.channels
    importance = (first.importance[0] * factor, *first.importance[1:])
    first = first.model_copy(update={"importance": importance})
    return of.model_copy(update={"channels": (first, *others)})


def test_the_same_cut_for_the_same_evidence_is_refused_and_names_what_happened() -> None:
    made = decision()
    refused = decision([taken_back(made)])
    assert not refused.approved_for_application
    assert refused.safety.outcome is Outcome.NO_GO
    assert made.idempotency_key in refused.rejection_reason
    assert "epoch 62 (accuracy fell)" in refused.rejection_reason
    assert refused.channels == made.channels, "the analysis goes on as telemetry"


def test_a_cut_that_contains_it_is_refused_too() -> None:
    made = decision()
    part = made.model_copy(update={"channels": made.channels[:1]})
    assert len(made.channels) > 1
    assert not rolled_back_gate(made, [taken_back(part)]).passed


def test_a_larger_cut_spares_the_set_and_goes_on_with_the_rest() -> None:
    bundle = networks.bundle(networks.chain([40, 48, 32]), epoch=60)
    made = analyze(bundle, SETTINGS)
    part = made.model_copy(update={"channels": made.channels[:1]})
    cut = taken_back(part)
    left = analyze(bundle, SETTINGS, taken_back=[cut])
    assert left.approved_for_application
    gone = {name: set(units) for name, units in cut.units}
    for target in left.channels:
        assert not gone.get(target.layer_name, set()) & set(target.original_indices)
    assert left.channels == made.channels[1:]
    gate = left.safety.gates[-1]
    assert gate.name == "rolled_back"
    assert gate.passed
    assert f"{made.idempotency_key} was rolled back at epoch 62" in gate.detail
    assert left.statistics.channels_after > made.statistics.channels_after
    assert left.rolled_back == (cut,)


def test_spared_units_of_a_group_that_still_loses_some_are_named() -> None:
    bundle = networks.bundle(networks.chain([40, 48, 32]), epoch=60)
    made = analyze(bundle, SETTINGS)
    target = next(t for t in made.channels if len(t.channel_indices) > 1)
    first = target.channel_indices[0]
    cut = taken_back(made).model_copy(
        update={
            "units": ((target.layer_name, (target.original_indices[0],)),),
            "scores": (target.importance[0],),
        }
    )
    left = analyze(bundle, SETTINGS, taken_back=[cut])
    (same,) = [t for t in left.channels if t.layer_name == target.layer_name]
    assert first not in same.channel_indices
    assert (first, "rolled_back") in {(unit.index, unit.reason) for unit in same.spared}


def test_nothing_but_the_same_set_is_refused_whole() -> None:
    bundle = networks.bundle(networks.chain([40, 48, 32]), epoch=60)
    made = analyze(bundle, SETTINGS)
    refused = analyze(bundle, SETTINGS, taken_back=[taken_back(made)])
    assert not refused.approved_for_application
    assert refused.channels == made.channels


def test_a_part_of_it_is_another_cut() -> None:
    made = decision()
    part = made.model_copy(update={"channels": made.channels[:1]})
    gate = rolled_back_gate(part, [taken_back(made)])
    assert gate.passed
    assert gate.name == "rolled_back"


def test_changed_evidence_opens_it_again() -> None:
    made = decision()
    shift = made.statistics.predicted_shift
    assert shift is not None
    other = taken_back(made, shift=shift * 9 + 1)
    assert rolled_back_gate(made, [other]).passed
    largest = max(abs(s) for t in made.channels for s in t.importance)
    first = made.channels[0].importance[0]
    moved = rescored(made, 1 + largest / abs(first))
    assert rolled_back_gate(moved, [taken_back(made)]).passed


def test_scores_of_another_scorer_are_no_changed_evidence() -> None:
    made = decision()
    cut = taken_back(made)
    assert cut.scorers == ((Level.CHANNEL, "output_projection"),)
    largest = max(abs(s) for t in made.channels for s in t.importance)
    moved = rescored(made, 1 + largest / abs(made.channels[0].importance[0]))
    assert rolled_back_gate(moved, [cut]).passed
    other = cut.model_copy(update={"scorers": ((Level.CHANNEL, "margins"),)})
    assert not rolled_back_gate(moved, [other]).passed
    unknown = cut.model_copy(update={"scorers": ()})
    assert rolled_back_gate(moved, [unknown]).passed, "as older builds did"


def test_scores_are_compared_on_the_scale_of_their_own_level() -> None:
    made = analyze(joint_networks.checkpoint(), joint_networks.settings())
    assert made.channels
    assert made.attention_heads
    cut = taken_back(made)
    assert {level for level, _ in cut.scorers} == {Level.CHANNEL, Level.HEAD, Level.LAYER}
    heads = {target.layer_name for target in made.attention_heads}
    units = [name for name, own in cut.units for _ in own or (-1,)]
    small = [
        score * (1e-6 if name in heads else 1)
        for name, score in zip(units, cut.scores, strict=True)
    ]
    again = cut.model_copy(update={"scores": tuple(small), "shift": None})
    assert rolled_back_gate(made, [again]).passed, "heads' scores have moved"


def test_a_run_without_such_cuts_has_the_same_bytes_as_ever() -> None:
    made = decision()
    assert encode(decision([])) == encode(made)


def test_a_replay_decides_by_what_the_decision_was_compared_with() -> None:
    made = decision()
    refused = decision([taken_back(made)])
    read = decode(StructuralPruningDecision, encode(refused))
    assert encode(decision(read.rolled_back)) == encode(refused)


@given(st.permutations(["a", "b", "c"]))
def test_the_fingerprint_does_not_depend_on_the_order_of_groups(names: list[str]) -> None:
    units = {"a": (1, 2), "b": (0,), "c": ()}
    key = decision_key()
    cut = RolledBackCut(idempotency_key=key, epoch=1, units=[(n, units[n]) for n in names])
    straight = RolledBackCut(idempotency_key=key, epoch=9, units=sorted(units.items()))
    assert fingerprint_of(cut) == fingerprint_of(straight)
    other = RolledBackCut(idempotency_key=key, epoch=1, units=[("a", (1, 2))])
    assert fingerprint_of(cut) != fingerprint_of(other)


def decision_key() -> str:
    return "60:0123456789abcdef:ck-1:channel"
