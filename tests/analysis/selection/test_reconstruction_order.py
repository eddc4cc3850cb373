"""The order under redistribution: costs are those of the residuals, whatever goes first."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from head_networks import checkpoint, transformer
from hypothesis import given
from hypothesis import strategies as st
from networks import bundle, chain

from elesh.analysis import analyze, select_channels
from elesh.analysis.candidates import Candidates
from elesh.analysis.levels.heads import HEADS
from elesh.analysis.levels.units import CHANNELS
from elesh.analysis.selection.reconstruction_order import (
    RIDGE,
    ReconstructionOrder,
    residual_slopes,
)
from elesh.settings import ChannelAnalysis, Settings
from leyline import (
    AnalysisParameters,
    CheckpointBundle,
    GateStatistics,
    InvalidField,
    Level,
    ShapeMismatch,
)


def gate(
    name: str, seed: int, units: int, sites: int = 1, rank: int = 0, width: int = 1
) -> GateStatistics:
    """Statistics with random input moments; ``rank``: of the moments, whole if 0."""
    rng = np.random.default_rng(seed)
    inputs = units * width

    def squares(inner: int) -> np.ndarray:
        parts = rng.standard_normal((sites, inputs, inner or 2 * inputs))
        return (parts @ parts.transpose(0, 2, 1) / inputs).astype(np.float32)

    moments = squares(rank)
    shares = rng.uniform(size=(sites, inputs))
    return GateStatistics(
        layer_name=name,
        projections=rng.standard_normal((8, units)).astype(np.float32),
        first_order=np.zeros(units, np.float32),
        second_order=np.zeros(units, np.float32),
        input_moments=moments,
        input_means=np.zeros((sites, inputs), np.float32),
        sample_moments=(shares * np.einsum("sii->si", moments)).astype(np.float32),
        input_slopes=np.stack([squares(0), squares(0)], axis=1),
    )


def cost_of(gate: GateStatistics, lost: list[int]) -> float:
    """The residual's covariance against the slopes, from its definition."""
    moments, steady, slopes = gate.input_moments, gate.sample_moments, gate.input_slopes
    assert moments is not None
    assert steady is not None
    assert slopes is not None
    width = moments.shape[1] // gate.projections.shape[1]
    inputs = moments.shape[1]
    gone = [unit * width + part for unit in lost for part in range(width)]
    kept = [i for i in range(inputs) if i not in gone]
    total = 0.0
    for site in range(len(moments)):
        inner = moments[site].astype(np.float64)
        inner += RIDGE * inner.diagonal().mean() * np.eye(inputs)
        across = inner[np.ix_(gone, kept)]
        left = inner[np.ix_(gone, gone)] - across @ np.linalg.solve(
            inner[np.ix_(kept, kept)], across.T
        )
        weighed = residual_slopes(moments[site], steady[site], slopes[site])
        total += float(np.trace(left @ weighed[np.ix_(gone, gone)]))
    return total


def single(units: int) -> Candidates:
    return Candidates(names=("a",), sizes=(units,), capacities=(units - 1,), multiples=(1,))


def everything(count: int) -> np.ndarray:
    return np.ones(count, dtype=np.bool_)


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 3), st.integers(1, 3), st.data())
def test_prices_add_up_to_the_cost_of_the_set(
    seed: int, units: int, sites: int, width: int, data: st.DataObject
) -> None:
    found = gate("a", seed, units, sites, width=width)
    removal_order = ReconstructionOrder(single(units), {"a": found}).pick(
        data.draw(st.integers(1, units - 1)), everything(units)
    )
    assert sum(removal_order.marginal_costs) == pytest.approx(
        cost_of(found, removal_order.units), rel=1e-6
    )
    assert min(removal_order.marginal_costs) >= 0


@pytest.mark.parametrize(("seed", "width"), [(0, 1), (1, 1), (2, 1), (3, 2), (4, 4)])
def test_every_step_takes_the_unit_that_adds_the_least(seed: int, width: int) -> None:
    found, gone = gate("a", seed, 9, sites=2, width=width), list[int]()
    for unit in ReconstructionOrder(single(9), {"a": found}).pick(5, everything(9)).units:
        before = cost_of(found, gone) if gone else 0.0
        added = {u: cost_of(found, [*gone, u]) - before for u in range(9) if u not in gone}
        assert added[unit] <= min(added.values()) * (1 + 1e-4)
        gone.append(unit)


def test_a_unit_that_the_others_predict_goes_first_however_much_it_does() -> None:
    """Nine units of rank eight: one is predictable, and its twin alone stays dear."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 8))
    x = np.c_[x, x[:, :1] * 1.3]
    found = gate("a", 1, 9).model_copy(
        update={
            "input_moments": (x.T @ x / len(x)).astype(np.float32)[None],
            "sample_moments": (x**2).mean(0).astype(np.float32)[None],
            "input_slopes": np.float32([np.diag(np.r_[50.0, np.ones(7), 50.0])] * 2)[None],
        }
    )
    removal_order = ReconstructionOrder(single(9), {"a": found}).pick(2, everything(9))
    assert removal_order.units[0] in (0, 8)
    assert removal_order.marginal_costs[0] < 0.05
    assert removal_order.units[1] not in (0, 8)


def test_putting_units_back_restores_the_costs() -> None:
    gates = {"a": gate("a", 3, 7, sites=2), "b": gate("b", 4, 5, width=3)}
    candidates = Candidates(names=("a", "b"), sizes=(7, 5), capacities=(6, 4), multiples=(1, 1))
    order = ReconstructionOrder(candidates, gates)
    before = order.costs.copy()
    first = order.pick(3, everything(12)).units
    middle = order.costs.copy()
    later = order.pick(4, everything(12)).units
    order.put_back(later)
    np.testing.assert_allclose(order.costs[~order.taken], middle[~order.taken], rtol=1e-6)
    order.put_back(first)
    np.testing.assert_allclose(order.costs, before, rtol=1e-6)


def with_moments(checkpoint: CheckpointBundle) -> CheckpointBundle:
    gates = {}
    for number, (name, old) in enumerate(checkpoint.gates.items()):
        new = gate(name, number, old.projections.shape[1])
        gates[name] = new.model_copy(update={"projections": old.projections})
    return CheckpointBundle(
        checkpoint.metadata, checkpoint.architecture, checkpoint.channels, gates
    )


def test_it_is_used_only_by_those_who_redistribute_and_its_absence_is_said() -> None:
    plain = bundle(chain((32, 48)), epoch=120)
    full = with_moments(plain)
    assert CHANNELS.choose_scorer(full, "auto") == ("output_projection", ())
    assert CHANNELS.choose_scorer(full, "auto", reconstructs=True) == ("reconstruction", ())
    used, fallbacks = CHANNELS.choose_scorer(plain, "auto", reconstructs=True)
    assert used == "output_projection"
    assert [fallback.rung for fallback in fallbacks] == ["moments_failure"]
    settings_ = ChannelAnalysis(min_channels_per_layer=4)
    ours = select_channels(full, 20, settings=settings_.model_copy(update={"redistribute": True}))
    assert ours != select_channels(full, 20, settings=settings_)
    assert sum(map(len, ours.values())) == 20


def test_a_network_without_heads_falls_back_to_nothing_for_want_of_their_statistics() -> None:
    """Regression: every decision on one said so, and was trusted less."""
    full = replace(
        with_moments(bundle(chain((32, 48)), epoch=120)),
        parameters=AnalysisParameters(redistribute=True),
        levels=(Level.CHANNEL, Level.HEAD),
    )
    open_ = Settings(structured_pruning={"channel_analysis": {"max_predicted_shift": 1e9}})
    decision = analyze(full, open_)
    assert decision.units
    assert decision.fallbacks == ()


def test_heads_too_go_by_what_the_kept_ones_cannot_make_up_for() -> None:
    """The order over both levels' groups is that of their own blocks."""
    plain = checkpoint(transformer(8, 8))
    gates = {
        name: gate(name, number, 8, width=3).model_copy(update={"projections": old.projections})
        for number, (name, old) in enumerate(plain.gates.items())
    }
    full = replace(plain, gates=gates)
    assert HEADS.choose_scorer(full, "auto") == ("output_projection", ())
    assert HEADS.choose_scorer(full, "auto", reconstructs=True) == ("reconstruction", ())
    used, fallbacks = HEADS.choose_scorer(plain, "auto", reconstructs=True)
    assert used == "output_projection"
    assert [(fallback.rung, "layer0" in fallback.reason) for fallback in fallbacks] == [
        ("moments_failure", True)
    ]
    asked = replace(full, parameters=AnalysisParameters(redistribute=True))
    open_ = Settings(structured_pruning={"channel_analysis": {"max_predicted_shift": 1e9}})
    decision = analyze(asked, open_, level=Level.HEAD)
    assert decision.statistics.scorer == "reconstruction"
    lost = {name: list(heads) for name, heads in decision.units.items()}
    assert lost
    for name, heads in lost.items():
        others = combinations(range(8), len(heads))
        assert cost_of(gates[name], heads) == min(cost_of(gates[name], list(o)) for o in others)


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("input_moments", (1, 3, 3)),
        ("input_means", (1, 5)),
        ("sample_moments", (2, 4)),
        ("input_slopes", (1, 4, 4)),
    ],
)
def test_input_moments_of_another_size_are_refused(field: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch, match=field):
        gate("a", 0, 4).model_validate(
            {**dict(gate("a", 0, 4)), field: np.zeros(shape, np.float32)}
        )


def test_half_of_the_input_moments_is_refused() -> None:
    with pytest.raises(InvalidField, match="sample_moments"):
        gate("a", 0, 4).model_validate({**dict(gate("a", 0, 4)), "sample_moments": None})
