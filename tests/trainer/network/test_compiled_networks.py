"""Compiled networks: masks act on them, they are measured, cut and compiled again."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.network.state import Uncompiled, unwrapped

UNITS = {"0": [0, 3, 5], "2": [1, 2]}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No mask of another test's network, still alive somewhere, has the compiler stopped, and no
    other network's recompilations count: all networks of a process share code objects."""
    torch._dynamo.reset()
    monkeypatch.setattr(Uncompiled, "_entered", 0)
    with torch.compiler.set_stance("default"):
        yield


def stance() -> str:
    return str(torch._dynamo.eval_frame._stance.stance)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
    ).eval()


def compiled(model: nn.Sequential, way: str) -> nn.Module:
    """The network as a training script calls it."""
    if way == "around":
        return torch.compile(model, backend="eager")
    if way == "in place":
        model.compile(backend="eager")
    elif way == "part":
        model[2].compile(backend="eager")
    elif way == "method":
        model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    elif way == "step":
        return torch.compile(lambda x: model(x), backend="eager")
    return model


@pytest.mark.parametrize("way", ["around", "in place", "part", "step", "method"])
@pytest.mark.sampled
def test_a_mask_acts_on_a_compiled_network_and_is_what_the_cut_computes(way: str) -> None:
    model, x = network(), torch.randn(5, 6)
    run = compiled(model, way)
    with torch.no_grad():
        plain = run(x)  # Compiled before there is any hook.
    given = run if isinstance(run, nn.Module) else model
    recorder = Recorder(given, x)
    surgeon = Surgeon(given, recorder.architecture)
    surgeon.mask(UNITS)
    masked = run(x).detach()
    assert not torch.allclose(masked, plain)
    surgeon.unmask()
    assert torch.equal(run(x), plain)
    surgeon.cut(UNITS)
    assert torch.allclose(run(x), masked, atol=1e-6)
    surgeon.undo()
    assert torch.equal(run(x), plain)


def test_a_compiled_network_is_measured_as_the_plain_one() -> None:
    data = [(torch.randn(16, 6), torch.randint(0, 3, (16,)))]
    plain = Recorder(network(), data[0][0]).measure(data, epoch=1)
    run = compiled(network(), "around")
    run(data[0][0])
    found = Recorder(run, data[0][0]).measure(data, epoch=1)
    assert found.architecture == plain.architecture
    for name, gate in plain.gates.items():
        assert (found.gates[name].projections == gate.projections).all()


@pytest.mark.slow
def test_more_cuts_than_the_compiler_would_recompile_for_are_all_compiled() -> None:
    model, x = network(), torch.randn(5, 6)
    frames: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        frames.append(len(inputs))
        return graph.forward

    run = torch.compile(model, backend=backend)
    surgeon = Surgeon(model, Recorder(model, x).architecture, restore_points=0)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for _ in range(6):
            run(x)
            surgeon.cut({"0": [0]})
        run(x)
    assert len(frames) >= 7


def test_the_compilers_stance_comes_back_with_the_last_who_leaves() -> None:
    run = torch.compile(network(), backend="eager")
    run(torch.randn(2, 6))
    one, other = Uncompiled(network()), Uncompiled(network())
    one.__enter__()
    other.__enter__()
    one.__exit__()
    assert stance() == "force_eager"
    other.__exit__()
    other.__exit__()
    assert stance() == "default"


def test_a_masked_network_that_nobody_holds_any_more_stops_no_compiler() -> None:
    model, x = network(), torch.randn(5, 6)
    torch.compile(model, backend="eager")(x)
    surgeon = Surgeon(model, Recorder(model, x).architecture)
    surgeon.mask(UNITS)
    assert stance() == "force_eager"
    del model, surgeon
    gc.collect()
    assert stance() == "default"


@pytest.mark.slow
def test_the_network_inside_a_compiled_one_is_found() -> None:
    model = network()
    assert unwrapped(torch.compile(model)) is model
    assert unwrapped(model) is model
