"""Published config.json files, and headers of their own widths to prune.

The files are read from the folder that SHARDSURGEON_PUBLISHED names, or from shared/real beside
the repository; they are no part of it. Of each, the layers are cut down to a few (`outline`), the
widths and the experts are the published ones. Tensor names are those of the published models;
what no MoE block holds is left out.

    python -m tests.families.published     writes shardsurgeon/families/published.md
"""

from __future__ import annotations

import gzip
import json
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardsurgeon import plan
from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.checkpoint.config import config_section, read_numbers
from shardsurgeon.errors import InputError
from shardsurgeon.families.schema import Family, family_for
from shardsurgeon.verification.verify import verify_checkpoint
from tests.support.hollow import HollowSource, Spec, carried_out, shard, whole

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("SHARDSURGEON_PUBLISHED", ROOT.parent / "shared/real")) / "configs"
DOCUMENT = ROOT / "shardsurgeon/families/published.md"

GLU, W123 = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")


@dataclass(frozen=True)
class Names:
    """Of a layer's MoE block: where it stands, its experts' parts, its router.

    stacked: tensors of all experts where no scheme quantizes them, name → dimensions in letters
    (h hidden, i of an expert, 2 twice that); vectors: one number per expert. mtp: prefix of MTP
    layers that count from 0.
    """

    layers: str
    block: str
    projections: tuple[str, ...] = GLU
    router: str = "gate.weight"
    vectors: tuple[str, ...] = ()
    stacked: tuple[tuple[str, str], ...] = ()
    mtp: str = ""


BIAS = ("gate.e_score_correction_bias",)
WRAPPED = "language_model.model.layers"
INSIDE = "model.language_model.layers"
DEEPSEEK = Names("model.layers", "mlp.", vectors=BIAS)
IN_OUT = (("experts.gate_up_proj", "h2"), ("experts.down_proj", "ih"))
OUT_IN = (("experts.gate_up_proj", "2h"), ("experts.down_proj", "hi"))
MINIMAX = ("e_score_correction_bias",)
NAMES = {
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": DEEPSEEK,
    "deepseek_v4": Names("layers", "ffn.", W123, vectors=("gate.bias",), mtp="mtp"),
    "gemma4": Names(INSIDE, "", router="router.proj.weight", vectors=("router.per_expert_scale",),
                    stacked=OUT_IN),
    "glm_moe_dsa": DEEPSEEK,
    "gpt_oss": Names("model.layers", "mlp.", router="router.weight", vectors=("router.bias",)),
    "kimi_k2": DEEPSEEK,
    "kimi_k25": Names(WRAPPED, "mlp.", vectors=BIAS),
    "kimi_k3": Names(WRAPPED, "block_sparse_moe.", W123, vectors=BIAS),
    "llama4": Names(WRAPPED, "feed_forward.", router="router.weight", stacked=IN_OUT),
    "mimo_v2_flash": DEEPSEEK,
    "minimax_m2": Names("model.layers", "block_sparse_moe.", W123, vectors=MINIMAX),
    "minimax_m3": Names(WRAPPED, "block_sparse_moe.", W123, vectors=MINIMAX),
    "mixtral": Names("model.layers", "block_sparse_moe.", W123),
    "nemotron_h": Names("backbone.layers", "mixer.", ("up_proj", "down_proj"), vectors=BIAS,
                        mtp="mtp.layers"),
    "qwen3_5_moe": Names(INSIDE, "mlp.", stacked=OUT_IN, mtp="mtp.layers"),
    "qwen3_moe": Names("model.layers", "mlp."),
    "qwen3_vl_moe": Names(INSIDE, "mlp.", stacked=IN_OUT),
}  # fmt: skip


def scheme(name: str, rows: int, columns: int) -> Iterator[Spec]:
    """Tensors of one weight [rows, columns], by what comes behind the projection's name."""
    if name == "fp8 blocks":
        yield "weight", "F8_E4M3", (rows, columns)
        yield "weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))
    elif name == "FP8":
        yield "weight", "F8_E4M3", (rows, columns)
        yield from (("weight_scale", "F32", ()), ("input_scale", "F32", ()))
    elif name == "NVFP4":
        yield "weight", "U8", (rows, columns // 2)
        yield "weight_scale", "F8_E4M3", (rows, columns // 16)
        yield from (("weight_scale_2", "F32", ()), ("input_scale", "F32", ()))
    elif name == "int4":
        yield "weight_packed", "I32", (rows, columns // 8)
        yield "weight_scale", "BF16", (rows, columns // 32)
        yield "weight_shape", "I32", (2,)
    elif name == "mxfp4":
        yield "weight_packed", "U8", (rows, columns // 2)
        yield "weight_scale", "U8", (rows, columns // 32)
    elif name == "fp4":
        yield "weight", "I8", (rows, columns // 2)
        yield "scale", "F8_E8M0", (rows, columns // 32)
    else:
        yield "weight", "BF16", (rows, columns)


def experts_scheme(config: dict[str, Any], text: dict[str, Any], quantization: str) -> str:
    """How the experts are stored. quantization: what hf_quant_config.json says."""
    section = config.get("quantization_config") or text.get("quantization_config") or {}
    said = f"{section.get('quant_algo')} {section.get('format')} {quantization}"
    if "NVFP4" in said or "MIXED" in said:
        return "NVFP4"
    if "mxfp4" in said:
        return "mxfp4"
    if "pack-quantized" in said:
        return "int4"
    if text.get("expert_dtype") == "fp4":
        return "fp4"
    if section.get("quant_method") == "fp8":
        return "fp8 blocks"
    return "FP8" if "FP8" in said else ""


@dataclass(frozen=True)
class Published:
    """One published model: its name, config.json and hf_quant_config.json (b"" without)."""

    name: str
    config: bytes
    quantization: bytes

    @property
    def settings(self) -> dict[str, Any]:
        """What config.json says."""
        settings: dict[str, Any] = json.loads(self.config)
        return settings


def published() -> Iterator[Published]:
    """Every model below FOLDER."""
    for path in sorted(FOLDER.glob("*_config.json*")):
        stem, _, rest = path.name.partition("_config.json")
        if stem.endswith("_hf_quant"):
            continue
        beside = path.with_name(f"{stem}_hf_quant_config.json{rest}")
        found = beside if beside.exists() else path.with_name(f"{stem}_hf_quant_config.json.gz")
        raw = _content(found) if found.exists() else b""
        yield Published(stem.replace("--", "/"), _content(path), raw)


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def moe_layers(text: dict[str, Any], layers: int) -> list[int]:
    """Which decoder layers have experts, by the keys that published configs say it with."""
    kinds = text.get("layers_block_type") or text.get("hybrid_override_pattern")
    if kinds is not None:
        return [n for n, kind in enumerate(kinds) if kind in ("moe", "E")]
    if isinstance(text.get("moe_layer_freq"), list):
        return [n for n, sparse in enumerate(text["moe_layer_freq"]) if sparse]
    step = text.get("interleave_moe_layer_step") or 1
    first = text.get("first_k_dense_replace") or 0
    return [n for n in range(first, layers) if (n + 1) % step == 0]


def outline(model: Published, family: Family) -> HollowSource:
    """The model's headers: its first two MoE layers and the dense ones before, and its MTP layers.

    config.json says so many layers; everything else in it is the published file's.
    """
    settings = model.settings
    counts = family.config.num_experts
    at = next(
        at for at in family.config.at if any(map((config_section(settings, at) or {}).get, counts))
    )
    text: Any = config_section(settings, at)
    numbers = read_numbers(family, settings, model.name)
    sparse = moe_layers(text, numbers.num_layers)[:2]
    shorten(text, numbers.num_layers, sparse[-1] + 1)
    config = json.dumps(settings, indent=2).encode()
    numbers = read_numbers(family, settings, model.name)
    files = {"config.json": whole(config)}
    if model.quantization:
        files["hf_quant_config.json"] = whole(model.quantization)
    said = json.loads(model.quantization or b"{}").get("quantization", {}).get("quant_algo", "")
    names, how = NAMES[family.name], experts_scheme(settings, text, said)
    prefixes = [f"{names.layers}.{layer}." for layer in sparse]
    for number in range(numbers.mtp_layers):
        own = f"{names.mtp}.{number}." if names.mtp else ""
        prefixes.append(own or f"{names.layers}.{numbers.num_layers + number}.")
    specs = [spec for p in prefixes for spec in block(p, names, text, numbers.experts.every, how)]
    files["model.safetensors"] = shard(specs)
    return HollowSource(model.name, files)


def shorten(text: dict[str, Any], before: int, layers: int) -> None:
    """Say fewer layers, and cut what has an entry for each of them."""
    for key, value in text.items():
        if isinstance(value, list | str) and len(value) == before:
            text[key] = value[:layers]
    if text.get("num_hidden_layers") is not None:
        text["num_hidden_layers"] = layers


def block(
    prefix: str, names: Names, text: dict[str, Any], experts: int, how: str
) -> Iterator[Spec]:
    """The tensors of one MoE block."""
    hidden = text["hidden_size"]
    inner = text.get("moe_intermediate_size") or text["intermediate_size"]
    width = text.get("moe_latent_size") or text.get("routed_expert_hidden_size") or hidden
    stem = prefix + names.block
    # Gemma's router stands beside the experts, in no block.
    yield stem + names.router, "BF16", (experts, hidden)
    for vector in names.vectors:
        yield stem + vector, "F32", (experts,)
    if names.router == "router.weight" and how == "mxfp4":
        groups = hidden // 32
        for part, rows in (("gate_up_proj", 2 * inner), ("down_proj", hidden)):
            yield f"{stem}experts.{part}_blocks", "U8", (experts, rows, groups, 16)
            yield f"{stem}experts.{part}_scales", "U8", (experts, rows, groups)
            yield f"{stem}experts.{part}_bias", "BF16", (experts, rows)
    elif names.stacked and not how:
        sizes = {"h": width, "i": inner, "2": 2 * inner}
        for name, letters in names.stacked:
            yield stem + name, "BF16", (experts, *(sizes[letter] for letter in letters))
    else:
        for expert in range(experts):
            for part in names.projections:
                down = part in ("down_proj", "w2")
                shape = (width, inner) if down else (inner, width)
                for ending, dtype, dims in scheme(how, *shape):
                    yield f"{stem}experts.{expert}.{part}.{ending}", dtype, dims


def outcome(model: Published) -> tuple[str, str, str]:
    """(family, experts, what becomes of it) of one model: pruned by half and verified, or why not.

    Raises AssertionError where the pruned model does not hold.
    """
    settings = model.settings
    try:
        family = family_for(settings, "config.json")
        numbers = read_numbers(family, settings, "config.json")
    except InputError as error:
        dense = "" if "dense" in error.problem else f": {error.remedy}"
        return "", "", f"refused: {error.problem}{dense}"
    count = f"{numbers.experts.every}, {numbers.top_k} at a time"
    source = outline(model, family)
    checkpoint = open_checkpoint(source)
    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.json"
        draw = random.Random(7)
        found = read_anatomy(checkpoint).layers
        table = {each.index: [draw.random() for _ in range(each.num_experts)] for each in found}
        scores.write_text(json.dumps(table))
        made = plan(checkpoint, scores, ratio=0.5, out=Path(folder) / "out")
        result = carried_out(made.plan, source, f"{model.name}-pruned")
        report = verify_checkpoint(checkpoint, result, sample=2, sample_nbytes=4096)
    assert report.differences == (), (model.name, report.differences)
    before, after = (
        json.loads(place.read("config.json", 0, _size(place))) for place in (source, result)
    )
    changed = dict(differing(before, after))
    experts = numbers.experts.every
    assert changed, model.name
    assert all(pair == (experts, made.decision.kept) for pair in changed.values()), changed
    return family.name, count, f"pruned to {made.decision.kept} and verified"


def _size(source: HollowSource) -> int:
    return next(file.nbytes for file in source.list() if file.name == "config.json")


def differing(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(path, both values) of every leaf that two configs have not in common."""
    if isinstance(before, dict) and isinstance(after, dict) and list(before) == list(after):
        for key in before:
            yield from differing(before[key], after[key], f"{path}.{key}".lstrip("."))
    elif before != after and not path.startswith(("quantization_config", "text_config.quant")):
        yield path, (before, after)


def row(model: Published) -> str:
    """The model's row of the table."""
    family, count, said = outcome(model)
    return f"| {model.name} | {f'`{family}`' if family else ''} | {count} | {said} |"


def document(rows: list[str]) -> str:
    """The whole of shardsurgeon/families/published.md."""
    return "\n".join(
        [HEAD, "| model | family | experts | outcome |", "|---|---|---|---|", *rows, ""]
    )


HEAD = """# Published models

Made by `python -m tests.families.published`, which needs the published config.json files \
(`SHARDSURGEON_PUBLISHED` names the folder that holds them; they are no part of the project). Each \
is put beside safetensors headers of its own widths, experts and quantization: its first two MoE \
layers, the dense ones before them and its MTP layers. The model is pruned by half, the result \
verified, and in its config nothing but expert counts and lists of experts may differ. \
`tests/families/test_published.py` compares.
"""

if __name__ == "__main__":
    DOCUMENT.write_text(document([row(model) for model in published()]), encoding="utf-8")
