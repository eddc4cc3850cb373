"""The schedule: phases by epoch at every boundary, quotas that never exceed a limit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import chain

from elesh.analysis import allowance, curve, phase_at
from elesh.analysis.selection.schedule import as_asked, phases_within
from elesh.settings import SafetySchedule
from leyline import AnalysisParameters, Phase

DEFAULT = SafetySchedule()
SHAPES = st.sampled_from(["polynomial", "linear", "exponential"])


@pytest.mark.parametrize(
    ("epoch", "phase"),
    [
        (0, Phase.PREPARATION),
        (1, Phase.PREPARATION),
        (30, Phase.PREPARATION),
        (31, Phase.CONSERVATIVE),
        (60, Phase.CONSERVATIVE),
        (61, Phase.MODERATE),
        (90, Phase.MODERATE),
        (91, Phase.AGGRESSIVE),
        (120, Phase.AGGRESSIVE),
        (121, Phase.VALIDATION),
        (10**9, Phase.VALIDATION),
    ],
)
def test_the_phase_of_an_epoch(epoch: int, phase: Phase) -> None:
    assert phase_at(epoch, DEFAULT) is phase


@pytest.mark.parametrize(
    ("epochs", "phases"),
    [
        (120, None),
        (500, None),
        (20, (4, 5, 5, 4)),
        (40, (9, 9, 9, 9)),
        (4, (1, 1, 1, 1)),
    ],
)
def test_a_run_that_is_shorter_than_the_schedule_has_its_phases_in_proportion(
    epochs: int, phases: tuple[int, ...] | None
) -> None:
    found = phases_within(DEFAULT, epochs)
    assert found == phases
    if found:
        assert sum(found) <= round(0.9 * epochs), "the rest is left to train on"
        asked = AnalysisParameters(phases=found, removed_at_most=0.4)
        shorter = as_asked(DEFAULT, asked)
        assert shorter.total_epochs == sum(found)
        assert shorter.conservative_limit == pytest.approx(0.1)
        assert phase_at(found[0] + 1, shorter) is Phase.CONSERVATIVE
        assert phase_at(sum(found) + 1, shorter) is Phase.VALIDATION


def test_lengths_of_phases_that_were_set_stay_however_short_the_run_is() -> None:
    assert phases_within(SafetySchedule(aggressive_epochs=400), 20) is None
    assert phases_within(SafetySchedule(aggressive_limit=0.5), 40) == (9, 9, 9, 9)
    assert phases_within(SafetySchedule(), 1) == (0, 0, 1, 0)


def test_a_phase_without_epochs_is_skipped() -> None:
    schedule = SafetySchedule(validation_epochs=0, conservative_epochs=2, moderate_epochs=0)
    assert [phase_at(epoch, schedule) for epoch in (0, 1, 2, 3)] == [
        Phase.PREPARATION,
        Phase.CONSERVATIVE,
        Phase.CONSERVATIVE,
        Phase.AGGRESSIVE,
    ]


def test_nothing_may_go_in_preparation_and_validation() -> None:
    for epoch in (0, 1, 30, 121, 500):
        assert allowance(chain((500, 500)), epoch, DEFAULT).quota == 0


@pytest.mark.parametrize(("epoch", "share"), [(60, 0.05), (90, 0.10), (120, 0.20)])
def test_each_phase_ends_at_its_limit_less_the_margin(epoch: int, share: float) -> None:
    for shape in ("polynomial", "linear", "exponential"):
        allowed = allowance(chain((500, 500)), epoch, DEFAULT, shape=shape, margin=0.1)
        assert allowed.limit == share
        assert allowed.share == pytest.approx(0.9 * share)
        assert allowed.quota == round(900 * share)


def test_the_polynomial_schedule_is_a_cubic_ease_out() -> None:
    assert [curve("polynomial", t) for t in (0, 0.5, 1)] == [0, 0.875, 1]
    assert allowance(chain((10000,)), 45, DEFAULT, margin=0).quota == int(10000 * 0.05 * 0.875)


@given(shape=SHAPES, t=st.floats(0, 1), later=st.floats(0, 1))
def test_curves_rise_from_zero_to_one(shape: str, t: float, later: float) -> None:
    low, high = sorted((t, later))
    assert 0 <= curve(shape, low) <= curve(shape, high) <= 1  # type: ignore[arg-type]
    assert curve(shape, 0) == 0  # type: ignore[arg-type]
    assert curve(shape, 1) == 1  # type: ignore[arg-type]


@given(
    shape=SHAPES,
    epoch=st.integers(0, 200),
    margin=st.floats(0, 0.9),
    now=st.integers(1, 300),
    lost=st.integers(0, 300),
    target=st.none() | st.floats(0, 1),
)
def test_the_quota_never_exceeds_the_limit_or_the_target(
    shape: str, epoch: int, margin: float, now: int, lost: int, target: float | None
) -> None:
    architecture = chain((now,), originals=(now + lost,))
    allowed = allowance(
        architecture,
        epoch,
        DEFAULT,
        shape=shape,  # type: ignore[arg-type]
        margin=margin,
        target=target,
    )
    assert allowed.quota >= 0
    if allowed.quota:
        share = (lost + allowed.quota) / (now + lost)
        assert share <= allowed.limit
        assert target is None or share <= target + 1e-6


def test_what_went_before_counts_against_the_original_network() -> None:
    fresh = allowance(chain((500, 500)), 60, DEFAULT)
    pruned = allowance(chain((490, 470), originals=(500, 500)), 60, DEFAULT)
    assert (fresh.quota, pruned.quota) == (45, 5)
    assert pruned.original == fresh.original == 1000
