"""Linear layers whose weight a function multiplies by, called after all where their input matters.

Some code hands the weights of its layers to a function (torchvision's Swin): the layers are never
called, so nothing can be masked or measured at their inputs. While the hooks of
:func:`through_layers` are on a network, such a product is made by calling the layer.

Promises: the values are the same; a layer that is called anyway costs nothing from its second
call on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

__all__ = ["seen_called", "through_layers"]

_CALLED: WeakSet[nn.Module] = WeakSet()
"""Layers that were seen to be called."""


def seen_called(layers: Iterable[nn.Module]) -> None:
    """Say that these layers are called themselves: nothing has to be watched for them."""
    _CALLED.update(layers)


def through_layers(model: nn.Module, paths: Iterable[str]) -> list[RemovableHandle]:
    """Have ``functional.linear`` call the linear layers at these paths where the module around one
    passes it that layer's weight and bias; to be put on before other hooks."""
    around: dict[str, list[nn.Linear]] = {}
    for path in paths:
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear) and layer not in _CALLED and path:
            around.setdefault(path.rpartition(".")[0], []).append(layer)
    handles: list[RemovableHandle] = []
    for path, layers in around.items():
        products, holder = _Products(layers), model.get_submodule(path)
        handles.append(holder.register_forward_pre_hook(products.begin))
        handles.append(holder.register_forward_hook(products.end, always_call=True))
        handles += [layer.register_forward_pre_hook(products.note) for layer in layers]
    return handles


class _Products:
    """Watches the products inside one module."""

    def __init__(self, layers: Collection[nn.Linear]) -> None:
        self._layers = layers
        self._modes: list[_Calling | None] = []

    def begin(self, module: nn.Module, args: Any) -> None:
        mode = None
        if any(layer not in _CALLED for layer in self._layers):
            mode = _Calling({id(layer.weight): layer for layer in self._layers})
            mode.__enter__()  # type: ignore[no-untyped-call]
        self._modes.append(mode)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._modes and (mode := self._modes.pop()) is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def note(self, layer: nn.Module, args: Any) -> None:
        if not any(mode is not None and mode.calling is layer for mode in self._modes):
            _CALLED.add(layer)


class _Calling(TorchFunctionMode):
    """Calls the layers whose weights (by id) ``functional.linear`` is given."""

    def __init__(self, layers: dict[int, nn.Linear]) -> None:
        super().__init__()
        self._layers = layers
        self.calling: nn.Linear | None = None
        """The layer that is called for such a product."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        layer = self._layer(*args, **given) if func is functional.linear else None
        if layer is None:
            return func(*args, **given)
        self.calling = layer
        try:
            return layer(args[0] if args else given["input"])
        finally:
            self.calling = None

    def _layer(self, input: Any, weight: Any, bias: Any = None) -> nn.Linear | None:
        layer = self._layers.get(id(weight))
        return layer if layer not in _CALLED and layer is not None and bias is layer.bias else None
