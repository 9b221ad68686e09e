"""What every command prints and writes on the shipped checkpoints, as one readable text.

`python -m tests.cli.transcript --write` records it anew in recorded.txt, beside this file; a test
compares. A change that is meant shows in the diff of that file, and nothing else does.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

from shardsurgeon.cli.main import main
from tests.cli.standins import ROOT, in_python

# What a command is at depends on the machine's speed.
os.environ["SHARDSURGEON_PROGRESS"] = "none"
RECORDED = Path(__file__).with_name("recorded.txt")
FAMILIES = ["deepseek_v3", "kimi_k2", "kimi_k25", "kimi_linear", "qwen3_5_moe", "qwen3_moe"]
COMMANDS = ["inspect", "fit", "plan", "apply", "materialize", "verify", "push", "scores"]
COMMANDS += ["calibrate", "evaluate", "probe", "report", "run", "families", "env", "completion"]
SCORES = ["show", "plot", "compare", "convert", "merge", "blend", "from-router", "from-weights"]
SCORES += ["random"]
# What differs from one run, or one machine, to the next.
_PASSING = [
    (re.compile(r'("(?:\w+_)?seconds?": )[\d.e-]+'), r"\1SECONDS"),
    (re.compile(r"\b[\d.]+ s(econds)?\b(?=[,.\n]| at| \()"), "SECONDS"),
    (re.compile(r"\b[\d.]+ [kMG]?B/s\b"), "SPEED"),
    (re.compile(r'("space_free": )\d+'), r"\1SPACE"),
    (re.compile(r"\b[\d.]+ [kMGT]?B free\b"), "SPACE free"),
    (re.compile(r"\b[0-9a-f]{40}\b"), "COMMIT"),
]


def session(name: str, folder: Path) -> str:
    """One session in a new folder; its first line is its name."""
    folder = folder.resolve()
    parts = [f"== {name}", *SESSIONS[name](folder / name)]
    return "\n".join(parts).replace(str(folder), "FOLDER")


def recorded() -> dict[str, str]:
    """The sessions in the file, by their names."""
    parts = f"\n{RECORDED.read_text(encoding='utf-8')}".split("\n== ")[1:]
    return {part.partition("\n")[0]: f"== {part}" for part in parts}


def _helps(folder: Path) -> Iterator[str]:
    words = [(), *((name,) for name in COMMANDS), *(("scores", name) for name in SCORES)]
    for word in words:
        yield _run(*word, "--help")


def _imports(folder: Path) -> Iterator[str]:
    """Libraries that a light command brings in; ours and the standard library's are left out."""
    model = ROOT / "fixtures" / "qwen3_moe"
    code = (
        "import json, sys; from shardsurgeon.cli.main import main; main(sys.argv[1:]);"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    folder.mkdir(parents=True, exist_ok=True)
    for words in (
        ("--help",),
        ("inspect", str(model)),
        ("plan", str(model / "scores.pt"), "--model", str(model), "--ratio", "0.5"),
    ):
        done = in_python(code, *words, capture_output=True, check=True, cwd=folder)
        names = set(json.loads(done.stdout.splitlines()[-1])) - set(sys.stdlib_module_names)
        known = names & {"click", "numpy", "torch", "transformers", "tqdm", "safetensors"}
        known |= names & {"huggingface_hub", "fsspec", "httpx", "requests", "compressed_tensors"}
        yield f"{words[0]}: {' '.join(sorted(known))}"


def _family(folder: Path) -> Iterator[str]:
    """Every command on the shipped checkpoint that the folder is named after."""
    family = folder.name
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "fixtures" / family, folder / "model", copy_function=shutil.copy2)
    take = ("scores.pt", "--model", "model")
    shutil.copy(folder / "model" / "scores.pt", folder / "scores.pt")
    with chdir(folder):
        yield _run("inspect", "model")
        yield _run("inspect", "model", "--json")
        yield _run("plan", *take, "--ratio", "0.25,0.5")
        yield _run("plan", *take, "--ratio", "0.5", "-o", "plan.json")
        yield _files(folder, "plan.json")
        yield _run("report", "plan.json", "--scores", "scores.pt", "-o", "report.html")
        yield _run("plan", *take, "--ratio", "0.5", "--mtp", "last", "--json")
        yield _run("plan", *take, "--target-size", "600kB", "--preserve-super-experts")
        yield _run("plan", *take, "--ratio", "0.5", "--allocate", "global")
        yield _run("plan", *take, "--ratio", "0.3", "--rounding", "nearest", "--multiple-of", "4")
        yield _run("apply", *take, "--ratio", "0.5", "--dry-run")
        yield _run("apply", *take, "--ratio", "0.5", "-o", "half", "--workers", "2")
        yield _files(folder / "half")
        yield _run("apply", *take, "--ratio", "0.5", "-o", "half")
        again = ("apply", *take, "--keep", "4", "-o", "four", "--max-shard-size", "200kB")
        yield _run(*again, "--mtp", "drop", "--json")
        yield _files(folder / "four")
        yield _run("apply", "--plan", "plan.json", "--model", "model", "-o", "planned")
        yield _files(folder / "planned")
        yield _run("apply", "scores.pt", "--model", "half", "--keep", "4", "-o", "chained")
        yield _files(folder / "chained")
        yield _run("inspect", "half")
        yield _run("verify", "model", "half")
        yield _run("verify", "model", "chained", "--json")
        yield _run("verify", "model", "four", "--sample", "3")
        shutil.copytree("half", "damaged")
        _damage(next(path for path in sorted(Path("damaged").glob("*.safetensors"))))
        yield _run("verify", "model", "damaged")
        yield _run("verify", "model", "four", "--json", "--sample", "0")
        yield _run("scores", "from-router", "model", "-o", "router.safetensors")
        yield _run("scores", "from-weights", "model", "-o", "weights.npz")
        yield _files(folder, "router.safetensors", "weights.npz")
        yield _run("scores", "show", "scores.pt", "--model", "model")


def _scores(folder: Path) -> Iterator[str]:
    folder.mkdir(parents=True)
    for family in ("kimi_k25", "qwen3_moe"):
        shutil.copy(ROOT / "fixtures" / family / "scores.pt", folder / f"{family}.pt")
    with chdir(folder):
        yield _run("scores", "show", "kimi_k25.pt")
        yield _run("scores", "show", "qwen3_moe.pt", "--json")
        for name in ("kimi_k25", "qwen3_moe"):
            for kind in ("json", "npz", "safetensors", "pt"):
                yield _run("scores", "convert", f"{name}.pt", "-o", f"{name}-to.{kind}")
                yield _files(folder, f"{name}-to.{kind}")
        model = str(ROOT / "fixtures" / "qwen3_moe")
        yield _run("scores", "random", model, "--seed", "3", "-o", "random.pt").replace(
            str(ROOT), "ROOT"
        )
        yield _run("scores", "compare", "qwen3_moe.pt", "random.pt")
        yield _run("scores", "compare", "qwen3_moe.pt", "random.pt", "--json")
        yield _run("scores", "merge", "qwen3_moe.pt", "random.pt", "-o", "merged.pt")
        yield _run("scores", "convert", "kimi_k25.pt", "-o", "kimi_k25-to.json")


def _refusals(folder: Path) -> Iterator[str]:
    """Words and files that no command can work with."""
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "fixtures" / "qwen3_moe", folder / "model")
    shutil.copy(folder / "model" / "scores.pt", folder / "scores.pt")
    take = ("scores.pt", "--model", "model")
    with chdir(folder):
        for words in (
            ("aply",),
            ("inspect",),
            ("inspect", "nowhere"),
            ("inspect", "scores.pt"),
            ("apply",),
            ("apply", *take),
            ("apply", *take, "--ratio", "1.5"),
            ("apply", *take, "--ratio", "0.5", "--keep", "4"),
            ("apply", *take, "--ratio", "half"),
            ("apply", *take, "--ratio", "0.25,0.5"),
            ("apply", *take, "--keep", "1"),
            ("apply", *take, "--keep", "1000"),
            ("apply", *take, "--target-size", "1kB"),
            ("apply", *take, "--target-size", "much"),
            ("apply", *take, "--ratio", "0.5", "--metric", "beauty"),
            ("apply", *take, "--ratio", "0.5", "--max-shard-size", "0"),
            ("apply", *take, "--ratio", "0.5", "-o", "model"),
            ("apply", *take, "--ratio", "0.5", "-o", "model/inside"),
            ("apply", "nothing.pt", "--model", "model", "--ratio", "0.5"),
            ("apply", "--plan", "scores.pt", "--model", "model"),
            ("apply", "--model", "model", "--ratio", "0.5"),
            ("verify", "model", "nowhere"),
            ("verify", "model", "model"),
            ("push", "model", "no name"),
            ("push", "model", "me/name"),
            ("scores", "convert", "scores.pt", "-o", "scores.xyz"),
            ("scores", "merge", "scores.pt", "-o", "merged.npz"),
            ("scores", "show", "model/config.json"),
            ("scores", "plot", "scores.pt", "-o", "picture.pdf"),
            ("report", "scores.pt", "-o", "report.html"),
            ("report", "model", "-o", "report.html"),
        ):
            yield _run(*words)
        for case, change in _SPOILT.items():
            shutil.copytree("model", case)
            change(folder / case)
            yield _run("inspect", case)
            yield _run("plan", "scores.pt", "--model", case, "--ratio", "0.5")
        for case, data in _BAD_SCORES.items():
            Path(case).write_bytes(data)
            yield _run("plan", case, "--model", "model", "--ratio", "0.5")
            yield _run("plan", "--plan", case, "--model", "model")


def _shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def _edit_config(model: Path, **values: object) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(values)
    path.write_text(json.dumps(config), encoding="utf-8")


def _damage(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


_SPOILT: dict[str, Callable[[Path], object]] = {
    "no-config": lambda model: (model / "config.json").unlink(),
    "config-cut": lambda model: (model / "config.json").write_text("{"),
    "config-list": lambda model: (model / "config.json").write_text("[]"),
    "other-family": lambda model: _edit_config(model, model_type="x", architectures=["X"]),
    "other-count": lambda model: _edit_config(model, num_experts=9),
    "no-shard": lambda model: _shards(model)[1].unlink(),
    "shard-cut": lambda model: os.truncate(_shards(model)[0], 1000),
    "shard-empty": lambda model: os.truncate(_shards(model)[0], 0),
    "shard-noise": lambda model: _shards(model)[0].write_bytes(b"\xff" * 64),
    "index-cut": lambda model: (model / "model.safetensors.index.json").write_text('{"a'),
    "index-empty": lambda model: (model / "model.safetensors.index.json").write_text("{}"),
}
_BAD_SCORES = {
    "empty.pt": b"",
    "noise.pt": b"\x80\x02cos\nsystem\n",
    "noise.npz": b"PK\x03\x04nothing",
    "noise.safetensors": b"\xff" * 16,
    "cut.json": b'{"0": [1, 2',
    "nan.json": b'{"0": [NaN]}',
    "short.json": b'{"0": [1, 2, 3]}',
    "drop.json": b'{"0": [0, 1], "1": [2, 3]}',
    "text.txt": b"0 1 2 3",
}


def _run(*words: str) -> str:
    """One command: its line, what it says, its status where that is not 0."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        status = main(words)
    text = f"$ shardsurgeon {shlex.join(words)}\n{stdout.getvalue()}"
    text += "".join(f"! {line}\n" for line in stderr.getvalue().splitlines())
    for pattern, word in _PASSING:
        text = pattern.sub(word, text)
    return text + (f"? {status}\n" if status else "")


def _files(folder: Path, *names: str) -> str:
    """A line for every file: the beginning of its sha256, and its name."""
    paths = [folder / name for name in names] or sorted(folder.rglob("*"))
    lines = []
    for path in paths:
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            lines.append(f"# {digest} {path.relative_to(folder).as_posix()}\n")
    return "".join(lines)


SESSIONS: dict[str, Callable[[Path], Iterator[str]]] = {
    "help": _helps,
    "imports": _imports,
    **dict.fromkeys(FAMILIES, _family),
    "scores": _scores,
    "refusals": _refusals,
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        text = "\n".join(session(name, Path(folder) / "t") for name in SESSIONS)
    if "--write" in sys.argv:
        RECORDED.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
