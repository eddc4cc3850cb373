"""A framework's checkpoint of a cut network carries its architecture, and loading one of before or
after a cut brings the network, its averages and its optimizers to that architecture."""

from __future__ import annotations

import logging
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from elesh import Settings, analyze
from elesh.trainer import Evaluation, Recorder, Session, Surgeon
from elesh.trainer.adapters.epochs import EveryEpoch, classification
from elesh.trainer.recovery.checkpoints import KEY, Loading, bring, cut_like, pack, unpack
from leyline import (
    ChannelPruningTarget,
    CheckpointBundle,
    InvalidField,
    Malformed,
    PrunedArchitecture,
    StructuralPruningDecision,
)

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()
NOWHERE = "redis://127.0.0.1:1/0"

_LOSSES = count(0.1, 1e-9)
"""No two are the same: a mask moves real ones."""


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 2))


class CutsOnce(Session):
    """Answers its first checkpoint itself, by a decision that removes two channels."""

    layer = "0"
    waiting: list[StructuralPruningDecision] | None = None

    def publish(self, bundle: CheckpointBundle) -> bool:
        if self.waiting is None:
            size = bundle.architecture.group[self.layer].size
            target = ChannelPruningTarget(
                layer_name=self.layer,
                channel_indices=(0, 1),
                original_indices=(0, 1),
                importance=(0.1, 0.1),
                channels_before=size,
                channels_after=size - 2,
            )
            update = {"channels": (target,), "approved_for_application": True}
            decision = analyze(bundle, settings=Settings())
            self.waiting = [decision.model_copy(update={**update, "rejection_reason": ""})]
        return True

    def decisions(self) -> list[StructuralPruningDecision]:
        found, self.waiting = self.waiting or [], [] if self.waiting is not None else None
        return found


def every(session: Session, **how: Any) -> EveryEpoch:
    settings = {"every": 1, "evaluate": lambda *_: Evaluation(0.9, next(_LOSSES)), **how}
    return EveryEpoch(session, [(X, Y)], [(X, Y)], **settings)


# Without a framework


@pytest.fixture(scope="module")
def architecture() -> PrunedArchitecture:
    return Recorder(build(), X[:4]).architecture


def test_an_uncut_network_adds_nothing_to_a_checkpoint(architecture: PrunedArchitecture) -> None:
    model = build()
    Surgeon(model, architecture)
    assert pack(model) is None


def test_a_state_dict_brings_network_and_average_to_its_structure_and_back(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    surgeon, average = Surgeon(model, architecture), AveragedModel(model)
    surgeon.follow("ema", average)
    loading = Loading(surgeon)
    uncut = {name: t.clone() for name, t in model.state_dict().items()}
    surgeon.cut({"0": [3, 7]}, epoch=2, key="first")
    packed, now = pack(model), surgeon.architecture
    assert packed is not None
    cut = {**{name: t.clone() for name, t in model.state_dict().items()}, KEY: packed}
    model.load_state_dict(uncut)
    assert surgeon.architecture.history == ()
    assert [p.shape for p in average.parameters()] == [p.shape for p in model.parameters()]
    model.load_state_dict(cut)
    assert surgeon.architecture == now
    assert [p.shape for p in average.parameters()] == [p.shape for p in model.parameters()]
    fresh = build()
    again = Surgeon(fresh, architecture)
    Loading(again)
    nn.ModuleDict({"model": fresh}).load_state_dict({f"model.{k}": v for k, v in cut.items()})
    assert again.architecture == now
    assert torch.equal(fresh(X), model(X))
    loading.end()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(uncut)


def test_best_weights_that_a_script_kept_are_loaded_whatever_was_cut_since(
    architecture: PrunedArchitecture,
) -> None:
    """Plain state dicts: of the uncut network, and of between two cuts."""
    model = build()
    surgeon, average = Surgeon(model, architecture), AveragedModel(model)
    with Session("run", NOWHERE) as session:
        session.resume(surgeon, ema=average, preflight=False)
        kept = []
        for gone in ([3, 7], [0], [4, 5]):
            kept.append({name: t.clone() for name, t in model.state_dict().items()})
            surgeon.cut({"0": gone})
        for best in (kept[1], kept[0], kept[2]):
            model.load_state_dict(best)
            assert surgeon.architecture.parameters == sum(p.numel() for p in model.parameters())
            assert all(torch.equal(t, best[name]) for name, t in model.named_parameters())
            assert all(map(torch.equal, model.parameters(), average.module.parameters()))


def test_a_checkpoint_of_other_channels_is_told_apart_though_shapes_are_alike(
    architecture: PrunedArchitecture,
) -> None:
    first, second = build(), build()
    Surgeon(first, architecture).cut({"0": [3, 7]}, key="first")
    surgeon = Surgeon(second, architecture)
    surgeon.cut({"0": [1, 2]}, key="second")
    Loading(surgeon)
    second.load_state_dict({**first.state_dict(), KEY: pack(first)})
    assert surgeon.architecture.history[0].original_indices == (3, 7)


def test_what_is_packed_is_read_back_and_damage_is_refused(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    surgeon = Surgeon(model, architecture)
    surgeon.cut({"0": [3, 7]}, epoch=2, key="first")
    packed = pack(model)
    assert packed is not None
    assert unpack(packed).now == surgeon.architecture
    with pytest.raises(Malformed, match=KEY):
        unpack(packed[:-3])
    fresh = build()
    cut_like(fresh, packed)
    fresh.load_state_dict(model.state_dict())
    other = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(InvalidField, match="one of another"):
        bring(Surgeon(other, Recorder(other, X[:4]).architecture), packed)


def test_labels_of_positions_are_judged_where_they_are_not_ignored() -> None:
    logits = torch.zeros(2, 3, 5)
    logits[..., 1] = 10.0

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return logits

    labels = torch.tensor([[1, 1, -100], [0, -100, -100]])
    judged = classification(Fixed(), [(torch.zeros(2, 3), labels)])
    assert judged.accuracy == pytest.approx(2 / 3)
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert judged.loss == pytest.approx(float(expected))


# Lightning

lightning = pytest.importorskip("pytorch_lightning")


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.model = build()

    def training_step(self, batch: Any, _: int) -> Tensor:
        return functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.model(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class ItselfTheNetwork(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False  # as modules with several optimizers must
        self.first, self.last = nn.Linear(8, 24), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(functional.relu(self.first(x)))
        return out

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.first.parameters(), 1e-2),
            torch.optim.AdamW(self.last.parameters(), 1e-2),
        ]

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss


def fit(
    folder: Path,
    module: Any,
    session: Session,
    epochs: int,
    *others: Any,
    ckpt_path: Path | None = None,
    **saving: Any,
) -> tuple[EveryEpoch, Any]:
    from torch.utils.data import DataLoader, TensorDataset

    from elesh.trainer.adapters.lightning import EleshCallback

    ours = every(session)
    saver = lightning.callbacks.ModelCheckpoint(
        dirpath=folder, save_last=True, save_top_k=-1, filename="{epoch}", **saving
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EleshCallback(ours), *others, saver],
        default_root_dir=folder,
    )
    data = DataLoader(TensorDataset(X, Y), 32)
    trainer.fit(
        module, data, data if hasattr(Module, "validation_step") else None, ckpt_path=ckpt_path
    )
    return ours, trainer


logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


@pytest.mark.slow
def test_lightning_resumes_from_both_sides_of_a_cut_and_loads_elsewhere(tmp_path: Path) -> None:
    from elesh.trainer.adapters.lightning import load_from_checkpoint

    module = Module()
    with CutsOnce("case", NOWHERE, restore_dir=tmp_path / "restore") as session:
        ours, trainer = fit(tmp_path / "saved", module, session, 3)
    assert module.model[0].out_features == 22
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
        assert len(session.watched) == 1
    with Session("other", NOWHERE) as session:
        before = Module()
        fit(tmp_path / "less", before, session, 2, ckpt_path=saved[0])
    assert before.model[0].out_features == 24
    trainer.validate(module, trainer.train_dataloader, ckpt_path=str(saved[0]), verbose=False)
    assert module.model[0].out_features == 24


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("WeightAveraging", marks=pytest.mark.slow),
        pytest.param("EMAWeightAveraging", marks=pytest.mark.soak),
        pytest.param("SWA", marks=pytest.mark.soak),
    ],
)
def test_lightnings_averages_are_cut_and_resumed_with_the_network(
    kind: str, tmp_path: Path
) -> None:
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


@pytest.mark.slow
def test_a_lightning_module_may_be_the_network_and_have_several_optimizers(
    tmp_path: Path,
) -> None:
    class Cuts(CutsOnce):
        layer = "first"

    module = ItselfTheNetwork()
    with Cuts("case", NOWHERE) as session:
        fit(tmp_path, module, session, 3, save_weights_only=True)
    assert module.first.out_features == 22
    assert KEY in torch.load(tmp_path / "last.ckpt", weights_only=False)


# Hugging Face

transformers = pytest.importorskip("transformers")


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
    from elesh.trainer.adapters.hugging_face import EleshCallback

    resume = how.pop("resume_from_checkpoint", None)
    arguments = transformers.TrainingArguments(
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
        session, data, data, every=1, evaluate=lambda *_: Evaluation(0.9, next(_LOSSES))
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        callbacks=[EleshCallback(ours)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
def test_the_hugging_face_trainer_saves_resumes_and_loads_a_cut_network(tmp_path: Path) -> None:
    from elesh.trainer.adapters.hugging_face import load

    model = Network()
    with CutsFirst("case", NOWHERE, restore_dir=tmp_path / "restore") as session:
        trainer = train(session, tmp_path / "out", 3, model, gradient_accumulation_steps=3)
    assert model.first.out_features == 22
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_causal_language_models_are_judged_by_the_next_token(tmp_path: Path) -> None:
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
