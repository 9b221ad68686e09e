"""A view of every family's fixture: read and materialised, it is what `apply` writes."""

from __future__ import annotations

from pathlib import Path

import pytest

import shardsurgeon
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.storage.formats.view import DATA_NAME
from tests.families.specimens import builders, fixture, written
from tests.operations.workbench import digests

# Families whose tensors tell expert ids or counts as values, which no range of the source has.
WITH_VALUES = {
    *("deepseek_v4", "deepseek_v4_vision", "inkling_nvfp4"),
    *("stacked_int4_asymmetric", "stacked_int4_symmetric"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(builders()))
def test_a_view_materialises_to_what_apply_writes(name: str, tmp_path: Path) -> None:
    source = written(fixture(name), tmp_path)
    plan = shardsurgeon.plan(source, source / "scores.pt", ratio=0.5)
    shardsurgeon.apply(plan, tmp_path / "direct")
    shardsurgeon.apply(plan, tmp_path / "view", view=True, verify=False)
    direct = digests(tmp_path / "direct")
    made = shardsurgeon.materialize(tmp_path / "view", tmp_path / "made")
    assert made.verification is not None and made.verification.holds
    assert digests(tmp_path / "made") == direct
    view = open_checkpoint(tmp_path / "view")
    for shard in view.shards:
        read = b"".join(view.source.stream(shard.file, 0, shard.nbytes))
        assert read == (tmp_path / "direct" / shard.file).read_bytes(), shard.file
    assert (tmp_path / "view" / DATA_NAME).exists() == (name in WITH_VALUES)
