"""The same under the Hugging Face Trainer, with a small ViT built from a configuration.

``pip install transformers accelerate``, then ``python examples/03_hf_trainer.py``; nothing is
downloaded. The hidden units of the feed-forward parts are what is removed.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from elesh.demo import Digits, Split, local_fleet
from elesh.trainer import Session
from elesh.trainer.adapters.epochs import EveryEpoch
from elesh.trainer.adapters.hugging_face import EleshCallback, labelled

EPOCHS = 12
SCHEDULE = {
    "validation_epochs": 2,
    "conservative_epochs": 3,
    "moderate_epochs": 3,
    "aggressive_epochs": 4,
}


class Images(Dataset[dict[str, Tensor]]):
    """Digits as the dictionaries that a Trainer collates."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.split.images[index], "labels": self.split.labels[index]}


class WaitForAnswer(TrainerCallback):
    """Only because this run is so short: let every checkpoint be answered."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def on_epoch_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        """After the epochs that publish."""
        if round(state.epoch) % 2 == 0:
            self.session.wait(10)


def network() -> ViTForImageClassification:
    """Two transformer blocks over 2x2 patches of 8x8 digits."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=10,
            attn_implementation="eager",
        )
    )


def main() -> None:
    """Train under the callback."""
    torch.manual_seed(0)
    data = Digits.load(seed=0)
    train = Images(data.train)
    with (
        tempfile.TemporaryDirectory() as folder,
        local_fleet({"structured_pruning": {"safety_schedule": SCHEDULE}}) as (url, settings),
        Session("hf-trainer", url, settings) as session,
    ):
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(network(), arguments, train_dataset=train)
        loader = trainer.get_train_dataloader()
        validation = torch.utils.data.DataLoader(Images(data.validation), 64)
        epochs = EveryEpoch(session, labelled(loader, 512), labelled(validation, 512), every=2)
        trainer.add_callback(EleshCallback(epochs))
        trainer.add_callback(WaitForAnswer(session))
        trainer.train()
        assert epochs.surgeon is not None
        architecture, accuracy = epochs.surgeon.architecture, epochs.evaluate().accuracy
    before, after = architecture.original_parameters, architecture.parameters
    print(f"parameters {before} -> {after}, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
