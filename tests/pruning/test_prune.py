"""elesh.prune: budgets are reached or explained, what stays was measured, nothing is half done."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from trained import SmallNet, SmallVit, accuracy, batches, digits, trained

import elesh
from elesh.pruning import at_once
from elesh.pruning.samples import divided, require_no_copies
from elesh.trainer import Recorder
from elesh.trainer.calibration.recorder import enough_samples
from elesh.trainer.network.gates import GateMeter
from elesh.trainer.surgery.reconstruction.output_matching import Matched
from leyline import InvalidField, Level


def prune(model: nn.Module, budget: dict[str, float], **options: Any) -> elesh.PruningReport:
    given = options.pop("batches", None) or batches()
    return elesh.prune(model, given, budget, progress=False, **options)


def prune_quickly(
    model: nn.Module, budget: dict[str, float], **options: Any
) -> elesh.PruningReport:
    """In one round, on half of the samples: where what matters is not how well it is chosen."""
    given = {"batches": batches(samples=256), "rounds": 1} | options
    return prune(model, budget, **given)


def validation(model: nn.Module) -> Callable[[], tuple[float, float]]:
    """A user's own evaluation."""
    data = digits().validation

    def evaluate() -> tuple[float, float]:
        with torch.no_grad():
            logits = model(data.images)
        right = (logits.argmax(1) == data.labels).float().mean()
        return float(right), float(functional.cross_entropy(logits, data.labels))

    return evaluate


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in now)


@pytest.mark.slow
def test_half_of_the_macs_go_at_little_cost() -> None:
    model = trained()
    before, macs = accuracy(model), 0.5
    report = prune(model, {"macs": macs})
    assert report.reached
    assert report.architecture.macs <= macs * report.original.macs
    assert before - accuracy(model) <= 0.04
    assert report.before.macs == report.original.macs
    assert report.after.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("resource", ["macs", "parameters", "memory"])
@pytest.mark.sampled
def test_no_budget_is_exceeded_by_more_than_a_unit(resource: str) -> None:
    model = trained()
    report = prune(model, {resource: 0.7}, rounds=2)
    (use,) = report.budget
    assert use.met
    # One channel of the largest group is a thirteenth of all that the network has.
    assert use.reached > 0.7 - 0.08


class WithFeatures(SmallNet):
    """Returns what its head reads, too."""

    def forward(self, x: torch.Tensor) -> Any:
        seen: list[torch.Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        logits = super().forward(x)
        handle.remove()
        return {"logits": logits, "features": seen[0]}


def test_outputs_that_the_caller_does_not_compare_may_change() -> None:
    model = WithFeatures().eval()
    model.load_state_dict(trained().state_dict())
    report = prune(model, {"macs": 0.9}, rounds=1, compared=lambda output: output["logits"])
    assert report.original.group["wide"].prunable
    assert Recorder(model, batches()[0][0][:2]).architecture.group["wide"].reason


@pytest.mark.slow
def test_several_budgets_hold_together() -> None:
    report = prune_quickly(trained(), {"macs": 0.7, "parameters": 0.6})
    assert report.reached
    assert {use.resource for use in report.budget} == {"macs", "parameters"}


@pytest.mark.slow
def test_heads_go_where_heads_are_asked_for() -> None:
    model = trained(SmallVit, 10)
    before = accuracy(model)
    report = prune_quickly(model, {"macs": 0.95}, levels=("head",))
    assert report.reached
    heads = [g.name for g in report.original.groups if g.level is Level.HEAD]
    assert any(report.removed.get(name) for name in heads)
    assert before - accuracy(model) <= 0.05


def test_outputs_that_come_nearer_at_the_cost_of_validation_are_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, plain, tried = trained(), trained(), list[int]()

    def harmful(network: nn.Module, inputs: Any, wanted: torch.Tensor) -> Matched:
        tried.append(len(wanted))
        network.get_submodule("head").weight.data.neg_()  # type: ignore[operator]
        return Matched(0.5, 0.1)

    monkeypatch.setattr(at_once, "match_outputs", harmful)
    report = prune_quickly(model, {"macs": 0.5}, evaluate=validation(model), soften=False)
    assert tried == [256]
    assert report.matched is None
    monkeypatch.setattr(at_once, "match_outputs", lambda *args: None)
    prune_quickly(plain, {"macs": 0.5}, evaluate=validation(plain), soften=False)
    assert unchanged(model, state_of(plain))


@pytest.mark.slow
def test_a_cut_network_is_brought_nearer_to_its_outputs_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of the samples that are matched: whether it helps with others depends on the processor.
    images, given = torch.cat([x for x, _ in batches(samples=256)]), trained()
    with torch.no_grad():
        wanted = given.eval()(images)

    def apart(model: nn.Module) -> tuple[float, float]:
        with torch.no_grad():
            return accuracy(model), float((model.eval()(images) - wanted).square().mean())

    model, plain = trained(), trained()
    report = prune_quickly(model, {"macs": 0.25}, evaluate=lambda: apart(model), soften=False)
    assert report.matched is not None
    assert report.matched.after < report.matched.before
    assert "outputs matched to those before the cut, without labels" in str(report)
    monkeypatch.setattr(at_once, "match_outputs", lambda *args: None)
    prune_quickly(plain, {"macs": 0.25}, evaluate=lambda: apart(plain), soften=False)
    assert apart(model)[1] < apart(plain)[1]


def test_outputs_that_are_too_large_to_be_matched_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = at_once.outputs_before

    def large(*given: Any, **how: Any) -> Any:
        return dataclasses.replace(kept(*given, **how), answers=None)

    monkeypatch.setattr(at_once, "outputs_before", large)
    report = prune_quickly(trained(), {"macs": 0.5})
    assert report.reached
    assert [said for said in report.fallbacks if "too large" in said]


@pytest.mark.slow
def test_what_costs_too_much_is_taken_back_and_said() -> None:
    model = trained()
    report = prune(model, {"macs": 0.02}, evaluate=validation(model), max_accuracy_drop=0.03)
    assert not report.reached
    assert "accuracy falls" in report.held_back
    assert "raise the limit" in report.held_back
    assert report.before.accuracy - report.after.accuracy <= 0.03
    assert any(made.refused for made in report.rounds)
    assert "not reached" in str(report)
    again = validation(model)()
    assert again[0] == pytest.approx(report.after.accuracy)


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda x, y: (x, (y + 1) % 10),
        lambda x, y: (x, y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]),
        lambda x, y: (x, torch.zeros_like(y)),
    ],
    ids=["labels + 1", "shuffled", "all alike"],
)
def test_labels_that_do_not_belong_to_the_inputs_are_refused(spoiled: Any) -> None:
    model = trained()
    before = state_of(model)
    with pytest.raises(InvalidField, match="labels"):
        prune(model, {"macs": 0.5}, batches=[spoiled(x, y) for x, y in batches()])
    assert unchanged(model, before)


def test_copies_do_not_count_as_samples() -> None:
    model = trained()
    before = state_of(model)
    x, y = batches()[0]
    with pytest.raises(InvalidField, match=r"different samples.*2 \(512 with copies\)"):
        prune(model, {"macs": 0.5}, batches=[(x[:2].repeat(32, 1, 1, 1), y[:2].repeat(32))] * 8)
    assert unchanged(model, before)


def test_a_loader_that_never_ends_is_read_until_nothing_new_comes() -> None:
    x, y = torch.randn(100, 4), torch.arange(100) % 2

    def endless() -> Any:
        while True:
            rows = torch.randint(0, 100, (32,))
            yield x[rows], y[rows]

    assert divided(endless(), hold_out=True).different == 100


def test_a_little_noise_does_not_make_many_samples_of_a_few() -> None:
    model = trained()
    before = state_of(model)
    x, y = batches()[0]
    noise = 1e-3 * torch.randn(512, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    noisy = x[:2].repeat(256, 1, 1, 1) + noise
    with pytest.raises(InvalidField, match=r"different samples.*2 \(512 with copies that"):
        prune(model, {"macs": 0.5}, batches=[(noisy, y[:2].repeat(256))])
    assert unchanged(model, before)
    line = torch.rand(200, 1, generator=torch.Generator().manual_seed(0))
    assert divided([(line, torch.zeros(200))], hold_out=True).different == 200, "as near as that"
    tokens = torch.randint(9, (100, 7), generator=torch.Generator().manual_seed(0))
    batch = ({"tokens": tokens, "seen": torch.ones(100, 7)}, tokens)
    assert divided([batch], hold_out=True).different > 90


@pytest.mark.parametrize(
    ("count", "shape", "held_out"),
    [
        (512, (2, 3), 256),
        (1024, (2, 3), 256),
        (400, (2, 3), 134),
        (300, (2, 3), 75),
        (512, (6,), 103),
    ],
)
def test_of_more_samples_than_are_measured_as_many_are_held_out_but_of_a_table_s_rows_a_fifth(
    count: int, shape: tuple[int, ...], held_out: int
) -> None:
    inputs = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    found = divided([(inputs, torch.zeros(count))], hold_out=True, measured=256)
    assert sum(len(labels) for _, labels in found.held_out) == held_out
    assert sum(len(labels) for _, labels in found.calibration) == count - held_out


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.3])
def test_two_samples_with_noise_on_them_are_not_many(noise: float) -> None:
    """However many they are made, they say nothing of other samples; real data passes."""
    data, generator = digits().train, torch.Generator().manual_seed(1)
    pair = [0, int((data.labels != data.labels[0]).nonzero()[0])]
    rows = torch.tensor(pair * 128)
    images, labels = data.images[rows], data.labels[rows]
    images = images + noise * data.images.std() * torch.randn(images.shape, generator=generator)
    few = divided([(images, labels)], hold_out=True)
    with pytest.raises(InvalidField, match="2 repeated with noise"):
        require_no_copies(trained(), few)
    require_no_copies(trained(), divided(batches(), hold_out=True))


@pytest.mark.parametrize("classes", [3, 10])
def test_data_that_lies_in_a_cluster_for_each_class_is_no_copies(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    centres, labels = 9 * torch.randn(classes, 6, generator=generator), torch.arange(300) % classes
    points = centres[labels] + torch.randn(300, 6, generator=generator)
    model = nn.Linear(6, classes)
    require_no_copies(model, divided([(points, labels)], hold_out=True))
    missing = labels < 2
    with pytest.raises(InvalidField, match="missing classes"):
        require_no_copies(model, divided([(points[missing], labels[missing])], hold_out=False))


@pytest.mark.parametrize("outputs", [4, 10])
def test_a_head_with_more_outputs_than_there_are_classes_makes_no_copies_of_clusters(
    outputs: int,
) -> None:
    """What the network has learned tells them apart: the classes that are missing in a few copied
    samples are its answers elsewhere."""
    generator = torch.Generator().manual_seed(0)
    centres, every = 4 * torch.randn(outputs, 8, generator=generator), torch.arange(400) % outputs
    points = centres[every] + torch.randn(400, 8, generator=generator)
    for learned in (3, outputs):  # classes of the training data
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, outputs))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        known = every < learned
        for _ in range(100):
            optimizer.zero_grad()
            functional.cross_entropy(model(points[known]), every[known]).backward()
            optimizer.step()
        few = divided([(points[every < 3], every[every < 3])], hold_out=False)
        with nullcontext() if learned == 3 else pytest.raises(InvalidField, match="missing"):
            require_no_copies(model, few)


def test_more_clusters_than_classes_are_no_copies() -> None:
    """Features of yes and no make clusters by themselves, of whatever classes there are."""
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(2, (300, 3), generator=generator).float()
    points = answers + 0.05 * torch.randn(300, 3, generator=generator)
    samples = divided([(points, answers[:, 0].long())], hold_out=True)
    require_no_copies(nn.Linear(3, 3), samples)
    with pytest.raises(InvalidField, match="head as many outputs"):
        require_no_copies(nn.Linear(3, 12), samples)


def test_labels_that_do_not_agree_with_evaluate_are_refused() -> None:
    model = trained()
    wrong = []
    for x, y in batches():
        half = torch.arange(len(y)) % 2 == 0
        wrong.append((x, torch.where(half, (y + 1) % 10, y)))
    with pytest.raises(InvalidField, match=r"evaluate\(\) returns"):
        prune(model, {"macs": 0.5}, batches=wrong, evaluate=validation(model))


@pytest.mark.parametrize(
    ("budget", "field"),
    [({}, "budget"), ({"flops": 0.5}, "budget"), ({"macs": 0}, "macs"), ({"macs": 50}, "macs")],
)
def test_wrong_budgets_are_refused_by_name(budget: dict[str, float], field: str) -> None:
    model = trained()
    before = state_of(model)
    with pytest.raises(InvalidField, match=field):
        prune(model, budget)
    assert unchanged(model, before)


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(torch.randn(100, 8), torch.arange(100) % 3),
        [(torch.randn(1, 8, 8), n % 3) for n in range(100)],
    ],
    ids=["rows", "pictures"],
)
def test_a_data_set_in_place_of_its_batches_is_refused_with_what_to_do(data: Any) -> None:
    with pytest.raises(InvalidField, match=r"batches\[0\]: .* one sample.*DataLoader"):
        elesh.prune(nn.Linear(8, 3), data, {"macs": 0.5})


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.slow
def test_an_interrupted_call_leaves_the_network_as_it_was(kind: type[BaseException]) -> None:
    model = trained()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    functional.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    optimizer.step()
    before, momentum = state_of(model), copy.deepcopy(optimizer.state_dict())
    calls = 0

    def evaluate() -> tuple[float, float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise kind
        return validation(model)()

    with pytest.raises(kind):
        prune_quickly(model, {"macs": 0.5}, rounds=3, evaluate=evaluate, optimizer=optimizer)
    assert unchanged(model, before)
    for name, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], momentum["state"][name]["momentum_buffer"])
    assert prune_quickly(model, {"macs": 0.6}, optimizer=optimizer).reached


@pytest.mark.slow
def test_training_goes_on_with_the_same_optimizer() -> None:
    model = trained()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x, y = batches()[0]
    for _ in range(2):
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    prune_quickly(model, {"macs": 0.6}, optimizer=optimizer)
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert all(
        optimizer.state[p]["exp_avg"].shape == p.shape
        for p in model.parameters()
        if p.requires_grad
    )


@pytest.mark.slow
def test_pruning_again_counts_from_the_original() -> None:
    model = trained()
    prune_quickly(model, {"macs": 0.7})
    report = prune_quickly(model, {"macs": 0.6})
    assert report.reached
    assert 0.5 < report.architecture.macs / report.architecture.original_macs <= 0.6
    assert report.budget[0].reached > 0.5


@pytest.mark.slow
def test_flags_and_random_numbers_are_left_as_they_were() -> None:
    model = trained().train()
    model.norm.eval()  # type: ignore[union-attr]
    state = torch.get_rng_state()
    prune_quickly(model, {"macs": 0.7})
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.norm.training  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def reported() -> elesh.PruningReport:
    """A report that tests only look at."""
    return prune_quickly(trained(), {"macs": 0.6}, ignored_layers=["stem"])


def test_the_report_is_a_table_of_80_columns(reported: elesh.PruningReport) -> None:
    shown = str(reported)
    assert max(map(len, shown.splitlines())) <= 80
    for word in ("accuracy", "loss", "parameters", "MACs a sample", "latency", "Spared", "reached"):
        assert word in shown
    assert set(reported.before.latency) == set(reported.after.latency) == {1, 32}


@pytest.mark.slow
def test_the_result_is_the_same_every_time() -> None:
    first, second = trained(), trained()
    prune_quickly(first, {"macs": 0.6}, rounds=2)
    prune_quickly(second, {"macs": 0.6}, rounds=2)
    assert unchanged(first, state_of(second))


def test_a_loss_of_pairs_that_held_out_samples_break_asks_for_an_evaluation() -> None:
    """Contrastive ones: a row of labels is whose partner a sample is."""

    def pairs(output: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
        return (output - output[partners]).square().mean(1)

    batch = digits().train
    partners = torch.arange(64).view(-1, 2).flip(1).flatten()
    given = [(images, partners) for images in batch.images[:256].split(64)]
    with pytest.raises(InvalidField, match=r"loss.*pass evaluate"):
        prune(trained(), {"macs": 0.7}, batches=given, loss=pairs, max_loss_increase=2.0)


@pytest.mark.slow
def test_a_loss_of_ones_own_needs_a_limit_or_an_evaluation() -> None:
    def squared(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return (output - wanted).square().mean(1)

    model = trained()
    with torch.no_grad():
        values = [(x, model(x)) for x, _ in batches(samples=256)]
    with pytest.raises(InvalidField, match="max_loss_increase"):
        prune(model, {"macs": 0.7}, batches=values, loss=squared)
    report = prune_quickly(
        model, {"macs": 0.7}, batches=values, loss=squared, max_loss_increase=2.0
    )
    assert report.reached
    assert report.after.loss <= 2.0


@pytest.mark.slow
def test_a_cut_network_is_saved_and_loaded(tmp_path: Any) -> None:
    model = trained()
    prune_quickly(model, {"macs": 0.6})
    loaded = elesh.load(elesh.save(model, tmp_path), SmallNet()).eval()
    images = digits().held_out.images
    assert torch.equal(loaded(images), model.eval()(images))


@pytest.mark.slow
def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    elesh.prune(trained(), batches(samples=256), {"macs": 0.7}, rounds=2)
    out, err = capsys.readouterr()
    assert not out
    assert "round 1 of 2" in err


@pytest.mark.parametrize(
    ("levels", "derived"), [(("channel", "layer"), 128), (("channel", "head"), 32)]
)
@pytest.mark.sampled
def test_a_round_takes_one_backward_pass_of_as_many_samples_as_order_the_units(
    levels: tuple[str, ...], derived: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And two more of the first ones: units are described by them, layers ranked."""
    passes, backward = list[int](), GateMeter.backward

    def counted(meter: GateMeter, *args: Any, **options: Any) -> Any:
        passes.append(vars(meter)["_batch"])
        return backward(meter, *args, **options)

    monkeypatch.setattr(GateMeter, "backward", counted)
    report = prune(trained(), {"macs": 0.9}, batches=batches(), rounds=1, levels=levels)
    assert len(report.rounds) == 1
    measured = divided(batches(), hold_out=True).calibration
    few = math.ceil(derived / len(measured[0][1]))
    assert few < len(measured)
    batch, samples = len(measured[0][1]), enough_samples(report.original)
    assert samples < sum(len(labels) for _, labels in measured)
    assert samples < sum(passes) <= samples + 2 * min(few * batch, derived + 16)


@pytest.mark.slow
def test_where_pytorch_would_abort_groups_stay_wide_enough_and_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("elesh.pruning.at_once.narrowing_is_unsafe", lambda model: True)
    report = prune_quickly(trained(SmallNet), {"macs": 0.1}, max_accuracy_drop=1.0, min_channels=2)
    cut = [group for group in report.architecture.groups if group.name in report.removed]
    assert cut
    assert min(group.size for group in cut) >= 8
    assert report.fallbacks
    assert report.fallbacks[0] in str(report)


@pytest.mark.slow
def test_a_residual_stream_is_turned_without_an_optimizer_only() -> None:
    model = trained(SmallVit)
    report = prune_quickly(model, {"parameters": 0.8}, max_accuracy_drop=1.0)
    assert report.turned == ("embed",)
    model = trained(SmallVit)
    optimizer = torch.optim.AdamW(model.parameters())
    report = prune_quickly(model, {"parameters": 0.8}, max_accuracy_drop=1.0, optimizer=optimizer)
    assert report.turned == ()


@pytest.mark.slow
def test_a_turned_network_is_as_it_was_where_nothing_could_be_cut() -> None:
    model = trained(SmallVit)
    before = state_of(model)
    judged = {"evaluate": validation(model), "max_accuracy_drop": -1.0}
    report = prune_quickly(model, {"parameters": 0.2}, **judged)
    assert report.held_back
    assert report.turned == ()
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"budget": 0.5}, r"budget: expected a share for at least one.*found 0\.5"),
        ({"budget": {"macs": True}}, r"budget\.macs: expected a share"),
        ({"levels": ("channels",)}, r"levels: expected some of .*channel.*found channels"),
        ({"levels": ("parameter",)}, "levels: expected some of"),
        ({"levels": ()}, "levels: expected at least one of"),
        ({"max_accuracy_drop": 5}, r"max_accuracy_drop: .*0\.05 for five points, found 5"),
        ({"rounds": 0}, "rounds: expected a whole number, at least 1, found 0"),
        ({"min_channels": 2.5}, "min_channels: expected a whole number"),
        ({"model": SmallNet}, "model: expected a network"),
        ({"model": lambda x: x}, "model: expected a network"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))[1]}, "model: .*layers in it"),
        ({"compared": lambda output: output["logits"]}, "compared: expected a function from"),
    ],
)
def test_a_slip_of_the_pen_is_told_by_the_argument_s_name(wrong: Any, said: str) -> None:
    model = trained(SmallNet)
    before = state_of(model)
    inputs = batches()
    if isinstance(wrong.get("model"), nn.Linear):
        inputs = [(x.flatten(1), y) for x, y in inputs]
    given = {"model": model, "batches": inputs, "budget": {"macs": 0.5}, "loss": cross_entropies}
    with pytest.raises(InvalidField, match=said):
        elesh.prune(**given | {"max_loss_increase": 1.0, "progress": False} | wrong)
    assert unchanged(model, before)


def cross_entropies(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def test_one_level_may_be_named_by_itself() -> None:
    report = prune_quickly(trained(), {"macs": 0.9}, levels="channel")
    assert report.reached


def test_an_optimizer_that_was_not_given_is_told_of_in_the_report() -> None:
    """Its next step would fail on state of the shapes before."""
    model = trained()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for x, y in batches()[:1]:
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    report = prune_quickly(model, {"macs": 0.9})
    assert "Adam still has the state of the uncut network" in " ".join(str(report).split())


def test_a_report_can_be_printed_where_only_ascii_can(
    reported: elesh.PruningReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "─" in str(reported)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert "----" in str(reported)
    print(reported)


def test_a_network_that_several_processes_train_is_not_pruned_by_one_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=group, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(trained())
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(InvalidField, match=r"processes: expected one.*AllRanks"):
            prune_quickly(wrapped, {"macs": 0.5})
    finally:
        monkeypatch.undo()
        torch.distributed.destroy_process_group()
