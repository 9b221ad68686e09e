from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.support.hub.models import ROOT, add_fixture, fixture_folder, write_checkpoint
from tests.support.hub.server import LocalHub


@pytest.mark.parametrize("layout", ["int4", "stacked"])
def test_a_checkpoint_has_about_the_size_and_all_that_its_index_says(
    tmp_path: Path, layout: str
) -> None:
    sample = write_checkpoint(tmp_path / "model", layout, 20_000_000, shards=5, experts=32)
    shards = sorted(sample.folder.glob("*.safetensors"))
    assert len(shards) == 5
    assert 10e6 < sum(shard.stat().st_size for shard in shards) < 30e6
    index = json.loads((sample.folder / "model.safetensors.index.json").read_text())
    found = {}
    for shard in shards:
        with safe_open(shard, "np") as file:
            found.update(dict.fromkeys(file.keys(), shard.name))
    assert found == index["weight_map"]
    assert sample.scores.parent == tmp_path
    assert {len(row) for row in json.loads(sample.scores.read_text()).values()} == {32}


def test_shards_hold_different_bytes_and_the_same_ones_each_time(tmp_path: Path) -> None:
    first, again = (
        write_checkpoint(tmp_path / name, "int4", 20_000_000, shards=3, experts=8)
        for name in ("a", "b")
    )
    shards = [path.read_bytes() for path in sorted(first.folder.glob("*.safetensors"))]
    assert shards == [path.read_bytes() for path in sorted(again.folder.glob("*.safetensors"))]
    assert len({shard[-4096:] for shard in shards}) == 3


def test_a_fixture_becomes_a_repository(hub: LocalHub) -> None:
    add_fixture(hub, "qwen3_moe", "org/qwen", private=True)
    config = (fixture_folder("qwen3_moe") / "config.json").read_bytes()
    assert hub.read("org/qwen", "config.json") == config


def test_people_may_serve_a_folder(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.support.hub.serve",
        f"org/qwen={fixture_folder('qwen3_moe')}",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert server.stdout is not None
    with server, server.stdout as printed:
        try:
            told = re.findall(r"^export (\w+)=(.*)$", "".join(_until(printed, "no_proxy")), re.M)
            script = "import huggingface_hub as h; print(h.HfApi().list_repo_files('org/qwen')[0])"
            done = subprocess.run(
                [sys.executable, "-c", script],
                env={**os.environ, **dict(told), "HF_HOME": str(tmp_path)},
                capture_output=True,
                text=True,
                check=True,
            )
        finally:
            server.terminate()
    assert done.stdout.strip() == "LICENSE"


def _until(lines: object, word: str) -> list[str]:
    found = []
    for line in lines:  # type: ignore[attr-defined]
        found.append(line)
        if word in line:
            break
    return found
