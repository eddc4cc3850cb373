"""A decision for the network as it was is applied to the network as it is, or said to be stale."""

from __future__ import annotations

import copy
from collections.abc import Callable

from guarded import decide
from torch import nn
from trainer_nets import batches, build, example, same

from elesh.analysis import analyze
from elesh.settings import Settings
from elesh.trainer import Evaluation, Recorder, Surgeon, apply_decision
from elesh.trainer.session.carry_over import carried_over, present_form
from leyline import Level, StructuralPruningDecision


def approved(recorder: Recorder, share: float) -> StructuralPruningDecision:
    """What goes when a share of the channels may."""
    limits = dict.fromkeys(("conservative_limit", "moderate_limit", "aggressive_limit"), share)
    channels = {"min_channels_per_layer": 2, "max_predicted_shift": 1e9, "safety_margin": 0.0}
    settings = Settings(
        structured_pruning={"channel_analysis": channels, "safety_schedule": limits}
    )
    return analyze(recorder.measure(batches(), epoch=120), settings).model_copy(
        update={"approved_for_application": True, "rejection_reason": ""}
    )


def good(model: nn.Module) -> Callable[[], Evaluation]:
    """An evaluation that finds nothing wrong."""
    return lambda: Evaluation(0.9, float(model(example()).detach().square().mean()))


def test_what_an_earlier_cut_left_of_a_decision_is_applied() -> None:
    model = build("Vgg")
    recorder = Recorder(model, example())
    first, second = approved(recorder, 0.15), approved(recorder, 0.3)
    surgeon = Surgeon(model, recorder.architecture)
    assert apply_decision(first, surgeon, good(model)).result == "applied"
    between = surgeon.architecture
    outcome = apply_decision(second, surgeon, good(model))
    assert outcome.result == "applied"
    assert "carried over" in outcome.detail
    now = surgeon.architecture
    assert now.model_hash != between.model_hash
    # Just what the second decision alone would have left, in its own words.
    named = {t.layer_name: set(t.original_indices) for t in second.channels}
    for group in now.groups:
        gone = set(range(group.original_size)) - set(group.origin)
        earlier = {
            i for t in first.channels if t.layer_name == group.name for i in t.original_indices
        }
        assert gone <= named.get(group.name, set()) | earlier
    assert now.parameters >= second.statistics.parameters_after
    assert now.macs >= second.statistics.macs_after


def test_no_more_goes_than_the_decision_said_and_what_is_left_of_nothing_is_stale() -> None:
    model = build("Vgg")
    recorder = Recorder(model, example())
    small, large = approved(recorder, 0.15), approved(recorder, 0.3)
    surgeon = Surgeon(model, recorder.architecture)
    assert apply_decision(large, surgeon, good(model)).result == "applied"
    assert carried_over(small, surgeon.architecture) is None
    before = copy.deepcopy(model.state_dict())
    outcome = apply_decision(small, surgeon, good(model))
    assert outcome.result == "refused"
    assert outcome.detail.startswith("stale")
    assert same(before, dict(model.state_dict()))


def test_channels_that_go_with_a_layer_do_not_make_its_decision_stale() -> None:
    """Regression: those inside of the layer were counted as if more went than was decided."""
    now = Recorder(build("ResNet"), example()).architecture
    layer = next(block.name for block in now.blocks if block.prunable)
    decision = decide(now, units=2, groups=1, layers=(layer,))
    (target,) = decision.channels
    channels = sum(g.size for g in now.groups if g.prunable and g.level is Level.CHANNEL)
    inside = channels - sum(
        g.size
        for g in now.without_layers([layer]).groups
        if g.prunable and g.level is Level.CHANNEL
    )
    assert inside > 2
    counted = decision.statistics.model_copy(update={"channels_after": channels - 2})
    decision = decision.model_copy(update={"statistics": counted})
    carried = carried_over(decision, now.without({target.layer_name: [0]}))
    assert carried is not None
    assert [t.original_indices for t in carried.channels] == [(1,)]
    assert [t.layer_name for t in carried.layers] == [layer]


def test_a_decision_on_the_present_architecture_stays_what_it_is() -> None:
    """Regression: in a demo it was taken for one that nothing is left of."""
    model = build("Vgg")
    recorder = Recorder(model, example())
    decision = approved(recorder, 0.3)
    assert present_form(decision, recorder.architecture) == (decision, "")
    outcome = apply_decision(decision, Surgeon(model, recorder.architecture), good(model))
    assert (outcome.result, "carried over" in outcome.detail) == ("applied", False)
    assert outcome.parameters_after == decision.statistics.parameters_after
