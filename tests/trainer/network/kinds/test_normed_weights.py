"""Weights that are a direction times a gain are cut along, and stay what they were; those that are
computed in another way are left alone, by a reason that says how and what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cut_check import counted_macs, cut_and_checked, prunable
from kind_nets import Attention, Vocoder, towers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from elesh.trainer import Recorder, Surgeon

WAVES = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(1))
WAYS = {
    "parametrised": parametrizations.weight_norm,
    "by a hook": weight_norm,
    "one gain": partial(parametrizations.weight_norm, dim=None),
    "by a hook, gains of inputs": partial(weight_norm, dim=1),
    "gains of places": partial(parametrizations.weight_norm, dim=2),
}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return model.eval()


@pytest.mark.parametrize("way", WAYS)
def test_normed_weights_go_with_all_channels_and_stay_what_they_were(way: str) -> None:
    model = built(lambda: Vocoder(WAYS[way]))
    surgeon = cut_and_checked(model, WAVES)
    assert prunable(surgeon) == ["enter", "up", "near"]
    assert surgeon.architecture.macs == counted_macs(model, WAVES)
    before = {name: getattr(model, name).weight.detach().clone() for name in ("up", "near")}
    surgeon.cut({"enter": [3, 7], "up": [0]})
    # A pass, as the older way computes the weight before it.
    model(WAVES)
    kept, places = [n for n in range(16) if n not in (3, 7)], list(range(1, 12))
    up, near = model.up.weight, model.near.weight  # type: ignore[union-attr]
    assert torch.allclose(up, before["up"][kept][:, 1:], atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(near, before["near"][:, places], atol=1e-6)  # type: ignore[arg-type]
    assert surgeon.architecture.macs == counted_macs(model, WAVES)


@pytest.mark.parametrize("way", ["parametrised", "by a hook"])
def test_normed_weights_of_grouped_convolutions_and_without_a_bias_go_too(way: str) -> None:
    surgeon = cut_and_checked(built(lambda: towers(WAYS[way])), WAVES)
    assert prunable(surgeon) == ["0", "2", "7"]


def test_heads_of_normed_weights_can_go() -> None:
    surgeon = cut_and_checked(built(lambda: Attention(parametrizations.weight_norm)), TOKENS)
    assert {surgeon.architecture.group[name].size for name in prunable(surgeon)} == {4, 16}


def test_a_network_of_normed_weights_is_measured_and_refitted_where_weights_are_plain() -> None:
    model = built(lambda: towers(parametrizations.weight_norm))
    recorder = Recorder(model, WAVES)
    x = torch.randn(32, 8, 12, generator=torch.Generator().manual_seed(2))
    labelled = [(x, torch.zeros(32, dtype=torch.long))]
    bundle = recorder.measure(labelled, epoch=0)
    assert set(bundle.gates) == {"0", "2", "7"}
    surgeon = Surgeon(model, recorder.architecture)
    moments = recorder.moments(labelled, groups=["0", "7"])
    surgeon.mask({"0": [1], "7": [0, 4]}, reconstruct=moments)
    masked = model(x)
    surgeon.unmask()
    surgeon.cut({"0": [1], "7": [0, 4]}, reconstruct=moments)
    assert (model(x) - masked).abs().max() <= 1e-5 * masked.abs().max()


def _pruned(layer: nn.Module) -> nn.Module:
    found: nn.Module = prune.l1_unstructured(layer, "weight", 0.5)
    return found


OTHERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str, str]] = {
    "spectral": (parametrizations.spectral_norm, "SpectralNorm", "remove_parametrizations"),
    "spectral, by a hook": (spectral_norm, "SpectralNorm", "remove_spectral_norm"),
    "orthogonal": (parametrizations.orthogonal, "Orthogonal", "remove_parametrizations"),
    "pruned": (_pruned, "L1Unstructured", "prune.remove"),
}


@pytest.mark.parametrize("way", OTHERS)
def test_weights_computed_otherwise_are_left_alone_by_their_reason(way: str) -> None:
    normed, kind, remedy = OTHERS[way]
    model = built(lambda: nn.Sequential(nn.Linear(10, 8), normed(nn.Linear(8, 6)), nn.Linear(6, 5)))
    architecture = Recorder(model, TOKENS).architecture
    for name in ("0", "1"):
        group = architecture.group[name]
        assert not group.prunable
        assert "the weight of 1 is computed" in group.reason
        assert kind in group.reason
        assert remedy in group.reason
    assert architecture.macs == 6 * (10 * 8 + 8 * 6 + 6 * 5)


def test_a_gain_of_a_direction_that_lost_all_it_had_is_zero() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original1[0, 2:] = 0  # type: ignore[union-attr, index]
    model = nn.Sequential(nn.Linear(10, 4), layer, nn.Linear(3, 5)).eval()
    surgeon = Surgeon(model, Recorder(model, TOKENS).architecture)
    surgeon.cut({"0": [0, 1]})
    found: Tensor = model(TOKENS)
    assert found.isfinite().all()
    assert not layer.parametrizations.weight.original0[0].any()  # type: ignore[union-attr, index]
    assert found.shape == (2, 6, 5)
