"""Gate gradients: how the outputs change if all outputs of a unit are scaled.

The gate of a unit multiplies what it sends to its consumers, so the derivative with respect to it
is the sum over positions of activation times gradient, at the consumers' inputs. The meter reads
it there, sample by sample, by an identity in the autograd graph; no parameter needs a gradient
and no ``grad`` is written. What a consumer reads for all samples at once (positions), beside calls
with samples, is masked but not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leyline import InvalidField

from .calling import Removable, replace_inputs, through_layers
from .kinds.matrices import layer_at
from .rows import Rows, picks_rows, spread

Axis = tuple[str, int]
"""A module's path and the channel axis of its first input (:attr:`leyline.GateSite.axis`)."""


class _Gate(torch.autograd.Function):
    """The identity; going backwards it shows activation and gradient to the reader."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, reader: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.reader = reader
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        ctx.reader(x, gradient)
        return gradient, None, None


class GateMeter:
    """Gates on every axis of a model while entered.

    Args:
        model: the network.
        axes: where to measure.
        watch: called with every activation that passes an axis forwards, without gradients.
        halved: by axis, indices whose gates stand at one half instead of 1.
    """

    def __init__(
        self,
        model: nn.Module,
        axes: Iterable[Axis],
        watch: Callable[[Axis, Tensor], None],
        halved: Mapping[Axis, Sequence[int]] | None = None,
    ) -> None:
        self._model, self._watch, self._halved = model, watch, halved or {}
        self._axes = list(axes)
        self._handles: list[Removable] = []
        self._batch = 0
        self._rows: Rows | None = None
        self._weights: Tensor | None = None
        self._look: Callable[[Axis, Tensor, Tensor], None] | None = None
        self._sums: dict[Axis, Tensor] = {}
        self._absolutes: dict[Axis, Tensor] = {}
        self.anchor = torch.zeros((), requires_grad=True)
        """What every backward pass asks the gradient of."""

    def __enter__(self) -> GateMeter:
        self._handles += through_layers(self._model, {path for path, _ in self._axes})
        if picks_rows(self._model):
            self._rows = Rows(self._model, lambda: self._batch)
            self._handles += self._rows.put_on()
        for axis in self._axes:
            module = layer_at(self._model, axis[0])
            hook = module.register_forward_pre_hook(self._gate(axis), with_kwargs=True)
            self._handles.append(hook)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def expect(self, batch: int) -> None:
        """Say how many samples the next forward pass has."""
        self._batch = batch

    def backward(
        self,
        scalar: Tensor,
        *,
        absolute: Tensor | None = None,
        keep: bool = True,
        look: Callable[[Axis, Tensor, Tensor], None] | None = None,
    ) -> tuple[dict[Axis, Tensor], dict[Axis, Tensor]]:
        """Gate gradients of a scalar that is a sum over samples.

        Args:
            absolute: also sum up ``|activation * gradient|``, with this weight [N] a sample.
            keep: keep the graph for another call.
            look: called with every axis, its activations and their gradients.

        Returns:
            by axis, float32 on the CPU: ``[N, C]`` sums over positions of activation * gradient,
            and, if asked for, ``[C]`` sums over samples and positions of its magnitude. Axes
            that the scalar does not depend on are missing.
        """
        self._sums, self._absolutes, self._weights, self._look = {}, {}, absolute, look
        torch.autograd.grad(scalar, self.anchor, retain_graph=keep, allow_unused=True)
        return self._sums, self._absolutes

    def _gate(self, axis: Axis) -> Callable[..., Any]:
        halved = self._halved.get(axis)

        def opened(x: Tensor) -> Tensor:
            owners = None if self._rows is None else self._rows.of(x)

            def reader(x: Tensor, gradient: Tensor) -> None:
                if owners is not None:
                    x, gradient = (
                        spread(t, owners.to(t.device), self._batch) for t in (x, gradient)
                    )
                if x.numel():
                    self._read(axis, x, gradient)

            # Nor does who follows the network's own functions see those of whoever watches.
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self._watch(axis, x)
            passed: Tensor = _Gate.apply(x, self.anchor, reader)  # type: ignore[no-untyped-call]
            if self._rows is not None:
                self._rows.same(passed, x)
            return passed if halved is None else passed * _levels(halved, passed, axis[1])

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return replace_inputs(module, args, kwargs, opened)

        return hook

    def _read(self, axis: Axis, x: Tensor, gradient: Tensor) -> None:
        product = x.float() * gradient.float()
        dim = axis[1] % x.ndim
        rest = [d for d in range(1, x.ndim) if d != dim]
        sums = product.sum(rest) if rest else product
        if len(sums) == 1 < self._batch:
            return  # The same for all samples (positions): it is not known which it moved.
        if len(sums) % self._batch:
            raise InvalidField(
                f"input of {axis[0]}",
                f"a first dimension that {self._batch} samples share evenly",
                tuple(x.shape),
            )
        if self._look is not None:
            self._look(axis, x, gradient)
        # Where samples were folded into rows (windows, time steps), sample by sample again.
        sums = sums.reshape(self._batch, -1, x.shape[dim]).sum(1).cpu()
        if axis in self._halved:  # The gradient came through the gate: it has the level in it.
            sums[:, list(self._halved[axis])] *= 2
        self._sums[axis] = self._sums[axis] + sums if axis in self._sums else sums
        if self._weights is not None:
            sizes = product.abs_().sum(rest) if rest else product.abs_()
            weights = self._weights.repeat_interleave(len(sizes) // self._batch)
            sizes = (weights.to(sizes) @ sizes).cpu()
            past = self._absolutes.get(axis)
            self._absolutes[axis] = sizes if past is None else past + sizes


def _levels(halved: Sequence[int], x: Tensor, dim: int) -> Tensor:
    """What multiplies ``x`` along ``dim``: one half at some indices, else 1."""
    levels = torch.ones(x.shape[dim], dtype=x.dtype)
    levels[list(halved)] = 0.5
    shape = [1] * x.ndim
    shape[dim] = -1
    return levels.view(shape).to(x.device)
