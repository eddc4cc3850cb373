"""Checks what a cut of every group promises: masking is cutting, counts are exact, a cut is undone
bit for bit, and the network trains on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import trainer_nets
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.network.calling import batch_size, call, main_output

__all__ = ["counted_macs", "cut_and_checked", "cut_and_counted", "prunable"]


def cut_and_checked(model: nn.Module, x: Any) -> Surgeon:
    """Some units of every group that may go were masked, cut, and undone."""
    model.eval()
    surgeon = Surgeon(model, Recorder(model, x).architecture)
    units, before = trainer_nets.units(surgeon.architecture), model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    surgeon.mask(units)
    masked = main_output(call(model, x))
    surgeon.unmask()
    after = surgeon.cut(units)
    cut = main_output(call(model, x))
    assert (cut - masked).abs().max() <= 1e-5 * masked.abs().max()
    assert after.parameters == sum(p.numel() for p in model.parameters())
    main_output(call(model.train(), x)).square().mean().backward()
    surgeon.undo()
    model.eval()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    return surgeon


def cut_and_counted(make: Callable[[], nn.Module], x: Any, sizes: Mapping[str, int]) -> None:
    """As many units as expected may go of each group; products are counted exactly before and after
    a cut, and nothing hangs on the network afterwards."""
    torch.manual_seed(0)
    model = make()
    surgeon = cut_and_checked(model, x)
    groups = [group for group in surgeon.architecture.groups if group.prunable]
    assert {group.name: group.size for group in groups} == sizes
    assert surgeon.architecture.macs == counted_macs(model, x)
    assert surgeon.cut({group.name: [0, 2] for group in groups}).macs == counted_macs(model, x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def counted_macs(model: nn.Module, x: Any) -> float:
    """Products of one sample, as PyTorch counts them: none of a fused attention on a CPU, so that
    attentions run step by step."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call(model, x)
    return counter.get_total_flops() / 2 / batch_size(x)


def prunable(surgeon: Surgeon) -> list[str]:
    """The names of the groups that may go."""
    return [group.name for group in surgeon.architecture.groups if group.prunable]
