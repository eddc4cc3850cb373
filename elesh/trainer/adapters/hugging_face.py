"""A callback for the Hugging Face Trainer: ``callbacks=[EleshCallback(EveryEpoch(session, ...))]``.

Needs ``transformers`` with ``accelerate``. Promises: nothing is done inside a step; a trainer of
several processes is refused by name before it trains; the weights that the Trainer saves of a cut
network say how it was cut, and the network takes the structure of every checkpoint that the Trainer
loads; labels are judged where the model's own loss puts them.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from elesh.trainer.network.calling import Batches, Inputs
from elesh.trainer.network.traversal import alive
from elesh.trainer.recovery.checkpoints import KEY, cut_like, pack
from leyline import InvalidField

from .epochs import EveryEpoch

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_IGNORED = -100
"""The label that losses of Transformers leave out."""


class EleshCallback(TrainerCallback):
    """Watches, applies and publishes after every training epoch.

    Give it to ``Trainer(callbacks=[...])``: one that is added later has not looked at the network
    when ``resume_from_checkpoint`` loads a cut one.

    Args:
        epochs: the session and its data; :func:`labelled` makes batches of a data loader.
    """

    def __init__(self, epochs: EveryEpoch) -> None:
        self.epochs = epochs

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Look at the network before a checkpoint is loaded into it."""
        if isinstance(kwargs.get("model"), nn.Module):
            self._look_at(kwargs["model"])

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Model and optimizer are there now, and a checkpoint was loaded."""
        self._look_at(kwargs["model"])
        self.epochs.ends_with(math.ceil(state.num_train_epochs))
        self.epochs.begin(
            kwargs["model"],
            kwargs["optimizer"],
            processes=args.world_size,
            scheduler=kwargs.get("lr_scheduler"),
            scaler=self._scaler(),
            epoch=round(state.epoch or 0),
            alone=True,
        )

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """An epoch was trained."""
        self.epochs.end_epoch(round(state.epoch or 0))

    def _look_at(self, model: nn.Module) -> None:
        self.epochs.relabel(functools.partial(_as_its_loss_does, model))
        self.epochs.look_at(model)
        for trainer in self._trainers():
            self._carry(trainer)

    def _trainers(self) -> Iterator[Any]:
        for trainer in alive(Trainer):
            handler = getattr(trainer, "callback_handler", None)
            if any(each is self for each in getattr(handler, "callbacks", ())):
                yield trainer

    def _scaler(self) -> Any:
        """Of gradients in half precision; None in any other."""
        found = [getattr(trainer, "accelerator", None) for trainer in self._trainers()]
        return next(filter(None, (getattr(each, "scaler", None) for each in found)), None)

    def _carry(self, trainer: Any) -> None:
        """Have ``trainer.save_model`` write the architecture beside the weights, in checkpoints
        and when the user calls it."""
        original = trainer.save_model
        if getattr(original, "of_elesh", None) is self:
            return

        @functools.wraps(original)
        def save_model(output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
            original(output_dir, *args, **kwargs)
            surgeon = self.epochs.surgeon
            packed = None if surgeon is None else pack(surgeon.model)
            if packed is not None and trainer.args.should_save:
                _add(Path(output_dir or trainer.args.output_dir), packed)

        save_model.of_elesh = self  # type: ignore[attr-defined]
        trainer.save_model = save_model


def load(folder: str | Path, model: Any) -> Any:
    """Cut a model as the saved one was and fill in its weights; ``from_pretrained`` for a cut one.

    Args:
        folder: of a checkpoint, or of ``trainer.save_model``.
        model: built anew, ``AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))``.

    Raises:
        InvalidField: if the folder holds no safetensors.
        ShapeMismatch: if the model is not the one that was cut.
    """
    state: dict[str, Tensor] = {}
    for file in _files(Path(folder)):
        state |= safetensors.torch.load_file(file)
    if not state:
        raise InvalidField("folder", f"a folder with {_WEIGHTS} or its shards", str(folder))
    packed = state.pop(KEY, None)
    if packed is not None:
        cut_like(model, packed)
    model.load_state_dict(state, strict=False)  # tied weights are saved once
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


def _files(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():
        names = json.loads((folder / _INDEX).read_bytes())["weight_map"].values()
        return [folder / name for name in dict.fromkeys(names)]
    return [folder / _WEIGHTS] if (folder / _WEIGHTS).exists() else []


def _add(folder: Path, packed: Tensor) -> None:
    """Put the architecture into every file of weights: shards are loaded one by one."""
    for file in _files(folder):
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        draft = file.with_name(f".{file.name}.draft")
        tensors = {**safetensors.torch.load_file(file), KEY: packed}
        safetensors.torch.save_file(tensors, draft, metadata=metadata)
        draft.replace(file)


def _as_its_loss_does(model: Any, inputs: Inputs, labels: Any) -> tuple[Inputs, Any]:
    """A batch whose labels stand where their logits are.

    A causal language model is judged by the next token, as its own loss shifts its labels; one
    that encodes first is given its labels as the decoder's inputs.
    """
    config = getattr(model, "config", None)
    if config is None or not isinstance(labels, Tensor):
        return inputs, labels
    if labels.is_floating_point():
        raise InvalidField(
            "labels",
            "class labels",
            f"numbers ({labels.dtype})",
            hint="the callback cannot judge regression or several labels at once; use "
            "elesh.prune with a loss and an evaluate of your own",
        )
    generates = callable(getattr(model, "can_generate", None)) and model.can_generate()
    if not generates or labels.ndim != 2:
        return inputs, labels
    if getattr(config, "is_encoder_decoder", False):
        return _with_decoder_inputs(model, inputs, labels), labels
    shifted = torch.full_like(labels, _IGNORED)
    shifted[:, :-1] = labels[:, 1:]
    return inputs, shifted


def _with_decoder_inputs(model: Any, inputs: Inputs, labels: Tensor) -> Inputs:
    if not isinstance(inputs, Mapping) or "decoder_input_ids" in inputs:
        return inputs
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        hint = "put decoder_input_ids into the inputs of every batch"
        expected = "inputs that the model can be called with"
        found = f"no decoder_input_ids, which {type(model).__name__} does not make of labels"
        raise InvalidField("inputs", expected, found, hint=hint)
    return {**inputs, "decoder_input_ids": shift(labels=labels)}


def labelled(
    loader: Iterable[Mapping[str, Tensor]], samples: int, labels: str = "labels"
) -> Batches:
    """Batches of (keyword inputs, labels) from a loader of dictionaries, of so many samples."""
    batches: list[tuple[dict[str, Tensor], Tensor]] = []
    taken = 0
    for batch in loader:
        if taken >= samples:
            break
        inputs = {name: value for name, value in batch.items() if name != labels}
        batches.append((inputs, batch[labels]))
        taken += len(batch[labels])
    return batches
