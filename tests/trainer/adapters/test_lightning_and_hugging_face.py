"""Checkpoints of Lightning and of the Hugging Face trainer: from before and after a cut, with
averages, several optimizers and language models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_framework_checkpoints import LOSSES, NOWHERE, CutsOnce, X, Y, every
from torch import Tensor, nn
from torch.nn import functional

from elesh.settings import Settings
from elesh.trainer import Evaluation, Session
from elesh.trainer.adapters.epochs import EveryEpoch
from elesh.trainer.recovery.checkpoints import KEY

pytestmark = pytest.mark.slow
_NEVER_BACK = {"rollback_triggers": {"channel_accuracy_drop": 1}}

# Lightning


@pytest.fixture
def lightning() -> Any:
    """Imported by the one process that needs it: it takes three seconds."""
    found = pytest.importorskip("pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    return found


def fit(
    folder: Path,
    module: Any,
    session: Session,
    epochs: int,
    *others: Any,
    ckpt_path: Path | None = None,
    judged: dict[str, Any] | None = None,
    precision: Any = None,
    plugins: Any = None,
    **saving: Any,
) -> tuple[EveryEpoch, Any]:
    from pytorch_lightning import Trainer
    from pytorch_lightning.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    from elesh.trainer.adapters.lightning import EleshCallback

    ours = every(session, **(judged or {}))
    saver = ModelCheckpoint(
        dirpath=folder, save_last=True, save_top_k=-1, filename="{epoch}", **saving
    )
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision=precision,
        plugins=plugins,
        callbacks=[EleshCallback(ours), *others, saver],
        default_root_dir=folder,
    )
    data = DataLoader(TensorDataset(X, Y), 32)
    trainer.fit(module, data, data, ckpt_path=ckpt_path)
    return ours, trainer


@pytest.mark.usefixtures("lightning")
def test_lightning_resumes_from_both_sides_of_a_cut_and_loads_elsewhere(tmp_path: Path) -> None:
    from lightning_modules import Module

    from elesh.trainer.adapters.lightning import load_from_checkpoint

    module = Module()
    with CutsOnce("case", NOWHERE, restore_dir=tmp_path / "restore") as session:
        ours, trainer = fit(tmp_path / "saved", module, session, 3)
    assert module.model[0].out_features == 22
    assert session.asked == (1, 2), "of the last epoch nothing can come"
    assert ours.surgeon is not None
    saved = sorted((tmp_path / "saved").glob("epoch*.ckpt"))
    assert len(saved) == 3
    elsewhere = load_from_checkpoint(Module, tmp_path / "saved" / "last.ckpt")
    assert torch.equal(elsewhere.model(X), module.model(X))
    uncut = load_from_checkpoint(Module, saved[0])
    assert uncut.model[0].out_features == 24
    with Session("case", NOWHERE, restore_dir=tmp_path / "restore") as session:
        again = Module()
        ours, _ = fit(tmp_path / "more", again, session, 4, ckpt_path=tmp_path / "saved/last.ckpt")
        assert again.model[0].out_features == 22
        assert len(session.monitored) == 1
    with Session("other", NOWHERE) as session:
        before = Module()
        fit(tmp_path / "less", before, session, 2, ckpt_path=saved[0])
    assert before.model[0].out_features == 24
    trainer.validate(module, trainer.train_dataloader, ckpt_path=str(saved[0]), verbose=False)
    assert module.model[0].out_features == 24


@pytest.mark.parametrize(
    "kind",
    [
        "WeightAveraging",
        pytest.param("EMAWeightAveraging", marks=pytest.mark.soak),
        pytest.param("SWA", marks=pytest.mark.soak),
    ],
)
def test_lightnings_averages_are_cut_and_resumed_with_the_network(
    kind: str, tmp_path: Path, lightning: Any
) -> None:
    from lightning_modules import Module

    def average() -> Any:
        if kind == "SWA":
            return lightning.callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=1)
        return getattr(lightning.callbacks, kind)()

    module = Module()
    with CutsOnce("case", NOWHERE) as session:
        fit(tmp_path, module, session, 3, average())
    assert module.model[0].out_features == 22
    with Session("case", NOWHERE) as second:
        again = Module()
        fit(tmp_path / "more", again, second, 4, average(), ckpt_path=tmp_path / "last.ckpt")
    assert again.model[0].out_features == 22


@pytest.mark.usefixtures("lightning")
def test_a_lightning_module_may_be_the_network_and_have_several_optimizers(
    tmp_path: Path,
) -> None:
    from lightning_modules import ItselfTheNetwork

    class Cuts(CutsOnce):
        layer = "first"

    module = ItselfTheNetwork()
    with Cuts("case", NOWHERE) as session:
        fit(tmp_path, module, session, 3, save_weights_only=True)
    assert module.first.out_features == 22
    assert KEY in torch.load(tmp_path / "last.ckpt", weights_only=False)


@pytest.mark.usefixtures("lightning")
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_network_that_lightning_casts_is_given_batches_in_its_own_precision(
    precision: str, tmp_path: Path
) -> None:
    from lightning_modules import Module

    module = Module()
    whole = {"trainer": {"cut_accuracy_drop": 1}, "structured_pruning": _NEVER_BACK}
    with CutsOnce("case", NOWHERE, Settings.model_validate(whole)) as session:
        ours, _ = fit(tmp_path, module, session, 3, judged={"evaluate": None}, precision=precision)
    assert module.model[0].out_features < 24
    assert ours.evaluate().finite


def test_restore_points_hold_the_scaler_of_half_precision(tmp_path: Path, lightning: Any) -> None:
    from lightning_modules import Module

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    mixed = lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    with CutsOnce("case", NOWHERE) as session:
        fit(tmp_path, Module(), session, 2, plugins=[mixed])
        assert session._recovery.tracked is not None
        assert session._recovery.tracked.parts["scaler"] is scaler


@pytest.mark.usefixtures("lightning")
def test_a_module_can_be_fitted_again(tmp_path: Path) -> None:
    """Its hooks are those of the new callback, and optimizers of an earlier trainer, which may be
    kept, are not in the way."""
    from lightning_modules import Module

    module, trainers = Module(), []
    for number in range(2):
        with CutsOnce("case", NOWHERE, restore_dir=tmp_path / f"restore{number}") as session:
            ours, trainer = fit(tmp_path, module, session, 3)
            assert ours.surgeon is not None
            assert ours.surgeon.architecture.parameters == sum(
                p.numel() for p in module.model.parameters()
            )
        trainers.append(trainer)
    assert module.model[0].out_features == 20
    for optimizer in trainers[0].optimizers:
        optimizer.step()  # has begun its state anew


@pytest.mark.usefixtures("lightning")
def test_every_scheduler_goes_back_with_a_rollback(tmp_path: Path) -> None:
    from lightning_modules import ItselfTheNetwork

    class Cuts(CutsOnce):
        layer = "first"

    class Scheduled(ItselfTheNetwork):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizers = super().configure_optimizers()
            return optimizers, [torch.optim.lr_scheduler.StepLR(each, 2) for each in optimizers]

        def on_train_epoch_end(self) -> None:
            for scheduler in self.lr_schedulers():
                scheduler.step()

    after_the_cut: list[Evaluation] = []

    def evaluate(network: Any, batches: Any) -> Evaluation:
        if network.first.out_features == 24:
            return Evaluation(0.9, next(LOSSES))
        after_the_cut.append(Evaluation(0.3 if after_the_cut else 0.9, 0.1 + len(after_the_cut)))
        return after_the_cut[-1]

    module = Scheduled()
    with Cuts("case", NOWHERE, restore_dir=tmp_path / "restore") as session:
        _, trainer = fit(tmp_path, module, session, 4, judged={"evaluate": evaluate})
    assert module.first.out_features == 24
    assert len(after_the_cut) > 1
    first, second = (config.scheduler.last_epoch for config in trainer.lr_scheduler_configs)
    assert first == second


# Hugging Face


@pytest.fixture
def transformers() -> Any:
    """Imported by the one process that needs it."""
    return pytest.importorskip("transformers")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 24), nn.Linear(24, 2)

    def forward(self, values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.last(functional.relu(self.first(values)))
        if labels is None:
            return {"logits": logits}
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


class CutsFirst(CutsOnce):
    layer = "first"


ROWS = [{"values": a, "labels": b} for a, b in zip(X, Y, strict=True)]


def train(session: Session, folder: Path, epochs: int, model: nn.Module, **how: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from elesh.trainer.adapters.hugging_face import EleshCallback

    resume = how.pop("resume_from_checkpoint", None)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="epoch",
        disable_tqdm=True,
        logging_strategy="no",
        **how,
    )
    data = [({"values": X}, Y)]
    ours = EveryEpoch(
        session, data, data, every=1, evaluate=lambda *_: Evaluation(0.9, next(LOSSES))
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        callbacks=[EleshCallback(ours)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.usefixtures("transformers")
def test_the_hugging_face_trainer_saves_resumes_and_loads_a_cut_network(tmp_path: Path) -> None:
    from elesh.trainer.adapters.hugging_face import load

    model = Network()
    with CutsFirst("case", NOWHERE, restore_dir=tmp_path / "restore") as session:
        trainer = train(session, tmp_path / "out", 3, model, gradient_accumulation_steps=3)
    assert model.first.out_features == 22
    assert session.asked == (1, 2), "of the last epoch nothing can come"
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load(tmp_path / "saved", Network())
    assert torch.equal(loaded(X)["logits"], model(X)["logits"])
    with Session("case", NOWHERE, restore_dir=tmp_path / "restore") as session:
        again = Network()
        train(session, tmp_path / "out", 4, again, resume_from_checkpoint=True)
        assert again.first.out_features == 22
    first = min((tmp_path / "out").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    with Session("other", NOWHERE) as session:
        before = Network()
        train(session, tmp_path / "out", 2, before, resume_from_checkpoint=str(first))
    assert before.first.out_features == 24


@pytest.mark.usefixtures("transformers")
def test_the_best_checkpoint_may_be_of_before_a_cut(tmp_path: Path) -> None:
    model = Network()
    with CutsFirst("case", NOWHERE) as session:
        train(
            session,
            tmp_path,
            3,
            model,
            eval_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,
        )
    assert model.first.out_features == 24


def test_causal_language_models_are_judged_by_the_next_token(
    tmp_path: Path, transformers: Any
) -> None:
    from elesh.trainer.adapters.hugging_face import EleshCallback, load

    ids = (torch.arange(16 * 8).view(16, 8) * 7) % 20
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2, use_cache=False
    )
    model = transformers.GPT2LMHeadModel(config)
    with Session("case", NOWHERE) as session:
        data = [({"input_ids": ids}, ids)]
        ours = EveryEpoch(session, data, data, every=1)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, gradient_checkpointing=True,
            num_train_epochs=1, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids]
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, callbacks=[EleshCallback(ours)]
        )
        trainer.train()
        judged = ours.evaluate()
        with torch.no_grad():
            own = float(model.eval()(input_ids=ids, labels=ids).loss)
        assert judged.loss == pytest.approx(own, rel=1e-4)
        assert ours.surgeon is not None
        group = next(g for g in ours.surgeon.architecture.groups if g.prunable)
        ours.surgeon.cut({group.name: [0]})
        trainer.save_model(str(tmp_path / "saved"))
    anew = load(tmp_path / "saved", transformers.GPT2LMHeadModel(config)).eval()
    assert torch.equal(anew(input_ids=ids).logits, model(input_ids=ids).logits)
