"""Peak memory of a calibration over the number of layers: it must stay flat.

    python tests/bench/calibration_memory.py [--layers 4 16 64] [--work FOLDER] [--tokens 2048]

Writes Qwen3-MoE checkpoints that differ in their number of layers alone, calibrates each in a
process of its own, in bfloat16 on the CPU, and prints a table. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure

HIDDEN, INNER, EXPERTS, TOP_K, HEADS, HEAD = 512, 256, 64, 8, 8, 64
VOCABULARY, SAMPLE_TOKENS = 4096, 256

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": 4 * HIDDEN,
    "max_position_embeddings": 4096,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": INNER,
    "norm_topk_prob": True,
    "num_attention_heads": HEADS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
}


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description="Peak memory of calibrate over layers.")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--tokens", type=int, default=2048, help="of all samples together")
    parser.add_argument("--work", type=Path, help="where the checkpoints are written")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.make, given.layers[0])
    elif given.calibrate:
        calibrate(given.calibrate, given.tokens)
    else:
        compare(given.layers, given.tokens, given.work)


def compare(layers: list[int], tokens: int, work: Path | None) -> None:
    """Print the table."""
    rows = []
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        for count in layers:
            folder = Path(scratch) / str(count)
            script = [sys.executable, __file__]
            measure.run([*script, "--make", str(folder), "--layers", str(count)])
            size = sum(path.stat().st_size for path in measure.files(folder))
            figures = measure.run([*script, "--calibrate", str(folder), "--tokens", str(tokens)])
            rows.append(
                (str(count), _mb(size), _mb(size / count), _mb(figures.rss), f"{figures.wall:.0f}")
            )
            measure.remove(folder)
    headings = ("layers", "checkpoint, MB", "one layer, MB", "peak memory, MB", "seconds")
    print(measure.table(headings, rows))


def make(folder: Path, layers: int) -> None:
    """Write a checkpoint of so many layers, one shard each."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Any:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16()

    weight_map = {}
    outside = {
        "model.embed_tokens.weight": drawn(VOCABULARY, HIDDEN),
        "lm_head.weight": drawn(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
    }
    parts = [outside, *(_layer(layer, drawn) for layer in range(layers))]
    for number, tensors in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    config = {**CONFIG, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _layer(layer: int, drawn: Any) -> dict[str, Any]:
    import torch

    stem, attention = f"model.layers.{layer}", HEADS * HEAD
    tensors = {
        f"{stem}.mlp.gate.weight": drawn(EXPERTS, HIDDEN),
        f"{stem}.self_attn.o_proj.weight": drawn(HIDDEN, attention),
    }
    for name in "qkv":
        tensors[f"{stem}.self_attn.{name}_proj.weight"] = drawn(attention, HIDDEN)
    for name in ("self_attn.q_norm", "self_attn.k_norm"):
        tensors[f"{stem}.{name}.weight"] = torch.ones(HEAD).bfloat16()
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{stem}.{name}.weight"] = torch.ones(HIDDEN).bfloat16()
    for expert in range(EXPERTS):
        own = f"{stem}.mlp.experts.{expert}"
        tensors[f"{own}.gate_proj.weight"] = drawn(INNER, HIDDEN)
        tensors[f"{own}.up_proj.weight"] = drawn(INNER, HIDDEN)
        tensors[f"{own}.down_proj.weight"] = drawn(HIDDEN, INNER)
    return tensors


def calibrate(folder: Path, tokens: int) -> None:
    """Run the engine over samples of random tokens."""
    import numpy as np

    from shardsurgeon.checkpoint.checkpoint import open_checkpoint
    from shardsurgeon.layerwise.activations import ActivationStore
    from shardsurgeon.layerwise.engine import calibrate_layers
    from shardsurgeon.layerwise.samples import Sample
    from shardsurgeon.layerwise.settings import Settings

    generator = np.random.default_rng(0)
    samples = [
        Sample(generator.integers(0, VOCABULARY, SAMPLE_TOKENS), "random", number)
        for number in range(tokens // SAMPLE_TOKENS)
    ]
    with (
        tempfile.TemporaryDirectory() as scratch,
        ActivationStore(Path(scratch), [len(s.ids) for s in samples], 1 << 30) as store,
    ):
        calibrate_layers(
            open_checkpoint(folder),
            samples,
            Settings(dtype="bfloat16"),
            store,
            _Forget(),
            lambda progress: None,
        )


class _Forget:
    """A sink that keeps nothing."""

    def finished_layer(self, index: int, is_mtp: bool, accumulators: object) -> None:
        """Nothing."""

    def done_layers(self) -> set[int]:
        """None."""
        return set()


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.0f}"


if __name__ == "__main__":
    main()
