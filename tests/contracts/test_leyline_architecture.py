"""A cut computed on the descriptor is the cut that slicing the real arrays makes."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import leyline as ll
from contracts import examples

Tensors = dict[str, npt.NDArray[np.int64]]
Removed = dict[str, list[int]]


def coupled(sizes: tuple[int, int], listed: bool) -> ll.PrunedArchitecture:
    """Two convolutions whose outputs are concatenated, flattened (2 positions each) and read by a
    linear layer and a bias-like buffer; ``listed`` gives the second's indices one by one."""
    one, two = sizes
    total = one + two
    tensors = (
        ll.TensorDescriptor(path="one.weight", shape=(one, 3), dtype="float32"),
        ll.TensorDescriptor(path="one.bias", shape=(one,), dtype="float32"),
        ll.TensorDescriptor(path="two.weight", shape=(two, 3), dtype="float32"),
        ll.TensorDescriptor(path="norm.mean", shape=(total,), dtype="float32", kind="buffer"),
        ll.TensorDescriptor(path="fc.weight", shape=(5, 2 * total), dtype="float32"),
    )
    layers = (
        ll.LayerDescriptor(name="one", kind="conv2d", weight="one.weight", positions=64),
        ll.LayerDescriptor(name="two", kind="conv2d", weight="two.weight", positions=16),
        ll.LayerDescriptor(name="norm", kind="batchnorm"),
        ll.LayerDescriptor(name="fc", kind="linear", weight="fc.weight", positions=1),
    )

    def at(start: int, width: int, count: int) -> dict[str, Any]:
        if listed and start:
            end = start + width * count
            return {"start": 0, "width": width, "indices": tuple(range(start, end))}
        return {"start": start, "width": width}

    groups = []
    for name, size, first in (("one", one, 0), ("two", two, one)):
        slices = [ll.TensorSlice(tensor=f"{name}.weight", dim=0)]
        slices += [ll.TensorSlice(tensor="one.bias", dim=0)] if name == "one" else []
        slices += [
            ll.TensorSlice(tensor="norm.mean", dim=0, **at(first, 1, size)),
            ll.TensorSlice(tensor="fc.weight", dim=1, **at(2 * first, 2, size)),
        ]
        site = ll.GateSite(module="fc", dim=-1, **at(2 * first, 2, size))
        groups.append(
            ll.PruningGroup(
                name=name,
                layers=(name,),
                original_size=size,
                origin=tuple(range(size)),
                slices=tuple(slices),
                sites=(site,),
            )
        )
    return ll.PrunedArchitecture.build(tensors, layers, tuple(groups))


@st.composite
def cuts(draw: st.DrawFn) -> tuple[ll.PrunedArchitecture, Removed, Removed]:
    """An architecture and two disjoint sets of units, both in original numbering."""
    sizes = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    architecture = coupled(sizes, draw(st.booleans()))
    first: Removed = {}
    second: Removed = {}
    for group in architecture.groups:
        fates = draw(st.lists(st.integers(0, 2), min_size=group.size, max_size=group.size))
        first[group.name] = [unit for unit, fate in enumerate(fates) if fate == 1]
        second[group.name] = [unit for unit, fate in enumerate(fates) if fate == 2]
    return architecture, first, second


def numbered(architecture: ll.PrunedArchitecture) -> Tensors:
    """Real arrays of the architecture's shapes, every element with its own number."""
    return {
        t.path: np.arange(t.numel).reshape(t.shape) + 1000 * index
        for index, t in enumerate(architecture.tensors)
    }


def sliced(architecture: ll.PrunedArchitecture, tensors: Tensors, removed: Removed) -> Tensors:
    """The arrays without the slices of the removed units: what a surgeon does."""
    gone: dict[tuple[str, int], list[int]] = {}
    for group in architecture.groups:
        for part in group.slices:
            axis = gone.setdefault((part.tensor, part.dim), [])
            axis += part.all_of(removed.get(group.name, ()))
    result = dict(tensors)
    for (path, dim), indices in gone.items():
        result[path] = np.delete(result[path], indices, axis=dim)
    return result


def renumbered(architecture: ll.PrunedArchitecture, original: Removed) -> Removed:
    """Units of original numbering in the architecture's current numbering."""
    return {
        group.name: [group.origin.index(unit) for unit in original[group.name]]
        for group in architecture.groups
    }


def merged(first: Removed, second: Removed) -> Removed:
    return {name: sorted(first[name] + second[name]) for name in first}


@given(cuts())
def test_counts_and_shapes_are_those_of_arrays_that_were_really_sliced(
    case: tuple[ll.PrunedArchitecture, Removed, Removed],
) -> None:
    architecture, removed, _ = case
    after = architecture.without(removed)
    arrays = sliced(architecture, numbered(architecture), removed)
    assert {t.path: t.shape for t in after.tensors} == {k: a.shape for k, a in arrays.items()}
    parameters = {t.path for t in after.tensors if t.kind == "parameter"}
    assert after.parameters == sum(arrays[path].size for path in parameters)
    weights = {"one.weight": 64, "two.weight": 16, "fc.weight": 1}
    assert after.macs == sum(arrays[path].size * times for path, times in weights.items())
    assert after.original_parameters == architecture.parameters
    assert after.original_macs == architecture.macs


@given(cuts())
def test_removing_in_two_steps_is_removing_at_once(
    case: tuple[ll.PrunedArchitecture, Removed, Removed],
) -> None:
    architecture, first, second = case
    halfway = architecture.without(first)
    after = halfway.without(renumbered(halfway, second))
    at_once = architecture.without(merged(first, second))
    history = {"history": ()}
    assert after.model_copy(update=history) == at_once.model_copy(update=history)
    assert after.model_hash == at_once.model_hash

    # And the slices of the second step cut the very elements that remain to be cut.
    arrays = sliced(architecture, numbered(architecture), first)
    arrays = sliced(halfway, arrays, renumbered(halfway, second))
    expected = sliced(architecture, numbered(architecture), merged(first, second))
    assert all(np.array_equal(arrays[path], expected[path]) for path in expected)


@given(cuts())
def test_history_tells_every_cut_in_original_numbering(
    case: tuple[ll.PrunedArchitecture, Removed, Removed],
) -> None:
    architecture, first, second = case
    halfway = architecture.without(first, epoch=31, key="first")
    after = halfway.without(renumbered(halfway, second), epoch=32, key="second")
    told: dict[str, list[int]] = {name: [] for name in first}
    for record in after.history:
        assert record.epoch == {"first": 31, "second": 32}[record.idempotency_key]
        told[record.group] += record.original_indices
    assert {name: sorted(units) for name, units in told.items()} == merged(first, second)
    for group in after.groups:
        assert sorted(group.origin + tuple(told[group.name])) == list(range(group.original_size))
        assert group.removed == len(told[group.name])


def test_the_group_behind_a_concat_moves_up() -> None:
    after = coupled((4, 3), listed=False).without({"one": [1, 2]})
    assert after.group["one"].slices[-1].start == 0
    assert [part.start for part in after.group["two"].slices] == [0, 2, 4]
    assert after.group["two"].sites[0].start == 4
    assert after.group["two"].sites[0].of(1) == range(6, 8)


def test_listed_indices_move_up_and_lose_those_of_the_removed_units() -> None:
    after = coupled((4, 3), listed=True).without({"one": [1, 2], "two": [0]})
    assert after.group["two"].slices[-1].indices == (4, 5, 6, 7)
    assert after.group["two"].sites[0].indices == (4, 5, 6, 7)
    assert after.group["two"].sites[0].of(1) == (6, 7)


def test_removing_nothing_changes_nothing() -> None:
    architecture = coupled((4, 3), listed=False)
    assert architecture.without({}) == architecture
    assert architecture.without({"one": []}) == architecture


@pytest.mark.parametrize(
    ("removed", "field"),
    [({"three": [0]}, "group"), ({"one": [4]}, "groups.one"), ({"one": [-1]}, "groups.one")],
)
def test_unknown_groups_and_units_are_refused_by_name(removed: Removed, field: str) -> None:
    with pytest.raises(ll.InvalidField) as caught:
        coupled((4, 3), listed=False).without(removed)
    assert caught.value.field == field


def test_a_unit_of_another_group_is_not_torn() -> None:
    architecture = coupled((4, 3), listed=False)
    pair = architecture.group["one"].model_copy(
        update={
            "name": "pairs",
            "original_size": 2,
            "origin": (0, 1),
            "slices": (ll.TensorSlice(tensor="one.weight", dim=0, width=2),),
            "sites": (),
        }
    )
    both = ll.PrunedArchitecture.build(
        architecture.tensors, architecture.layers, (*architecture.groups, pair)
    )
    with pytest.raises(ll.InvalidField, match=r"groups\.pairs\.one\.weight\.0"):
        both.without({"one": [0]})


def test_the_hash_follows_the_structure() -> None:
    architecture = coupled((4, 3), listed=False)
    assert coupled((4, 3), listed=False).model_hash == architecture.model_hash
    assert coupled((4, 4), listed=False).model_hash != architecture.model_hash
    assert architecture.without({"one": [0]}).model_hash != architecture.model_hash
    assert (
        architecture.without({"one": [0]}).model_hash
        != architecture.without({"one": [1]}).model_hash
    )


def decoded(change: Any) -> ll.PrunedArchitecture:
    """The example architecture as it is read from the wire after ``change`` of its plain form;
    its hash is made to fit, so that it is the change that is refused."""
    plain = msgpack.unpackb(ll.encode(examples.ARCHITECTURE))
    change(plain)
    try:
        return ll.decode(ll.PrunedArchitecture, msgpack.packb(plain))
    except ll.IdentityMismatch as error:
        plain["model_hash"] = error.expected
        return ll.decode(ll.PrunedArchitecture, msgpack.packb(plain))


def first(plain: Any, *path: Any) -> Any:
    for key in path:
        plain = plain[key]
    return plain


BAD = {
    "weight": (lambda p: first(p, "layers", 0).update(weight="x"), "layers.a.weight"),
    "tensor": (
        lambda p: first(p, "groups", 0, "slices", 0).update(tensor="x"), "groups.a.slices.x"),
    "dimension": (
        lambda p: first(p, "groups", 0, "slices", 0).update(dim=4), "groups.a.slices.a.weight.dim"),
    "outside": (
        lambda p: first(p, "groups", 0, "slices", 0).update(start=1), "groups.a.slices.a.weight"),
    "wide": (
        lambda p: first(p, "groups", 0, "slices", 0).update(width=2), "groups.a.slices.a.weight"),
    "indices": (
        lambda p: first(p, "groups", 1, "slices", 1).update(indices=[1]),
        "groups.b.slices.fc.weight.indices"),
    "negative index": (
        lambda p: first(p, "groups", 1, "slices", 1, "indices").__setitem__(0, -1),
        "groups.b.slices.fc.weight.indices"),
    "index twice": (
        lambda p: first(p, "groups", 1, "slices", 1, "indices").__setitem__(0, 15),
        "groups.b.slices.fc.weight.indices"),
    "index outside": (
        lambda p: first(p, "groups", 1, "slices", 1, "indices").__setitem__(0, 28),
        "groups.b.slices.fc.weight.indices"),
    "site too wide": (
        lambda p: first(p, "groups", 0, "sites", 0).update(width=2**60), "groups.a.sites.fc"),
    "tensor twice": (lambda p: p["tensors"].append(p["tensors"][0]), "tensors"),
    "group twice": (lambda p: p["groups"].append(p["groups"][0]), "groups"),
    "origin falls": (lambda p: first(p, "groups", 0).update(origin=[0, 3, 2]), "groups.a.origin"),
    "origin twice": (lambda p: first(p, "groups", 0).update(origin=[0, 2, 2]), "groups.a.origin"),
    "origin outside": (lambda p: first(p, "groups", 0).update(origin=[0, 2, 4]), "groups.a.origin"),
    "negative origin": (
        lambda p: first(p, "groups", 0).update(origin=[-1, 2, 3]), "groups.a.origin"),
    "too many parameters": (
        lambda p: first(p, "tensors", 0).update(shape=[3, 2**39, 2**39, 1]), "parameters"),
    "too many operations": (lambda p: first(p, "layers", 0).update(positions=2**62), "macs"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_an_architecture_that_does_not_hang_together_is_refused_by_name(name: str) -> None:
    change, field = BAD[name]
    with pytest.raises(ll.InvalidField) as caught:
        decoded(change)
    assert caught.value.field == field


@pytest.mark.parametrize("shape", [[-1], [2**40], [True], [1.0], ["3"], [1] * 9])
def test_sizes_of_tensors_are_whole_numbers_within_bounds(shape: list[Any]) -> None:
    with pytest.raises(ll.InvalidField, match=r"tensors\.0\.shape"):
        decoded(lambda plain: plain["tensors"][0].update(shape=shape))


def test_a_cut_architecture_is_checked_and_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, hashed = coupled((4, 3), listed=False), list[str]()
    compute = ll.PrunedArchitecture.computed_hash

    def counted(one: ll.PrunedArchitecture) -> str:
        hashed.append(compute(one))
        return hashed[-1]

    monkeypatch.setattr(ll.PrunedArchitecture, "computed_hash", counted)
    after = architecture.without({"one": [0]})
    assert hashed == [after.model_hash]
    assert ll.decode(ll.PrunedArchitecture, ll.encode(after)) == after
    torn = after.tensors[1:]
    with pytest.raises(ll.InvalidField):
        ll.PrunedArchitecture.build(torn, after.layers, after.groups)


def test_a_hash_of_another_structure_is_refused() -> None:
    plain = msgpack.unpackb(ll.encode(examples.ARCHITECTURE)) | {"model_hash": "0" * 16}
    with pytest.raises(ll.IdentityMismatch) as caught:
        ll.decode(ll.PrunedArchitecture, msgpack.packb(plain))
    assert caught.value.expected == examples.ARCHITECTURE.model_hash
    assert caught.value.found == "0" * 16


@settings(max_examples=20, deadline=None)
@given(cuts())
def test_a_cut_architecture_survives_the_wire(
    case: tuple[ll.PrunedArchitecture, Removed, Removed],
) -> None:
    after = case[0].without(case[1], epoch=3, key="k")
    assert ll.decode(ll.PrunedArchitecture, ll.encode(after)) == after


def _layered() -> ll.PrunedArchitecture:
    """Two convolutions; ``inner`` lies in a block and its hidden group ends there."""
    tensors = tuple(
        ll.TensorDescriptor(path=path, shape=shape, dtype="float32")
        for path, shape in (
            ("stem.weight", (4, 1)),
            ("up.weight", (6, 4)),
            ("down.weight", (4, 6)),
            ("head.weight", (2, 4)),
        )
    )
    layers = tuple(
        ll.LayerDescriptor(name=name, kind="linear", weight=f"{name}.weight", positions=3)
        for name in ("stem", "up", "down", "head")
    )
    stream = ll.PruningGroup(
        name="stem",
        layers=("stem", "down"),
        original_size=4,
        origin=(0, 1, 2, 3),
        slices=tuple(
            ll.TensorSlice(tensor=f"{name}.weight", dim=dim)
            for name, dim in (("stem", 0), ("up", 1), ("down", 0), ("head", 1))
        ),
        sites=(ll.GateSite(module="up", dim=-1), ll.GateSite(module="head", dim=-1)),
    )
    hidden = ll.PruningGroup(
        name="up",
        layers=("up",),
        original_size=6,
        origin=(0, 1, 2, 3, 4, 5),
        slices=(
            ll.TensorSlice(tensor="up.weight", dim=0),
            ll.TensorSlice(tensor="down.weight", dim=1),
        ),
        sites=(ll.GateSite(module="down", dim=-1),),
    )
    block = ll.LayerBlock(
        name="block",
        kind="linear",
        depth=0.5,
        strategy="residual",
        skip_potential=0.95,
        branch="down",
        entry="up",
        stand_ins=(
            ll.StandIn(module="down", kind="zero"),
            ll.StandIn(module="up", kind="identity"),
        ),
        tensors=("up.weight", "down.weight"),
    )
    fixed = block.model_copy(
        update={
            "name": "fixed",
            "prunable": False,
            "reason": "by hand",
            "tensors": ("stem.weight",),
        }
    )
    return ll.PrunedArchitecture.build(tensors, layers, (stream, hidden), blocks=(block, fixed))


def test_removing_a_layer_takes_its_tensors_layers_groups_and_sites_along() -> None:
    before = _layered()
    after = before.without_layers(["block"], epoch=7, key="k")
    assert (before.parameters, after.parameters) == (4 + 24 + 24 + 8, 4 + 8)
    assert (before.macs, after.macs) == (3 * 60, 3 * 12)
    assert [t.path for t in after.tensors] == ["stem.weight", "head.weight"]
    assert [layer.name for layer in after.layers] == ["stem", "head"]
    (stream,) = after.groups
    assert stream.layers == ("stem",)
    assert [part.tensor for part in stream.slices] == ["stem.weight", "head.weight"]
    assert [site.module for site in stream.sites] == ["head"]
    assert (after.original_parameters, after.original_macs) == (60, 180)
    assert after.block["block"].removed
    (record,) = after.history
    assert (record.group, record.level, record.epoch, record.original_indices) == (
        "block",
        ll.Level.LAYER,
        7,
        (),
    )
    assert after.model_hash != before.model_hash
    assert ll.PrunedArchitecture.model_validate_json(after.model_dump_json(), strict=True) == after


def test_layers_and_channels_can_be_removed_in_any_order() -> None:
    one = _layered().without_layers(["block"]).without({"stem": [1]})
    two = _layered().without({"stem": [1], "up": [0, 5]}).without_layers(["block"])
    assert (one.tensors, one.layers, one.groups, one.blocks) == (
        two.tensors,
        two.layers,
        two.groups,
        two.blocks,
    )


@pytest.mark.parametrize(("name", "told"), [("fixed", "by hand"), ("other", "one of")])
def test_a_layer_that_cannot_go_is_refused_by_name(name: str, told: str) -> None:
    with pytest.raises(ll.InvalidField, match=told):
        _layered().without_layers([name])
    with pytest.raises(ll.InvalidField, match="removed before"):
        _layered().without_layers(["block"]).without_layers(["block"])


def test_blocks_count_in_the_hash_and_are_left_out_where_there_are_none() -> None:
    with_blocks = _layered()
    plain = ll.PrunedArchitecture.build(with_blocks.tensors, with_blocks.layers, with_blocks.groups)
    assert plain.model_hash != with_blocks.model_hash
    assert "blocks" not in plain.model_dump()
    assert "blocks" in with_blocks.model_dump()
    unknown = with_blocks.blocks[0].model_copy(update={"tensors": ("nowhere",)})
    with pytest.raises(ll.InvalidField, match=r"blocks\.block\.tensors"):
        ll.PrunedArchitecture.build(plain.tensors, plain.layers, plain.groups, blocks=(unknown,))


def _multiplying() -> ll.PrunedArchitecture:
    """The layered network, which multiplies activations in a block and outside of it."""
    plain = _layered()
    names = [group.name for group in plain.groups]
    path = f"{plain.block['block'].modules[0]}.scores"
    inside = ll.ActivationProduct(module=path, shape=(5, plain.group[names[0]].size))
    cuts = tuple(
        ll.ProductCut(group=name, dim=dim, width=width)
        for dim, (name, width) in enumerate(zip(names, (1, 2), strict=True), 1)
    )
    sizes = [plain.group[name].size for name in names]
    outside = ll.ActivationProduct(shape=(3, sizes[0] + 1, 2 * sizes[1]), cuts=cuts)
    return ll.PrunedArchitecture.build(
        plain.tensors, plain.layers, plain.groups, blocks=plain.blocks, products=(inside, outside)
    )


def test_products_of_activations_are_counted_and_shrink_with_their_units() -> None:
    plain, whole = _layered(), _multiplying()
    one, two = (group.size for group in whole.groups)
    assert whole.macs == plain.macs + 5 * one + 3 * (one + 1) * 2 * two == whole.original_macs
    removed = {whole.groups[0].name: [0], whole.groups[1].name: [1]}
    left = 5 * one + 3 * one * 2 * (two - 1)
    assert whole.without(removed).macs == plain.without(removed).macs + left
    without = whole.without_layers(["block"])
    assert [product.module for product in without.products] == [""]
    kept = {group.name for group in without.groups}
    assert {cut.group for cut in without.products[0].cuts} <= kept
    assert ll.PrunedArchitecture.model_validate(whole.model_dump()) == whole
    assert whole.model_hash == plain.model_hash
    assert "products" not in plain.model_dump()


def test_products_that_have_no_room_for_their_units_are_refused() -> None:
    whole = _multiplying()
    name, size = whole.groups[0].name, whole.groups[0].size

    def refused(shape: tuple[int, ...], group: str, dim: int, told: str) -> None:
        cut = ll.ProductCut(group=group, dim=dim, width=1)
        product = ll.ActivationProduct(module="at", shape=shape, cuts=(cut,))
        with pytest.raises(ll.InvalidField, match=told):
            ll.PrunedArchitecture.build(
                whole.tensors, whole.layers, whole.groups, products=(product,)
            )

    refused((4, size), "nobody", 1, "groups of the architecture")
    refused((4, size), name, 2, "an axis of")
    refused((4, size - 1), name, 1, "has room for")
