"""Second moments of large maps are read at some positions: enough of them, and the same ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elesh.trainer.positions import positions_drawn, positions_to_read
from elesh.trainer.surgery.reconstruction.after_cut import CovarianceSums


@pytest.mark.parametrize(("positions", "channels"), [(1, 512), (64, 8), (196, 16), (3136, 64)])
@pytest.mark.parametrize("samples", [32, 512])
def test_every_channel_has_its_rows(positions: int, channels: int, samples: int) -> None:
    count = positions_to_read(positions, channels, samples)
    assert count == positions or count * samples >= 64 * channels
    assert positions > 64 or count == positions
    assert positions_to_read(positions, channels, None) == positions


def test_positions_are_spread_over_the_map_and_drawn_again_alike() -> None:
    read, again, other = (positions_drawn(3136, 64, draw) for draw in (7, 7, 8))
    assert read is not None
    assert again is not None
    assert other is not None
    assert torch.equal(read, again)
    assert not torch.equal(read, other)
    assert torch.equal(read * len(read) // 3136, torch.arange(len(read)))  # One of each stretch.


def smooth(samples: int, seed: int) -> Tensor:
    """[samples, 6, 32, 32]: maps whose neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(samples, 6, 4, 4, generator=generator) + torch.arange(6).view(1, 6, 1, 1)
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")


def test_a_large_map_has_the_second_moments_of_all_its_positions() -> None:
    whole, some = CovarianceSums(), CovarianceSums(samples=256)
    for part in range(4):
        x = smooth(64, part)
        whole.see(("layer", 1), x)
        some.see(("layer", 1), x)
    assert some.rows[("layer", 1)] < whole.rows[("layer", 1)] / 4
    found, expected = some.mean("hash"), whole.mean("hash")
    for axis in whole.rows:
        scale = float(expected.squares[axis].diagonal().mean())
        apart = (found.squares[axis] - expected.squares[axis]).abs().max()
        assert float(apart) < 0.01 * scale


def test_second_moments_are_made_in_double_precision_when_they_are_asked_for() -> None:
    sums, axis, x = CovarianceSums(), ("layer", -1), smooth(8, 0).movedim(1, -1)
    sums.see(axis, x)
    found = sums.mean("hash")
    assert sums.second[axis].dtype == torch.float32  # No copy of them in double precision is kept.
    rows = x.reshape(-1, x.shape[-1]).double()
    first = found.squares[axis]
    torch.testing.assert_close(first, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    first.zero_()
    assert found.squares[axis].any()
    assert list(found.squares) == [axis]
