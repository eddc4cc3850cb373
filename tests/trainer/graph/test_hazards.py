"""What the example inputs do not show is not cut: unreached layers, shared memory, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from elesh.trainer import Recorder, Surgeon
from leyline import InvalidField


class Staged(nn.Module):
    """A second stage is switched on later; a second entry point reads the same features."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = 0
        self.stem, self.body = nn.Linear(8, 16), nn.Linear(16, 12)
        self.later, self.answer = nn.Linear(16, 16), nn.Linear(12, 3)
        self.rebuild = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        if self.stage or x.shape[1] > 1000:
            x = self.later(x).relu()
        return self.answer(self.body(x).relu())

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.rebuild(self.body(self.stem(x).relu()).relu())


def prunable(recorder: Recorder) -> list[str]:
    return [group.name for group in recorder.architecture.groups if group.prunable]


def reason(recorder: Recorder, name: str) -> str:
    return recorder.architecture.group[name].reason


def cut_all(model: nn.Module, recorder: Recorder) -> None:
    Surgeon(model, recorder.architecture).cut({name: [0, 1] for name in prunable(recorder)})


def test_what_a_later_stage_or_another_entry_point_may_read_is_left_alone() -> None:
    model, x = Staged(), torch.randn(4, 8)
    recorder = Recorder(model, x)
    assert "later may read it" in reason(recorder, "stem")
    assert "rebuild may read it" in reason(recorder, "body")
    cut_all(model, recorder)
    model.stage = 1
    model(x)
    model.reconstruct(x)


def test_flattened_maps_may_feed_a_layer_that_is_not_reached() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1)
            self.answer, self.flat = nn.Linear(5, 2), nn.Linear(6 * 16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.answer(self.other(self.conv(x).relu()).relu().mean((2, 3)))

        def flat_answer(self, x: Tensor) -> Tensor:
            return self.flat(self.conv(x).relu().flatten(1))

    model, x = Network(), torch.randn(2, 3, 6, 6)
    recorder = Recorder(model, x)
    assert prunable(recorder) == ["other"]
    cut_all(model, recorder)
    model.flat_answer(x)


class WithTrainingHead(nn.Module):
    """Two outputs in training; normalised over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.norm, self.answer, self.extra = nn.BatchNorm1d(12), nn.Linear(12, 5), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu()
        out = self.answer(self.norm(self.body(x).relu().mean((2, 3))))
        return (out, self.extra(x.mean((2, 3)))) if self.training else out


@pytest.mark.parametrize("samples", [1, 2])
def test_a_head_that_only_training_uses_is_seen_with_one_sample_too(samples: int) -> None:
    model, x = WithTrainingHead(), torch.randn(8, 3, 8, 8)
    recorder = Recorder(model, x[:samples])
    assert prunable(recorder) == ["stem", "body"]
    cut_all(model, recorder)
    model.train()
    sum(out.sum() for out in model(x)).backward()


class Detector(nn.Module):
    """Gives losses in training, for which it needs targets, and boxes in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.neck = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.boxes, self.mask = nn.Conv2d(12, 4, 1), nn.Conv2d(16, 1, 1)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        features = self.body(torch.stack(images)).relu()
        boxes = self.boxes(self.neck(features).relu())
        if not self.training:
            return [{"boxes": b} for b in boxes]
        if targets is None:
            raise ValueError("targets are needed in training")
        wanted = torch.stack([t["box"] for t in targets])
        return {
            "box": (boxes.mean((2, 3)) - wanted).square().mean(),
            "mask": self.mask(features).square().mean(),
        }


@pytest.mark.parametrize("with_targets", [True, False])
def test_a_detector_still_trains_after_a_cut(with_targets: bool) -> None:
    model = Detector()
    images = [torch.randn(3, 8, 8) for _ in range(2)]
    targets = [{"box": torch.randn(4)} for _ in range(2)]
    recorder = Recorder(model, (images, targets) if with_targets else (images,))
    assert "neck" in prunable(recorder)
    cut_all(model, recorder)
    model.train()
    sum(model(images, targets).values()).backward()


class Choosing(Detector):
    """Gives the best boxes of each picture, by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        del self.mask

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        boxes = [b.flatten(1).T for b in self.boxes(self.neck(self.body(torch.stack(images))))]
        return [{"boxes": found[found[:, 0].argsort(descending=True)[:5]]} for found in boxes]


def test_a_detector_that_picks_boxes_by_numbers_is_cut() -> None:
    model = Choosing()
    recorder = Recorder(model, ([torch.randn(3, 8, 8) for _ in range(2)],))
    assert prunable(recorder) == ["body", "neck"]


def test_parameters_that_share_memory_are_not_torn_apart_and_survive_undo() -> None:
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
        nn.Linear(16, 3),
    )  # fmt: skip
    model[4].weight.data = model[2].weight.data
    x = torch.randn(4, 8)
    recorder = Recorder(model, x)
    refused = [g for g in recorder.architecture.groups if "shares its memory" in g.reason]
    assert {g.name for g in refused} == {"0", "2", "4"}
    surgeon = Surgeon(model, recorder.architecture)
    surgeon.cut({name: [0] for name in prunable(recorder)})
    surgeon.undo()
    assert model[4].weight.data_ptr() == model[2].weight.data_ptr()


def test_a_forward_pass_that_goes_around_the_modules_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    weights = [model[0].weight, model[0].bias, model[2].weight, model[2].bias]

    def around(x: Tensor) -> Tensor:
        # The copy's forward still computes with the weights of the network itself.
        return functional.linear(functional.linear(x, *weights[:2]).relu(), *weights[2:])

    model.forward = around  # type: ignore[method-assign]
    assert prunable(Recorder(model, torch.randn(4, 8))) == []


@pytest.mark.parametrize("wrong", [torch.randn(2, 5), torch.zeros(2, 6, dtype=torch.long)])
def test_a_wrong_example_is_said_as_such(wrong: Tensor) -> None:
    with pytest.raises(InvalidField, match="example_inputs") as told:
        Recorder(nn.Linear(6, 3), wrong)
    assert str(list(wrong.shape)) in str(told.value)


def test_a_network_that_runs_once_only_is_refused_as_such() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(6, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("no more samples")
            return self.fc(x)

    with pytest.raises(InvalidField, match=r"several times.*no more samples"):
        Recorder(Once(), torch.randn(2, 6))
