"""What is kept of a pass for going backward: where numbers are zero, in a quarter of the memory or
in none; or nothing, and what was changed in place is noticed all the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional

from elesh.trainer.graph import wiring
from elesh.trainer.graph.axes import any_along
from elesh.trainer.network.calls import Calls
from elesh.trainer.network.saved import Bytes, NonZero, Packed, Versions, unpacked, without_saving


def test_bytes_have_zeros_where_numbers_have_them_and_are_near_the_others() -> None:
    drawn = torch.randn(64, 64)
    x = (drawn + drawn.sign()) * torch.logspace(-4, 4, 64)
    x[3, 5:9] = 0
    packed = Bytes(()).pack(x)
    assert isinstance(packed, tuple)
    assert packed[0].element_size() == 1
    back = unpacked(packed)
    assert torch.equal(back == 0, x == 0)
    assert back.dtype == x.dtype
    assert bool(((back - x).abs() <= x.abs() / 8).all())


def test_what_no_byte_can_hold_stays_finite() -> None:
    x = torch.full((2048,), torch.finfo(torch.float32).min)
    x[0], x[1] = -torch.inf, 0
    assert bool(unpacked(Bytes(()).pack(x)).isfinite().all())


def test_of_numbers_without_a_zero_only_the_shape_is_kept() -> None:
    x = torch.randn(64, 40)
    kept = Bytes(())
    packed = kept.pack(x)
    assert isinstance(packed, NonZero)
    assert kept.pack(x.detach()) is packed
    all_packed = [packed, *(kept.pack(torch.randn(64, 40)) for _ in range(3))]
    found, *others = map(unpacked, all_packed)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert bool(found.all())
    assert found.is_contiguous()
    # All are windows of the same numbers, none of them the same.
    assert len({one.untyped_storage().data_ptr() for one in others}) == 1
    assert not any(torch.equal(others[0], one) for one in others[1:])


@pytest.mark.parametrize("size", [2, 64])
def test_a_function_that_keeps_what_it_made_does_not_keep_itself(size: int) -> None:
    layer, before = nn.Linear(64, 64), _functions()
    with Bytes(layer.parameters()):
        made = functional.softmax(layer(torch.randn(size, 64)), -1)
    function = made.grad_fn
    assert _functions() == before + 1
    del made, function
    assert _functions() == before


def _functions() -> int:
    """How many functions of autograd Python knows of that are a softmax."""
    return sum(type(one).__name__ == "SoftmaxBackward0" for one in gc.get_objects())


@pytest.mark.parametrize(
    "smooth",
    [
        functional.gelu,
        functional.silu,
        functional.softplus,
        torch.sigmoid,
        torch.tanh,
        lambda x: functional.layer_norm(x, x.shape[-1:]),
        lambda x: x / x.norm(dim=-1, keepdim=True),
        lambda x: x * x - x,
        lambda x: x.softmax(-1),
        lambda x: functional.scaled_dot_product_attention(x, x, x),
    ],
)
def test_derivatives_are_zero_where_they_were(smooth: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 4, 16, 32, requires_grad=True)
    drawn = torch.randn(x.shape)
    (plain,) = torch.autograd.grad((smooth(x + 1) * drawn).sum(), x)
    with Bytes([x]):
        made = (smooth(x + 1) * drawn).sum()
    (seen,) = torch.autograd.grad(made, x)
    assert bool(seen.isfinite().all())
    assert torch.equal(seen != 0, plain != 0)


def test_one_tensor_is_put_into_bytes_once_and_another_in_its_place_anew() -> None:
    kept = Bytes(())
    x = torch.randn(2048)
    x[7] = 0
    assert kept.pack(x.detach()) is kept.pack(x)
    before = kept.pack(x)
    x.mul_(2)
    assert kept.pack(x) is not before
    del x
    for _ in range(3):  # At the same address, perhaps.
        other = torch.randn(2048)
        other[5] = 0
        found = unpacked(kept.pack(other))
        assert bool(((found - other).abs() <= other.abs() / 8 + 2**-16).all())
        del other


def test_what_lives_on_is_not_copied() -> None:
    weight, few = torch.randn(64, 64), torch.randn(4)
    window = weight.view(-1)[64:]
    kept = Bytes([weight])
    assert all(kept.pack(one) is one for one in (weight, window, few, torch.arange(4096)))


class Kept(nn.Module):
    """Remembers its hidden activations weakly."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 8)
        self.seen: weakref.ref[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).sigmoid()
        self.seen = weakref.ref(hidden.untyped_storage())  # type: ignore[arg-type]
        out: Tensor = self.down(hidden)
        return out


def test_a_traced_pass_is_let_go_of_without_searching_for_garbage() -> None:
    wiring.trace(Kept(), torch.randn(64, 32))  # What is done once keeps its frames.
    network = Kept()
    collecting = gc.isenabled()
    gc.disable()
    try:
        found = wiring.trace(network, torch.randn(64, 32))
        function = weakref.ref(found.passage.passes[-1])
        assert network.seen is not None
        assert network.seen() is None
        assert function() is not None
        del found
        assert function() is None
    finally:
        if collecting:
            gc.enable()


def test_the_graph_of_a_traced_pass_ends_with_what_was_found_in_it() -> None:
    network = Kept()
    found = wiring.trace(network, torch.randn(4, 32))  # So few numbers are kept as they are.
    assert network.seen is not None
    assert network.seen() is not None
    del found
    assert network.seen() is None


@pytest.mark.parametrize("changed", [False, True])
def test_what_is_changed_in_place_after_it_was_saved_is_noticed(changed: bool) -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    saved = Versions()
    with saved:
        hidden = (torch.randn(3, 4) @ weight).sigmoid()  # Of which the output is saved,
        made = hidden @ weight  # and here, what comes in.
        assert not saved.changed
        if changed:
            hidden.mul_(2)
    assert saved.changed is changed
    with pytest.raises(BaseException, match="nothing was saved"):
        made.sum().backward()


def test_what_goes_backward_itself_runs_again_even_where_it_catches_its_errors() -> None:
    weight, runs = torch.randn(4, 4, requires_grad=True), list[int]()

    def run() -> Tensor:
        runs.append(0)
        hidden = weight.sigmoid()
        try:
            return torch.autograd.grad(hidden.sum(), weight)[0]
        except Exception:
            return hidden

    found, saved = without_saving(run)
    assert saved is None
    assert len(runs) == 2
    assert torch.allclose(found, weight.sigmoid() * (1 - weight.sigmoid()))


def test_nothing_is_kept_of_what_is_saved() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    with Versions():
        hidden = torch.randn(3, 4) @ weight
        kept = weakref.ref(hidden.untyped_storage())
        made = hidden.sigmoid() @ weight
    del hidden
    assert kept() is None
    assert made.requires_grad


class Doubling(nn.Linear):
    """Uses what it is given beside its product."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * x)


@pytest.mark.parametrize(("kind", "kept"), [(nn.Linear, 0), (Doubling, 3)])
def test_what_a_layer_only_multiplies_by_its_weight_is_not_kept(
    kind: type[nn.Linear], kept: int
) -> None:
    network = nn.Sequential(nn.Linear(32, 64), nn.Sigmoid(), kind(64, 8))
    x, packed = torch.randn(64, 32), list[object]()
    calls = Calls(network, any_along)

    class Noting(Bytes):
        def pack(self, x: Tensor) -> Packed:
            found = super().pack(x)
            packed.append(found)
            return found

    with calls, Noting([x, *network.parameters()], None, calls.is_multiplied):
        made = network(x)
    # The sigmoid's output is there for its own sake.
    assert sum(isinstance(one, NonZero) for one in packed) == 1 + kept
    edge = calls.made[0].made
    assert edge is not None
    (found,) = torch.autograd.grad(made.sum(), GradientEdge(*edge))
    hidden = network[0](x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(network[2](network[1](hidden)).sum(), hidden)
    assert torch.equal(found != 0, expected != 0)
    given = calls.made[2].given
    assert given is not None
    assert (given.rows, given.acting.tolist()) == (64, [True] * 64)
