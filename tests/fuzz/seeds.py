"""Where the fuzzer starts: files of the fixtures, cut to a size that mutates well, and a few
small ones of every shape that the readers know.
"""

from __future__ import annotations

import collections
import gzip
import io
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tests.cli.standins import EVALUATED
from tests.support import handmade_view, tiny

FIXTURES = Path(__file__).parents[2] / "fixtures"
_FEW = 4
_DTYPES = ("F4", "F6_E2M3", "F8_E4M3", "BF16", "I32", "F32", "I64", "BOOL", "C64")


def headers() -> list[bytes]:
    """Two bytes of data length, then a header."""
    found = []
    for entries in _headers():
        text = json.dumps(entries).encode()
        ends = [one["data_offsets"][1] for one in entries.values() if "data_offsets" in one]
        found.append(max(ends, default=0).to_bytes(2, "little") + text)
    return found


def header_files() -> list[bytes]:
    """Whole safetensors files."""
    found = [
        len(seed[2:]).to_bytes(8, "little") + seed[2:] + bytes(int.from_bytes(seed[:2], "little"))
        for seed in headers()
    ]
    return [*found, b"version https://git-lfs.github.com/spec/v1\n", b""]


def _headers() -> Iterator[dict[str, dict[str, Any]]]:
    yield {}
    yield {"__metadata__": {"format": "pt"}}
    yield {"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}
    yield {
        "b": {"dtype": "U8", "shape": [0, 3], "data_offsets": [0, 0]},
        "a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]},
    }
    begin = 0
    entries: dict[str, dict[str, Any]] = {}
    for dtype in _DTYPES:
        nbytes = {"F4": 4, "F6_E2M3": 6, "BF16": 16, "I32": 32, "F32": 32, "I64": 64, "C64": 64}
        end = begin + nbytes.get(dtype, 8)
        entries[dtype] = {"dtype": dtype, "shape": [2, 4], "data_offsets": [begin, end]}
        begin = end
    yield entries
    for shard in sorted(FIXTURES.glob("*/*.safetensors"))[:_FEW]:
        raw = shard.read_bytes()
        entries = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        few = dict(list(entries.items())[:5])
        ends = [one["data_offsets"][1] for one in few.values() if "data_offsets" in one]
        if max(ends) < 1 << 16:
            yield few


def indexes() -> list[bytes]:
    """Indexes of a few tensors."""
    found = []
    for path in sorted(FIXTURES.glob("*/*.index.json"))[:_FEW]:
        content = json.loads(path.read_text())
        content["weight_map"] = dict(list(content["weight_map"].items())[:5])
        found.append(json.dumps(content, indent=2).encode())
    return found


def documents() -> list[bytes]:
    """Configs."""
    return [path.read_bytes() for path in sorted(FIXTURES.glob("*/config.json"))]


def configs() -> list[bytes]:
    """Configs of the tiny model, with the quantization of every fixture."""
    found = [
        json.dumps(tiny.config()).encode(),
        json.dumps({"text_config": tiny.config()}).encode(),
    ]
    for path in sorted(FIXTURES.glob("*/config.json")):
        said = json.loads(path.read_bytes())
        part = said.get("quantization_config") or said.get("text_config", {}).get(
            "quantization_config"
        )
        if part:
            found.append(json.dumps(tiny.config(quantization_config=part)).encode())
    return found


def edits() -> list[bytes]:
    """Changes of documents, as `edits.edited` reads them."""
    return [
        b"",
        bytes(5),
        *(bytes([n, kind, 0, 3 * n, 5 * n]) for n in range(12) for kind in range(4)),
    ]


def families() -> list[bytes]:
    """Declarations: of one family, of one like another, and of one read off a model."""
    folder = FIXTURES.parent / "shardsurgeon" / "families"
    names = ("deepseek_v3", "kimi_k25", "qwen3_moe")
    return [(folder / f"{name}.toml").read_bytes() for name in names]


def provenances() -> list[bytes]:
    """Metadata of one prune and of two."""
    source = {"name": "m", "revision": None, "config_sha256": "0" * 64}
    step = {"num_experts_before": 4, "num_experts_after": 2, "ratio": 0.5, "rounding": "floor",
            "metric": "reap", "selection": "ratio", "source": source}  # fmt: skip
    layer = {"retained": [0, 2], "pruned": [1, 3], "preserved": [0], "policy": "scores",
             "saliency": [1, 0.5, None, 0], "groups": [{}, {}]}  # fmt: skip
    whole: dict[str, Any] = {
        "format": 1,
        "method": "reap",
        **step,
        "steps": [step],
        "layers": {"1": layer},
    }
    sampling = {"min_p": 0.05, "top_k": 0, "do_sample": True}
    last = {**step, "num_experts_before": 3, "sampling": sampling}
    chain = {**whole, "steps": [{**step, "num_experts_after": 3}, last]}
    bare = {key: value for key, value in whole.items() if key != "steps"}
    every: list[dict[str, Any]] = [whole, chain, bare, {"layers": []}]
    return [json.dumps(one).encode() for one in every]


def journals() -> list[bytes]:
    """An interrupted run's journal."""
    head = {"format": "shardsurgeon journal", "version": 3, "result": "r", "source": "s",
            "asked": {"a": "b"}, "program": "0.1",
            "origin": "", "source_files": [["a.safetensors", 5, "1:2"]]}  # fmt: skip
    done = {"finished": "a.safetensors", "nbytes": 3}
    line, more = json.dumps(head).encode() + b"\n", json.dumps(done).encode() + b"\n"
    steps: list[dict[str, Any]] = [
        {"begun": "b"},
        {"filled": "b", "ranges": [[0, 3], [7, 9]]},
        {"sent": "a.safetensors", "to": "hf://me/pruned", "receipt": "r"},
    ]
    parts = b"".join(json.dumps(step).encode() + b"\n" for step in steps)
    return [line, line + more, line + more[:-5], line + more + parts]


def manifests() -> list[bytes]:
    """A view's manifest, unpacked: the whole, one of a shard without tensors, one whose headers are
    strings."""
    lines = handmade_view.in_memory()
    empty = [{**lines[0], "shards": 1, "tensors": 0}, handmade_view.shard("a.safetensors", {}, ())]
    headers = [handmade_view.spelled(line["header"]).decode() for line in lines[1:]]
    texts = [{**line, "header": text} for line, text in zip(lines[1:], headers, strict=True)]
    return [handmade_view.text_of(each) for each in (lines, empty, [lines[0], *texts])]


def packed_manifests() -> list[bytes]:
    """The same as they are stored."""
    return [gzip.compress(text, mtime=0) for text in manifests()]


def keep_lists() -> list[bytes]:
    """Every accepted shape."""
    record = {"retained": [0, 1], "pruned": list(range(2, 16)), "preserved": [1],
              "saliency": [0.5] * 16}  # fmt: skip
    shapes: list[object] = [
        {"kept": {"0": [1, 2], "mtp": [3]}, "num_experts": 16},
        {"dropped": {"layers.3": [0, 15]}},
        {"1": {"kept": [0, 1], "keep": 2}},
        {"model.layers.3.mlp": [0, 4]},
        {"3": [1, 2, 3], "mtp": [1]},
        {"format": 1, "kind": "shardsurgeon-plan", "num_experts": 16, "layers": {"1": record}},
        {"num_experts_before": 16, "layers": {"1": record}},
        {"perLayer": {}},
        {"original_experts": 16, "per_layer_keep": {"1": [0, 1]}, "per_layer_drop": {"1": [2]}},
        {"layers": {"L3": {"kept_experts": [1], "ranked_experts": [1, 0]}}},
        {"pruned": [{"layer": 3, "expert": 1}, {"layer": 4, "expert": 0}]},
        {"keep": {"per_layer": [[0, 1], [1, 2]]}, "kept_per_layer": 2},
    ]
    lines = b'{"layer": 3, "kept": [1]}\n{"layer": 4, "kept": [2]}\n'
    return [*(json.dumps(one).encode() for one in shapes), lines]


def _tables() -> dict[str, object]:
    return {
        "layers": {"3": {"reap": [0.5, 1.5], "expert_frequency": [0, 7]}, "note": "x"},
        "rows": {"scores": [[1, 2], [3, 4.5]], "total_tokens": 12},
        "plain": {"layers.1.mlp": [1, 2, 3], "mtp.0": [4, 5, 6]},
        "ranking": {"expert_ranking": {"3": [1, 0, 2]}, "order": "worst_first"},
        "records": {"experts": [{"layer": 3, "expert": e, "eanSum": 0.5} for e in range(2)]},
    }


def scores_jsons() -> list[bytes]:
    """Tables by layer and by row, and calibrations of one dataset and of two."""
    tables = [json.dumps(one).encode() for one in (*_tables().values(), _calibration(), _mix())]
    lines = b'{"layer": 3, "ranking": [1, 0]}\n{"layer": 4, "ranking": [0, 1]}\n'
    return [*tables, lines, b"\xef\xbb\xbf[[1,2],[3,4]]"]


def _calibration() -> dict[str, Any]:
    names = (
        *("counts", "weight_sum", "norm_sum", "weighted_norm_sum", "max_activation"),
        "norm_square_sum",
    )
    sums: dict[str, Any] = {"total_tokens": 9, **{name: [3, 0] for name in names}}
    return {
        "format": "shardsurgeon scores",
        "version": 1,
        "calibration": {"model": "m", "samples": [["c4", 0, 9]]},
        "scores": {"3": {"reap": [0.5, 0]}},
        "accumulators": {"3": sums},
    }


def evaluations() -> list[bytes]:
    """One of two candidates on two parts."""
    return [EVALUATED.file()]


def _mix() -> dict[str, Any]:
    """The same calibration, of which a third is another dataset."""
    made = _calibration()
    own = {name: [[1, 0], [2, 0]] for name in made["accumulators"]["3"]}
    made["calibration"]["samples"] = [["c4", 0, 3], ["org/code(train)", 0, 6]]
    return {**made, "parts": {"3": {**own, "total_tokens": [3, 6]}}}


def scores_safetensors() -> list[bytes]:
    """The same as tensors."""
    arrays = {"3.reap": np.array([0.5, 1.5], "f4"), "3.expert_frequency": np.array([1, 0])}
    made = _calibration()
    sums = {f"accumulators.layers.3.{n}": np.array(v) for n, v in made["accumulators"]["3"].items()}
    said = {"version": "1", "calibration": json.dumps(made["calibration"])}
    mix = _mix()
    parts = {f"parts.layers.3.{n}": np.array(v) for n, v in mix["parts"]["3"].items()}
    mixed = {**said, "calibration": json.dumps(mix["calibration"]), "format": mix["format"]}
    return [
        safetensors.numpy.save(arrays, {"total_tokens": "12"}),
        safetensors.numpy.save({**arrays, **sums}, {"format": made["format"], **said}),
        safetensors.numpy.save({**arrays, **sums, **parts}, mixed),
        safetensors.numpy.save({"scores": np.ones((2, 3), "f2")}),
        *map(_vector_of, ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "U64", "C64")),
    ]


def _vector_of(dtype: str) -> bytes:
    nbytes = {"BF16": 6, "U64": 24, "C64": 24}.get(dtype, 3)
    text = json.dumps({"3": {"dtype": dtype, "shape": [3], "data_offsets": [0, nbytes]}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(60, 60 + nbytes))


def torch_files() -> list[bytes]:
    """The fixtures' scores."""
    return [path.read_bytes() for path in sorted(FIXTURES.glob("*/scores.pt"))]


def torch_pickles() -> list[bytes]:
    """What lies in them."""
    found = []
    for raw in torch_files():
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            name = next(one for one in archive.namelist() if one.endswith("data.pkl"))
            found.append(archive.read(name))
    # Containers of every kind, which scores rarely have.
    found.append(b"\x80\x02}q\x00(K\x03}q\x01X\x04\x00\x00\x00reapq\x02](G?\xe0\x00\x00\x00\x00"
                 b"\x00\x00K\x01eh\x02\x85\x86su.")  # fmt: skip
    found.append(b"\x80\x04\x8f(K\x01\x90\x91ccollections\nOrderedDict\n)R}b\x88\x89N\x87.")
    values = {1: np.float64(0.5), "s": {1, 2}, "f": frozenset([3]), "c": 1 + 2j, "b": b"xy",
              "o": collections.OrderedDict(a=1), "n": collections.Counter("ab"),
              "d": collections.defaultdict(int)}  # fmt: skip
    found += [pickle.dumps(values, protocol) for protocol in (2, 4)]
    return [*found, *_hand_written()]


def _hand_written() -> list[bytes]:
    """What torch.save writes more rarely: untyped storages, parameters, sizes, devices."""
    empty = b"ccollections\nOrderedDict\n)R"
    untyped = b"(X\x07\0\0\0storagectorch.storage\nUntypedStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK@tQ"
    typed = b"(X\x07\0\0\0storagectorch\nHalfStorage\nX\x01\0\0\x001X\x03\0\0\0cpuK tQ"
    place = b"K\x02K\x02K\x03\x86K\x03K\x01\x86\x89" + empty
    flags = b"}X\x03\0\0\0neg\x88s"
    third = b"ctorch._utils\n_rebuild_tensor_v3\n(" + untyped + place + b"ctorch\nuint16\ntR"
    negated = b"ctorch._utils\n_rebuild_tensor_v2\n(" + typed + place + flags + b"tR"
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + third + b"\x88" + empty + b"tR"
    kind = b"ctorch._utils\n_rebuild_tensor_v2\nctorch.nn.parameter\nParameter\n"
    typed_as = b"ctorch._tensor\n_rebuild_from_type_v2\n(" + kind + b"(" + typed + place + b"t}tR"
    others = [b"ctorch\nSize\nK\x02K\x03\x86\x85R", b"ctorch\ndevice\nX\x04\0\0\0cudaK\0\x86R"]
    values = [third, negated, parameter, typed_as, *others]
    return [b"\x80\x02}K\x03" + value + b"s." for value in values]


def npz_files() -> list[bytes]:
    """Stored and deflated."""
    found = []
    saves: list[Any] = [np.savez, np.savez_compressed]
    for save in saves:
        out = io.BytesIO()
        save(out, **{"3.reap": np.array([0.5, 1.5]), "total_tokens": np.array(7)})
        found.append(out.getvalue())
    return found


def npz_members() -> list[bytes]:
    """Arrays of several types and orders."""
    found = []
    for array in (
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype="<u2").reshape(3, 2)),
        np.array([True, False]),
        np.array(3 + 4j),
    ):
        out = io.BytesIO()
        np.lib.format.write_array(out, array)
        found.append(out.getvalue())
    return found
