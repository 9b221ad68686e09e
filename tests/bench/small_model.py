"""A small Qwen3-MoE whose experts differ, trained in minutes on two cores.

    python tests/bench/small_model.py WORK [--steps 1200] [--seed 0]

It learns from text that ships with Python, in two parts: `code`, the modules of the standard
library without their docstrings, and `prose`, the docstrings and the topics of `help()`. WORK gets
`model/`, with a byte-level BPE tokenizer of that text, and what a calibration and a measurement
take, records {"text": ...}: `code.jsonl` and `prose.jsonl`, which it was trained on, and
`code-test.jsonl` and `prose-test.jsonl` of other modules and topics, which it has never seen.
The same seed, Python, torch, kind of processor and number of threads (OMP_NUM_THREADS) give the
same bytes. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PARTS = ("code", "prose")
MODEL = "model"
# Characters of a record, about as many as fill a window; shorter ones than a fourth are left out.
PIECE = 1000
# Every so many modules and topics are held out, and so many records of each part are kept of them.
HELD_OUT, TEST_RECORDS = 10, 100
# Other people's code, code that says little, and tables.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
LEFT_OUT |= {"pydoc_data", "unidata"}

VOCABULARY, END = 2048, "<|endoftext|>"
WINDOW, BATCH = 256, 8
RATE, WARM_UP = 8e-3, 100
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "moe_intermediate_size": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    # Less than a published model is trained with: it makes all experts alike.
    "router_aux_loss_coef": 1e-3,
    # Wider than of a large model, so that few steps suffice.
    "initializer_range": 0.08,
    "max_position_embeddings": 4 * WINDOW,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=1200, help="of 2,048 tokens each")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    begun = time.perf_counter()
    given.work.mkdir(parents=True, exist_ok=True)
    texts = write_texts(given.work)
    tokenizer = make_tokenizer(texts)
    tokenizer.save_pretrained(given.work / MODEL)
    streams = {part: _stream(tokenizer, texts[part]) for part in PARTS}
    model = train(streams, given.steps, given.seed)
    save(model, given.work / MODEL)
    seconds = time.perf_counter() - begun
    print(f"{given.work / MODEL}: {given.steps} steps in {seconds:.0f} s")


def write_texts(work: Path) -> dict[str, list[str]]:
    """Write the four files of records; part -> the records to train and calibrate on."""
    trained, held_out = split(documents(Path(sysconfig.get_paths()["stdlib"])))
    for part in PARTS:
        # From all over the modules, not from the first ones.
        step = max(1, len(held_out[part]) // TEST_RECORDS)
        held_out[part] = held_out[part][::step][:TEST_RECORDS]
        for name, texts in ((part, trained[part]), (f"{part}-test", held_out[part])):
            lines = (json.dumps({"text": text}) + "\n" for text in texts)
            (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            size = sum(map(len, texts))
            print(f"{name}.jsonl: {len(texts):,} records, {size:,} characters")
    return trained


def documents(library: Path) -> Iterator[dict[str, str]]:
    """What belongs together, part -> text: a module's code and its docstrings; a topic of help."""
    from pydoc_data.topics import topics

    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not LEFT_OUT.intersection(inside.parts) and not path.name.startswith("_sysconfigdata"):
            yield separate(path.read_text(encoding="utf-8"))
    for name in sorted(topics):
        yield {"prose": topics[name]}


def separate(source: str) -> dict[str, str]:
    """A module's code, without the lines of its docstrings, and the docstrings."""
    found, dropped = [], set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        match node.body:
            case [ast.Expr(ast.Constant(str(text))) as expression, *_]:
                first, last = expression.lineno, expression.end_lineno
                found.append((first, inspect.cleandoc(text)))
                dropped.update(range(first, (last or first) + 1))
    # As Python counts lines: a form feed, which old modules have, ends none.
    lines = source.split("\n")
    code = "\n".join(line for at, line in enumerate(lines, 1) if at not in dropped)
    return {"code": code, "prose": "\n\n".join(text for _, text in sorted(found))}


def split(texts: Iterable[dict[str, str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Records to train on, and of every tenth document records to test with, part by part.

    No record is in both: what modules have in common is trained on and not tested.
    """
    trained: dict[str, list[str]] = {part: [] for part in PARTS}
    held_out: dict[str, list[str]] = {part: [] for part in PARTS}
    for number, document in enumerate(texts):
        records = held_out if number % HELD_OUT == 0 else trained
        for part, text in document.items():
            records[part].extend(pieces(text))
    known = {text for texts in trained.values() for text in texts}
    unseen = {part: [each for each in held_out[part] if each not in known] for part in PARTS}
    return trained, unseen


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Whole lines, together about `size` characters long; a rest that is short is left out."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= size:
            yield piece
            piece = ""
    if len(piece) >= size // 4:
        yield piece


def make_tokenizer(texts: dict[str, list[str]]) -> Any:
    """A byte-level BPE of the text that is trained on."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    every = (text for part in PARTS for text in texts[part])
    bpe.train_from_iterator(every, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)


def _stream(tokenizer: Any, texts: list[str]) -> Any:
    """int64 [tokens]: all records, an end behind each."""
    import torch

    encoded = tokenizer(texts, verbose=False)["input_ids"]
    ids = [each for record in encoded for each in (*record, tokenizer.eos_token_id)]
    return torch.tensor(ids)


def train(streams: dict[str, Any], steps: int, seed: int) -> Any:
    """The model; windows from anywhere in the streams, half of each batch from either part."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG)).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    begun = time.perf_counter()
    for step in range(1, steps + 1):
        ids = torch.cat([_windows(stream, BATCH // len(PARTS)) for stream in streams.values()])
        # Its loss includes the load balancing.
        loss = model(ids, labels=ids, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            seconds = time.perf_counter() - begun
            print(f"step {step}: loss {loss.item():.3f}, {seconds:.0f} s", file=sys.stderr)
    return model.eval()


def _rate(step: int, steps: int) -> float:
    """The share of the learning rate: up in a line, down in a half wave to a twentieth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2


def _windows(stream: Any, count: int) -> Any:
    """int64 [count, WINDOW], from places drawn by torch's seed."""
    import torch

    begins = torch.randint(len(stream) - WINDOW, (count,)).tolist()
    return torch.stack([stream[begin : begin + WINDOW] for begin in begins])


def save(model: Any, folder: Path) -> None:
    """Write the model as Qwen3-MoE is published: a tensor per expert, `num_experts`."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # The name that this version of transformers writes.
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
