"""elesh.attach: a loop under Elesh applies what is decided, resumes, and goes on without a bus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shared import quick_first
from station import PATIENCE
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from trained import SmallNet, SmallVit, batches, digits

import elesh
from elesh.demo import local_fleet
from elesh.trainer import Recorder
from elesh.trainer.recovery.files import FolderInUse
from leyline import InvalidField, PruningOutcome, StructuralPruningDecision

SCHEDULE = {
    "validation_epochs": 1,
    "conservative_epochs": 2,
    "moderate_epochs": 2,
    "aggressive_epochs": 5,
}
BLOCK = {
    "structured_pruning": {
        "safety_schedule": SCHEDULE,
        "channel_analysis": {"min_channels_per_layer": 8},
    }
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One epoch."""
    model.train()
    for x, y in batches():
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def validation(model: nn.Module) -> Callable[[], elesh.Evaluation]:
    data = digits().validation

    def evaluate() -> elesh.Evaluation:
        with torch.no_grad():
            logits = model(data.images)
        right = (logits.argmax(1) == data.labels).float().mean()
        return elesh.Evaluation(float(right), float(functional.cross_entropy(logits, data.labels)))

    return evaluate


def attached(model: nn.Module, optimizer: Any, folder: Path, **options: Any) -> elesh.Pruning:
    return elesh.attach(
        model,
        optimizer,
        run_id="attached",
        calibration=batches(),
        evaluate=validation(model),
        restore_dir=folder,
        **options,
    )


@pytest.mark.slow
def test_a_run_is_cut_killed_and_resumed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SmallNet()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    with local_fleet(BLOCK) as (url, settings):
        options: dict[str, Any] = {"url": url, "settings": settings, "every": 2}
        with attached(model, optimizer, tmp_path, **options) as pruning:
            assert pruning.done == 0
            for epoch in pruning.epochs(8):
                train(model, optimizer)
                pruning.step(epoch)
                if epoch % 2 == 0:
                    pruning.session.wait(PATIENCE)
            assert any(outcome.result == "applied" for outcome in pruning.outcomes)
            cut = pruning.architecture
            assert cut.macs < cut.original_macs
            assert "applied" in str(pruning)
        elesh.save(model, tmp_path / "saved")

        again = SmallNet()
        other = torch.optim.AdamW(again.parameters(), 4e-3)
        with attached(again, other, tmp_path, **options) as pruning:
            assert pruning.done == 8
            assert pruning.architecture.model_hash == cut.model_hash
            assert list(pruning.epochs(10)) == [9, 10]
            for name, tensor in model.state_dict().items():
                assert torch.equal(again.state_dict()[name], tensor)
    loaded = elesh.load(tmp_path / "saved", SmallNet()).eval()
    images = digits().held_out.images
    assert torch.equal(loaded(images), model.eval()(images))


def test_an_evaluation_that_must_be_given_something_is_refused_before_anything_begins(
    tmp_path: Path,
) -> None:
    model = SmallNet()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)

    def evaluate(network: nn.Module) -> elesh.Evaluation:
        raise AssertionError("not called")

    given: dict[str, Any] = {"evaluate": evaluate}
    with pytest.raises(InvalidField, match="missing a required argument: 'network'"):
        elesh.attach(
            model, optimizer, run_id="r", calibration=batches(), restore_dir=tmp_path, **given
        )
    with pytest.raises(InvalidField, match="lambda"):
        elesh.prune(model, batches(), {"macs": 0.5}, **given)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_of_calibration_is_left_as_it_was(tmp_path: Path, workers: int) -> None:
    """Its epochs are those of a training without Elesh: order, base seeds, persistent workers."""

    def epochs(begin: Callable[[Any], object]) -> list[Tensor]:
        torch.manual_seed(3)
        own = torch.Generator().manual_seed(4)
        loader = DataLoader(
            Noisy(), 20, shuffle=True, generator=own,
            num_workers=workers, persistent_workers=workers > 0,
        )  # fmt: skip
        begin(loader)
        return [x for _ in range(2) for x, _ in loader] + [torch.rand(3)]

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def attach(loader: Any) -> object:
        return elesh.attach(
            model, torch.optim.SGD(model.parameters()), run_id="loader", calibration=loader,
            evaluate=lambda: (0.5, 1.0), restore_dir=tmp_path, url="redis://127.0.0.1:1/0",
        )  # fmt: skip

    assert all(map(torch.equal, epochs(attach), epochs(lambda loader: None)))


def test_a_cell_that_is_run_again_makes_its_optimizer_anew(tmp_path: Path) -> None:
    """As in a notebook, where names of the run before are there until they are given again."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    samples = [(torch.randn(100, 8), torch.randint(0, 2, (100,))) for _ in range(4)]
    cell: dict[str, Any] = {}

    def evaluate() -> tuple[float, float]:
        return 0.5, float(model(samples[0][0]).detach().square().mean())

    for number in range(3):
        cell["optimizer"] = torch.optim.AdamW(model.parameters(), 1e-3)
        cell["scheduler"] = torch.optim.lr_scheduler.StepLR(cell["optimizer"], 1)
        cell["pruning"] = elesh.attach(
            model, cell["optimizer"], scheduler=cell["scheduler"], run_id=f"run-{number}",
            calibration=samples, evaluate=evaluate, restore_dir=tmp_path, url="redis://127.0.0.1:1/0",
        )  # fmt: skip
        with cell["pruning"] as pruning:
            assert pruning.done == 0
            cell["pruning"].surgeon.cut({"0": [0]})
            pruning.step(1)
        del pruning
        assert "applied" in str(cell["pruning"])
    assert isinstance(model[0], nn.Linear)
    assert model[0].out_features == 13


class Noisy(Dataset[tuple[Tensor, int]]):
    """Samples with noise of the global generator."""

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(8) + index, index % 2


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (lambda y: torch.where(y == 3, 255, y), "classes from 0 to 9, or -100.*masked_fill"),
        (lambda y: y - 1, "classes from 0 to 9, or -100.*found -1 to 8"),
        (lambda y: y.float(), "classes as integers.*float32"),
        (lambda y: {"digit": y}, "a tensor of classes, found dict"),
        (lambda y: y.tolist(), "a tensor of classes, found list"),
        (lambda y: y[:-1], "without their classes"),
        (lambda y: y[:, None], "without their classes"),
        (lambda y: functional.one_hot(y, 10) * 2.0, "shares of them that add up to one"),
        (lambda y: functional.one_hot(y, 10) - 0.5, "shares of them that add up to one"),
    ],
)
def test_labels_that_are_no_classes_are_refused_before_training(
    tmp_path: Path, labels: Callable[[Tensor], Any], said: str
) -> None:
    """In whichever batch."""
    model = SmallNet()
    given = [(x, labels(y) if number else y) for number, (x, y) in enumerate(batches())]
    pruning = elesh.attach(
        model, torch.optim.SGD(model.parameters()), run_id="labels", calibration=given,
        evaluate=validation(model), held_out=batches()[0], restore_dir=tmp_path,
        url="redis://127.0.0.1:1/0",
    )  # fmt: skip
    with pytest.raises(InvalidField, match=rf"calibration\[\d+\].*{said}"), pruning:
        pass


def test_one_output_a_sample_is_refused_before_training(tmp_path: Path) -> None:
    """A number to predict, or the odds of one of two classes: its cross-entropy is always zero."""
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    given = [(torch.rand(32, 4), torch.rand(32, 1)) for _ in range(2)]
    pruning = elesh.attach(
        model, torch.optim.SGD(model.parameters()), run_id="labels", calibration=given,
        evaluate=lambda: elesh.Evaluation(0.5, 1.0), restore_dir=tmp_path,
        url="redis://127.0.0.1:1/0",
    )  # fmt: skip
    with pytest.raises(InvalidField, match=r"two classes, found .*1\).*loss of your own"), pruning:
        pass


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", quick_first([SmallNet, SmallVit]))
def test_labels_of_one_class_are_refused_before_training(
    tmp_path: Path, kind: type[nn.Module], held_out: bool
) -> None:
    """Data that is sorted by class: the first some hundred samples are alike."""
    model = kind()
    sevens = [(x, torch.full_like(y, 7)) for x, y in batches()]
    pruning = elesh.attach(
        model, torch.optim.SGD(model.parameters()), run_id="labels", evaluate=validation(model),
        calibration=batches() if held_out else sevens, held_out=sevens[0] if held_out else None,
        restore_dir=tmp_path, url="redis://127.0.0.1:1/0",
    )  # fmt: skip
    name = "held_out" if held_out else "calibration"
    with pytest.raises(InvalidField, match=rf"{name}: labels.*two classes.*only class 7"), pruning:
        pass


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32])
def test_classes_may_be_any_integers(tmp_path: Path, kind: torch.dtype) -> None:
    model = SmallNet()
    given = [(x, y.to(kind)) for x, y in batches()]
    published: list[Any] = []
    with elesh.attach(
        model, torch.optim.SGD(model.parameters()), run_id="labels", calibration=given,
        evaluate=validation(model), restore_dir=tmp_path, url="redis://127.0.0.1:1/0", every=1,
        observers=[Published(published)],
    ) as pruning:  # fmt: skip
        pruning.step(1)
    assert len(published) == 1


class Published:
    """An observer that keeps checkpoints."""

    def __init__(self, found: list[Any]) -> None:
        self.on_checkpoint = found.append

    def on_outcome(self, decision: StructuralPruningDecision, outcome: PruningOutcome) -> None:
        pass


def test_a_checkpoint_that_cannot_be_measured_stops_nothing(tmp_path: Path) -> None:
    """Not enough memory, weights that are not finite: the next checkpoint is another chance."""
    model = SmallNet()
    published: list[Any] = []
    with attached(
        model, torch.optim.SGD(model.parameters()), tmp_path, url="redis://127.0.0.1:1/0",
        every=1, observers=[Published(published)],
    ) as pruning:  # fmt: skip
        weight = next(model.parameters())
        sound = weight.detach().clone()
        for epoch in pruning.epochs(3):
            weight.data.copy_(sound if epoch == 2 else sound * torch.nan)
            assert pruning.step(epoch) == []
    assert [bundle.metadata.epoch for bundle in published] == [2]


def test_a_run_resumes_only_what_it_was(tmp_path: Path) -> None:
    """Another network under the run's id, or another optimizer, is refused; nothing has changed."""

    def begun(kind: Any, width: int) -> tuple[nn.Module, elesh.Pruning]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
        x = torch.randn(80, 8)
        return model, elesh.attach(
            model, kind(model.parameters(), lr=0.1), run_id="same", every=1,
            calibration=[(x, (x[:, 0] > 0).long())], url="redis://127.0.0.1:1/0",
            evaluate=lambda: (0.5, 1 + float(model(x).std().detach())), restore_dir=tmp_path,
        )  # fmt: skip

    _, pruning = begun(torch.optim.AdamW, 16)
    with pruning:
        pruning.step(1)
    for kind, width, said in (
        (torch.optim.AdamW, 20, r"0\.weight.*\(20, 8\).*\(16, 8\).*another network"),
        (torch.optim.SGD, 16, "optimizer.*AdamW.*SGD"),
    ):
        model, pruning = begun(kind, width)
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(InvalidField, match=said), pruning:
            pass
        assert all(map(torch.equal, before, model.parameters()))
    _, pruning = begun(torch.optim.AdamW, 16)
    with pruning:
        assert pruning.done == 1


@pytest.mark.parametrize("kind", ["sparse", "nested"])
@pytest.mark.filterwarnings("ignore")
def test_batches_of_sparse_and_nested_tensors_are_refused_by_name(
    tmp_path: Path, kind: str
) -> None:
    inputs = torch.eye(80).to_sparse()
    if kind == "nested":  # Not where tests are collected: the first one takes two seconds.
        rows = [torch.ones(n) for n in range(1, 81)]
        inputs = torch.nested.nested_tensor(rows, layout=torch.jagged)
    model = nn.Linear(80, 2)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(InvalidField, match=r"batches\[0\]: expected dense tensors"):
        elesh.attach(
            model, optimizer, run_id="layout", evaluate=lambda: (0.5, 1.0), restore_dir=tmp_path,
            calibration=[(inputs, torch.zeros(80, dtype=torch.long))],
        )  # fmt: skip


def test_wrong_calls_are_told_what_to_do(tmp_path: Path) -> None:
    model = SmallNet()
    pruning = attached(
        model, torch.optim.SGD(model.parameters()), tmp_path, url="redis://127.0.0.1:1/0"
    )
    for outside in (lambda: pruning.step(1), pruning.evaluate, lambda: pruning.epochs(3)):
        with pytest.raises(InvalidField, match=r"inside `with elesh\.attach"):
            outside()
    with pruning:
        for wrong in ("1", None, 1.5, -1):
            with pytest.raises(InvalidField, match="epoch: expected a whole number"):
                pruning.step(wrong)  # type: ignore[arg-type]
        assert pruning.step(np.int64(1)) == []  # type: ignore[arg-type]
    with pytest.raises(InvalidField, match="a used one; create a new session"), pruning:
        pass
    for wrong in (print, [print]):
        with pytest.raises(InvalidField, match=r"observers: expected objects with on_checkpoint"):
            attached(model, torch.optim.SGD(model.parameters()), tmp_path, observers=wrong)


def test_one_of_several_processes_is_refused_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would be cut differently."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = SmallNet()
    with pytest.raises(InvalidField, match=r"processes: expected one training process.*AllRanks"):
        attached(model, torch.optim.AdamW(model.parameters(), 4e-3), tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_ignored_layer_may_be_given_by_its_name_alone() -> None:
    model = SmallNet()
    several, one = (
        Recorder(model, torch.zeros(2, 1, 8, 8), ignored_layers=name).architecture
        for name in (["first"], "first")
    )
    assert one.model_hash == several.model_hash
    assert not one.group["first"].prunable


def test_training_goes_on_without_a_bus(tmp_path: Path) -> None:
    model = SmallNet()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    with attached(model, optimizer, tmp_path, url="redis://127.0.0.1:1/0", every=1) as pruning:
        for epoch in pruning.epochs(2):
            assert pruning.step(epoch) == []
    assert pruning.architecture.macs == pruning.architecture.original_macs


def test_a_cut_that_is_told_of_twice_counts_once(tmp_path: Path) -> None:
    model = SmallNet()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    pruning = attached(
        model, optimizer, tmp_path, url="redis://127.0.0.1:1/0", budget={"macs": 0.5}
    )
    with pruning:
        cut = PruningOutcome(
            idempotency_key="1:0123456789abcdef:ck-1:joint",
            run_id="attached",
            epoch=1,
            result="applied",
            parameters_before=9,
            parameters_after=8,
        )
        other = cut.model_copy(update={"idempotency_key": "2:0123456789abcdef:ck-2:joint"})
        undone = other.model_copy(update={"result": "rolled_back"})
        pruning.outcomes = [cut, other, cut.model_copy(update={"watched": 0}), undone]
        first, second = str(pruning).splitlines()
    assert first.startswith("1 cuts applied, 1 rolled back; 100.0% of the parameters")
    assert second.startswith("budget not reached (macs 50%): 100.0% of the macs left; ")


def test_wrong_calls_are_refused_before_anything_begins(tmp_path: Path) -> None:
    model = SmallNet()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    with pytest.raises(InvalidField, match="different samples"):
        elesh.attach(
            model,
            optimizer,
            run_id="few",
            calibration=batches(samples=32),
            evaluate=validation(model),
            restore_dir=tmp_path,
        )
    assert not list(tmp_path.iterdir())
    pruning = attached(model, optimizer, tmp_path)
    with pytest.raises(InvalidField, match="inside"):
        pruning.epochs(3)


def test_what_is_compared_is_the_callers_in_a_run_too(tmp_path: Path) -> None:
    class Twofold(SmallNet):
        def forward(self, x: torch.Tensor) -> Any:
            return {"logits": super().forward(x), "twice": 2 * super().forward(x)}

    seen: list[list[str]] = []

    def compared(output: Any) -> torch.Tensor:
        seen.append(sorted(output))
        return torch.as_tensor(output["logits"])

    model = Twofold()
    pruning = attached(model, torch.optim.SGD(model.parameters(), 0.1), tmp_path, compared=compared)
    assert pruning._epochs.look_at(model).architecture.group["stem"].prunable
    assert ["logits", "twice"] in seen


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"budget": 0.5}, "budget: expected a share"),
        ({"budget": {"flops": 0.5}}, "budget: expected one of"),
        ({"levels": ("heads",)}, "levels: expected some of"),
        ({"removed_at_most": 40}, "removed_at_most: expected a share"),
        ({"every": 0}, "every: expected a whole number, at least 1, found 0"),
        ({"held_out": digits().validation.images}, r"held_out: expected a pair \(inputs, labels\)"),
    ],
)
def test_a_wrong_argument_is_told_by_its_name_and_the_next_call_has_the_folder(
    tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    model = SmallNet()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    with pytest.raises(InvalidField, match=said):
        attached(model, optimizer, tmp_path, **wrong)
    with attached(model, optimizer, tmp_path, url="redis://127.0.0.1:1/0") as pruning:
        assert pruning.done == 0
        with pytest.raises(InvalidField, match="epochs: expected a whole number"):
            pruning.epochs(2.0)  # type: ignore[arg-type]


def test_a_cell_that_was_never_entered_gives_way_to_the_one_that_is_run_again(
    tmp_path: Path,
) -> None:
    """Its object still has a name when the call is made again."""
    model = SmallNet()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    first = attached(model, optimizer, tmp_path, url="redis://127.0.0.1:1/0")
    second = attached(model, optimizer, tmp_path, url="redis://127.0.0.1:1/0", every=1)
    with second as pruning:
        pruning.step(1)
        with pytest.raises(FolderInUse, match="taken over by a later session"), first:
            pass
        with pytest.raises(FolderInUse, match="close the session of this process"):
            attached(model, optimizer, tmp_path, url="redis://127.0.0.1:1/0")
    with attached(model, optimizer, tmp_path, url="redis://127.0.0.1:1/0") as pruning:
        assert pruning.done == 1
