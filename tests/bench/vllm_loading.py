"""How long vLLM loads a view, against its own loader on the folder with shards, and in what memory.

    python tests/bench/vllm_loading.py WORK --python VENV/bin/python

VENV: vLLM's environment, as tests/serving makes it, with this package in it. Runs alternate; of
each pair the quotient counts, since the machine's speed wanders from pair to pair.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from layouts import QWEN
from measure import chill, remove, table, warm
from skeleton import build

FORMS: Mapping[str, Mapping[str, str]] = {"folder": {}, "view": {"load_format": "shardsurgeon"}}
STATES = ("warm", "cold")
Load = dict[str, float]


def main() -> None:
    """Build, prune, and have a process load in turns; print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--python", help="an interpreter that has vLLM")
    parser.add_argument("--runs", type=int, default=7, help="pairs (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=5, help="1.2 GB each (default: %(default)s)")
    options = parser.parse_args()
    if options.python is None:
        load_in_turns(options.work, options.runs)
        return
    make(options.work, options.layers)
    words = [options.python, __file__, str(options.work), "--runs", str(options.runs)]
    done = subprocess.run(words, env=surroundings(), stdout=subprocess.PIPE, text=True, check=True)
    found = json_lines(done.stdout)
    headings = ("", "load", "÷ default", "CPU", "÷ default", "resident at most", "its own memory")
    rows = (row(state, form, found) for state in STATES for form in FORMS)
    print(table(headings, rows))
    remove(options.work)


def json_lines(text: str) -> dict[tuple[str, str], list[Load]]:
    """(state, form) → its loads, of what the other process printed."""
    found: dict[tuple[str, str], list[Load]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            state, form, figures = json.loads(line)
            found.setdefault((state, form), []).append(figures)
    return found


def load_in_turns(work: Path, runs: int) -> None:
    """Load both forms again and again into one model's memory, each first as often as the other."""
    with engines(work) as loads:
        for state, prepare in zip(STATES, (warm, chill), strict=True):
            for number in range(runs):
                for form in sorted(FORMS, reverse=number % 2 == 1):
                    prepare(work / "model" if form == "view" else work / "folder")
                    print(json.dumps([state, form, loads[form]()]), flush=True)


def make(work: Path, layers: int) -> Path:
    """A model in bf16, its pruned folder, and its view; returns the model."""
    source = work / "model"
    if source.exists():  # from a run that was broken off
        return source
    model = replace(QWEN, layers=layers, hidden=2048, moe=768, vocabulary=8192, heads=32)
    build(source, model, 4, "random")
    words = ["-m", "shardsurgeon", "apply", str(source / "scores.json"), "--model", str(source)]
    for form, view in (("folder", []), ("view", ["--view"])):
        ratio = ["--ratio", "0.5", "-o", str(work / form), "--quiet", *view]
        subprocess.run([sys.executable, *words, *ratio], check=True, stdout=subprocess.DEVNULL)
    return source


def row(state: str, form: str, found: Mapping[tuple[str, str], list[Load]]) -> list[str]:
    """A line of the table: medians, and the quotients of the pairs."""
    runs = found[state, form]
    quotients = [quotient(runs, found[state, "folder"], key) for key in ("seconds", "cpu")]
    middle = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
    return [
        f"{form}, {state}",
        f"{middle['seconds']:.2f} s",
        quotients[0],
        f"{middle['cpu']:.2f} s",
        quotients[1],
        f"{middle['resident'] / 1e9:.2f} GB",
        f"{middle['own'] / 1e9:.2f} GB",
    ]


def quotient(runs: list[dict[str, float]], others: list[dict[str, float]], key: str) -> str:
    """The middle, least and largest quotient of a figure of the pairs."""
    found = sorted(mine[key] / other[key] for mine, other in zip(runs, others, strict=True))
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def surroundings() -> dict[str, str]:
    """What a vLLM on a CPU needs."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }


@contextmanager
def engines(work: Path) -> Iterator[dict[str, Callable[[], Load]]]:
    """Form → what loads its weights once and measures that: seconds, CPU seconds, and the most
    bytes that were resident meanwhile, with mapped files and without."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    configs = {
        form: EngineArgs(
            model=str(work / form),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=128,
            use_tqdm_on_load=False,
            **words,
        ).create_engine_config()
        for form, words in FORMS.items()
    }
    folder = configs["folder"]
    with set_current_vllm_config(folder), tempfile.TemporaryDirectory() as scratch:
        init_distributed_environment(1, 0, f"file://{scratch}/store", 0, "gloo")
        initialize_model_parallel(1)
        with set_default_torch_dtype(folder.model_config.dtype):
            model = get_model_loader(folder.load_config).create_model(folder, folder.model_config)

    def load(form: str) -> Load:
        config = configs[form]
        with set_current_vllm_config(config), Watch() as watch:
            loader = get_model_loader(config.load_config)
            loader.load_weights(model, config.model_config)
        return {
            "seconds": watch.seconds,
            "cpu": watch.cpu,
            "resident": watch.resident,
            "own": watch.own,
        }

    yield {form: partial(load, form) for form in FORMS}


class Watch:
    """The most memory of this process while it is open, looked at every few milliseconds."""

    def __enter__(self) -> Watch:
        self._begun, self._cpu = time.perf_counter(), time.process_time()
        self.resident = self.own = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds, self.cpu = time.perf_counter() - self._begun, time.process_time() - self._cpu
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.005):
            lines = Path("/proc/self/status").read_text().splitlines()
            found = dict(line.split(":", 1) for line in lines)
            sizes = [int(found[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon")]
            self.resident, self.own = max(self.resident, sizes[0]), max(self.own, sizes[1])


if __name__ == "__main__":
    main()
