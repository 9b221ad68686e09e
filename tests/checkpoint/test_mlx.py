"""MLX's layout of a declared family: experts stacked as `switch_mlp`, quantized or not.

Tensor names as mlx-lm writes them for each family. A quantized module has its weights in words
along the inputs, with scales and biases beside them, the experts first as in all of MLX's tensors.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from shardsurgeon import apply, inspect, open_checkpoint, plan, verify
from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.guess import guess_family
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.checkpoint.quantization import count_parameters
from shardsurgeon.families.schema import all_families
from tests.support.hollow import HollowSource, Spec, shard, whole

EXPERTS, HIDDEN, WIDTH, GROUP = 4, 128, 64, 64
GLU = ("gate_proj", "up_proj", "down_proj")

Tensors = dict[str, NDArray[np.generic]]


class Layout(NamedTuple):
    """Names of a layer's experts and of its router's matrix and vectors, behind its number."""

    layers: str
    experts: str
    router: str
    vectors: tuple[str, ...] = ()
    projections: tuple[str, ...] = GLU


PLAIN, WRAPPED = "model.layers", "language_model.model.layers"
BIAS = ("mlp.gate.e_score_correction_bias",)
SOFTMAX = Layout(PLAIN, "mlp.switch_mlp", "mlp.gate")
SIGMOID = Layout(PLAIN, "mlp.switch_mlp", "mlp.gate", BIAS)
SPARSE = Layout(PLAIN, "block_sparse_moe.switch_mlp", "block_sparse_moe.gate")
GRANITE = Layout(PLAIN, "block_sparse_moe.switch_mlp", "block_sparse_moe.router.layer")
LAYOUTS = {
    "bailing_moe": Layout(PLAIN, "mlp.switch_mlp", "mlp.gate.gate_proj", ("mlp.gate.expert_bias",)),
    "deepseek_v2": SOFTMAX,
    "deepseek_v3": SIGMOID,
    "deepseek_v32": SIGMOID,
    "dots1": Layout(PLAIN, "mlp.experts", "mlp.gate", BIAS),
    "ernie4_5_moe": SOFTMAX,
    "gemma4": Layout(WRAPPED, "experts.switch_glu", "router.proj", ("router.per_expert_scale",)),
    "glm4_moe": SIGMOID,
    "glm4_moe_lite": SIGMOID,
    "glm_moe_dsa": SIGMOID,
    "gpt_oss": Layout(PLAIN, "mlp.experts", "mlp.router", ("mlp.router.bias",)),
    "granitemoe": GRANITE,
    "granitemoehybrid": GRANITE,
    "hunyuan_v1_moe": Layout(PLAIN, "mlp.switch_mlp", "mlp.gate.wg"),
    "jamba": Layout(PLAIN, "feed_forward.switch_mlp", "feed_forward.router"),
    "kimi_k2": SIGMOID,
    "kimi_k25": SIGMOID._replace(layers=WRAPPED),
    "kimi_linear": SOFTMAX._replace(vectors=("mlp.e_score_correction_bias",)),
    "llama4": Layout(WRAPPED, "feed_forward.experts", "feed_forward.router"),
    "longcat_flash": Layout(
        PLAIN, "mlp.switch_mlp", "mlp.router.classifier", ("mlp.router.e_score_correction_bias",)
    ),
    "mimo_v2_flash": SIGMOID,
    "minimax_m2": SPARSE._replace(vectors=("block_sparse_moe.e_score_correction_bias",)),
    "mixtral": SPARSE,
    "nemotron_h": Layout(
        "backbone.layers",
        "mixer.switch_mlp",
        "mixer.gate",
        ("mixer.gate.e_score_correction_bias",),
        ("fc1", "fc2"),
    ),
    "olmoe": SOFTMAX,
    "phimoe": SPARSE,
    "qwen2_moe": SOFTMAX,
    "qwen3_5_moe": SOFTMAX._replace(layers=WRAPPED),
    "qwen3_moe": SOFTMAX,
    "qwen3_next": SOFTMAX,
    "qwen3_vl_moe": SOFTMAX._replace(layers=WRAPPED),
    "step3p5": Layout(PLAIN, "mlp.switch_mlp", "mlp.gate.gate", ("mlp.gate.router_bias",)),
}
each_family = pytest.mark.parametrize("name", LAYOUTS)
# Rows are rows, whatever stands in them: two families show the other widths.
WIDTHS = [
    *((name, 4) for name in LAYOUTS),
    ("qwen3_moe", None),
    ("qwen3_moe", 6),
    ("gpt_oss", None),
]


def config(name: str, bits: int | None) -> dict[str, Any]:
    """The counts under the family's first spelling, in its first place; routers in 8 bits."""
    family = next(family for family in all_families() if family.name == name)
    keys = family.config
    counts: dict[str, Any] = {keys.num_experts[0]: EXPERTS, keys.top_k[0]: 1}
    counts[keys.num_layers[0]] = ["moe", "moe"] if "list" in keys.num_layers[0] else 2
    if keys.num_layers[0] == "layers_block_type":
        counts["layers_block_type"] = ["moe", "moe"]
    found: dict[str, Any] = {"model_type": family.model_types[0]}
    node = found
    for key in filter(None, keys.at[0].split(".")):
        node = node.setdefault(key, {})
    node |= counts
    if bits is not None:
        layout = LAYOUTS[name]
        scheme: dict[str, Any] = {"group_size": GROUP, "bits": bits, "mode": "affine"}
        for layer in range(2):
            eight = {"group_size": GROUP, "bits": 8}
            scheme[f"{layout.layers}.{layer}.{layout.router}"] = eight
        found |= {"quantization": scheme, "quantization_config": scheme}
    return found


def module(name: str, rows: int, columns: int, bits: int | None, lead: tuple[int, ...]) -> Tensors:
    """A linear layer of MLX's, `[*lead, rows, columns]`, every number of it another one."""

    def numbered(width: int, dtype: str) -> NDArray[np.generic]:
        shape = (*lead, rows, width)
        return np.arange(np.prod(shape)).reshape(shape).astype(dtype)

    if bits is None:
        return {f"{name}.weight": numbered(columns, "f4")}
    return {
        f"{name}.weight": numbered(columns * bits // 32, "u4"),
        f"{name}.scales": numbered(columns // GROUP, "f4"),
        f"{name}.biases": -numbered(columns // GROUP, "f4"),
    }


def tensors(name: str, bits: int | None) -> Tensors:
    layout, made = LAYOUTS[name], dict[str, NDArray[np.generic]]()
    for layer in range(2):
        prefix = f"{layout.layers}.{layer}"
        for projection in layout.projections:
            shape = (HIDDEN, WIDTH) if projection in ("down_proj", "fc2") else (WIDTH, HIDDEN)
            made |= module(f"{prefix}.{layout.experts}.{projection}", *shape, bits, (EXPERTS,))
        router = f"{prefix}.{layout.router}"
        made |= module(router, EXPERTS, HIDDEN, bits and 8, ())
        made |= {f"{prefix}.{v}": np.arange(EXPERTS, dtype="f4") for v in layout.vectors}
        made[f"{prefix}.input_layernorm.weight"] = np.ones(HIDDEN, "f4")
    return made


def parameters(made: Tensors, bits: int | None) -> int:
    """As mlx-lm counts them: the numbers that the words stand for, scales and biases left out."""
    total = 0
    for name, values in made.items():
        if values.dtype == np.uint32:
            of_router = "switch" not in name and "experts" not in name
            total += values.size * 32 // (8 if of_router else bits or 32)
        elif not name.endswith((".scales", ".biases")):
            total += values.size
    return total


def write(folder: Path, name: str, bits: int | None) -> Path:
    folder.mkdir()
    made = tensors(name, bits)
    weight_map = {key: f"model-0000{1 + ('.1.' in key)}-of-00002.safetensors" for key in made}
    for file in set(weight_map.values()):
        held = {key: values for key, values in made.items() if weight_map[key] == file}
        save_file(held, folder / file, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config(name, bits), indent=2), encoding="utf-8")
    size = sum(values.nbytes for values in made.values())
    metadata = {"total_size": size, "total_parameters": parameters(made, bits)}
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("name", "bits"), WIDTHS)
def test_what_mlx_writes_is_pruned_by_rows(name: str, bits: int | None, tmp_path: Path) -> None:
    source, out, scores = write(tmp_path / "m", name, bits), tmp_path / "out", tmp_path / "s.json"
    scores.write_text(json.dumps({layer: [4.5, 0.5, 1.25, 3.5] for layer in range(2)}))
    done = apply(plan(source, scores, ratio=0.5), out)
    assert done.serve is None  # vLLM reads no such layout
    assert verify(source, out).holds
    expected = {
        key: values[[0, 3]] if len(values) == EXPERTS else values
        for key, values in tensors(name, bits).items()
    }
    found = dict[str, NDArray[np.generic]]()
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert np.array_equal(found[key], values), key
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == parameters(expected, bits)
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, out))
    assert after.get("quantization") == before.get("quantization")


@each_family
def test_the_router_is_the_words_and_not_their_scales(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", name, 4)
    layers = read_anatomy(open_checkpoint(folder)).layers
    layout = LAYOUTS[name]
    routers = [f"{layout.layers}.{layer}.{layout.router}.weight" for layer in range(2)]
    assert [layer.router for layer in layers] == routers
    assert inspect(folder).quantization == "mlx affine"


def mistral4() -> HollowSource:
    """Mistral 4 in 4 bits as mlx-lm wrote it, its router in bfloat16, without vision."""
    text = {
        "hidden_size": 4096,
        "model_type": "mistral4",
        "n_routed_experts": 128,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 36,
    }
    scheme = {"group_size": 64, "bits": 4, "mode": "affine"}
    content = {"model_type": "mistral3", "quantization": scheme, "quantization_config": scheme}
    specs: list[Spec] = [("language_model.model.norm.weight", "BF16", (4096,))]

    def add(name: str, *shape: int) -> None:
        *lead, columns = shape
        specs.append((f"language_model.{name}.weight", "U32", (*lead, columns // 8)))
        for kind in ("scales", "biases"):
            specs.append((f"language_model.{name}.{kind}", "BF16", (*lead, columns // 64)))

    add("model.embed_tokens", 131072, 4096)
    add("lm_head", 131072, 4096)
    for layer in range(36):
        at = f"model.layers.{layer}"
        for name, size in (
            ("input_layernorm", 4096),
            ("post_attention_layernorm", 4096),
            ("self_attn.q_a_layernorm", 1024),
            ("self_attn.kv_a_layernorm", 256),
        ):
            specs.append((f"language_model.{at}.{name}.weight", "BF16", (size,)))
        specs.append((f"language_model.{at}.mlp.gate.weight", "BF16", (128, 4096)))
        add(f"{at}.self_attn.q_a_proj", 1024, 4096)
        add(f"{at}.self_attn.q_b_proj", 32 * 128, 1024)
        add(f"{at}.self_attn.kv_a_proj_with_mqa", 256 + 64, 4096)
        add(f"{at}.self_attn.embed_q", 32, 256, 64)
        add(f"{at}.self_attn.unembed_out", 32, 128, 256)
        add(f"{at}.self_attn.o_proj", 4096, 32 * 128)
        for block, lead in (("shared_experts", ()), ("switch_mlp", (128,))):
            for part in ("gate_proj", "up_proj"):
                add(f"{at}.mlp.{block}.{part}", *lead, 2048, 4096)
            add(f"{at}.mlp.{block}.down_proj", *lead, 4096, 2048)
    raw = json.dumps({**content, "text_config": text}).encode()
    return HollowSource("mistral4", {"config.json": whole(raw), "m.safetensors": shard(specs)})


def test_a_published_model_has_the_size_and_parameters_that_its_index_says() -> None:
    checkpoint = open_model(mistral4())
    assert checkpoint.total_size == 66_949_842_944
    assert count_parameters(checkpoint.tables, checkpoint.settings) == 118_972_826_624


def test_a_published_model_of_an_undeclared_wrapper_can_be_read_by_auto() -> None:
    checkpoint = open_model(mistral4())
    family = guess_family(checkpoint).family
    found = read_anatomy(replace(checkpoint, family=family))
    assert (len(found.layers), found.num_experts, found.top_k) == (36, 128, 4)
    # Per expert and layer three matrices in 4 bits with scales and biases, and a router row.
    matrices = 3 * 2048 * 4096
    each = matrices // 2 + 2 * 2 * matrices // 64 + 2 * 4096
    assert found.expert_nbytes == (each, each)
