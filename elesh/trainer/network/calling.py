"""How a network is called, whatever its inputs and outputs look like, and left as it was found.

Promises: inputs may be a tensor, a sequence (positional) or a mapping (keywords); after
:func:`preserve_state` nothing that a caller can see of the model or the random generators differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leyline import InvalidField

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""One batch of inputs; the first dimension of every tensor counts samples."""


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's answer to one batch of inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(*inputs)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` applied to every tensor in its tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_tensors(function, part) for part in value]
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in a nest of tuples, lists and mappings, in order."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)  # type: ignore[func-returns-value]
    return found


def example_copy(inputs: Inputs) -> Any:
    """Example inputs that no tracing can change, in single precision where they are floats."""

    def copied(tensor: Tensor) -> Tensor:
        clone = tensor.detach().clone()
        return clone.float() if clone.is_floating_point() else clone

    with torch.inference_mode(False):
        return map_tensors(copied, inputs)


def batch_size(inputs: Inputs) -> int:
    """Samples in a batch of inputs: the first dimension of its first tensor.

    Raises:
        InvalidField: if there is no tensor with a first dimension.
    """
    for tensor in tensors_in(inputs):
        if tensor.ndim:
            return tensor.shape[0]
    raise InvalidField("inputs", "at least one tensor whose first dimension counts samples", inputs)


def main_output(output: Any) -> Tensor:
    """The tensor that speaks for the network: ``logits`` where it has that name, else the first.

    Raises:
        InvalidField: if the output holds no floating-point tensor.
    """
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"]  # type: ignore[no-any-return]
    for tensor in tensors_in(output):
        if tensor.is_floating_point():
            return tensor
    raise InvalidField("outputs", "at least one floating-point tensor", type(output).__name__)


def replace_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], function: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's arguments with ``function`` applied to its first input (for pre-hooks)."""
    if args:
        return (function(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: function(kwargs[name])}


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor lives; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed the generators of the CPU and of one device.

    Not ``torch.manual_seed``: that seeds those of devices that have nothing to do with the model.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


@contextlib.contextmanager
def preserve_state(model: nn.Module, seed: int) -> Iterator[None]:
    """Evaluation mode with gradients, seeded; training flags, buffers and generators come back.

    Gradients are on even inside a caller's ``no_grad`` or ``inference_mode``; parameters' ``grad``
    is not touched as long as the body uses ``torch.autograd.grad``.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    device = device_of(model)
    accelerators = [device] if device.type != "cpu" else []
    with (
        torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        seed_generators(device, seed)
        model.eval()
        try:
            yield
        finally:
            for module, training in flags:
                module.training = training
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, saved):
                    buffer.data.copy_(saved)
