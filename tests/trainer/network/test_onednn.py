"""Where PyTorch would abort the process after a cut, Elesh keeps clear of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elesh.trainer.network import onednn


def strided(channels: int, layout: torch.memory_format = torch.channels_last) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 16, 1, stride=2))
    return model.to(memory_format=layout)


@pytest.fixture(params=["AVX2", "AVX512"])
def concerned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return bool(request.param == "AVX2" and torch.backends.mkldnn.is_available())


def test_a_narrow_strided_convolution_is_trained_without_onednn(concerned: bool) -> None:
    for channels, narrow in ((6, True), (8, False)):
        with onednn.clear_of_onednn(strided(channels)):
            assert torch.backends.mkldnn.enabled is not (concerned and narrow)
        assert torch.backends.mkldnn.enabled


def test_narrowing_is_unsafe_only_for_strided_pointwise_convolutions_stored_channels_last(
    concerned: bool,
) -> None:
    assert onednn.narrowing_is_unsafe(strided(32)) is concerned
    assert not onednn.narrowing_is_unsafe(strided(32, torch.contiguous_format))
    dense = nn.Conv2d(32, 16, 3, stride=2).to(memory_format=torch.channels_last)
    assert not onednn.narrowing_is_unsafe(dense)
