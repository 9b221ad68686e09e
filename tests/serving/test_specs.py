"""`fit`'s bytes against vLLM's own: KV cache specs and parameters, built from config.json.

Every family that vLLM's CPU build constructs, on one and on two ranks; nothing is served.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import read_numbers
from shardsurgeon.checkpoint.kv_cache import KVCache, read_kv_cache
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.checkpoint.tensor_parallel import Parallel, gpu_weights
from tests.families.specimens import FIXTURES, fixture, written
from tests.serving.asking import planned
from tests.serving.cases import CASES

pytestmark = [pytest.mark.serving, pytest.mark.slow]

# Fixtures of the families that the CPU build constructs; the tiny ones' heads divide by 2.
ALONE = (
    *("afmoe", "aria_text", "axk1", "dbrx", "deepseek_v2", "deepseek_v3", "dots1"),
    *("ernie4_5_moe", "exaone_moe", "flex_olmo", "gemma4", "glm4_moe", "glm4_moe_lite"),
    *("gpt_oss_bf16", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
    *("hunyuan_v1_moe", "hy_v3", "jamba", "laguna", "lfm2_moe", "llama4", "longcat_flash"),
    *("minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe"),
    *("qwen3_next", "qwen3_vl_moe", "solar_open", "step3_text"),
)
IN_TWO = (
    *("dbrx", "deepseek_v3", "gemma4", "glm4_moe", "granitemoehybrid", "jamba", "lfm2_moe"),
    *("llama4", "longcat_flash", "qwen3_5_moe", "qwen3_moe", "qwen3_next"),
)
CASES_OF_SPECS = [(1, name) for name in ALONE] + [(2, name) for name in IN_TWO]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("specs")
    return {name: written(fixture(name), place) for name in ALONE}


def cache_of(model: Checkpoint, ranks: int) -> KVCache:
    family = read_anatomy(model).family
    numbers = read_numbers(family, model.settings, "config.json")
    return read_kv_cache(family, model.settings, numbers, "config.json", ranks=ranks)


@pytest.mark.parametrize(("ranks", "name"), CASES_OF_SPECS)
def test_the_kv_cache_is_what_vllm_plans(folders: dict[str, Path], ranks: int, name: str) -> None:
    names = ALONE if ranks == 1 else IN_TWO
    vllm = planned(ranks, tuple(folders[each] for each in names))[name]
    assert "error" not in vllm, vllm
    ours = cache_of(open_model(str(folders[name])), ranks)
    specs = list(vllm["caches"].values())
    # A kernel may want windows in larger blocks than the rest: on a CPU it does.
    windows = {block for kind, block, _ in specs if "Sliding" in kind} or {16}
    (window,) = windows
    caches = [each for layer in ours.layers for each in layer]
    blocks = [window if each.slack else 16 for each in caches]
    pages = [
        each.row_nbytes * (1 if each.is_state else block)
        for each, block in zip(caches, blocks, strict=True)
    ]
    assert sorted(pages) == sorted(nbytes for _, _, nbytes in specs)
    for tokens, nbytes in vllm["sequence"].items():
        mine = sum(
            each.sequence_nbytes(int(tokens), block)
            for each, block in zip(caches, blocks, strict=True)
        )
        assert mine == nbytes, tokens


@pytest.fixture(scope="session")
def serving_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    place = tmp_path_factory.mktemp("serving")
    command = [sys.executable, "-m", "builders.serving", *CASES, "--out", str(place)]
    subprocess.run(command, cwd=FIXTURES, check=True, stdout=subprocess.DEVNULL)
    return tuple(place / name for name in CASES)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("position", range(len(CASES)), ids=list(CASES))
def test_a_gpu_has_the_weights_that_vllm_loads(
    serving_folders: tuple[Path, ...], position: int, ranks: int
) -> None:
    folder = serving_folders[position]
    vllm = planned(ranks, serving_folders)[folder.name]
    assert "error" not in vllm, vllm
    model = open_model(str(folder))
    ours = gpu_weights(model, read_anatomy(model)).nbytes(16, Parallel(ranks, ranks))
    # The CPU build serves the language model alone.
    records = (record for shard in model.shards for record in shard.header.tensors)
    seen = sum(record.nbytes for record in records if ".visual." in record.name)
    assert ours - seen / ranks == pytest.approx(vllm["weights"], rel=0.01)
