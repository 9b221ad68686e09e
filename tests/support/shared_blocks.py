"""A system that shares blocks on any disk, by copying them, and a job whose blocks lie alike."""

import os
import tempfile
import threading
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import cast

from shardsurgeon.execution.plan import Literal, OutputShard, Plan, Segment
from shardsurgeon.storage.files import sha256_of
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.system import System
from tests.support.tiny_job import SIDE, Job, Piece, shard, tensor

BLOCK = 4096


@dataclass
class Clones:
    """What was shared.

    made: source and target file, first byte in each, bytes; the probe's target has no name. Every
    call is held to what Linux asks for: whole blocks of both files, inside the source.
    declined_from: the call, from 0, from which on none succeeds; devices: those that share,
    None for all.
    """

    declined_from: int | None = None
    devices: set[int] | None = None
    made: list[tuple[str, int, str, int, int]] = field(default_factory=list)
    asked: int = 0
    probes: int = 0

    def system(self, real: System) -> System:
        """`real`, and shared blocks."""
        lock = threading.Lock()

        def share(source: FileIO, begin: int, target: FileIO, at: int, nbytes: int) -> bool:
            numbers = begin, at, nbytes
            assert nbytes > 0 and not any(number % BLOCK for number in numbers), numbers
            assert begin + nbytes <= os.fstat(source.fileno()).st_size
            of_probe = isinstance(target.name, int)
            with lock:
                self.probes += of_probe
                number, self.asked = self.asked, self.asked + (not of_probe)
            if self.devices is not None and os.fstat(source.fileno()).st_dev not in self.devices:
                return False
            if not of_probe and self.declined_from is not None and number >= self.declined_from:
                return False
            data = os.pread(source.fileno(), nbytes, begin)
            assert len(data) == os.pwrite(target.fileno(), data, at) == nbytes
            if not of_probe:
                with lock:
                    self.made.append((_name(source), begin, _name(target), at, nbytes))
            return True

        def unnamed(folder: Path) -> FileIO:
            assert folder.is_dir()
            return cast(FileIO, tempfile.TemporaryFile(buffering=0))

        return replace(real, share=share, unnamed=unnamed)

    @property
    def nbytes(self) -> int:
        """How much was shared."""
        return sum(nbytes for *_, nbytes in self.made)


def _name(file: FileIO) -> str:
    return Path(str(file.name)).name


def make_aligned_job(folder: Path, scale: int = 1) -> Job:
    """Two source shards become two output shards, most of whose bytes lie in their blocks as in the
    source: with both edges, with none, between others that do not; and a copied file.

    scale: how many times as large the pieces are.
    """
    model = folder / "Tiny-MoE"
    (model / "code").mkdir(parents=True)
    sources = {
        "a.safetensors": os.urandom(60 * BLOCK * scale + 50),
        "b.safetensors": os.urandom(40 * BLOCK * scale),
    }
    for name, data in {**sources, **SIDE}.items():
        (model / name).write_bytes(data)
    (folder / "scores.pt").write_bytes(b"scores")
    shards = (
        _shard(
            "model-1.safetensors",
            64,
            # One run with two edges, in two tensors.
            Segment("a.safetensors", 64, 9 * BLOCK * scale),
            Segment("a.safetensors", 64 + 9 * BLOCK * scale, 3 * BLOCK * scale + 1_000),
            Literal(b"\x87" * 8),
            Segment("b.safetensors", 5 * BLOCK + 64 + 1_008, 6 * BLOCK * scale),
            # Nothing of these: no whole block, and another place in the block.
            Segment("b.safetensors", 64 + 1_008, 3_000),
            Segment("a.safetensors", 20 * BLOCK * scale + 7, 5 * BLOCK * scale),
        ),
        _shard(
            "sub/model-2.safetensors",
            BLOCK,
            # From block to block, out of order, and to the end of the source.
            Segment("a.safetensors", 30 * BLOCK * scale, 2 * BLOCK * scale),
            Segment("a.safetensors", 26 * BLOCK * scale, BLOCK * scale),
            Segment("a.safetensors", 40 * BLOCK * scale, 20 * BLOCK * scale + 50),
        ),
    )
    source = LocalSource(model)
    plan = Plan(
        shards=shards,
        generated_files=(("config.json", b"{}\n"),),
        copied_files=tuple(sorted(SIDE)),
        score_files=(("calibration/scores.pt", str(folder / "scores.pt"), _sha256(folder)),),
        source_files=source.list(),
        asked=(("selection", "ratio 0.5"),),
        source_fingerprint="2" * 64,
    )
    made = {shard.file: _content(shard, sources) for shard in shards}
    others = {"config.json": b"{}\n", "calibration/scores.pt": b"scores"}
    return Job(source, plan, made | others | SIDE)


def shared_of(plan: Plan) -> int:
    """Bytes of the plan that lie in shared blocks, counted block by block."""
    return _of_shards(plan) + sum(len(SIDE[n]) // BLOCK * BLOCK for n in plan.copied_files)


def _of_shards(plan: Plan) -> int:
    total = 0
    for made in plan.shards:
        at = len(made.header)
        # Where each byte of the output comes from, as the place that byte 0 would have.
        origins: list[tuple[int, int, object]] = []
        for piece in made.pieces:
            shift = (piece.file, piece.begin - at) if isinstance(piece, Segment) else None
            if shift and origins and origins[-1][1:] == (at, shift):
                origins[-1] = origins[-1][0], at + piece.nbytes, shift
            else:
                origins.append((at, at + piece.nbytes, shift))
            at += piece.nbytes
        for block in range(0, at - BLOCK + 1, BLOCK):
            inside = [o for o in origins if o[0] <= block and block + BLOCK <= o[1]]
            shift = inside[0][2] if inside else None
            total += BLOCK if isinstance(shift, tuple) and shift[1] % BLOCK == 0 else 0
    return total


def _shard(name: str, header: int, *pieces: Piece) -> OutputShard:
    return shard(name, b"H" * header, *map(tensor, pieces))


def _content(made: OutputShard, sources: dict[str, bytes]) -> bytes:
    data = made.header
    for piece in made.pieces:
        if isinstance(piece, Literal):
            data += piece.data
        else:
            data += sources[piece.file][piece.begin : piece.begin + piece.nbytes]
    return data


def _sha256(folder: Path) -> str:
    return sha256_of(folder / "scores.pt")
