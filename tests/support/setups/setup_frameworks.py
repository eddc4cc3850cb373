"""The rows of docs/setups.md that a framework trains: one run of six epochs, killed and resumed.

After epoch 2 a cut is applied, at epoch 3 it is rolled back, after epoch 5 another one is applied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from guarded import decide, trainer_settings
from torch import Tensor, nn
from torch.nn import functional

from elesh.trainer import Evaluation, Session
from elesh.trainer.adapters.epochs import EveryEpoch, classification
from leyline import CheckpointBundle, PruningOutcome, StructuralPruningDecision

AWAY = "redis://127.0.0.1:1/0"
WHOLE = trainer_settings(cut_accuracy_drop=1)
"""Cuts go as they were decided: what they cost is not what is looked at here."""
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()
Cell = Callable[[str], Any]


class Answering(Session):
    """Answers two checkpoints itself; at epoch 3 the network has become bad."""

    def __init__(self, folder: Path) -> None:
        super().__init__("run", AWAY, WHOLE, restore_dir=folder / "restore")
        self.bundles: list[CheckpointBundle] = []
        self.outcomes: list[PruningOutcome] = []
        self._due: list[StructuralPruningDecision] = []

    def publish(self, bundle: CheckpointBundle) -> bool:
        self.bundles.append(bundle)
        epoch = bundle.metadata.epoch
        if epoch in (1, 4):
            self._due = [decide(bundle.architecture, groups=1, number=epoch)]
        return True

    def decisions(self) -> list[StructuralPruningDecision]:
        found, self._due = self._due, []
        return found

    def apply(self, *given: Any, **how: Any) -> PruningOutcome:
        self.outcomes.append(super().apply(*given, **how))
        return self.outcomes[-1]

    def watch(
        self,
        epoch: int,
        evaluate: Callable[[], Evaluation],
        *,
        always: bool = False,
        look: bool = True,
    ) -> list[PruningOutcome]:
        found = super().watch(epoch, evaluate if epoch != 3 else lambda: Evaluation(0.1, 2.0))
        self.outcomes += found
        return found


def judged(network: nn.Module, batches: Any) -> Evaluation:
    """The real loss, with an accuracy that no cut hurts."""
    return Evaluation(0.9, classification(network, batches).loss)


class Life:
    """One process of a run; ``train`` gives the outputs, when training began and when it ended."""

    def __init__(
        self,
        train: Callable[[Path, EveryEpoch, int, bool], tuple[Tensor, Tensor]],
        load: Callable[[Path], Tensor],
        data: Any,
    ) -> None:
        self._train, self._load, self._data = train, load, data

    def _run(self, folder: Path, epochs: int, resume: bool) -> tuple[Answering, Tensor, Tensor]:
        session = Answering(folder)
        ours = EveryEpoch(session, self._data, self._data, every=1, evaluate=judged)
        return session, *self._train(folder, ours, epochs, resume)

    def first(self, folder: Path, cell: Cell) -> None:
        """Six epochs."""
        with cell("record"):
            session, _, outputs = self._run(folder, 6, False)
        with cell("measure"):
            assert [b.metadata.epoch for b in session.bundles] == [1, 2, 3, 4, 5]
        first, back, second = (session.outcomes + [None] * 3)[:3]
        with cell("mask"):
            assert first is not None
            assert first.loss_masked not in (None, first.loss_before), first.detail
        with cell("cut"):
            assert (first.result, second and second.result) == ("applied", "applied")
        with cell("train on"):
            assert torch.isfinite(outputs).all()
        with cell("roll back"):
            assert back is not None
            assert back.result == "rolled_back"
            sizes = [b.architecture.parameters for b in session.bundles]
            assert sizes[2] == sizes[0] > sizes[1] == sizes[4], sizes
        torch.save(outputs, folder / "outputs")

    def second(self, folder: Path, cell: Cell) -> None:
        """Two more, in a new process; the last epoch of a run publishes nothing."""
        outputs = torch.load(folder / "outputs")
        with cell("resume after kill -9"):
            session, began, _ = self._run(folder, 8, True)
            assert torch.equal(began, outputs), "not bit for bit"
            assert [b.metadata.epoch for b in session.bundles] == [7]
        with cell("save and load elsewhere"):
            assert torch.equal(self._load(folder), outputs), "not bit for bit"


def lightning_life() -> Life:
    import pytorch_lightning as lightning
    from torch.utils.data import DataLoader, TensorDataset

    from elesh.trainer.adapters.lightning import EleshCallback, load_from_checkpoint

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 2))
            self.began: Tensor | None = None

        def outputs(self) -> Tensor:
            with torch.no_grad():
                return self.model(X)  # type: ignore[no-any-return]

        def on_train_epoch_start(self) -> None:
            self.began = self.outputs() if self.began is None else self.began

        def training_step(self, batch: Any, _: int) -> Tensor:
            return functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    def train(folder: Path, ours: EveryEpoch, epochs: int, resume: bool) -> tuple[Tensor, Tensor]:
        saver = lightning.callbacks.ModelCheckpoint(folder / "saved", save_last=True)
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", devices=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            callbacks=[EleshCallback(ours), saver],
        )  # fmt: skip
        module, last = Module(), folder / "saved" / "last.ckpt"
        data = DataLoader(TensorDataset(X, Y), 32)
        trainer.fit(module, data, ckpt_path=last if resume else None)
        if not resume:
            trainer.save_checkpoint(folder / "kept.ckpt")
        assert module.began is not None
        return module.began, module.outputs()

    return Life(
        train, lambda folder: load_from_checkpoint(Module, folder / "kept.ckpt").outputs(),
        [(X, Y)],
    )  # fmt: skip


def hugging_face_life() -> Life:
    import transformers

    from elesh.trainer.adapters.hugging_face import EleshCallback, load

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(8, 24), nn.Linear(24, 2)

        def forward(self, values: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.last(functional.relu(self.first(values)))
            if labels is None:
                return {"logits": logits}
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    def outputs(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return network(X)["logits"]  # type: ignore[no-any-return]

    class Began(transformers.TrainerCallback):  # type: ignore[misc]
        outputs: Tensor | None = None

        def on_epoch_begin(self, *given: Any, model: nn.Module, **how: Any) -> None:
            self.outputs = outputs(model) if self.outputs is None else self.outputs

    def train(folder: Path, ours: EveryEpoch, epochs: int, resume: bool) -> tuple[Tensor, Tensor]:
        arguments = transformers.TrainingArguments(
            output_dir=str(folder / "out"), num_train_epochs=epochs, use_cpu=True, report_to=[],
            per_device_train_batch_size=32, learning_rate=1e-2, save_strategy="epoch",
            disable_tqdm=True, logging_strategy="no", save_total_limit=2,
        )  # fmt: skip
        rows = [{"values": x, "labels": y} for x, y in zip(X, Y, strict=True)]
        network, began = Network(), Began()
        callbacks = [EleshCallback(ours), began]
        trainer = transformers.Trainer(network, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        if not resume:
            trainer.save_model(str(folder / "kept"))
        assert began.outputs is not None
        return began.outputs, outputs(network)

    return Life(
        train, lambda folder: outputs(load(folder / "kept", Network())), [({"values": X}, Y)]
    )


FRAMEWORKS: dict[str, Callable[[], Life]] = {
    "Lightning: EleshCallback, ModelCheckpoint, ckpt_path": lightning_life,
    "Hugging Face Trainer: EleshCallback, resume_from_checkpoint": hugging_face_life,
}
