"""The gates: each passes and fails at its own limit, and no verdict overlooks a failed one."""

from __future__ import annotations

import pytest

from elesh import safety
from leyline import (
    LayerDescriptor,
    PerformanceRequirements,
    Phase,
    PrunedArchitecture,
    PruningGroup,
    TensorDescriptor,
    TensorSlice,
)


def architecture(*, owner: str = "host", size: int = 20) -> PrunedArchitecture:
    tensors = (
        TensorDescriptor(path="a.weight", shape=(size, 3), dtype="float32"),
        TensorDescriptor(path="b.weight", shape=(5, size), dtype="float32", owner=owner),
    )
    slices = (TensorSlice(tensor="a.weight", dim=0), TensorSlice(tensor="b.weight", dim=1))
    group = PruningGroup(
        name="a", original_size=size, origin=tuple(range(size)), slices=slices, sites=()
    )
    layers = (LayerDescriptor(name="a", kind="Linear", weight="a.weight", positions=1),)
    return PrunedArchitecture.build(tensors, layers, (group,))


@pytest.mark.parametrize("phase", list(Phase))
def test_only_the_phases_that_prune_pass(phase: Phase) -> None:
    passed = phase in (Phase.CONSERVATIVE, Phase.MODERATE, Phase.AGGRESSIVE)
    assert safety.phase_gate(phase).passed is passed


def test_the_cumulative_limit_counts_what_went_before() -> None:
    assert safety.cumulative_limit(3, 2, 100, 0.05).passed
    over = safety.cumulative_limit(3, 3, 100, 0.05)
    assert (over.passed, over.measured, over.limit) == (False, 0.06, 0.05)
    assert safety.cumulative_limit(30, 0, 100, 0.05).passed  # nothing is cut now


def test_a_group_below_the_minimum_is_named() -> None:
    assert safety.minimum_units(architecture(), {"a": range(4)}, 16).passed
    short = safety.minimum_units(architecture(), {"a": range(5)}, 16)
    assert (short.passed, short.measured, short.detail) == (False, 15, "a: 15")


def test_an_emptied_group_or_tensor_fails_the_structure_gate() -> None:
    gate, after = safety.structure(architecture(), {"a": range(19)})
    assert gate.passed
    assert after == architecture().without({"a": range(19)})
    emptied, none = safety.structure(architecture(), {"a": range(20)})
    assert not emptied.passed
    assert none is None
    assert "a.weight" in emptied.detail
    assert "group a would be empty" in emptied.detail


def test_unknown_groups_and_units_fail_the_structure_gate() -> None:
    assert "nobody" in safety.structure(architecture(), {"nobody": [1]})[0].detail
    assert not safety.structure(architecture(), {"a": [20]})[0].passed


def test_a_cut_through_host_and_seed_fails_gradient_isolation() -> None:
    assert safety.gradient_isolation(architecture(), {"a": [1]}).passed
    mixed = architecture(owner="seed")
    assert safety.gradient_isolation(mixed, {"a": []}).passed
    assert safety.gradient_isolation(mixed, {"a": [1]}).detail == "a"


@pytest.mark.parametrize(
    ("samples", "measured", "prunable", "passed"),
    [(32, 1, 1, True), (31, 1, 1, False), (32, 0, 1, False), (32, 0, 0, True)],
)
def test_statistics_need_samples_and_groups(
    samples: int, measured: int, prunable: int, passed: bool
) -> None:
    assert safety.statistics_sound(samples, measured, prunable).passed is passed


@pytest.mark.parametrize(
    ("damage", "error", "random", "passed"),
    [(1.0, 0.4, 2.0, True), (1.0, 0.6, 2.0, False), (0.0, 0.0, 0.0, True), (None, 0, 1, True)],
)
def test_a_cut_within_two_errors_of_a_random_one_is_noise(
    damage: float | None, error: float, random: float, passed: bool
) -> None:
    assert safety.noise(damage, error, random).passed is passed


def test_the_predicted_shift_counts_its_error() -> None:
    assert safety.predicted_shift(0.06, 0.02, 0.1).passed
    assert not safety.predicted_shift(0.06, 0.021, 0.1).passed
    assert safety.predicted_shift(None, None, 0.1).passed


def test_requirements_name_what_does_not_hold() -> None:
    asked = PerformanceRequirements(max_predicted_loss_rise=0.1, min_parameters_removed=0.2)
    assert safety.requirements(asked, 0.1, 0.2).passed
    assert "0.11 over 0.1" in safety.requirements(asked, 0.11, 0.2).detail
    assert "0.1 below 0.2" in safety.requirements(asked, 0.1, 0.1).detail
    assert not safety.requirements(asked, None, 0.2).passed
    assert safety.requirements(PerformanceRequirements(), None, 0.0).passed
