"""A correct result passes; every kind of damage to one is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from shardsurgeon.cli.main import main
from shardsurgeon.errors import CheckpointError
from shardsurgeon.verification.verify import verify_checkpoint
from tests.support import stored_tensors, torch_file

FIXTURES = Path(__file__).parents[2] / "fixtures"
INDEX = "model.safetensors.index.json"
METADATA = "calibration/reap_pruning_metadata.json"

Spoil = Callable[[Path], object]


@pytest.fixture(scope="session", params=["deepseek_v3", "kimi_k25", "qwen3_5_moe"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(source, pruned) of a family; a test that spoils the pruned one takes a copy."""
    return _pruned(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def grouped(tmp_path_factory: pytest.TempPathFactory):
    return _pruned("deepseek_v3", tmp_path_factory.mktemp("grouped"))


def _pruned(family: str, folder: Path, *words: str) -> tuple[Path, Path]:
    source, out = FIXTURES / family, folder / "out"
    given = [str(source / "scores.pt"), "--model", str(source), "--ratio", "0.5", *words]
    assert main(["apply", *given, "-o", str(out), "--no-verify"]) == 0
    return source, out


def differences(source: Path, pruned: Path, **options: int) -> str:
    return "\n".join(verify_checkpoint(source, pruned, **options).differences)


def test_a_right_result_holds_and_every_byte_was_compared(pair) -> None:
    source, out = pair
    report = verify_checkpoint(source, out)
    assert report.differences == ()
    size = json.loads((out / INDEX).read_text())["metadata"]["total_size"]
    assert (report.tensors, report.bytes_compared) == (report.tensors_compared, size)


def test_a_result_without_its_mtp_layers_holds(tmp_path: Path) -> None:
    source, out = _pruned("deepseek_v3", tmp_path, "--mtp", "drop")
    assert differences(source, out) == ""


def test_a_result_holds_whose_source_had_lost_its_mtp_layers(tmp_path: Path) -> None:
    """A model that transformers saved again: the count is there, the tensors are not."""
    source = Path(shutil.copytree(FIXTURES / "kimi_linear", tmp_path / "resaved"))
    _edit_json("config.json", lambda c: c.update(num_nextn_predict_layers=1))(source)
    for policy in ("drop", "last"):
        words = ["--model", str(source), "--keep", "8", "--mtp", policy, "--no-verify"]
        out = tmp_path / policy
        assert main(["apply", str(source / "scores.pt"), *words, "-o", str(out)]) == 0
        assert differences(source, out) == ""


def test_a_score_file_in_a_pruned_model_may_meet_an_earlier_one(tmp_path: Path) -> None:
    """Both are called scores.pt, so the later one gets another name in calibration/."""
    _, middle = _pruned("kimi_linear", tmp_path)
    scores = {layer: np.roll(np.arange(8) + 0.5, layer) for layer in (1, 2, 3)}
    torch_file.save(scores, middle / "scores.pt")
    out = tmp_path / "last"
    words = ["--model", str(middle), "--keep", "4", "--no-verify", "-o", str(out)]
    assert main(["apply", str(middle / "scores.pt"), *words]) == 0
    assert (out / "calibration" / "scores-2.pt").exists()
    assert differences(middle, out) == ""


def test_a_repacked_result_holds(tmp_path: Path) -> None:
    source, out = _pruned("qwen3_5_moe", tmp_path, "--max-shard-size", "100KB")
    assert len(list(out.glob("*.safetensors"))) > 5
    assert differences(source, out) == ""


def test_a_sample_compares_some_tensors_of_every_shard(grouped) -> None:
    source, out = grouped
    report = verify_checkpoint(source, out, sample=3)
    assert report.tensors_compared == 3 * len(list(out.glob("*.safetensors")))
    assert report.holds


def _edit_json(name: str, change: Callable[[dict], object]) -> Spoil:
    def spoil(out: Path) -> None:
        content = json.loads((out / name).read_text())
        change(content)
        (out / name).write_text(json.dumps(content, indent=2))

    return spoil


def _shard_of(out: Path, tensor: str) -> Path:
    return out / json.loads((out / INDEX).read_text())["weight_map"][tensor]


def _edit_tensors(tensor: str, change: Callable[[dict], object]) -> Spoil:
    """Change the tensors of the shard that holds `tensor`; the index follows."""

    def spoil(out: Path) -> None:
        shard = _shard_of(out, tensor)
        tensors = stored_tensors.load(shard)
        change(tensors)
        stored_tensors.save(tensors, shard)
        index = json.loads((out / INDEX).read_text())
        others = {n: f for n, f in index["weight_map"].items() if f != shard.name}
        index["weight_map"] = {**others, **dict.fromkeys(tensors, shard.name)}
        (out / INDEX).write_text(json.dumps(index))

    return spoil


EXPERT = "model.layers.1.mlp.experts.{}.up_proj.weight"
GATE = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


def _swap(left: str, right: str) -> Callable[[dict], object]:
    def change(tensors: dict) -> None:
        tensors[left], tensors[right] = tensors[right], tensors[left]

    return change


def _roll(name: str) -> Callable[[dict], object]:
    return lambda tensors: tensors.update({name: tensors[name].rolled()})


def _misalign(out: Path) -> None:
    """One byte more of padding than the header may have."""
    shard = _shard_of(out, GATE)
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" "
    shard.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def _flip(name: str) -> Spoil:
    def spoil(out: Path) -> None:
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 0x40
        (out / name).write_bytes(data)

    return spoil


def _truncate(out: Path) -> None:
    shard = _shard_of(out, GATE)
    shard.write_bytes(shard.read_bytes()[:-7])


def _keep_other(content: dict) -> None:
    """Another expert in the keep-list: the lists still add up, the weights do not fit them."""
    layer = content["layers"]["1"]
    new, old = layer["pruned"][0], layer["retained"][0]
    layer["retained"] = sorted([new, *layer["retained"][1:]])
    layer["pruned"] = sorted([old, *layer["pruned"][1:]])


SPOILED: dict[str, tuple[Spoil, str]] = {
    "two experts swapped": (
        _edit_tensors(EXPERT.format(0), _swap(EXPERT.format(0), EXPERT.format(1))),
        EXPERT.format(0),
    ),
    "router rows in another order": (_edit_tensors(GATE, _roll(GATE)), GATE),
    "router bias in another order": (_edit_tensors(BIAS, _roll(BIAS)), BIAS),
    "a tensor missing": (
        _edit_tensors(EXPERT.format(2), lambda t: t.pop(EXPERT.format(2))),
        f"{EXPERT.format(2)}: is missing",
    ),
    "a surplus expert": (
        _edit_tensors(
            EXPERT.format(0), lambda t: t.update({EXPERT.format(12): t[EXPERT.format(0)]})
        ),
        "is a surplus tensor: expert 12 of 12 kept",
    ),
    "a tensor nobody knows": (
        _edit_tensors(GATE, lambda t: t.update({"model.oddity": t[GATE]})),
        "model.oddity: is a surplus tensor",
    ),
    "a count left in the config": (
        _edit_json("config.json", lambda c: c.update(n_routed_experts=24)),
        "n_routed_experts is 24, expected 12",
    ),
    "another value of the config": (
        _edit_json("config.json", lambda c: c.update(rope_theta=1)),
        "config.json: rope_theta is 1",
    ),
    "config keys in another order": (
        _edit_json("config.json", lambda c: c.update(model_type=c.pop("model_type"))),
        "in another order",
    ),
    "a key added to the config": (
        _edit_json("config.json", lambda c: c.update(num_local_experts=12)),
        "num_local_experts was added",
    ),
    "a wrong total size": (
        _edit_json(INDEX, lambda c: c["metadata"].update(total_size=1)),
        "total_size is 1",
    ),
    "a side file missing": (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json"),
    "a side file changed": (_flip("generation_config.json"), "generation_config.json"),
    "keep-lists that are others": (_edit_json(METADATA, _keep_other), "differs from"),
    "saliencies that contradict": (
        _edit_json(
            METADATA,
            lambda c: c["layers"]["1"]["groups"][0].update(min_retained_saliency=-1.0),
        ),
        "min_retained_saliency",
    ),
    "no metadata": (lambda out: (out / METADATA).unlink(), "nothing says which experts"),
    "a header that ends between words": (_misalign, "no multiple of 8"),
    "a truncated shard": (_truncate, "safetensors"),
    "a stale shard": (
        lambda out: shutil.copy(_shard_of(out, GATE), out / "model-00009-of-00009.safetensors"),
        "model-00009-of-00009.safetensors",
    ),
    "a shard under another name": (
        lambda out: _rename_shard(out),
        "should be called",
    ),
    "no config": (lambda out: (out / "config.json").unlink(), "config.json"),
}


def _rename_shard(out: Path) -> None:
    shard = _shard_of(out, GATE)
    shard.rename(out / "part-1.safetensors")
    text = (out / INDEX).read_text()
    (out / INDEX).write_text(text.replace(shard.name, "part-1.safetensors"))


@pytest.mark.parametrize("defect", SPOILED)
def test_a_spoiled_result_is_found_and_named(defect: str, grouped, tmp_path: Path) -> None:
    source, out = grouped
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    spoil, says = SPOILED[defect]
    spoil(copy)
    assert says in differences(source, copy)


def test_a_spoiled_result_ends_the_command_with_status_1(
    grouped, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = grouped
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    _flip(_shard_of(copy, GATE).name)(copy)
    assert main(["verify", str(source), str(copy)]) == 1
    captured = capsys.readouterr()
    assert "differs from" in captured.out + captured.err


def test_a_pruned_path_that_is_no_folder_is_bad_input(grouped, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        verify_checkpoint(grouped[0], tmp_path / "nowhere")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_bit_of_any_weight_is_found(grouped, tmp_path_factory, data) -> None:
    source, out = grouped
    copy = tmp_path_factory.getbasetemp() / "flipped"
    if not copy.exists():
        shutil.copytree(out, copy)
    shards = sorted(out.glob("*.safetensors"))
    shard = data.draw(st.sampled_from(shards))
    raw = bytearray(shard.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    at = data.draw(st.integers(begin, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    (copy / shard.name).write_bytes(raw)
    try:
        lines = verify_checkpoint(source, copy).differences
    finally:
        shutil.copy(shard, copy / shard.name)
    assert len(lines) == 1 and "differs from" in lines[0]
    with safe_open(shard, "np") as held:
        assert lines[0].split()[1].rstrip(":") in held.keys()  # noqa: SIM118
