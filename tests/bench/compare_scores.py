"""Which metric is right for a model: perplexity against ratio, for measured scores and baselines.

    python tests/bench/compare_scores.py WORK [--ratios 0.25,0.5,0.65] [--check | --check only]

WORK is what `small_model.py` wrote. Calibrates on its `code.jsonl` and `prose.jsonl`, scores by
weights and at random, has `plan` choose the experts that stay for each metric and ratio, has
`evaluate` measure all of them on the held-out records, and prints a table. `--check` prunes each
for real as well, measures with transformers, and fails where the two differ; `--check only` is
that measurement alone. What it makes lies in WORK/compared, made anew each time. Needs torch and
transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
from small_model import MODEL, PARTS, WINDOW

SEEDS = 5
# (label, score file, metric): of a calibration, which has many, and of files that have one.
MEASURED = [
    (f"`{metric}`", "calibration.safetensors", metric)
    for metric in ("reap", "man", "weighted_ean_sum", "ean_sum", "expert_frequency")
]
BASELINES = [
    ("router norms", "router.safetensors", ""),
    ("weight norms", "norm.safetensors", ""),
    ("AIMER", "aimer.safetensors", ""),
]
RANDOM = [(f"random {seed}", f"random-{seed}.safetensors", "") for seed in range(SEEDS)]
WAYS = [*MEASURED, *BASELINES, *RANDOM]
# Of a perplexity: float32 sums in another order.
TOLERANCE = 1e-5


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--ratios", default="0.25,0.5,0.65")
    parser.add_argument("--samples", type=int, default=512, help="to calibrate on")
    parser.add_argument("--check", nargs="?", const="too", choices=("too", "only"))
    given = parser.parse_args()
    work, ratios = given.work.resolve(), given.ratios.split(",")
    into = work / "compared"
    measure.remove(into)
    into.mkdir()
    make_scores(work, into, given.samples)
    plans = [plan(work, into, way, ratio) for way in WAYS for ratio in ratios]
    checked = by_transformers(work, into, plans) if given.check else []
    measured = checked if given.check == "only" else by_evaluate(work, into, plans)
    print(table(ratios, measured))
    if given.check == "too":
        worst = max(abs(a / b - 1) for a, b in zip(measured, checked, strict=True))
        print(f"\ntransformers on the pruned folders differs by {worst:.1e} at most")
        sys.exit(worst > TOLERANCE)


def make_scores(work: Path, into: Path, samples: int) -> None:
    """Write every score file that WAYS names."""
    model = str(work / MODEL)
    data = ",".join(str(work / f"{part}.jsonl") for part in PARTS)
    sampling = ["--samples", str(samples), "--max-length", str(WINDOW)]
    calibration = str(into / "calibration.safetensors")
    surgeon("calibrate", model, "--dataset", data, *sampling, "-o", calibration)
    surgeon("scores", "from-router", model, "-o", str(into / "router.safetensors"))
    for criterion in ("norm", "aimer"):
        words = ["scores", "from-weights", model, "--criterion", criterion]
        surgeon(*words, "-o", str(into / f"{criterion}.safetensors"))
    for seed, (_, file, _) in enumerate(RANDOM):
        surgeon("scores", "random", model, "--seed", str(seed), "-o", str(into / file))


def plan(work: Path, into: Path, way: tuple[str, str, str], ratio: str) -> Path:
    """The keep-lists of one metric at one ratio."""
    _, file, metric = way
    path = into / f"{metric or Path(file).stem}-{ratio}.json"
    words = [str(into / file), "--model", str(work / MODEL), "--ratio", ratio]
    surgeon("plan", *words, *(["--metric", metric] if metric else []), "-o", str(path))
    return path


def held_out(work: Path) -> list[Path]:
    """The files that perplexity is measured on, every record of them."""
    return [work / f"{part}-test.jsonl" for part in PARTS]


def by_evaluate(work: Path, into: Path, plans: Sequence[Path]) -> list[float]:
    """Perplexity of the original and of each plan, all of them in one pass over the weights."""
    counts = {path: len(path.read_text().splitlines()) for path in held_out(work)}
    data = ",".join(f"{path}:{count}" for path, count in counts.items())
    report = into / "evaluation.json"
    words = [word for path in plans for word in ("--plan", str(path))]
    sampling = ["--dataset", data, "--max-length", str(WINDOW), "--dtype", "float32"]
    surgeon("evaluate", str(work / MODEL), *words, *sampling, "-o", str(report))
    found = json.loads(report.read_text())
    damages = [found["original"], *(each["damage"] for each in found["candidates"])]
    return [damage["perplexity"] for damage in damages]


def by_transformers(work: Path, into: Path, plans: Sequence[Path]) -> list[float]:
    """The same of the folders that `apply` writes, by transformers' own model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / MODEL)
    lines = [line for path in held_out(work) for line in path.read_text().splitlines()]
    encoded = tokenizer([json.loads(line)["text"] for line in lines])["input_ids"]
    windows = [ids[:WINDOW] for ids in encoded]
    found = [perplexity(work / MODEL, windows)]
    for path in plans:
        folder = into / path.stem
        surgeon("apply", "--plan", str(path), "--model", str(work / MODEL), "-o", str(folder))
        found.append(perplexity(folder, windows))
        shutil.rmtree(folder)
    return found


def perplexity(folder: Path, windows: Sequence[Sequence[int]]) -> float:
    """e to the mean loss of every token but the first of each window, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    by_length: dict[int, list[Sequence[int]]] = defaultdict(list)
    for ids in windows:
        by_length[len(ids)].append(ids)
    loss, count = 0.0, 0
    with torch.inference_mode():
        # Windows of one length need no padding.
        for alike in by_length.values():
            for ids in torch.tensor(alike).split(16):
                logits = model(ids).logits[:, :-1].flatten(0, 1)
                loss += _cross_entropy(logits, ids[:, 1:].flatten()).item()
                count += ids[:, 1:].numel()
    return math.exp(loss / count)


def _cross_entropy(logits: Any, ids: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(logits.double(), ids, reduction="sum")


def table(ratios: Sequence[str], measured: Sequence[float]) -> str:
    """Markdown: perplexity, a row for each way of scoring, a column for each ratio.

    measured: of the original, then of every way at every ratio, in the order of WAYS.
    """
    original, *pruned = measured
    rows = [pruned[at : at + len(ratios)] for at in range(0, len(pruned), len(ratios))]
    lines = [["none removed", *[_figure(original)] * len(ratios)]]
    lines += [[label, *map(_figure, row)] for (label, _, _), row in zip(WAYS, rows, strict=True)]
    random = list(zip(*rows[-SEEDS:], strict=True))
    lines[-SEEDS:] = [[f"random, {SEEDS} seeds: mean (range)", *map(_spread, random)]]
    return measure.table(["experts chosen by", *(f"{float(each):.0%}" for each in ratios)], lines)


def _spread(found: Sequence[float]) -> str:
    mean = sum(found) / len(found)
    return f"{_figure(mean)} ({_figure(min(found))} to {_figure(max(found))})"


def _figure(value: float) -> str:
    return f"{value:,.1f}"


def surgeon(*words: str) -> None:
    """Run one command; what it says is shown where it fails."""
    command = [sys.executable, "-m", "shardsurgeon", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"shardsurgeon {' '.join(words)}: status {done.returncode}\n{done.stderr}")


if __name__ == "__main__":
    main()
