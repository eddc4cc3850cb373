"""A callback for Lightning: ``callbacks=[EleshCallback(EveryEpoch(session, ...))]``.

Needs ``lightning`` or ``pytorch-lightning``. Promises: nothing is done inside a step; a trainer of
several processes is refused by name before it trains; every checkpoint of a cut network says how it
was cut, and the network takes the structure of every checkpoint that the trainer loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elesh.trainer.surgery.averages import copies_in
from leyline import InvalidField

if TYPE_CHECKING:
    Callback: Any = object
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback

from elesh.trainer.recovery.checkpoints import KEY, bring, cut_like, pack

from .epochs import EveryEpoch


class EleshCallback(Callback):  # type: ignore[misc]
    """Watches, applies and publishes after every training epoch.

    All optimizers of the module are cut along, and the averages that other callbacks keep
    (WeightAveraging, EMAWeightAveraging, StochasticWeightAveraging).

    Args:
        epochs: the session and its data.
        network: the attribute of the LightningModule that holds the network to prune; empty: the
            module is the network itself, as it is where it has no attribute ``model``.
    """

    def __init__(self, epochs: EveryEpoch, network: str = "model") -> None:
        super().__init__()
        self.epochs, self._network = epochs, network

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Look at the network before a checkpoint is loaded into it."""
        with _alone(pl_module):
            self.epochs.look_at(_network_of(pl_module, self._network))
        self._carry(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Optimizers are there now, and a checkpoint was loaded."""
        if (trainer.max_epochs or 0) > 0:
            self.epochs.ends_with(trainer.max_epochs)
        with _alone(pl_module):
            self.epochs.begin(
                _network_of(pl_module, self._network),
                trainer.optimizers,
                processes=trainer.world_size,
                epoch=trainer.current_epoch,
                alone=True,
                scaler=getattr(trainer.precision_plugin, "scaler", None),
                **_schedulers(trainer),
                **_averages(trainer, self.epochs),
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """An epoch was trained (Lightning counts from 0)."""
        with _alone(pl_module):
            self.epochs.end_epoch(trainer.current_epoch + 1)

    def _carry(self, trainer: Any, pl_module: Any) -> None:
        """Have the module's own checkpoint hooks write and read the architecture: they are called
        for every checkpoint, of weights only too, and before weights are loaded."""
        if getattr(pl_module.on_save_checkpoint, "of_elesh", None) is self:
            return
        hooks = pl_module.on_save_checkpoint, pl_module.on_load_checkpoint
        # Without those of a callback of an earlier fit, and its trainer.
        save, load = (getattr(hook, "of_module", hook) for hook in hooks)

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            save(checkpoint)
            surgeon = self.epochs.surgeon
            packed = None if surgeon is None else pack(surgeon.model)
            if packed is not None:
                checkpoint[KEY] = packed

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            load(checkpoint)
            surgeon = self.epochs.surgeon
            if surgeon is not None:
                for name, average in _averages(trainer, self.epochs).items():
                    surgeon.follow(name, average)
                bring(surgeon, checkpoint.get(KEY))

        on_save_checkpoint.of_elesh = self  # type: ignore[attr-defined]
        on_save_checkpoint.of_module = save  # type: ignore[attr-defined]
        on_load_checkpoint.of_module = load  # type: ignore[attr-defined]
        pl_module.on_save_checkpoint = on_save_checkpoint
        pl_module.on_load_checkpoint = on_load_checkpoint


def load_from_checkpoint(
    kind: Any, path: Any, network: str = "model", *, map_location: Any = None, **settings: Any
) -> Any:
    """``kind.load_from_checkpoint(path, **settings)`` for a checkpoint of a cut network, or of one
    that was never cut.

    Args:
        kind: the class of the LightningModule.
        network: as for :class:`EleshCallback`.
        settings: for ``kind``, beside those that the checkpoint holds.

    Raises:
        ShapeMismatch: if the module's network is not the one that was cut.
    """
    checkpoint = torch.load(path, map_location=map_location, weights_only=False)
    module = kind(**{**dict(checkpoint.get("hyper_parameters", {})), **settings})
    if KEY in checkpoint:
        cut_like(_network_of(module, network), checkpoint[KEY])
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module


def _network_of(module: Any, name: str) -> nn.Module:
    found = getattr(module, name, None) if name else module
    own = type(module).forward.__module__  # Lightning's and PyTorch's only say that there is none
    is_network = not own.startswith(("lightning.", "pytorch_lightning.", "torch."))
    if found is None and name == "model" and is_network:
        return module  # type: ignore[no-any-return]
    if not isinstance(found, nn.Module):
        parts = [child for child, _ in module.named_children()]
        hint = "EleshCallback(epochs, network='...'); network='' for the module itself"
        expected = f"an attribute that is a network, one of {parts}"
        raise InvalidField("network", expected, name, hint=hint)
    return found


def _schedulers(trainer: Any) -> dict[str, Any]:
    """Every scheduler, by the name that restore points have for it."""
    found = [config.scheduler for config in trainer.lr_scheduler_configs]
    names = ["scheduler", *(f"scheduler_{number}" for number in range(2, len(found) + 1))]
    return dict(zip(names, found, strict=False))


def _averages(trainer: Any, epochs: EveryEpoch) -> dict[str, nn.Module]:
    """The averaged modules that callbacks keep of the network, by the callbacks' names."""
    assert epochs.surgeon is not None
    found = {}
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None)
        name = type(callback).__name__
        if isinstance(average, nn.Module) and copies_in(name, average, epochs.surgeon.model):
            found[name] = average
    return found


@contextmanager
def _alone(module: Any) -> Iterator[None]:
    """The module without its trainer, which copies of it must not take along."""
    trainer, fabric = module._trainer, module._fabric
    module._trainer = module._fabric = None
    try:
        yield
    finally:
        module._trainer, module._fabric = trainer, fabric
