"""Time and peak memory of loading a pruned model with transformers, from a view and from a folder.

    python tests/bench/loading_memory.py [--layers 40] [--runs 3] [--work FOLDER]

Writes two checkpoints of 50 MB a layer, one with a matrix per expert (Qwen3-MoE), one with stacked
experts (GraniteMoE), prunes each by half both ways, and loads each result in a process of its own:
as it comes, and with a prompt put through it, which reads the experts that it is sent to. Prints
a table. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import measure
from calibration_memory import EXPERTS, HEADS, HIDDEN, INNER, TOP_K, VOCABULARY
from calibration_memory import make as make_one_by_one

LAYOUTS = ("a matrix per expert", "stacked experts")
WAYS = ("folder", "view", "plan")


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description="Memory of loading a view and a folder.")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the checkpoints are written")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stacked", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--load", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--forward", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        load(given.work, given.load, forward=given.forward)
    elif given.make:
        make(given.make, given.layers, stacked=given.stacked)
    else:
        compare(given.layers, given.runs, given.work)


def compare(layers: int, runs: int, work: Path | None) -> None:
    """Print the table."""
    rows = []
    script = [sys.executable, __file__]
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            folder = Path(scratch)
            stacked = ["--stacked"] * (layout == LAYOUTS[1])
            measure.run([*script, "--make", scratch, "--layers", str(layers), *stacked])
            kept = sum(path.stat().st_size for path in measure.files(folder / "folder"))
            for forward in (False, True):
                option = ["--forward"] * forward
                samples: dict[str, list[measure.Sample]] = {way: [] for way in WAYS}
                for _ in range(runs):
                    for way in WAYS:
                        command = [*script, "--work", scratch, "--load", way, *option]
                        samples[way].append(measure.run(command))
                figures = {way: measure.median(each) for way, each in samples.items()}
                ratio = figures["view"].rss / figures["folder"].rss
                what = f"{layout}, {kept / 1e9:.2f} GB kept, {'one token' if forward else 'loaded'}"
                peaks = [f"{figures[way].rss / 1e6:.0f}" for way in WAYS]
                times = [f"{figures[way].wall:.1f}" for way in WAYS]
                rows.append((what, *peaks, f"{ratio:.2f}", *times))
    peaks = [f"{way}, peak MB" for way in WAYS]
    headings = ("", *peaks, "view ÷ folder", *(f"{way}, s" for way in WAYS))
    print(measure.table(headings, rows))


def make(folder: Path, layers: int, *, stacked: bool) -> None:
    """Write a checkpoint, a plan for it, and what comes of it: a folder and a view."""
    import shardsurgeon

    model = folder / "model"
    if stacked:
        make_stacked(model, layers)
    else:
        make_one_by_one(model, layers)
    kept = {layer: {"kept": list(range(0, EXPERTS, 2))} for layer in range(layers)}
    (folder / "keep.json").write_text(json.dumps(kept))
    plan = shardsurgeon.plan(model, plan_file=folder / "keep.json")
    shardsurgeon.apply(plan, folder / "folder", verify=False)
    shardsurgeon.apply(plan, folder / "view", view=True, verify=False)


def make_stacked(folder: Path, layers: int) -> None:
    """Write a checkpoint of so many layers whose experts are stacked."""
    import torch
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    config = GraniteMoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = GraniteMoeForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="500MB")


def load(folder: Path, way: str, *, forward: bool) -> None:
    """Load one of the results; forward: put a prompt of 64 tokens through it."""
    import torch
    from transformers import AutoModelForCausalLM

    from shardsurgeon.serving import load_pruned

    if way == "folder":
        model = AutoModelForCausalLM.from_pretrained(folder / "folder")
    elif way == "view":
        model = load_pruned(folder / "view")
    else:
        model = load_pruned((folder / "model", folder / "keep.json"))
    if forward:
        with torch.inference_mode():
            tokens = torch.arange(64)[None]
            assert statistics.fmean(model(input_ids=tokens).logits.float().flatten().tolist())


if __name__ == "__main__":
    main()
