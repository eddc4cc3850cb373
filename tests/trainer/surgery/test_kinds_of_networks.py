"""Masks, cuts and training afterwards on networks and inputs as people have them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.network.calling import batch_size, map_tensors
from leyline import Level

State = namedtuple("State", "shift scale")


@dataclass(frozen=True)
class Batch:
    """Inputs as one object."""

    x: Tensor
    state: State
    note: str = "none"


class Stateful(nn.Module):
    """Takes what holds tensors as it is."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, batch: Any) -> Tensor:
        assert type(batch) is self.kind
        if isinstance(batch, PackedSequence):
            x, state = pad_packed_sequence(batch, batch_first=True)[0].mean(1), State(0, 1)
        elif isinstance(batch, Batch):
            x, state = batch.x, batch.state
        else:
            x, state = batch["x"], batch["state"]
        return self.last(self.first(x).relu() * state.scale + state.shift)


def packed(count: int) -> PackedSequence:
    return pack_sequence([torch.randn(5 - i % 4, 8) for i in range(count)], enforce_sorted=False)


INPUTS = {
    "dataclass": lambda n: Batch(torch.randn(n, 8), State(torch.zeros(n, 1), torch.ones(n, 1))),
    "ordered": lambda n: (
        OrderedDict(x=torch.randn(n, 8), state=State(torch.zeros(n, 1), torch.ones(n, 1))),
    ),
    "packed": packed,
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_keep_their_types_through_measuring_masking_and_cutting(name: str) -> None:
    torch.manual_seed(0)
    inputs = INPUTS[name](12)
    held = inputs[0] if type(inputs) is tuple else inputs
    model, labels = Stateful(type(held)), torch.randint(0, 4, (12,))
    recorder = Recorder(model, inputs)
    bundle = recorder.measure([(inputs, labels)], epoch=1)
    assert bundle.metadata.samples == 12
    surgeon = Surgeon(model, recorder.architecture)
    surgeon.mask({"first": [0, 1]})
    masked = model(held).detach()
    surgeon.unmask()
    surgeon.cut({"first": [0, 1]})
    assert torch.allclose(model(held), masked, atol=1e-6)


def test_a_named_tuple_is_one_argument_where_the_network_takes_one() -> None:
    class One(nn.Linear):
        def forward(self, state: State) -> Tensor:  # type: ignore[override]
            return super().forward(state.shift) * state.scale

    Recorder(nn.Sequential(OrderedDict(one=One(8, 4))), State(torch.randn(3, 8), torch.ones(3, 1)))


def test_nests_are_copied_in_their_types() -> None:
    nest = {"a": (torch.ones(2), [State(torch.ones(2), None)]), "b": packed(3)}
    twice = map_tensors(lambda t: t * 2, nest)
    assert type(twice["a"]) is tuple
    assert twice["a"][1][0].shift.tolist() == [2, 2]
    assert torch.equal(twice["b"].batch_sizes, nest["b"].batch_sizes)
    assert nest["a"][0].tolist() == [1, 1]
    assert batch_size(packed(3)) == 3


class Reader(nn.Module):
    """One causal attention over left-padded sequences; the last position answers."""

    def __init__(self, *, need_weights: bool = False) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.words, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.answer = nn.Linear(32, 2)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        ahead = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        x = self.words(ids)
        h = self.norm(x)
        seen, _ = self.attention(
            h, h, h, attn_mask=ahead, key_padding_mask=padding, need_weights=self.need_weights
        )
        return self.answer((x + seen)[:, -1])


def test_rows_that_may_see_no_key_stay_finite_and_train() -> None:
    torch.manual_seed(0)
    model, ids = Reader(), torch.randint(1, 50, (16, 8))
    padding = torch.zeros(16, 8, dtype=torch.bool)
    padding[10:, :3] = True
    surgeon = Surgeon(model, Recorder(model, (ids[:4], padding[:4])).architecture)
    plain = model(ids, padding)
    surgeon.mask({"attention": [1]})
    masked = model(ids, padding).detach()
    surgeon.unmask()
    assert torch.allclose(model(ids, padding), plain)
    surgeon.cut({"attention": [1]})
    assert torch.allclose(model(ids, padding), masked, atol=1e-6)
    model(ids, padding).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_network_that_lost_a_head_can_be_scripted() -> None:
    model = Reader()
    ids, padding = torch.randint(1, 50, (4, 8)), torch.zeros(4, 8, dtype=torch.bool)
    surgeon = Surgeon(model, Recorder(model, (ids, padding)).architecture)
    surgeon.cut({"attention": [1]})
    scripted = torch.jit.script(model.attention)
    x = torch.randn(2, 5, 32)
    assert torch.allclose(scripted(x, x, x)[0], model.attention(x, x, x)[0], atol=1e-6)


class Encoder(nn.Module):
    """PyTorch's encoder, which packs padded batches in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0)
        self.encoder, self.answer = nn.TransformerEncoder(layer, 2), nn.Linear(32, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        # Padded rows count: they are zeros where the batch was packed.
        return self.answer(self.encoder(x, src_key_padding_mask=padding).mean(1))


@pytest.mark.parametrize("level", [Level.CHANNEL, Level.HEAD, Level.LAYER])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.sampled
def test_padded_encoders_compute_under_a_mask_what_they_do_after_the_cut(
    level: Level, grad: bool
) -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(6, 5, 32)
    padding = torch.zeros(6, 5, dtype=torch.bool)
    padding[2:4, 3:] = True
    recorder = Recorder(model, (x, padding))
    recorder.measure([((x, padding), torch.randint(0, 2, (6,)))], epoch=1)
    surgeon = Surgeon(model, recorder.architecture)
    blocks = [block.name for block in recorder.architecture.blocks if block.prunable]
    units = {
        Level.CHANNEL: {"encoder.layers.0.linear1": [0, 5], "encoder.layers.1.linear1": [3]},
        Level.HEAD: {"encoder.layers.0.self_attn": [2]},
        Level.LAYER: {},
    }[level]
    names = blocks[:1] if level is Level.LAYER else []
    with torch.set_grad_enabled(grad):
        plain = model(x, padding)
        surgeon.mask(units)
        surgeon.mask_layers(names)
        masked = model(x, padding)
        surgeon.unmask()
        assert torch.equal(model(x, padding), plain)
        surgeon.cut(units)
        if names:
            surgeon.cut_layers(names)
        assert torch.allclose(model(x, padding), masked, atol=1e-5)
        assert not torch.allclose(masked, plain, atol=1e-5)


def test_a_mask_set_in_inference_mode_works_in_training_too() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(4, 8)
    surgeon = Surgeon(model, Recorder(model, x).architecture)
    with torch.inference_mode():
        surgeon.mask({"0": [1]})
        model(x)
    model(x).sum().backward()


class Block(nn.Module):
    """A residual block as ResNets have it, with activations in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += x
        return self.relu(out)


def test_a_removed_layer_answers_with_a_tensor_of_its_own() -> None:
    torch.manual_seed(0)
    stem, answer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
    model, x = nn.Sequential(stem, Block(8), Block(8), Block(8), answer), torch.randn(3, 3, 6, 6)
    architecture = Recorder(model, x).architecture
    names = [block.name for block in architecture.blocks if block.prunable]
    assert len(names) == 3
    surgeon = Surgeon(model.eval(), architecture)
    surgeon.mask_layers(names)
    masked = model(x).detach()
    surgeon.unmask()
    surgeon.cut_layers(names)
    assert torch.allclose(model(x), masked, atol=1e-6)
    model.train()
    model(x).sum().backward()
    assert stem.weight.grad is not None


def test_channels_last_weights_stay_so_through_cut_and_undo() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    surgeon = Surgeon(model, Recorder(model, x).architecture, optimizer=optimizer)
    model(x).sum().backward()
    optimizer.step()

    def layouts() -> list[bool]:
        tensors = [model[0].weight, model[3].weight]
        tensors += [optimizer.state[t]["momentum_buffer"] for t in tensors]
        return [t.is_contiguous(memory_format=torch.channels_last) for t in tensors]

    assert layouts() == [True] * 4
    surgeon.cut({"0": [1, 2]})
    assert layouts() == [True] * 4
    surgeon.undo()
    assert layouts() == [True] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(12, 8)
    data = [(x, torch.randint(0, 4, (12,)))]
    expected = Recorder(model, x).measure(data, epoch=1)
    torch.set_default_dtype(dtype)
    try:
        found = Recorder(model, x).measure(data, epoch=1)
        assert torch.get_default_dtype() == dtype
        made = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        surgeon = Surgeon(made, Recorder(made, x.to(dtype)).architecture)
        surgeon.cut({"0": [1]})
        made(x.to(dtype))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, gate in expected.gates.items():
        assert (found.gates[name].projections == gate.projections).all()


def test_a_cut_inside_autocast_is_seen_at_once() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(4, 8)
    surgeon = Surgeon(model, Recorder(model, x).architecture)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
        surgeon.cut({"0": [0]})
        inside = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inside, model(x))


class LowRank(nn.Module):
    """An adapter as PEFT puts it around a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, 4, bias=False)
        self.b = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def test_adapters_fit_a_network_that_was_cut_and_it_can_be_cut_again() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(4, 8)
    Surgeon(model, Recorder(model, x).architecture).cut({"0": [0, 7]})
    model[0], model[2] = LowRank(model[0]), LowRank(model[2])
    model(x).sum().backward()
    recorder = Recorder(model, x)
    units = {group.name: [0] for group in recorder.architecture.groups if group.prunable}
    assert "0.base_layer" in units
    surgeon = Surgeon(model, recorder.architecture)
    surgeon.mask(units)
    masked = model(x).detach()
    surgeon.unmask()
    surgeon.cut(units)
    assert torch.allclose(model(x), masked, atol=1e-6)
    model(x).sum().backward()


def test_a_buffer_that_grows_hinders_neither_measuring_nor_cutting() -> None:
    class Remembering(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
            self.register_buffer("bank", torch.zeros(0, 4))

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if self.training:
                self.bank = torch.cat([self.bank, out.detach()])
            return out

    model, x = Remembering(), torch.randn(4, 8)
    recorder = Recorder(model, x)
    surgeon = Surgeon(model, recorder.architecture)
    model(x)
    recorder.measure([(x, torch.randint(0, 4, (4,)))], epoch=1)
    surgeon.cut({"0": [0]})
    model(x)
    surgeon.undo()
    assert model.bank.shape == (8, 4)


def test_layers_on_the_steps_of_a_packed_sequence_are_left_alone_before_they_are_measured() -> None:
    """Their rows are steps, which no sum over samples can be taken of."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 6)
            self.rnn, self.hidden = nn.LSTM(6, 6), nn.Linear(6, 12)
            self.out = nn.Linear(12, 4)

        def forward(self, batch: PackedSequence) -> Tensor:
            steps = self.down(self.up(batch.data).relu())
            state = self.rnn(batch._replace(data=steps))[1][0][-1]
            return self.out(self.hidden(state).relu())

    for count in (4, 5):  # 14 steps, and 19
        model, inputs = Steps(), packed(count)
        recorder = Recorder(model, inputs)
        prunable = [group.name for group in recorder.architecture.groups if group.prunable]
        assert prunable == ["rnn", "hidden"]  # the state after the last step is of a sample
        assert "not divided evenly among samples" in recorder.architecture.group["up"].reason
        recorder.measure([(inputs, torch.arange(count) % 4)], epoch=1)
