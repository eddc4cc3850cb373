"""Attention heads are found in every kind of network, masked, cut and measured like channels."""

from __future__ import annotations

import copy
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from attention_nets import NETS, Fused, Native, Own, Vit, architecture_of, build, inputs
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from torch import Tensor, nn
from torch.nn import functional
from trainer_nets import Attention as PlainAttention
from trainer_nets import batches, close, example, same
from trainer_nets import build as build_plain

from elesh.analysis import analyze
from elesh.settings import Settings
from elesh.trainer import Evaluation, Recorder, Surgeon, apply_decision
from elesh.trainer.calibration.losses import directions
from elesh.trainer.network.calling import call, main_output
from elesh.trainer.network.multihead import HeadwiseAttention
from leyline import CheckpointBundle, Level, PrunedArchitecture, PruningGroup


def head_groups(architecture: PrunedArchitecture) -> list[PruningGroup]:
    return [group for group in architecture.groups if group.level is Level.HEAD]


def outputs(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return main_output(call(model, batch)).clone()


def some_heads(architecture: PrunedArchitecture) -> dict[str, list[int]]:
    """The first head of each layer, and of the first layer every other one."""
    chosen = {group.name: [0] for group in head_groups(architecture)}
    first = head_groups(architecture)[0]
    chosen[first.name] = list(range(0, first.size, 2))
    return chosen


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_the_heads_of_every_kind_of_network_are_found(name: str) -> None:
    groups = head_groups(architecture_of(name))
    assert {g.name: g.size for g in groups} == NETS[name][2]
    assert all(group.prunable for group in groups), [group.reason for group in groups]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_cut_heads_give_what_masked_ones_gave_and_are_counted_exactly(name: str) -> None:
    model, batch = build(name), inputs(name)
    plain = outputs(model, batch)
    surgeon = Surgeon(model, architecture_of(name))
    chosen = some_heads(surgeon.architecture)
    predicted = surgeon.architecture.without(chosen).parameters
    before = sum(p.numel() for p in model.parameters())
    surgeon.mask(chosen)
    masked = outputs(model, batch)
    surgeon.unmask()
    assert close(outputs(model, batch), plain)
    surgeon.cut(chosen)
    assert close(outputs(model, batch), masked)
    assert not close(masked, plain)
    assert sum(p.numel() for p in model.parameters()) == predicted < before


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_undoing_a_cut_of_heads_brings_everything_back(name: str) -> None:
    model, batch = build(name), inputs(name)
    untouched = copy.deepcopy(model)
    plain, attributes = outputs(model, batch), plain_attributes(model)
    surgeon = Surgeon(model, architecture_of(name))
    surgeon.cut(some_heads(surgeon.architecture))
    assert plain_attributes(model) != attributes
    surgeon.undo()
    assert same(model.state_dict(), untouched.state_dict())
    assert plain_attributes(model) == attributes
    assert torch.equal(outputs(model, batch), plain)


def plain_attributes(model: nn.Module) -> list[object]:
    kinds = (int, float, str, bool)
    return [
        (type(module), {k: v for k, v in vars(module).items() if isinstance(v, kinds)})
        for module in model.modules()
    ]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_a_network_that_lost_heads_trains_and_loads_into_a_fresh_one(name: str) -> None:
    model, batch, architecture = build(name), inputs(name), architecture_of(name)
    surgeon = Surgeon(model, architecture)
    surgeon.cut(some_heads(architecture))
    main_output(call(model.train(), batch)).float().square().sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    fresh = build(name, seed=1)
    Surgeon(fresh, architecture).replay(surgeon.architecture.history)
    fresh.load_state_dict(model.state_dict())
    assert close(outputs(fresh.eval(), batch), outputs(model.eval(), batch))


def test_heads_and_channels_are_cut_together_and_again() -> None:
    model, batch = build("own"), inputs("own")
    surgeon = Surgeon(model, architecture_of("own"))
    for _ in range(2):
        chosen = {g.name: [1] for g in surgeon.architecture.groups if g.prunable}
        assert {surgeon.architecture.group[name].level for name in chosen} == {
            Level.HEAD, Level.CHANNEL,
        }  # fmt: skip
        surgeon.mask(chosen)
        masked = outputs(model, batch)
        surgeon.cut(chosen)
        assert close(outputs(model, batch), masked)
    assert model.attention[0].n_head == 2  # type: ignore[union-attr,index]


def test_query_heads_that_share_keys_and_values_go_together() -> None:
    (group, _) = head_groups(architecture_of("Llama"))
    widths = {part.tensor.rsplit(".", 2)[-2]: part.width for part in group.slices}
    assert widths == {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8}


def test_attention_with_a_size_in_its_code_is_refused_by_name() -> None:
    class Fixed(PlainAttention):
        def forward(self, x: Tensor) -> Tensor:
            shape = (*x.shape[:2], 4, -1)
            q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
            weights = (q @ k.mT / 2).softmax(-1)
            return self.proj((weights @ v).transpose(1, 2).reshape(*x.shape[:2], 16))

    model: Any = build_plain("Vit")
    for block in model.blocks:
        block.attention = Fixed(16, 4)
    groups = head_groups(Recorder(model, example()).architecture)
    assert len(groups) == 2
    for group in groups:
        assert not group.prunable
        assert "a size written into the code" in group.reason


def test_heads_go_with_the_width_that_their_code_takes_for_theirs() -> None:
    model, batch = build_plain("Vit"), example()
    architecture = Recorder(model, batch).architecture
    (group,) = head_groups(architecture)
    assert (group.prunable, group.size) == (True, 4)
    widths = {(part.tensor, part.dim): part.width for part in group.slices}
    assert widths["patch.weight", 0] == widths["blocks.1.attention.q.weight", 0] == 4
    assert len(group.norms) == 5  # Masked, they see the kept channels only.
    whole, surgeon = copy.deepcopy(model.state_dict()), Surgeon(model, architecture)
    surgeon.mask({group.name: [0, 2]})
    masked = outputs(model, batch)
    surgeon.cut({group.name: [0, 2]})
    assert close(outputs(model, batch), masked)
    left = sum(parameter.numel() for parameter in model.parameters())
    assert left == surgeon.architecture.parameters
    model(batch).square().sum().backward()
    surgeon.undo()
    assert same(whole, dict(model.state_dict()))


@pytest.mark.parametrize("output", ["called", "lent"])
def test_heads_whose_weights_functions_use_go_with_the_width_that_these_read(output: str) -> None:
    class Lent(PlainAttention):
        def forward(self, x: Tensor) -> Tensor:
            b, n, d = x.shape
            made = [functional.linear(x, f.weight, f.bias) for f in (self.q, self.k, self.v)]
            q, k, v = (y.view(b, n, self.heads, -1).transpose(1, 2) for y in made)
            mixed = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(b, n, d)
            lent = functional.linear(mixed, self.proj.weight, self.proj.bias)
            return lent if output == "lent" else self.proj(mixed)

    model: Any = build_plain("Vit")
    for block in model.blocks:
        block.attention = Lent(16, 4)
    surgeon = Surgeon(model, Recorder(model, example()).architecture)
    (group,) = head_groups(surgeon.architecture)
    assert (group.prunable, group.size) == (True, 4)
    surgeon.mask({group.name: [1]})
    masked = outputs(model, example())
    surgeon.unmask()
    bundle = Recorder(model, example()).measure(batches(2, 32), epoch=120)
    assert bundle.heads[group.name].gradient_sensitivity.all()
    surgeon.cut({group.name: [1]})
    assert close(outputs(model, example()), masked)


def test_heads_that_go_with_a_width_are_measured_and_analyzed() -> None:
    model: Any = build_plain("Vit")
    name = "blocks.0.attention"
    for block in model.blocks:
        block.attention = PlainAttention(16, 8)
    bundle = Recorder(model, example()).measure(batches(2, 32), epoch=120)
    assert bundle.heads[name].gradient_sensitivity.all()
    free = Settings(structured_pruning={"channel_analysis": {"max_predicted_shift": 1e9}})
    decision = analyze(bundle, free, level=Level.HEAD)
    assert decision.approved_for_application, decision.rejection_reason
    losses = count(0.0, 1e-9)
    surgeon = Surgeon(model, bundle.architecture)
    outcome = apply_decision(decision, surgeon, lambda: Evaluation(1.0, next(losses)))
    assert outcome.result == "applied"
    assert surgeon.architecture.group[name].size == 7
    assert outcome.parameters_after == sum(p.numel() for p in model.parameters())


def test_equal_parts_of_a_layer_whose_size_a_module_keeps_go_together() -> None:
    class Split(nn.Module):
        def __init__(self, width: int, parts: int) -> None:
            super().__init__()
            self.width = width
            self.enter = nn.Conv2d(3, width * parts, 1)
            self.inner = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(parts - 1))
            self.leave = nn.Conv2d(width * parts, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            first, *rest = torch.split(torch.relu(self.enter(x)), self.width, 1)
            made = [first]
            for part, layer in zip(rest, self.inner, strict=True):
                made.append(torch.relu(layer(part + made[-1])))
            return self.leave(torch.cat(made, 1)).mean((2, 3))

    model, batch = Split(6, 3), torch.randn(2, 3, 4, 4)
    surgeon = Surgeon(model, Recorder(model, batch).architecture)
    group = surgeon.architecture.group["enter"]
    assert (group.prunable, group.size) == (True, 6)
    (part,) = [part for part in group.slices if part.tensor == "enter.weight"]
    assert part.width == 3
    surgeon.mask({"enter": [0, 5]})
    masked = outputs(model, batch)
    surgeon.cut({"enter": [0, 5]})
    assert close(outputs(model, batch), masked)
    assert model.width == 4
    surgeon.undo()
    assert model.width == 6


def test_heads_that_something_mixes_are_no_units() -> None:
    class Mixed(Fused):
        def __init__(self) -> None:
            super().__init__()
            self.between = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            shape = (*x.shape[:2], 3, self.num_heads, self.head_dim)
            q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
            talking = (self.between.weight @ (q @ k.mT).flatten(2)).view(*q.shape[:3], -1)
            return self.proj((talking.softmax(-1) @ v).transpose(1, 2).flatten(2))

    groups = head_groups(Recorder(Vit(Mixed), inputs("own")).architecture)
    assert not any(group.prunable for group in groups)


def test_ignored_attention_is_left_alone() -> None:
    ignored = ["attention.0.k"]
    architecture = Recorder(build("own"), inputs("own"), ignored_layers=ignored).architecture
    assert architecture.group["attention.0"].reason == "ignored"
    assert architecture.group["attention.1"].prunable


def test_a_single_head_is_no_unit() -> None:
    architecture = Recorder(Vit(lambda: Own(1)), inputs("own")).architecture
    assert head_groups(architecture) == []
    layers = {layer for group in architecture.groups for layer in group.layers}
    assert {"attention.0.q", "attention.0.k", "attention.0.v", "attention.0.out"} <= layers


def test_the_one_key_value_head_of_all_queries_stays() -> None:
    (group, _) = head_groups(architecture_of("multi-query"))
    tensors = {part.tensor for part in group.slices}
    assert tensors == {f"attention.0.{name}" for name in ("q.weight", "q.bias", "out.weight")}


def test_layers_that_share_a_table_of_positions_lose_the_same_heads() -> None:
    (group,) = head_groups(architecture_of("shared positions"))
    assert [site.module for site in group.sites] == ["first.out", "second.out"]
    assert ("table.weight", 1) in {(part.tensor, part.dim) for part in group.slices}


def test_multihead_attention_is_plain_torch_again_after_masking_and_measuring() -> None:
    model = build("native")
    recorder = Recorder(model, inputs("native"))
    recorder.measure([(inputs("native", 8), torch.zeros(8, dtype=torch.long))], epoch=1)
    surgeon = Surgeon(model, recorder.architecture)
    surgeon.mask({"first": [0]})
    assert isinstance(model, Native)
    assert type(model.first) is HeadwiseAttention
    surgeon.unmask()
    assert type(model.first) is nn.MultiheadAttention
    surgeon.cut({"first": [0]})
    assert (type(model.first), model.first.num_heads) == (HeadwiseAttention, 3)
    assert type(model.second) is nn.MultiheadAttention


def test_headwise_attention_computes_what_multihead_attention_does() -> None:
    model, x = build("native"), inputs("native")
    assert isinstance(model, Native)
    query = model.enter(x)
    for options in (
        {"need_weights": True},
        {"need_weights": True, "average_attn_weights": False},
        {"attn_mask": torch.randn(4 * len(x), 6, 6)},
        {"key_padding_mask": torch.rand(len(x), 6) > 0.8},
    ):
        expected = model.first(query, query, query, **options)
        copied = copy.deepcopy(model.first)
        copied.__class__ = HeadwiseAttention
        found = copied(query, query, query, **options)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    single = copied(query[0], query[0], query[0])
    torch.testing.assert_close(single, model.first(query[0], query[0], query[0]))


def measured(name: str, count: int = 6, **options: Any) -> tuple[nn.Module, CheckpointBundle]:
    model = build(name)
    labels = torch.arange(count) % 2
    batches = [(inputs(name, count), labels)]
    recorder = Recorder(model, inputs(name), architecture=architecture_of(name), **options)
    return model, recorder.measure(batches, epoch=1)


def gated(model: nn.Module, group: PruningGroup, unit: int, gate: float, x: Any) -> Tensor:
    (site,) = group.sites

    def scaled(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        factors = torch.ones(args[0].shape[-1], dtype=args[0].dtype)
        factors[list(site.of(unit))] = gate
        return (args[0] * factors,)

    handle = model.get_submodule(site.module).register_forward_pre_hook(scaled)
    found = outputs(model, x)
    handle.remove()
    return found


@pytest.mark.parametrize("name", ["own", "digits", "BERT"])
@pytest.mark.sampled
def test_projections_of_heads_are_derivatives_by_their_gates(name: str) -> None:
    model, bundle = measured(name, seed=5)
    exact, x, step = copy.deepcopy(model).double(), inputs(name, 6), 1e-5
    x = x.double() if isinstance(x, Tensor) else x
    v = directions(outputs(model, inputs(name, 6)), torch.Generator().manual_seed(5), 1).double()
    for group in head_groups(bundle.architecture):
        G = bundle.gates[group.name].projections
        for unit in range(group.size):
            up = gated(exact, group, unit, 1 + step, x)
            down = gated(exact, group, unit, 1 - step, x)
            numerical = (v * (up - down)).sum(1).numpy() / (2 * step)
            assert np.allclose(G[:, unit], numerical, rtol=1e-3, atol=1e-3 * np.abs(G).max())


def test_patterns_are_told_as_their_definitions_say() -> None:
    _, bundle = measured("own")
    model, x = build("own"), inputs("own", 6)
    assert isinstance(model, Vit)
    attention = model.attention[1]
    seen: list[Tensor] = []
    attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs(model, x)
    with torch.no_grad():
        q, k = (attention.split(f(seen[0])) for f in (attention.q, attention.k))  # type: ignore[union-attr,operator]
        weights = (q @ k.mT / 3**0.5).softmax(-1).double().transpose(0, 1).flatten(1, 2).numpy()
    heads = bundle.heads["attention.1"]
    assert heads.entropy is not None
    assert heads.entropy_bound is not None
    assert heads.diversity is not None
    assert heads.similarity is not None
    assert np.allclose(heads.entropy, entropy(weights, axis=-1).mean(-1), rtol=1e-4)
    assert np.allclose(heads.entropy_bound, np.log(16))
    apart = np.array(
        [[np.mean(jensenshannon(a, b, axis=-1) ** 2) for b in weights] for a in weights]
    )
    assert np.allclose(heads.diversity, apart.sum(1) / 3, rtol=1e-3)
    flat = weights.reshape(4, -1)
    cosines = flat @ flat.T / np.outer(*[np.linalg.norm(flat, axis=1)] * 2)
    assert np.allclose(heads.similarity, cosines, atol=1e-4)


def square(output: Any, labels: Tensor) -> Tensor:
    """A loss for networks that do not classify samples."""
    return main_output(output).square().flatten(1).mean(1)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_patterns_are_seen_in_every_kind_of_network(name: str) -> None:
    loss = square if name in ("encoder", "GPT-2", "Llama") else None
    _, bundle = measured(name, loss=loss)
    for group in head_groups(bundle.architecture):
        heads = bundle.heads[group.name]
        assert heads.entropy is not None
        assert heads.entropy_bound is not None
        assert (heads.entropy > 0).all()
        assert (heads.entropy <= heads.entropy_bound + 1e-5).all()
        assert heads.gradient_sensitivity.all()
        assert group.name not in bundle.channels


def test_the_fused_kernel_shows_the_same_patterns_as_softmax_by_hand() -> None:
    class ByHand(Fused):
        def forward(self, x: Tensor) -> Tensor:
            shape = (*x.shape[:2], 3, self.num_heads, self.head_dim)
            q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            weights = (q @ k.mT / 2).masked_fill(hidden, -torch.inf).softmax(-1)
            return self.proj((weights @ v).transpose(1, 2).flatten(2))

    model, bundle = measured("fused")
    copied = Vit(ByHand)
    copied.load_state_dict(model.state_dict())
    batches = [(inputs("fused", 6), torch.arange(6) % 3)]
    other = Recorder(copied, inputs("fused")).measure(batches, epoch=1)
    for name, heads in bundle.heads.items():
        for field in ("entropy", "entropy_bound", "diversity", "similarity"):
            found, expected = getattr(heads, field), getattr(other.heads[name], field)
            assert np.allclose(found, expected, atol=1e-5), field


@pytest.mark.parametrize("name", ["BERT", "Llama"])
@pytest.mark.sampled
def test_the_kernel_that_transformers_picks_shows_what_eager_attention_does(name: str) -> None:
    found = []
    for kind in ("eager", "sdpa"):
        model = build(name)
        model.set_attn_implementation(kind)  # type: ignore[operator]
        batches = [(inputs(name, 6), torch.arange(6) % 2)]
        recorder = Recorder(model, inputs(name), loss=square)
        found.append(recorder.measure(batches, epoch=1))
    assert found[0].architecture == found[1].architecture
    for layer, heads in found[0].heads.items():
        other = found[1].heads[layer]
        for field in ("entropy", "entropy_bound", "diversity", "similarity"):
            assert np.allclose(getattr(heads, field), getattr(other, field), atol=1e-4), field


def test_patterns_that_cannot_be_seen_are_absent_not_made_up() -> None:
    class Hidden(Own):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.split(f(x)) for f in (self.q, self.k, self.v))
            weights = torch.ops.aten._softmax.default(q @ k.mT / 2, -1, False)
            return self.out((weights @ v).transpose(1, 2).flatten(2))

    batches = [(inputs("own", 6), torch.arange(6) % 3)]
    bundle = Recorder(Vit(Hidden), inputs("own")).measure(batches, epoch=1)
    assert {heads.entropy is None for heads in bundle.heads.values()} == {True}
    assert all(heads.gradient_sensitivity.all() for heads in bundle.heads.values())


def test_a_decision_on_heads_is_masked_measured_and_cut() -> None:
    torch.manual_seed(0)
    model = Vit(lambda: Own(heads=16, head_dim=2)).eval()
    x = inputs("own", 64)
    labels = outputs(model, x).argmax(1)
    recorder = Recorder(model, inputs("own"))
    bundle = recorder.measure([(x, labels)], epoch=120)
    free = Settings(structured_pruning={"channel_analysis": {"max_predicted_shift": 1e9}})
    decision = analyze(bundle, free, level=Level.HEAD)
    assert decision.approved_for_application, decision.rejection_reason
    assert sum(len(target.head_indices) for target in decision.attention_heads) == 5
    surgeon = Surgeon(model, bundle.architecture)
    losses = count(0.0, 1e-9)  # A mask moves real ones.
    outcome = apply_decision(decision, surgeon, lambda: Evaluation(1.0, next(losses)))
    assert outcome.result == "applied"
    assert outcome.parameters_after == decision.statistics.parameters_after
    assert outcome.parameters_after == sum(p.numel() for p in model.parameters())
    recorder.architecture = surgeon.architecture
    again = recorder.measure([(x, labels)], epoch=121)
    sizes = {name: heads.size for name, heads in again.heads.items()}
    assert sizes == {t.layer_name: t.heads_after for t in decision.attention_heads} | {
        name: size for name, size in sizes.items() if name not in decision.units
    }
