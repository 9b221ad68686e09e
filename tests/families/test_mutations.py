"""A checkpoint of any family that is not what its family says is refused, and the culprit named.

Each fixture is spoiled in one place, drawn at random: the error must name the tensor (or the
config key). Layers that are the only ones of their kind can lose what nothing else tells of;
where that is so the test says it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.config import config_section, config_values
from shardsurgeon.checkpoint.layer_consistency import require_complete
from shardsurgeon.checkpoint.layouts import with_other_layouts
from shardsurgeon.checkpoint.roles import Carried, ExpertTensor, Sliced, Surplus, Tabled
from shardsurgeon.errors import ConfigError, FamilyError, InputError
from shardsurgeon.pruning.config_edits import pruned_config
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.storage.formats.tensor_table import TensorRecord
from tests.families.specimens import Specimen, builders, specimen

NAMES = sorted(builders())
WORDS = st.from_regex(r"[a-z][a-z_]{2,12}", fullmatch=True)
a_few = settings(max_examples=6)

every_family = pytest.mark.parametrize("name", NAMES)


@cache
def anatomy(name: str) -> Anatomy:
    return read_anatomy(specimen(name).checkpoint())


def refusal(spoiled: Specimen) -> str:
    """What the user reads who keeps every expert."""
    with pytest.raises(InputError) as caught:
        require_complete(read_anatomy(spoiled.checkpoint()).incomplete, None, "specimen")
    return str(caught.value)


def roles(name: str) -> Iterator[tuple[str, Any]]:
    for tensor, (dtype, shape) in specimen(name).tensors.items():
        yield tensor, anatomy(name).role(TensorRecord(tensor, dtype, shape, 0, 0))


def of_role(name: str, *kinds: type) -> list[str]:
    return [tensor for tensor, role in roles(name) if isinstance(role, kinds)]


@cache
def prefixes(name: str) -> dict[int, str]:
    """Layer → what the names of its tensors begin with, of the MoE layers."""
    found = {}
    for layer in anatomy(name).layers:
        place = anatomy(name).reader.place(layer.router)
        assert place is not None
        found[layer.index] = layer.router[: place[1]]
    return found


def block_of(name: str) -> str:
    """The part of a layer that holds its router."""
    rest = next(iter(anatomy(name).layers)).router.removeprefix(next(iter(prefixes(name).values())))
    names = with_other_layouts(anatomy(name).family.tensors, specimen(name).tensors)
    blocks = [block for block in names.blocks if rest.startswith(f"{block}.")]
    return max(blocks, key=len)


def drawn(data: st.DataObject, tensors: list[str]) -> str:
    if not tensors:
        pytest.skip("this fixture has no such tensor")
    return data.draw(st.sampled_from(tensors))


@every_family
def test_the_fixture_itself_is_accepted(name: str) -> None:
    found = anatomy(name)
    assert found.main_layers
    assert all(layer.router in specimen(name).tensors for layer in found.layers)


@every_family
def test_a_config_with_fewer_layers_than_the_shards_is_refused(name: str) -> None:
    whole = specimen(name)
    keys = anatomy(name).family.config
    paths = [
        (*at, key)
        for at in (tuple(filter(None, place.split("."))) for place in keys.at)
        for key in keys.num_layers
        if type((config_section(whole.config, ".".join(at)) or {}).get(key)) is int
    ]
    if not paths:
        pytest.skip("this config counts a list of layers")
    reader = anatomy(name).reader
    places = (reader.place(tensor) for tensor in whole.tensors)
    has_mtp = any(place is not None and reader.is_mtp(place[0]) for place in places)
    if keys.mtp_layers and not has_mtp:
        pytest.skip("one more layer may be an MTP layer that this config is silent about")
    for path in paths:
        whole = whole.configured(path, anatomy(name).num_layers - 1)
    assert "layer" in refusal(whole)


@every_family
@a_few
@given(data=st.data(), number=st.integers(0, 999))
def test_a_renamed_expert_is_missed_by_name(name: str, data: st.DataObject, number: int) -> None:
    whole = specimen(name)
    tensor = drawn(data, of_role(name, ExpertTensor))
    role = anatomy(name).role(TensorRecord(tensor, "F32", (1,), 0, 0))
    assert isinstance(role, ExpertTensor)
    stem = tensor[: role.begin]
    spoiled = whole
    for other in of_role(name, ExpertTensor):
        if re.match(rf"{re.escape(stem)}{role.expert}(?=\.)", other):
            new = f"{stem}{number}{other[role.end :]}"
            assume(new not in spoiled.tensors)
            spoiled = spoiled.renamed(other, new)
    told = refusal(spoiled)
    assert f"{stem}{role.expert}." in told or f"{stem}{number}." in told


@every_family
@a_few
@given(data=st.data(), word=WORDS)
def test_a_renamed_stacked_tensor_is_missed_by_name(
    name: str, data: st.DataObject, word: str
) -> None:
    stacked = [t for t, r in roles(name) if isinstance(r, Sliced) and not r.is_router]
    tensor = drawn(data, stacked)
    inner = tensor.rpartition(".")[0] + f".{word}"
    told = refusal(specimen(name).renamed(tensor, inner))
    assert tensor in told or inner in told
    layer = anatomy(name).reader.place(tensor)
    assert layer is not None
    if layer[0] < anatomy(name).num_layers and len(anatomy(name).main_layers) > 1:
        # Even a name that the family's pattern takes is not the one the other layers have.
        assert tensor in refusal(specimen(name).renamed(tensor, f"{tensor}_{word}"))


@every_family
@a_few
@given(data=st.data())
def test_a_tensor_lost_from_a_block_is_missed_by_name(name: str, data: st.DataObject) -> None:
    """An expert's weight or scale, a router's weight or bias, a stacked matrix, scale or bias,
    a shared expert's matrix."""
    tensor = drawn(data, losable(name))
    told = refusal(specimen(name).without(tensor))
    if isinstance(dict(roles(name))[tensor], Tabled):
        # A layer that has lost its table looks like one that has lost the other layers' bias.
        place = anatomy(name).reader.place(tensor)
        assert place is not None
        assert f"{tensor[: place[1]]}{block_of(name)}." in told
    else:
        assert tensor in told


@cache
def losable(name: str) -> list[str]:
    """Tensors of MoE blocks whose loss can be seen: an expert's, or one that another layer has."""
    found, reader = anatomy(name), anatomy(name).reader
    kinds: dict[str, list[tuple[str, int]]] = {}
    lonely = {
        place[0]
        for tensor in specimen(name).tensors
        if (place := reader.place(tensor)) and reader.varies(tensor[place[1] :])
    }
    losable = []
    for tensor, role in roles(name):
        place = reader.place(tensor)
        if isinstance(role, ExpertTensor) or tensor in {layer.router for layer in found.layers}:
            losable.append(tensor)
        elif isinstance(role, Surplus):
            pass  # what no one reads, no one misses
        elif place and place[0] in prefixes(name) and reader.in_block(tensor, place[1]):
            kinds.setdefault(tensor[place[1] :], []).append((tensor, place[0]))
    for shared in kinds.values():
        main = [(tensor, layer) for tensor, layer in shared if layer < found.num_layers]
        if len(main) > 1:
            losable += [tensor for tensor, layer in main if layer not in lonely]
    return losable


@every_family
@a_few
@given(data=st.data(), word=WORDS, everywhere=st.booleans(), beside=st.booleans())
def test_an_unknown_vector_per_expert_is_refused_by_name(
    name: str, data: st.DataObject, word: str, everywhere: bool, beside: bool
) -> None:
    """In one layer or in all, in the block or beside it."""
    place = "" if beside else f"{block_of(name)}."
    assume(not any(re.fullmatch(t.replace("*", ".*"), word) for t in beside_of(name)))
    spoiled, counts = specimen(name), anatomy(name).experts_per_layer
    chosen = drawn(data, list(prefixes(name).values()))
    added = {
        f"{prefix}{place}{word}": counts[layer]
        for layer, prefix in prefixes(name).items()
        if everywhere or prefix == chosen
    }
    assume(not any(tensor in spoiled.tensors for tensor in added))
    for tensor, count in added.items():
        spoiled = spoiled.having(tensor, "F32", count)
    told = refusal(spoiled)
    assert any(told.startswith(f"{tensor}: shape [{count}]") for tensor, count in added.items())


def beside_of(name: str) -> tuple[str, ...]:
    return anatomy(name).family.tensors.beside


@every_family
@a_few
@given(data=st.data(), word=WORDS, dtype=st.sampled_from(["I64", "I32"]))
def test_an_unknown_table_in_a_block_is_refused_by_name(
    name: str, data: st.DataObject, word: str, dtype: str
) -> None:
    prefix = drawn(data, list(prefixes(name).values()))
    tensor = f"{prefix}{block_of(name)}.{word}"
    assume(tensor not in specimen(name).tensors)
    told = refusal(specimen(name).having(tensor, dtype, 321, anatomy(name).top_k))
    assert told.startswith(f"{tensor}: shape [321, {anatomy(name).top_k}]")


@every_family
@a_few
@given(data=st.data(), off=st.sampled_from([-1, 1]))
def test_a_router_or_stack_of_another_length_is_refused_by_name(
    name: str, data: st.DataObject, off: int
) -> None:
    sliced = {tensor: role for tensor, role in roles(name) if isinstance(role, Sliced)}
    tensor = drawn(data, list(sliced))
    dtype, shape = specimen(name).tensors[tensor]
    axis = sliced[tensor].axis
    assume(shape[axis] > 2)
    other = (*shape[:axis], shape[axis] + off, *shape[axis + 1 :])
    assert tensor in refusal(specimen(name).having(tensor, dtype, *other))


@cache
def count_paths(name: str) -> list[tuple[str | int, ...]]:
    """Where config.json says the expert count."""
    paths, keys = [], anatomy(name).family.config
    for at in keys.at:
        section = config_section(specimen(name).config, at)
        prefix = tuple(filter(None, at.split(".")))
        own = (keys.per_layer, keys.per_mtp_layer, *keys.mtp_num_experts)
        for dotted in filter(None, (*keys.num_experts, *own)):
            for path, _ in config_values(section, tuple(dotted.split("."))):
                paths.append((*prefix, *path))
    return paths


def identity_experts(name: str) -> int:
    keys = anatomy(name).family.config
    sections = (config_section(specimen(name).config, at) or {} for at in keys.at)
    return next((int(s[keys.extra_rows]) for s in sections if keys.extra_rows in s), 0)


@every_family
@a_few
@given(data=st.data(), off=st.sampled_from([-1, 1, 17]))
def test_a_count_that_is_not_the_tensors_is_refused_with_key_or_tensor(
    name: str, data: st.DataObject, off: int
) -> None:
    path = data.draw(st.sampled_from(count_paths(name)))
    wrong = anatomy(name).num_experts + off
    rows = wrong + identity_experts(name)
    told = refusal(specimen(name).configured(path, wrong))
    keys = {dotted.split(".")[-1] for dotted in anatomy(name).family.config.num_experts}
    assert str(wrong) in told or str(rows) in told
    assert any(key in told for key in keys) or any(
        tensor in told for tensor in specimen(name).tensors
    )


@every_family
def test_a_count_under_an_unknown_key_is_refused_with_the_key(name: str) -> None:
    found, count = anatomy(name), anatomy(name).num_experts
    at = [path[:-1] for path in count_paths(name) if not any(type(part) is int for part in path)]
    path = (*next(iter(at), ()), "experts_to_route")
    spoiled = specimen(name).configured(path, count).checkpoint()
    ids = tuple(range(count))
    layers = {layer.index: LayerKeep(ids[:-1], ids[-1:]) for layer in found.layers}
    with pytest.raises(ConfigError, match="experts_to_route"):
        pruned_config(spoiled, read_anatomy(spoiled), KeepList(count, layers), drop_mtp=False)


@every_family
def test_a_config_without_any_spelling_is_refused_with_the_ones_there_are(name: str) -> None:
    config = renamed_keys(specimen(name).config, set(anatomy(name).family.config.num_experts))
    with pytest.raises(InputError) as caught:
        read_anatomy(Specimen(specimen(name).tensors, config).checkpoint())
    assert isinstance(caught.value, FamilyError | ConfigError)
    assert anatomy(name).family.config.num_experts[0] in str(caught.value)


def renamed_keys(node: Any, paths: set[str]) -> Any:
    keys = {path.rpartition(".")[2] for path in paths}
    if isinstance(node, dict):
        return {f"x_{k}" if k in keys else k: renamed_keys(v, paths) for k, v in node.items()}
    if isinstance(node, list):
        return [renamed_keys(item, paths) for item in node]
    return node


def test_nothing_carried_is_an_expert_of_a_shipped_family() -> None:
    """A guard of the tests above: what they draw from is not empty where it should not be."""
    for name in NAMES:
        kinds = {type(role) for _, role in roles(name)}
        assert Sliced in kinds
        assert Carried in kinds
        assert losable(name)


def test_mtp_layers_may_be_numbered_on_though_the_family_has_a_prefix_for_them() -> None:
    whole, found = specimen("minimax_m3"), anatomy("minimax_m3")
    apart = r"model\.mtp\.layers\.0\.transformer_layer\."
    mtp = [tensor for tensor in whole.tensors if re.search(apart, tensor)]
    for tensor in mtp:
        numbered = re.sub(apart, f"model.layers.{found.num_layers}.", tensor)
        whole = whole.renamed(tensor, numbered)
    assert mtp and read_anatomy(whole.checkpoint()).mtp_layers
