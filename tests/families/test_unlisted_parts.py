"""In every family: a head in a file that no index lists is known for what it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.roles import Carried
from shardsurgeon.checkpoint.shards import Shard
from shardsurgeon.checkpoint.unlisted import forgotten_parts
from shardsurgeon.storage.formats.tensor_table import TensorRecord
from tests.families.specimens import builders, specimen


def is_mtp(record: TensorRecord, anatomy: Anatomy) -> bool:
    role = anatomy.role(record)
    return role.mtp if isinstance(role, Carried) else anatomy.reader.is_mtp(role.layer)


def divided(shard: Shard, anatomy: Anatomy) -> tuple[Shard, Shard]:
    """The model without its MTP layers, and these in a file of their own."""
    tensors: dict[bool, list[TensorRecord]] = {False: [], True: []}
    for record in shard.header.tensors:
        tensors[is_mtp(record, anatomy)].append(record)
    main, head = (replace(shard.header, tensors=tuple(tensors[kind])) for kind in (False, True))
    return replace(shard, header=main), Shard("mtp.safetensors", 0, head, "")


@pytest.mark.parametrize("name", sorted(builders()))
def test_a_head_is_known_and_a_whole_model_lacks_nothing(name: str) -> None:
    checkpoint = specimen(name).checkpoint()
    anatomy, config = read_anatomy(checkpoint), checkpoint.settings
    whole = checkpoint.shards
    main, head = divided(whole[0], anatomy)
    if not head.header.tensors:
        pytest.skip("has no MTP layers")
    assert anatomy.absent_mtp_layers == 0
    assert forgotten_parts([main], [head], anatomy.family, config) == [head]
    assert forgotten_parts(whole, [head, *whole], anatomy.family, config) == []


@pytest.mark.parametrize("name", sorted(builders()))
def test_a_decoder_layer_is_known_too(name: str) -> None:
    checkpoint = specimen(name).checkpoint()
    anatomy = read_anatomy(checkpoint)
    layer = anatomy.main_layers[-1].index
    parts: dict[bool, list[TensorRecord]] = {False: [], True: []}
    for record in checkpoint.records:
        place = anatomy.reader.place(record.name)
        parts[place is not None and place[0] == layer].append(record)
    shard = checkpoint.shards[0]
    rest, part = (
        replace(shard, file=file, header=replace(shard.header, tensors=tuple(parts[kind])))
        for kind, file in ((False, "rest.safetensors"), (True, "part.safetensors"))
    )
    assert forgotten_parts([rest], [part], anatomy.family, checkpoint.settings) == [part]
