"""Ratios in benchmark tables: paired by seed, and none where noise would stand below the line."""

from __future__ import annotations

import math

import pytest

from benchmarks.common.ratios import paired_ratio


def test_a_hard_seed_that_costs_both_alike_adds_no_error() -> None:
    ratio = paired_ratio([0.01, 0.02, 0.03], [0.05, 0.10, 0.15])
    assert ratio is not None
    assert ratio.value == pytest.approx(0.2)
    assert ratio.error == pytest.approx(0, abs=1e-12)


def test_the_error_is_that_of_the_residuals() -> None:
    ratio = paired_ratio([0.02, 0.04], [0.10, 0.10])
    assert ratio is not None
    assert ratio.value == pytest.approx(0.3)
    assert ratio.error == pytest.approx(0.1)  # residuals -.01 and .01: an error of .01, of .10


@pytest.mark.parametrize("other", [[0.004, 0.0, 0.0, 0.0, 0.002], [-0.01, -0.02], [0.0]])
def test_no_ratio_where_the_other_loses_less_than_its_noise(other: list[float]) -> None:
    assert paired_ratio([0.001] * len(other), other) is None


def test_one_seed_gives_a_ratio_without_an_error() -> None:
    ratio = paired_ratio([0.01], [0.05])
    assert ratio is not None
    assert ratio.value == pytest.approx(0.2)
    assert math.isnan(ratio.error)


def test_other_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="longer"):
        paired_ratio([0.01], [0.05, 0.06])
