"""Elesh stays within a share of the training's time, and says what it puts off for that."""

from __future__ import annotations

from elesh.trainer.time_share import TimeShare


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_is_the_trainings_or_eleshs() -> None:
    clock = Clock()
    share = TimeShare(0.1, clock)
    clock.now = 10
    assert (share.trained, share.taken, share.over) == (10, 0, False)
    with share.taking():
        clock.now = 12
        assert share.trained == 10  # what is under way is nobody's yet
    assert (share.trained, share.taken, share.over) == (10, 2, True)
    clock.now = 32
    assert (share.trained, share.over) == (30, False)


def test_fewer_samples_are_measured_where_time_is_short_but_never_fewer_than_the_least() -> None:
    clock = Clock()
    share = TimeShare(0.1, clock)
    assert share.samples(1024, 256) == 1024  # nothing is known yet
    with share.measuring(1024):
        clock.now += 1.024
    clock.now = 1.024 + 20
    assert share.samples(1024, 256) == 1024
    clock.now = 6
    assert share.samples(1024, 256) == 512
    clock.now = 1.1
    assert share.samples(1024, 256) == 256
    assert share.samples(100, 256) == 100


def test_no_limit_takes_all() -> None:
    clock = Clock()
    share = TimeShare(0, clock)
    with share.taking(), share.measuring(1024):
        clock.now = 100
    assert (share.over, share.samples(1024, 256)) == (False, 1024)
