"""What hostile files cost before they are refused, beside a good file of their kind.

    python tests/bench/hostile_memory.py WORK            prints the table of README.md
    python tests/bench/hostile_memory.py WORK --only scores

WORK: a folder for some 3 GB of files. Each command runs in a process of its own, of which the
system tells the peak of its memory and the processor time. The good files are those of the largest
published layout: Kimi-K2.5 with its 208,000 tensors, and 20 metrics of each of its experts.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layouts import KIMI
from skeleton import build

ROOT = Path(__file__).parents[2]
MB = 10**6
MIB = 2**20
MOST_MB, MOST_SECONDS = 400, 20
INDEX, CONFIG = "model.safetensors.index.json", "config.json"
MANIFEST = "shardsurgeon_view.jsonl.gz"
RECORD = "calibration/reap_pruning_metadata.json"


@dataclass(frozen=True)
class Cost:
    """Of one run: peak resident memory in bytes, seconds of the processor, exit status."""

    rss: int
    cpu: float
    status: int
    said: str


def measure(arguments: list[str]) -> Cost:
    """Run shardsurgeon once, from a small process: a child's peak counts what its parent has."""
    command = [sys.executable, __file__, "--measure", *arguments]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return Cost(**json.loads(said))


def measured_here(arguments: list[str]) -> Cost:
    """Run shardsurgeon as a child of this process."""
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", "shardsurgeon", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
    seconds = usage.ru_utime + usage.ru_stime
    return Cost(usage.ru_maxrss * 1024, seconds, child.returncode, said)


def dense(piece: bytes, nbytes: int, before: bytes = b'{"a":[', after: bytes = b"1]}") -> bytes:
    """JSON of so many bytes, a piece again and again."""
    return before + piece * (nbytes // len(piece)) + after


class Workshop:
    """Makes the inputs, each right before it is needed; the good model is shared."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self.good = work / "good"
        if not self.good.exists():
            build(self.good, KIMI, 64, "holes")
            self._good_scores()
        self.config = json.loads((self.good / CONFIG).read_text())

    def _good_scores(self) -> None:
        numbers = random.Random(42)

        def row() -> list[float]:
            return [numbers.random() for _ in range(KIMI.experts)]

        table = {
            str(layer): {f"metric_{n}": row() for n in range(19)} | {"reap": row()}
            for layer in KIMI.moe_layers
        }
        (self._work / "good.json").write_text(json.dumps(table))
        half = list(range(KIMI.experts // 2))
        kept = {"kept": {str(layer): half for layer in KIMI.moe_layers}}
        (self._work / "keep.json").write_text(json.dumps(kept))
        header = {}
        for at, layer in enumerate(KIMI.moe_layers):
            places = [at * 8 * KIMI.experts, (at + 1) * 8 * KIMI.experts]
            header[f"layers.{layer}.reap"] = {
                "dtype": "F64",
                "shape": [KIMI.experts],
                "data_offsets": places,
            }
        text = json.dumps(header).encode()
        data = b"".join(struct.pack(f"<{KIMI.experts}d", *row()) for _ in header)
        (self._work / "good.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)

    def model(self, name: str, **files: bytes) -> str:
        """The good model with other files; slashes are double underscores in the names."""
        folder = self._work / "hostile"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        replaced = {key.replace("__", "/"): data for key, data in files.items()}
        for path in self.good.iterdir():
            if path.name not in replaced:
                os.link(path, folder / path.name)
        for file, data in replaced.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(data)
        return str(folder)

    def view(self, manifest: Callable[[], bytes] | None = None) -> str:
        """A view of the good model that loses a quarter of its experts, with another manifest."""
        good, folder = self._work / "good-view", self._work / "hostile-view"
        if not good.exists():
            words = ["apply", str(self._work / "good.json"), "--model", str(self.good)]
            words += ["--ratio", "0.25", "--view", "-o", str(good)]
            if measured_here(words).status:
                sys.exit(f"{good} cannot be made")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        if manifest is not None:
            (folder / MANIFEST).write_bytes(manifest())
        return str(folder)

    def lines(self, change: Callable[[list[dict[str, Any]]], object]) -> bytes:
        """The manifest of that view with changes."""
        text = gzip.decompress((self._work / "good-view" / MANIFEST).read_bytes())
        lines = [json.loads(line) for line in text.splitlines()]
        change(lines)
        return gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines), 1)

    def configured(self, **changes: object) -> str:
        """The good model with another config."""
        config = json.loads(json.dumps(self.config))
        config.get("text_config", config).update(changes)
        return self.model("", **{CONFIG: json.dumps(config).encode()})

    def file(self, name: str, data: bytes) -> str:
        """A file of its own."""
        path = self._work / name
        path.write_bytes(data)
        return str(path)

    def header(self, text: bytes) -> bytes:
        """A safetensors file without data."""
        return len(text).to_bytes(8, "little") + text

    def inputs(self) -> Iterator[tuple[str, str, Callable[[], list[str]]]]:
        """(name, kind, what makes it and gives the command); the first of a kind is good."""
        work, good = self._work, str(self.good)
        entry = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        tensors = b"{" + b",".join(entry % n for n in range(340_000)) + b"}"
        names = b'{"weight_map":{' + b",".join(
            b'"%d":"a.safetensors"' % n for n in range(1_250_000)
        )

        def scores(path: str) -> list[str]:
            return ["plan", path, "--model", good, "--ratio", "0.5"]

        def listed(path: str) -> list[str]:
            return ["plan", "--plan", path, "--model", good]

        def inspected(**files: bytes) -> Callable[[], list[str]]:
            return lambda: ["inspect", self.model("", **files)]

        def claimed(**changes: object) -> Callable[[], list[str]]:
            return lambda: ["inspect", self.configured(**changes)]

        def written(
            name: str, data: Callable[[], bytes], how: Callable[[str], list[str]]
        ) -> Callable[[], list[str]]:
            return lambda: how(self.file(name, data()))

        yield "model: good", "model", lambda: ["inspect", good]
        whole = json.dumps(self.config).encode()[:-1] + b',"x":['
        lists = {
            "`[],`, 15 MB": (b"[],", 15 * MB),
            "`[],`, below the limit": (b"[],", 1_150_000),
            "numbers, below the limit": (b"1,", 1_600_000),
            "lists in lists, below the limit": (b"[" * 40 + b"]" * 40 + b",", 1_300_000),
            "texts, below the limit": (b'"ab",', 3_600_000),
        }
        for name, (piece, nbytes) in lists.items():
            text = dense(piece, nbytes, whole, b"1]}")
            yield f"config: {name}", "model", inspected(**{CONFIG: text})
        counts = ("n_routed_experts", "num_hidden_layers", "n_group", "num_experts_per_tok")
        for key in (*counts, "num_nextn_predict_layers", "topk_group"):
            yield f"config: `{key}: 2147483648`", "model", claimed(**{key: 2**31})
        for key in ("n_routed_experts", "num_hidden_layers"):
            value = 65_536 if key == counts[0] else 4096
            yield f"config: `{key}: {value}`, below the limit", "model", claimed(**{key: value})
        per_layer = {"num_routed_experts_per_layer": [65_536] * 61}
        yield "config: 65,536 experts in each of 61 layers", "model", claimed(**per_layer)
        pattern = {"quant_method": "compressed-tensors", "ignore": ["re:(a+)+$", "re:(.*)*x"]}
        yield "config: evil patterns in `ignore`", "model", claimed(quantization_config=pattern)
        index = {"`[],`, 100 MB": dense(b"[],", 100 * MB), "1.25 million names": names + b"}}"}
        index["`[],`, below the limit"] = dense(b"[],", 8 * MB)
        for name, data in index.items():
            yield f"index: {name}", "model", inspected(**{INDEX: data})
        shard = "model-00001-of-000064.safetensors"
        headers = {
            "`[],`, 90 MB": dense(b"[],", 90 * MB),
            "`[],`, below the limit": dense(b"[],", 9 * MB),
            "340,000 tensors of no size": tensors,
        }
        for name, data in headers.items():
            yield f"header: {name}", "model", inspected(**{shard: self.header(data)})
        record = RECORD.replace("/", "__")
        for name, data in {
            "`[],`, 60 MB": dense(b"[],", 60 * MB, b'{"format":1,"a":['),
            "`num_experts_before: 2147483648`": b'{"format":1,"num_experts_before":2147483648,'
            b'"num_experts_after":2,"layers":{"1":{"retained":[0,1],"pruned":[2]}}}',
        }.items():
            yield f"metadata: {name}", "model", inspected(**{record: data})
        yield "view: good", "view", lambda: ["inspect", self.view()]
        views: dict[str, Callable[[], bytes]] = {
            "4 GB of zeros": lambda: zeros(4000),
            "3 million empty members": lambda: gzip.compress(b"", mtime=0) * 3_000_000,
            "`[],`, 120 MB": lambda: gzip.compress(dense(b"[],", 120 * MB), 1),
            "`[],`, below the limit": lambda: gzip.compress(dense(b"[],", 9 * MB), 1),
            "texts, below the limit": lambda: gzip.compress(dense(b'"ab",', 20 * MB), 1),
            "one wide character, 40 MB": lambda: gzip.compress(
                b'{"a":"\xf0\x9f\x98\x80' + b"a" * 40 * MB + b'"}', 1
            ),
            "a million files": lambda: self.lines(
                lambda lines: lines[0].update(
                    files=[[f"{n}.safetensors", 1, "1:1"] for n in range(1_000_000)]
                )
            ),
            "ranges of a byte": lambda: self.lines(bytes_alone),
            "`source: /`": lambda: self.lines(lambda lines: lines[0].update(source="/")),
        }
        for name, make in views.items():
            yield f"view: {name}", "view", lambda make=make: ["inspect", self.view(make)]  # type: ignore[misc]
        yield "family: good", "family", lambda: [
            "inspect", good, "--family", str(ROOT / "shardsurgeon/families/kimi_k25.toml"),
        ]  # fmt: skip
        like = 'like = "kimi_k25"\nfacts = "x"\nmodel_types = []\narchitectures = []\n[tensors]\n'
        stars = "*a" * 100
        families = {
            "a dotted key of 30,000 parts": "a." * 30_000 + "b = 1",
            "dotted keys, below the limit": "".join("a." * 7980 + f"b{n} = 1\n" for n in range(4)),
            "lists in lists": "a = " + "[\n" * 15_000,
            "names with 100 `*`": f'{like}shared = ["{stars}"]\nbeside = ["{stars}"]',
            "250 names": f"{like}beside = {[f'*e*{n}*.*w' for n in range(250)]}",
        }
        for name, said in families.items():
            made = written("family.toml", said.encode, lambda p: ["inspect", good, "--family", p])
            yield f"family: {name}", "family", made
        yield "keep-list: good", "keep-list", lambda: listed(str(work / "keep.json"))
        keeps: dict[str, Callable[[], bytes]] = {
            "`[],`, 60 MB": lambda: dense(b"[],", 60 * MB),
            "`[],`, below the limit": lambda: dense(b"[],", 8 * MB),
            "lines `{}`, 60 MB": lambda: b"{}\n" * (20 * MB),
            "a key a million times": lambda: b"{" + b'"a":1,' * MB + b'"a":1}',
            "`num_experts: 2147483648`": lambda: b'{"kept":{"1":[0]},"num_experts":2147483648}',
            "a plan of 2147483648 experts": lambda: (
                b'{"format":1,"kind":"shardsurgeon-plan","num_experts":2147483648,'
                b'"layers":{"1":{"retained":[0],"pruned":[1]}}}'
            ),
        }
        for name, make in keeps.items():
            yield f"keep-list: {name}", "keep-list", written("keep2.json", make, listed)
        yield "scores.json: good", "scores.json", lambda: scores(str(work / "good.json"))
        texts: dict[str, Callable[[], bytes]] = {
            "`[],`, 120 MB": lambda: dense(b"[],", 120 * MB, b"[", b"[]]"),
            "`[],`, below the limit": lambda: dense(b"[],", 9 * MB, b"[", b"[]]"),
            "numbers, below the limit": lambda: dense(b"1.5,", 34 * MB, b'{"1":[', b"1]}"),
            "one wide character, 120 MB": lambda: '"\U0001f600'.encode() + b"a" * 120 * MB + b'"',
            "5,000 digits": lambda: b'{"1":[' + b"1" * 5000 + b"]}",
        }
        for name, make in texts.items():
            yield f"scores.json: {name}", "scores.json", written("s.json", make, scores)
        yield "scores.safetensors: good", "arrays", lambda: scores(str(work / "good.safetensors"))
        arrays: dict[str, Callable[[], bytes]] = {
            "header `[],`, 90 MB": lambda: self.header(dense(b"[],", 90 * MB)),
            "340,000 tensors of no size": lambda: self.header(tensors),
        }
        for name, make in arrays.items():
            made = written("s.safetensors", make, scores)
            yield f"scores.safetensors: {name}", "arrays", made
        archives: dict[str, Callable[[], bytes]] = {
            "an array of 8 GB of zeros": lambda: npz({"1": (2**30,)}),
            "numbers, the most there may be": lambda: npz({"a": (2**8, 2**16)}),
            "metadata of 1 GB of zeros": lambda: npz({"metadata": (2**30,), "1": (4,)}, "|u1"),
            "95,000 members": lambda: npz({str(n): (2,) for n in range(95_000)}),
        }
        for name, make in archives.items():
            yield f"scores.npz: {name}", "arrays", written("s.npz", make, scores)
        pickles: dict[str, Callable[[], bytes]] = {
            "a pickle of 900,000 lists": lambda: torch_file(b"\x80\x02](" + b"]" * 900_000 + b"e."),
            "a pickle of 15 MB": lambda: torch_file(pickle.dumps([[n] for n in range(2 * MB)], 2)),
        }
        for name, make in pickles.items():
            yield f"scores.pt: {name}", "arrays", written("s.pt", make, scores)


def zeros(megabytes: int) -> bytes:
    """gzip of so many MB of zeros."""
    packer = zlib.compressobj(9, wbits=31)
    found = [packer.compress(bytes(MB)) for _ in range(megabytes)]
    return b"".join([*found, packer.flush()])


def bytes_alone(lines: list[dict[str, Any]]) -> None:
    """Ranges of a byte each in place of those that a few shards have, as many as are read."""
    left = 4_500_000
    for line in lines[1:]:
        data_nbytes = min(line["nbytes"] - line["header_nbytes"], left // 4)
        columns = {"file": [0] * data_nbytes, "begin": [0] * data_nbytes}
        line["ranges"] = {**columns, "nbytes": [1] * data_nbytes}
        left -= data_nbytes


def npz(shapes: dict[str, tuple[int, ...]], kind: str = "<f8") -> bytes:
    """Deflated arrays of zeros."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, shape in shapes.items():
            said = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                member._compress_type = zipfile.ZIP_DEFLATED  # type: ignore[attr-defined]
                member.write(b"\x93NUMPY\x01\0" + len(said).to_bytes(2, "little") + said)
                left = int(kind[2:])
                for size in shape:
                    left *= size
                while left > 0:
                    member.write(bytes(min(left, 64 * MIB)))
                    left -= 64 * MIB
    return out.getvalue()


def torch_file(data: bytes) -> bytes:
    """A `.pt` with this pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", data)
    return out.getvalue()


def main() -> int:
    """The command line above; 1 where an input costs more than is promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", default="", help="inputs whose name begins so, and good ones")
    parser.add_argument("--say", action="store_true", help="print what each input is told")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    shop = Workshop(options.work)
    measures: dict[str, Cost] = {}
    failed = False
    print("| input | peak MB | over a good file | CPU s | exit status |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, kind, make in shop.inputs():
        if kind in measures and not name.startswith(options.only):
            continue
        cost = measure(make())
        good = measures.setdefault(kind, cost)
        over = (cost.rss - good.rss) / MB
        within = over <= MOST_MB and cost.cpu - good.cpu <= MOST_SECONDS
        failed |= not within or cost.status not in (0, 2)
        shown = "" if cost is good else f"{over:+.0f} MB"
        print(
            f"| {name} | {cost.rss / MB:.0f} | {shown} | {cost.cpu:.1f} | {cost.status} |"
            + ("" if within else " **too much**"),
            flush=True,
        )
        if options.say:
            print(f"    {cost.said[:200]}")
    print(f"\nThe limits: {MOST_MB} MB and {MOST_SECONDS} s of the processor over a good file.")
    return failed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(asdict(measured_here(sys.argv[2:]))))
        sys.exit()
    sys.exit(main())
