"""The gate ``labels``: figures on labels that do not belong to the inputs mean nothing."""

from __future__ import annotations

import numpy as np

from elesh.safety import labels_belong
from elesh.safety.measured_gates import Outcomes


def outcomes(answers: np.ndarray, labels: np.ndarray) -> Outcomes:
    """Of a network that answers so."""
    count = np.arange(len(labels))
    return Outcomes(np.zeros(len(labels)), answers == labels, labels, count, answers)


def test_a_network_that_has_learned_its_labels_passes_and_no_other() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 500)
    answers = np.where(rng.random(500) < 0.9, labels, rng.integers(0, 10, 500))
    assert labels_belong(outcomes(answers, labels), None).passed
    assert labels_belong(outcomes(answers, labels), 0.91).passed
    assert not labels_belong(outcomes(answers, rng.permutation(labels)), None).passed
    assert not labels_belong(outcomes(answers, (labels + 1) % 10), None).passed
    gate = labels_belong(outcomes(answers, labels), 0.999)
    assert not gate.passed, "the trainer said that it does better"
    assert "said was 0.999" in gate.detail


def test_always_the_most_frequent_class_is_not_better_than_chance() -> None:
    labels = (np.arange(1000) < 100).astype(np.int64)
    gate = labels_belong(outcomes(np.zeros(1000, np.int64), labels), None)
    assert (gate.passed, gate.measured) == (False, 0.9)


def test_labels_of_one_class_tell_nothing() -> None:
    """However right the network is, and whatever the trainer said."""
    labels = np.full(400, 3)
    for said in (None, 0.9, 1.0):
        gate = labels_belong(outcomes(labels, labels), said)
        assert not gate.passed
        assert "all held-out labels are class 3" in gate.detail
