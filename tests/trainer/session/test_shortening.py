"""Of a decision that costs too much, the parts that are tried are the cheapest: as the groups were
measured, where the statistics' own order is too much as well."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise

import pytest
import torch
from guarded import decide
from torch.nn.functional import cross_entropy
from trained import batches, digits, trained

from elesh.settings import RollbackTriggers
from elesh.trainer import Evaluation, Recorder, Surgeon
from elesh.trainer.session.apply import RefitData, check_and_cut
from elesh.trainer.session.carry_over import share_of_costs
from elesh.trainer.session.shortening import Shortening, parts_alone, size_of
from leyline import PrunedArchitecture, StructuralPruningDecision

Units = Mapping[str, Collection[int]]


def example() -> tuple[StructuralPruningDecision, PrunedArchitecture]:
    """Three groups of a trained network; all their units are said to cost alike."""
    architecture = Recorder(trained(), batches()[0][0][:2]).architecture
    return decide(architecture, units=5, groups=3), architecture


def test_the_first_part_is_as_large_as_is_expected_to_do_and_what_follows_is_halved() -> None:
    whole, now = example()
    parts = Shortening(whole, now, lambda units: None)
    sizes = [size_of(part) for part in iter(lambda: parts.next(0.7), None)]
    assert sizes == [10, 5, 2, 1]
    assert [size_of(part) for part in iter(lambda: parts.next(0.7), None)] == []


def test_a_group_that_is_measured_as_expensive_stays_and_the_others_go() -> None:
    whole, now = example()
    dear = whole.channels[1].layer_name
    asked: list[set[str]] = []

    def alone(units: Units) -> float:
        asked.append(set(units))
        return 0.9 if dear in units else 0.01

    parts = Shortening(whole, now, alone)
    first = parts.next(0.8)
    assert first is not None
    assert dear in first.units
    assert not asked, "one part more is tried before groups are measured"
    second = parts.next(0.8)
    assert second is not None
    assert dear not in second.units or len(second.units[dear]) < 5
    assert {name: len(own) for name, own in second.units.items() if name != dear} == {
        target.layer_name: 5 for target in whole.channels if target.layer_name != dear
    }
    assert sorted(map(len, asked)) == [1] * len(whole.channels)
    third = parts.next(0.9)
    assert third is not None
    assert size_of(third) < size_of(second)
    assert len(third.units.get(dear, ())) <= len(second.units.get(dear, ()))


def test_the_smallest_of_many_groups_are_measured_together() -> None:
    units = {f"group {number}": range(number + 1) for number in range(20)}
    asked: list[Units] = []

    def alone(own: Units) -> float:
        asked.append(own)
        return float(sum(map(len, own.values())))

    found = parts_alone(units, alone)
    assert len(asked) == 16
    assert found == pytest.approx({name: len(own) for name, own in units.items()})
    assert parts_alone(units, lambda own: None) == {}


def test_what_a_group_costs_is_told_from_the_networks_answers() -> None:
    """Of a group whose units the network does not read nothing changes; so the whole of it goes."""
    model = trained()
    surgeon = Surgeon(model, Recorder(model, batches()[0][0][:2]).architecture)
    whole = decide(surgeon.architecture, units=12, groups=3)
    free = whole.channels[-1].layer_name
    with torch.no_grad():
        for site in surgeon.architecture.group[free].sites:
            weight = surgeon.model.get_submodule(site.module).weight
            weight[:, :12] = 0  # type: ignore[index, operator]
    data = digits().validation

    def evaluate() -> Evaluation:
        with torch.no_grad():
            output = model(data.images)
        right = (output.argmax(1) == data.labels).float().mean()
        return Evaluation(float(right), float(cross_entropy(output, data.labels)))

    held_out = [(digits().held_out.images, digits().held_out.labels)]
    triggers = RollbackTriggers(channel_accuracy_drop=0.5)
    given = RefitData(None, None, (), held_out)
    outcome, _ = check_and_cut(whole, surgeon, evaluate, given, triggers, cut_drop=0.02)
    assert outcome.result == "applied"
    assert outcome.shortened_to is not None
    assert surgeon.architecture.group[free].removed == 12


def test_what_is_tried_next_has_as_much_of_the_costs_as_the_last_part_may_have() -> None:
    """The same part is not tried twice, and each has less of the costs."""
    whole, now = example()
    names = [target.layer_name for target in whole.channels]
    costs = dict(zip(names, (0.1, 0.3, 0.6), strict=True))
    parts = Shortening(whole, now, lambda units: sum(costs[name] for name in units))
    tried = list(iter(lambda: parts.next(0.9), None))
    shares = [share_of_costs(part, whole, now, costs) for part in tried]
    assert shares == sorted(shares, reverse=True)
    assert len({str(part.units) for part in tried}) == len(tried)
    assert shares[1] <= 0.9**1.5 * shares[0] + 1e-9
    assert all(b <= 0.5 * a + 1e-9 for a, b in pairwise(shares[1:]))
