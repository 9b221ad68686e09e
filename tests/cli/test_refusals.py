"""Bad input through the real command: one line, status 2, no output, the source untouched."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shardsurgeon.cli.main import main
from tests.cli.standins import ROOT
from tests.support import torch_file

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
EXPERT = "model.layers.1.mlp.experts.6.up_proj.weight"

Spoil = Callable[[Path], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "fixtures" / "qwen3_moe", tmp_path / "model"))


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(
    model: Path, capsys: pytest.CaptureFixture[str], *words: str, scores: str = "scores.pt"
) -> str:
    """Run apply, check everything that must hold of a refusal, and return the line."""
    out = model.parent / "out"
    before = digest(model)
    words = words or ("--ratio", "0.5")
    arguments = [*([str(model / scores)] if scores else []), "--model", str(model), *words]
    if "-o" not in words:
        arguments += ["-o", str(out)]
    status = main(["apply", *arguments])
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert captured.out == ""
    line = captured.err
    assert line.startswith("shardsurgeon: error: ") and line.count("\n") == 1, line
    assert "Traceback" not in line and "this is a bug" not in line
    assert not out.exists() and not Path(f"{out}.partial").exists()
    assert digest(model) == before
    return line


def header_of(shard: Path) -> tuple[dict, bytes]:
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(change: Callable[[dict], object]) -> Spoil:
    """Change the header of a shard and write it back, its data as it was."""

    def spoil(model: Path) -> None:
        header, data = header_of(model / SHARD)
        change(header)
        write_raw(model / SHARD, json.dumps(header).encode(), data)

    return spoil


def write_raw(shard: Path, header: bytes, data: bytes) -> None:
    shard.write_bytes(len(header).to_bytes(8, "little") + header + data)


def first_tensors(header: dict) -> list[dict]:
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return sorted(entries, key=lambda entry: entry["data_offsets"])


def reverse_offsets(header: dict) -> None:
    first_tensors(header)[0]["data_offsets"].reverse()


def overlap(header: dict) -> None:
    first, second = first_tensors(header)[:2]
    second["data_offsets"] = first["data_offsets"]


def make_hole(header: dict) -> None:
    header.pop(next(name for name in header if name != "__metadata__"))


def duplicate_key(model: Path) -> None:
    data = (model / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    name, entry = next((n, e) for n, e in json.loads(header).items() if n != "__metadata__")
    again = header[:-1] + f',"{name}":{json.dumps(entry)}}}'.encode()
    write_raw(model / SHARD, again, data[8 + length :])


def with_tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Spoil:
    """Change the tensors of the shard that holds EXPERT, and the index with them."""

    def spoil(model: Path) -> None:
        index = json.loads((model / INDEX).read_text())
        file = index["weight_map"][EXPERT]
        tensors = load_raw(model / file)
        change(tensors)
        save_file(tensors, model / file, metadata={"format": "pt"})
        others = {n: f for n, f in index["weight_map"].items() if f != file}
        index["weight_map"] = {**others, **dict.fromkeys(tensors, file)}
        (model / INDEX).write_text(json.dumps(index))

    return spoil


def load_raw(shard: Path) -> dict[str, np.ndarray]:
    """A shard with BF16 read as the integers that numpy has."""
    header, data = header_of(shard)
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[name] = np.frombuffer(data[begin:end], np.uint16).reshape(entry["shape"])
    return found


def with_index(change: Callable[[dict[str, str]], object]) -> Spoil:
    def spoil(model: Path) -> None:
        index = json.loads((model / INDEX).read_text())
        change(index["weight_map"])
        (model / INDEX).write_text(json.dumps(index))

    return spoil


def with_config(**changes: object) -> Spoil:
    def spoil(model: Path) -> None:
        config = {**json.loads((model / "config.json").read_text()), **changes}
        kept = {key: value for key, value in config.items() if value is not None}
        (model / "config.json").write_text(json.dumps(kept))

    return spoil


def truncate(model: Path) -> None:
    data = (model / SHARD).read_bytes()
    (model / SHARD).write_bytes(data[:-100])


def set_length(length: int) -> Spoil:
    def spoil(model: Path) -> None:
        data = (model / SHARD).read_bytes()
        (model / SHARD).write_bytes(length.to_bytes(8, "little") + data[8:])

    return spoil


def shard_twice(model: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    first = index["weight_map"][EXPERT]
    shutil.copy(model / first, model / "again.safetensors")
    tensors = {**load_file_names(model / first)}
    other = next(n for n in tensors if n != EXPERT)
    index["weight_map"][other] = "again.safetensors"
    del index["weight_map"][EXPERT]  # so that it does not say which one is meant
    (model / INDEX).write_text(json.dumps(index))


def load_file_names(shard: Path) -> dict[str, dict]:
    return {n: e for n, e in header_of(shard)[0].items() if n != "__metadata__"}


BROKEN: dict[str, tuple[Spoil, str]] = {
    "truncated shard": (truncate, "fetch this shard again"),
    "header longer than the file": (set_length(10**7), "fetch this shard again"),
    "absurd header length": (set_length(2**63 + 5), SHARD),
    "header not JSON": (lambda m: write_raw(m / SHARD, b"{nonsense", b""), "not JSON"),
    "header not an object": (lambda m: write_raw(m / SHARD, b'["a"]', b""), SHARD),
    "duplicate keys": (duplicate_key, "twice"),
    "reversed offsets": (with_header(reverse_offsets), SHARD),
    "overlapping offsets": (with_header(overlap), SHARD),
    "a hole between tensors": (with_header(make_hole), SHARD),
    "unknown dtype": (
        with_header(lambda h: first_tensors(h)[0].update(dtype="F7")),
        "F7",
    ),
    "size that does not match the shape": (
        with_header(lambda h: first_tensors(h)[0].update(shape=[3])),
        SHARD,
    ),
    "missing shard": (lambda m: (m / SHARD).unlink(), "which is not there"),
    "path outside the folder": (
        with_index(lambda names: names.update({EXPERT: "../evil.safetensors"})),
        "../evil.safetensors",
    ),
    "absolute path in the index": (
        with_index(lambda names: names.update({EXPERT: "/etc/x.safetensors"})),
        "/etc/x.safetensors",
    ),
    "index names what a shard lacks": (
        with_index(lambda names: names.update({"ghost.weight": SHARD})),
        "ghost.weight",
    ),
    "tensor in two shards": (shard_twice, "holds too"),
    "missing expert tensor": (with_tensors(lambda t: t.pop(EXPERT)), EXPERT),
    "experts not dense": (
        with_tensors(
            lambda t: [
                t.update({n.replace("experts.6.", "experts.99."): t.pop(n)})
                for n in list(t)
                if "layers.1.mlp.experts.6." in n
            ]
        ),
        "expert",
    ),
    "unclaimed expert axis": (
        with_tensors(lambda t: t.update({"model.layers.1.mlp.scale": np.zeros(16, "f4")})),
        "model.layers.1.mlp.scale",
    ),
    "no config.json": (lambda m: (m / "config.json").unlink(), "config.json: no such file"),
    "config is not JSON": (lambda m: (m / "config.json").write_text("{"), "config.json"),
    "no expert count": (with_config(num_experts=None), "no expert count"),
    "dense model": (
        lambda m: (m / "config.json").write_text('{"model_type": "llama"}'),
        "a dense model has none to prune",
    ),
    "unknown model type": (with_config(model_type="qwen3_mow", architectures=[]), "qwen3_moe"),
    "counts that disagree": (with_config(num_local_experts=8), "make the spellings agree"),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(
    defect: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, says = BROKEN[defect]
    spoil(model)
    assert says in refused(model, capsys)


class _Evil:
    def __reduce__(self) -> tuple:
        return (print, ("the pickle was run",))


def save_scores(scores: object) -> Spoil:
    return lambda model: torch_file.save(scores, model / "scores.pt")


def plain(experts: int = 16, layers: tuple[int, ...] = (0, 1, 2)) -> dict[int, np.ndarray]:
    scores = np.arange(experts, dtype=np.float32) + 0.5
    return {layer: np.roll(scores, layer) for layer in layers}


def spoiled_value(value: float) -> dict[int, np.ndarray]:
    scores = plain()
    scores[1][4] = value
    return scores


BAD_SCORES: dict[str, tuple[Spoil, str]] = {
    "wrong number of experts": (save_scores(plain(experts=12)), "12 scores"),
    "missing layer": (save_scores(plain(layers=(0, 2))), "layer 1"),
    "extra layer": (save_scores(plain(layers=(0, 1, 2, 3))), "layer 3"),
    "minus infinity": (save_scores(spoiled_value(-np.inf)), "-inf"),
    "NaN of an expert that was routed": (
        save_scores(
            {
                layer: {"reap": row, "expert_frequency": np.ones(16, np.int64)}
                for layer, row in spoiled_value(np.nan).items()
            }
        ),
        "layer 1, expert 4",
    ),
    "nothing but NaN": (save_scores({**plain(), 1: np.full(16, np.nan)}), "layer 1"),
    "hostile pickle": (save_scores({0: _Evil()}), "print"),
    "a bare pickle": (lambda m: (m / "scores.pt").write_bytes(pickle.dumps({})), "torch.save"),
    "an empty file": (lambda m: (m / "scores.pt").write_bytes(b""), "scores.pt"),
    "no such file": (lambda m: (m / "scores.pt").unlink(), "scores.pt"),
}


@pytest.mark.parametrize("defect", BAD_SCORES)
def test_scores_that_cannot_be_used_are_refused_in_one_line(
    defect: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, says = BAD_SCORES[defect]
    spoil(model)
    line = refused(model, capsys)
    assert says in line
    assert "the pickle was run" not in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--ratio", "1.5"), "between 0 and 1"),
        (("--ratio", "0"), "between 0 and 1"),
        (("--ratio", "nan"), "between 0 and 1"),
        (("--keep", "16"), "prunes nothing"),
        (("--keep", "3"), "fewer than the 4 each token is sent to"),
        (("--keep", "8", "--ratio", "0.5"), "2 selections at once"),
        (("--target-size", "lots"), "not a size"),
        (("--target-size", "1KB"), "smallest checkpoint possible"),
        (("--ratio", "0.5", "--metric", "loudness"), "loudness"),
        (("--workers", "2"), "nothing says how many experts to keep"),
    ],
)
def test_a_selection_that_cannot_hold_is_refused_in_one_line(
    words: tuple[str, ...], says: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(model, capsys, *words)


def test_group_arithmetic_that_cannot_hold_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(ROOT / "fixtures" / "deepseek_v3", tmp_path / "model"))
    assert "do not divide into the 4 groups" in refused(model, capsys, "--keep", "13")
    assert "2 of 4 groups with 1 experts each" in refused(model, capsys, "--keep", "4")


def test_no_scores_and_no_plan_is_refused_in_one_line(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no score file was given" in refused(model, capsys, scores="")


def test_an_output_inside_the_source_or_around_it_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside, around = str(model / "out"), str(model.parent)
    assert "is inside the source" in refused(model, capsys, "--ratio", "0.5", "-o", inside)
    assert "contains the source" in refused(model, capsys, "--ratio", "0.5", "-o", around)
    assert "is the source itself" in refused(model, capsys, "--ratio", "0.5", "-o", str(model))


def test_an_output_that_exists_is_refused_and_left_alone(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = model.parent / "there"
    there.mkdir()
    (there / "precious").write_text("mine")
    assert "exists" in refused(model, capsys, "--ratio", "0.5", "-o", str(there))
    assert (there / "precious").read_text() == "mine"


# `plan -o`: what stands there already.


def saved(model: Path, out: str, *more: str, ratio: str = "0.5") -> int:
    scores = str(model / "scores.pt")
    return main(
        ["plan", scores, "--model", str(model), "--ratio", ratio, "-o", str(model / out), *more]
    )


@pytest.mark.parametrize("name", ["config.json", "scores.pt", "tokenizer.json", SHARD])
@pytest.mark.parametrize("more", [(), ("--force",)])
def test_a_plan_never_takes_the_place_of_a_file_that_it_was_made_from(
    name: str, more: tuple[str, ...], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digest(model)
    assert saved(model, name, *more) == 2
    line = capsys.readouterr().err
    assert f"{name}: is read by this command" in line and line.count("\n") == 1
    assert digest(model) == before


def test_a_plan_is_saved_again_where_it_is_the_same_and_replaced_only_by_force(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert saved(model, "../plan.json") == 0
    first = (model.parent / "plan.json").read_bytes()
    assert saved(model, "../plan.json") == 0
    # In the model's folder, as the README's recipe has it.
    assert saved(model, "plan.json") == saved(model, "plan.json") == 0
    capsys.readouterr()
    assert saved(model, "../plan.json", ratio="0.25") == 2
    line = capsys.readouterr().err
    assert "exists and holds something else; choose another -o" in line and "--force" in line
    assert (model.parent / "plan.json").read_bytes() == first
    assert saved(model, "../plan.json", "--force", ratio="0.25") == 0
    assert (model.parent / "plan.json").read_bytes() != first


@pytest.mark.parametrize("content", ["", "notes of mine", '{"kind": "mine"}', "[" * 9000])
def test_force_replaces_plans_and_nothing_else(
    content: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = model.parent / "mine.json"
    mine.write_text(content)
    assert saved(model, "../mine.json", "--force") == 2
    assert mine.read_text() == content
    assert "exists and holds something else" in capsys.readouterr().err


def test_force_without_a_file_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(model / "scores.pt"), "--model", str(model), "--ratio", "0.5", "--force"]
    assert main(words) == 2
    assert "--force: is about a file that -o names" in capsys.readouterr().err
