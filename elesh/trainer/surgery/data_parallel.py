"""Networks that several processes train together.

Promises: a network whose parameters are sharded over processes is refused; after a cut, every
DistributedDataParallel around the network averages its gradients again, without being made anew by
the user and without a word between the processes.
"""

from __future__ import annotations

from typing import Any

import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from elesh.trainer.network.state import alive
from leyline import InvalidField

__all__ = ["rebuild_reducers", "require_whole"]


def require_whole(model: nn.Module) -> None:
    """Refuse a network that this process has only a part of.

    Raises:
        InvalidField: naming a parameter that is sharded.
    """
    hint = (
        "prune before it is sharded: cut the plain network, save it with elesh.save, and call "
        "fully_shard on the cut one; or train with DistributedDataParallel, which can be cut"
    )
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            found = f"{path or 'the network'} is a FullyShardedDataParallel"
            raise InvalidField("model", "a network that is whole in this process", found, hint=hint)
    for path, parameter in model.named_parameters():
        kind = type(parameter)
        sharded = any(base.__name__ in ("DTensor", "FlatParameter") for base in kind.__mro__)
        if sharded or hasattr(parameter, "ds_id"):  # DeepSpeed's ZeRO-3 leaves empty parameters
            found = f"{path} is sharded over processes ({kind.__name__})"
            raise InvalidField("model", "a network that is whole in this process", found, hint=hint)


def rebuild_reducers(model: nn.Module) -> int:
    """Let every DistributedDataParallel around the network look at its parameters again; how many.

    It hooks into autograd's nodes of parameters, which a cut replaces, and keeps buckets of their
    sizes: left alone it would let the processes drift apart without an error. What is done is what
    unpickling one does: its buckets and hooks are made anew from its module's parameters. It sends
    nothing, so that processes need not do it at the same time.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0
    own = {id(module) for module in model.modules()}
    found = [
        each
        for each in alive(lambda kind: issubclass(kind, DistributedDataParallel))
        if "reducer" in vars(each) and any(id(module) in own for module in each.module.modules())
    ]
    for wrapper in found:
        _rebuild(wrapper)
    return len(found)


def _rebuild(wrapper: Any) -> None:  # its own methods have no types
    wrapper._remove_autograd_hooks()
    wrapper._module_parameters = [
        parameter
        for path, parameter in wrapper.module.named_parameters()
        if path not in wrapper.parameters_to_ignore
    ]
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    wrapper._has_rebuilt_buckets = False
    register: Any = vars(torch.distributed)["_register_comm_hook"]
    for hook, state in wrapper._comm_hooks:
        _forget_buckets(state)
        register(wrapper.reducer, state, hook)
    if wrapper.static_graph:
        wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()


def _forget_buckets(state: object) -> None:
    """Compressing hooks (PowerSGD) keep errors and factors by bucket; the buckets are others."""
    for value in getattr(state, "__dict__", {}).values():
        if isinstance(value, dict) and all(isinstance(key, int) for key in value):
            value.clear()
