"""Whatever the wiring: masking is cutting, counts are exact. `make soak` has 2000 networks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_nets import RandomNet, Step, plans
from trainer_nets import close, units

from elesh.trainer import Recorder, Surgeon


@pytest.mark.slow
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(plan=plans, seed=st.integers(0, 1000))
def test_in_random_networks_masking_is_cutting_and_counts_are_exact(
    plan: list[Step], seed: int
) -> None:
    torch.manual_seed(seed)
    model, x = RandomNet(plan), torch.randn(2, 2, 6, 6)
    model(x)
    model.eval()
    architecture = Recorder(model, x).architecture
    refused = {group.reason for group in architecture.groups if not group.prunable}
    assert all(reason.startswith("network output") for reason in refused)
    surgeon, chosen = Surgeon(model, architecture), units(architecture, seed)
    before = model(x)
    surgeon.mask(chosen)
    masked = model(x)
    surgeon.unmask()
    after = surgeon.cut(chosen)
    assert close(masked, model(x))
    assert after.parameters == sum(p.numel() for p in model.parameters())
    traced = Recorder(model, x).architecture
    assert (after.macs, after.parameters) == (traced.macs, traced.parameters)
    surgeon.undo()
    assert torch.equal(before, model(x))
