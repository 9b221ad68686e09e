"""A tiny source, a plan for it that has every kind of piece, and the bytes it must give."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardsurgeon.execution.plan import Literal, OutputShard, OutputTensor, Pieces, Plan, Segment
from shardsurgeon.storage.files import sha256_of
from shardsurgeon.storage.formats.tensor_table import TensorRecord, TensorTable
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.source import Source

A = random.Random(1).randbytes(60_000)
B = random.Random(2).randbytes(40_000)
SIDE = {"tokenizer.json": b"{}" * 3000, "code/model.py": b"print()", "empty.txt": b""}
Piece = Segment | Literal


def tensor(*pieces: Piece) -> OutputTensor:
    nbytes = sum(piece.nbytes for piece in pieces)
    return OutputTensor(f"tensor of {nbytes}", "U8", (nbytes,), pieces)


def shard(file: str, header: bytes, *tensors: OutputTensor) -> OutputShard:
    records, end = [], 0
    for each in tensors:
        records.append(TensorRecord(each.name, each.dtype, each.shape, end, end + each.nbytes))
        end += each.nbytes
    pieces = Pieces.of(piece for each in tensors for piece in each.pieces)
    return OutputShard(file, header, TensorTable.of(records), pieces)


def tensors_of(made: OutputShard) -> Iterator[OutputTensor]:
    """Every tensor of a shard with its pieces."""
    pieces = iter(made.pieces)
    for record in made.tensors:
        own: list[Piece] = []
        while sum(piece.nbytes for piece in own) < record.nbytes:
            own.append(next(pieces))
        yield OutputTensor(record.name, record.dtype, record.shape, tuple(own))


@dataclass(frozen=True)
class Job:
    """A source folder, a plan for it, and what the plan must make of it."""

    source: Source
    plan: Plan
    expected: dict[str, bytes]


def make_job(folder: Path) -> Job:
    """Two source shards become three output shards: joined, cut, out of order, literal, empty."""
    model = folder / "Tiny-MoE"
    (model / "code").mkdir(parents=True)
    for name, data in {"a.safetensors": A, "b.safetensors": B, **SIDE}.items():
        (model / name).write_bytes(data)
    (model / "code" / "model.py").chmod(0o755)
    (folder / "scores.pt").write_bytes(b"scores")
    source = LocalSource(model)
    return Job(source, make_plan(source, folder / "scores.pt"), expected_files())


def make_plan(source: Source, scores: Path) -> Plan:
    one = (
        tensor(Segment("a.safetensors", 100, 20_000)),
        tensor(Segment("a.safetensors", 20_100, 10_000), Segment("a.safetensors", 40_000, 1)),
        tensor(Literal(b"\x87\0\0\0")),
        tensor(Segment("b.safetensors", 7, 5), Segment("b.safetensors", 50, 0)),
    )
    two = (
        tensor(Segment("b.safetensors", 1_000, 39_000)),
        tensor(Segment("a.safetensors", 3, 9_000)),
    )
    return Plan(
        shards=(
            shard("model-1.safetensors", b"1" * 64, *one),
            shard("model-2.safetensors", b"2" * 72, *two),
            shard("sub/model-3.safetensors", b"3" * 8, tensor(Literal(b"xyz"))),
        ),
        generated_files=(("calibration/metadata.json", b"{ }"), ("config.json", b"{}\n")),
        copied_files=tuple(sorted(SIDE)),
        score_files=(("calibration/scores.pt", str(scores), sha256_of(scores)),),
        source_files=source.list(),
        asked=(("selection", "ratio 0.5"),),
        source_fingerprint="2" * 64,
    )


def expected_files() -> dict[str, bytes]:
    return {
        "model-1.safetensors": b"1" * 64
        + A[100:30_100]
        + A[40_000:40_001]
        + b"\x87\0\0\0"
        + B[7:12],
        "model-2.safetensors": b"2" * 72 + B[1_000:40_000] + A[3:9_003],
        "sub/model-3.safetensors": b"3" * 8 + b"xyz",
        "calibration/metadata.json": b"{ }",
        "calibration/scores.pt": b"scores",
        "config.json": b"{}\n",
        **SIDE,
    }


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
