"""Files that try to run code, exhaust memory or break the reader of torch.save's format."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import ScoreError
from shardsurgeon.storage.formats import pickle_reader
from shardsurgeon.storage.formats.dtypes import StoredArray
from shardsurgeon.storage.formats.torch_file import read_torch_file
from tests.support import torch_file

PROTOCOLS = [1, 2, 3, 4, 5]


def read(path: Path) -> object:
    return read_torch_file(path, "scores.pt")


def archive(
    path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, root: str = "archive"
) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{root}/data.pkl", pickled)
        file.writestr(f"{root}/byteorder", "little")
        for name, content in (storages or {}).items():
            file.writestr(f"{root}/data/{name}", content)
    return path


def hostile(tmp_path: Path, pickled: bytes, storages: dict[str, bytes] | None = None) -> ScoreError:
    with pytest.raises(ScoreError) as caught:
        read(archive(tmp_path / "hostile.pt", pickled, storages))
    assert caught.value.where == "scores.pt"
    return caught.value


class TestHostileFiles:
    """Each would run code, or exhaust memory or patience, in a reader that trusts the file."""

    class Evil:
        def __init__(self, function: object, *arguments: object) -> None:
            self.call = (function, arguments)

        def __reduce__(self) -> object:
            return self.call

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    @pytest.mark.parametrize(
        ("function", "argument", "name"),
        [
            (os.system, "echo owned", f"{os.system.__module__}.system"),
            (eval, "1 + 1", "(builtins|__builtin__).eval"),
            (getattr, "x", "(builtins|__builtin__).getattr"),
            (pickle.loads, b"x", "_?c?[pP]ickle.loads"),
        ],
    )
    def test_a_call_of_anything_else_is_refused_by_name(
        self, tmp_path: Path, protocol: int, function: object, argument: object, name: str
    ) -> None:
        self.refused_by_name(
            tmp_path, pickle.dumps({0: self.Evil(function, argument)}, protocol), name
        )

    @pytest.mark.torch
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_a_call_of_torch_is_refused_by_name(self, tmp_path: Path, protocol: int) -> None:
        import torch

        pickled = pickle.dumps({0: self.Evil(torch.load, "x")}, protocol)
        self.refused_by_name(tmp_path, pickled, "torch.serialization.load")

    def refused_by_name(self, tmp_path: Path, pickled: bytes, name: str) -> None:
        error = hostile(tmp_path, pickled)
        assert re.search(f"names {name}, which is not on the list", error.problem)
        assert "weights_only=True" in error.remedy

    def test_nothing_of_the_file_is_called_or_imported(self, tmp_path: Path) -> None:
        witness = tmp_path / "witness"
        hostile(tmp_path, pickle.dumps(self.Evil(os.mkdir, str(witness))))
        assert not witness.exists()
        hostile(tmp_path, b"cantigravity\nfly\n.")
        assert "antigravity" not in sys.modules

    @pytest.mark.parametrize("value", [np.arange(3.0), Path("x")], ids=["numpy", "path"])
    def test_honest_values_beyond_the_list_are_refused_with_advice(
        self, tmp_path: Path, value: object
    ) -> None:
        self.refused_with_advice(archive(tmp_path / "a.pt", pickle.dumps({0: value}, 2)))

    @pytest.mark.torch
    @pytest.mark.parametrize("kind", ["sparse", "meta", "module"])
    def test_what_torch_saves_beyond_the_list_is_refused_with_advice(
        self, tmp_path: Path, kind: str
    ) -> None:
        import torch

        values: dict[str, object] = {
            "sparse": torch.eye(2).to_sparse(),
            "meta": torch.empty(2, device="meta"),
            "module": torch.nn.Linear(1, 1),
        }
        torch.save({0: values[kind]}, tmp_path / "a.pt")
        self.refused_with_advice(tmp_path / "a.pt")

    def refused_with_advice(self, path: Path) -> None:
        with pytest.raises(ScoreError, match=r"not on the list .* if you trust the file") as caught:
            read(path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("pickled", "problem"),
        [
            (b"", "breaks off after 0 bytes"),
            (b"\x80\x02}", "breaks off after 3 bytes"),
            (b"\x80\x09N.", "protocol 9"),
            (b".", "ends with 0 values"),
            (b"NN.", "ends with 2 values"),
            (b"(N.", "ends with 1 values"),
            (b"a.", "empty stack"),
            (b"(s.", "empty stack"),
            (b"u.", "misses a mark"),
            (b"\xff.", "unknown opcode 0xff"),
            (b"(ios\nsystem\n.", "opcode INST"),
            (b"(cos\nsystem\no.", "names os.system"),
            (b"(o.", "opcode OBJ"),
            (b")\x81.", "opcode NEWOBJ"),
            (b")}\x92.", "opcode NEWOBJ_EX"),
            (b"\x82\x01.", "opcode EXT1"),
            (b"\x83\x01\x00.", "opcode EXT2"),
            (b"\x84\x01\x00\x00\x00.", "opcode EXT4"),
            (b"Pos\n.", "opcode PERSID"),
            (b"N2.", "opcode DUP"),
            (b"\x97.", "opcode NEXT_BUFFER"),
            (b"K\x01K\x02\x93.", "by something that is not a string"),
            (b"\x8c\x02os\x8c\x06system\x93.", "names os.system"),
            (b"ctorch.serialization\nload\nN\x85R.", "names torch.serialization.load"),
            (b"\x8c\x05torch\x8c\x0cnn.Module.to\x93.", "names torch.nn.Module.to"),
            (b"NQ.", "not a storage"),
            (b"X\x01\x00\x00\x00/Q.", "not a storage"),
            (b"N)R.", "not a function"),
            (b"ctorch\nFloatStorage\n)R.", "not a function"),
            (b"ctorch\nSize\nNR.", "not a tuple of arguments"),
            (b"ctorch\nSize\n)R.", "torch.Size with malformed arguments"),
            (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "malformed arguments"),
            (b"ctorch\nSize\n.", "a class or a bare storage"),
            (b"]ctorch\nFloatStorage\na.", "a class or a bare storage"),
            (b"N}b.", "sets the state"),
            (b"](K\x01e]b.", "sets the state"),
            (b"K\x01K\x02a.", "appends to something"),
            (b"]K\x01K\x02s.", "sets items of something"),
            (b"](K\x01\x90.", "adds to something"),
            (b"}(K\x01u.", "sets items of something"),
            (b"}]K\x01s.", "uses a list as key"),
            (b"}K\x01\x85K\x01s.", "uses a tuple as key"),
            (b"h\x07.", "value 7, which it has not stored"),
            (b"\x8b\xff\xff\xff\x7f.", "integer of 2,147,483,647 bytes"),
            (b"\x8b\xff\xff\xff\xff.", "integer of -1 bytes"),
            (b"\x8a\xff" + b"\x01" * 255 + b".", "integer of 255 bytes"),
            (b"I" + b"9" * 5000 + b"\n.", "malformed integer"),
            (b"Lx\n.", "malformed integer"),
            (b"X\xff\xff\xff\xffabc.", "breaks off"),
            (b"\x8d" + b"\xff" * 8 + b"abc.", "breaks off"),
            (b"X\x01\x00\x00\x00\xff.", "not UTF-8"),
            (b"cos", "breaks off within a line"),
            (b"]q\x00h\x00a.", "holds itself"),
            (b"}q\x00K\x01h\x00s.", "holds itself"),
            (b"]q\x00h\x00\x85a.", "holds itself"),
            (b"]" * 101 + b"a" * 100 + b".", "nests more than 100"),
            (b")" + b"\x85" * 100_000 + b".", "nests more than 100"),
        ],
    )
    def test_malformed_pickles(self, tmp_path: Path, pickled: bytes, problem: str) -> None:
        assert problem in hostile(tmp_path, pickled).problem

    def test_shared_parts_are_walked_once(self, tmp_path: Path) -> None:
        # t = (t, t), ninety times: 2^90 leaves for a reader that follows every path.
        doubled = b")q\x00" + b"h\x00\x86q\x00" * 90 + b"."
        assert isinstance(read(archive(tmp_path / "a.pt", doubled)), tuple)

    def test_depth_is_counted_along_shared_parts(self, tmp_path: Path) -> None:
        shared = b")" + b"\x85" * 60 + b"q\x00" + b"h\x00" + b"\x85" * 60 + b"\x86."
        assert "nests more than 100" in hostile(tmp_path, shared).problem

    def test_too_many_operations(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pickle_reader, "MAX_OPERATIONS", 1000)
        error = hostile(tmp_path, b"](" + b"N" * 1000 + b"e.")
        assert error.problem == "its pickle has more than 1,000 operations"
        assert "save the scores as tensors" in error.remedy

    @pytest.mark.parametrize(
        ("offset", "shape", "strides", "problem"),
        [
            (0, (4,), (1,), "elements up to 4 of a storage that has 3"),
            (3, (1,), (1,), "elements up to 4 of a storage that has 3"),
            (4, (0,), (1,), "elements up to 4 of a storage that has 3"),
            (0, (2, 2), (2, 1), "elements up to 4 of a storage that has 3"),
            (0, (2,), (2**62,), "elements up to 4,611,686,018,427,387,905"),
            (2, (2,), (-1,), "malformed arguments"),
            (-1, (2,), (1,), "malformed arguments"),
            (0, (-1,), (1,), "malformed arguments"),
            (0, (1.5,), (1,), "malformed arguments"),
            (0, (True,), (1,), "malformed arguments"),
            (0, (2,), (1, 1), "1 dimensions and 2 strides"),
            (0, (1,) * 65, (1,) * 65, "65 dimensions"),
            (0, (0, 2**62), (1, 1), "shape [0, 4611686018427387904]"),
            (0, (2**40, 2), (0, 0), "shape [1099511627776, 2]"),
            (0, (2**30,), (0,), "far more elements than the file bytes"),
        ],
    )
    def test_views_outside_of_their_storage(
        self, tmp_path: Path, offset: int, shape: object, strides: object, problem: str
    ) -> None:
        pickled = tensor_pickle(("0", "cpu", 3), offset, shape, strides)
        assert problem in hostile(tmp_path, pickled, {"0": bytes(12)}).problem

    @pytest.mark.parametrize(
        ("storage", "problem"),
        [
            (("1", "cpu", 3), "storage '1' is missing"),
            (("../../etc/passwd", "cpu", 3), "storage '../../etc/passwd' is missing"),
            (("../data.pkl", "cpu", 3), "is missing"),
            (("0", "cpu", 4), "12 bytes, 4 elements of 4 bytes were saved"),
            (("0", "cpu", 2), "12 bytes, 2 elements of 4 bytes were saved"),
            (("0", "cpu", -1), "malformed storage"),
            (("0", "cpu", 2**90), "integer of 12 bytes"),
            ((0, "cpu", 3), "malformed storage"),
            (("0", "cpu"), "not a storage"),
        ],
    )
    def test_storages_that_are_not_there(
        self, tmp_path: Path, storage: tuple[object, ...], problem: str
    ) -> None:
        pickled = tensor_pickle(storage, 0, (1,), (1,))
        assert problem in hostile(tmp_path, pickled, {"0": bytes(12)}).problem

    def test_many_expanded_views_add_up(self, tmp_path: Path) -> None:
        # Each asks for a fifth of what one file may ask for.
        tensors = [np.broadcast_to(np.float32(0), 2**18) for _ in range(5)]
        with pytest.raises(ScoreError, match=r"far more elements .*clone"):
            read(torch_file.save(tensors, tmp_path / "a.pt"))

    def test_a_storage_that_changed_after_saving_does_not_match_its_checksum(
        self, tmp_path: Path
    ) -> None:
        path = torch_file.save(np.float32([1.0, 2.0, 3.0]), tmp_path / "scores.pt")
        raw = path.read_bytes()
        number = np.float32(2.0).tobytes()
        assert raw.count(number) == 1
        path.write_bytes(raw.replace(number, np.float32(4.0).tobytes()))
        value = read(path)
        assert isinstance(value, StoredArray)
        with pytest.raises(ScoreError, match="data/0 does not match its checksum"):
            value.load()


class TestOtherFormats:
    @pytest.mark.torch
    def test_the_format_before_zip_is_refused_with_advice(self, tmp_path: Path) -> None:
        import torch

        path = tmp_path / "scores.pt"
        torch.save({0: torch.ones(2)}, path, _use_new_zipfile_serialization=False)
        with pytest.raises(ScoreError, match=r"old format.*weights_only=True") as caught:
            read(path)
        assert "torch.save" in caught.value.remedy

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (b"", "the file is empty"),
            (pickle.dumps({0: [1.0]}), "a plain pickle"),
            (b"version https://git-lfs", "no zip archive"),
            (b"PK", "no zip directory"),
            (b"\x00" * 257 + b"ustar" + b"\x00" * 300, "tar format"),
        ],
    )
    def test_files_of_other_kinds(self, tmp_path: Path, content: bytes, problem: str) -> None:
        path = tmp_path / "a.pt"
        path.write_bytes(content)
        with pytest.raises(ScoreError, match=problem):
            read(path)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ScoreError, match="cannot be read"):
            read(tmp_path / "nothing.pt")

    def test_a_big_endian_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/data.pkl", b"N.")
            file.writestr("a/byteorder", "big")
        with pytest.raises(ScoreError, match="byte order b'big'"):
            read(path)

    def test_a_compressed_archive(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a/data.pkl", b"N." + bytes(10_000_000))
        with pytest.raises(ScoreError, match=r"compressed, torch.save stores"):
            read(path)

    def test_a_torchscript_program(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/data.pkl", b"N.")
            file.writestr("a/constants.pkl", b"N.")
        with pytest.raises(ScoreError, match="TorchScript"):
            read(path)

    @pytest.mark.parametrize("names", [[], ["data.pkl"], ["a/data.pkl", "b/data.pkl"]])
    def test_an_archive_without_exactly_one_pickle(self, tmp_path: Path, names: list[str]) -> None:
        path = tmp_path / "a.pt"
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, b"N.")
        with pytest.raises(ScoreError, match=r"members named data\.pkl"):
            read(path)


def tensor_pickle(
    storage: tuple[object, ...], offset: object, shape: object, strides: object
) -> bytes:
    """A pickle of one float tensor as torch writes it, with whatever numbers are wanted."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", torch_file.FloatStorage, *storage) if value is marker else None

        def reducer_override(self, value: object) -> object:
            if value is tensor:
                rest = (offset, shape, strides, False, OrderedDict())
                return torch_file._rebuild_tensor_v2, (marker, *rest)
            return NotImplemented

    marker, tensor = Marker(), Marker()
    out = io.BytesIO()
    Pickler(out, 2).dump(tensor)
    return torch_file.as_torchs(out.getvalue())


class Marker:
    """Stands for a storage or a tensor while it is pickled."""


def _valid_file() -> bytes:
    out = io.BytesIO()
    layer = {"reap": np.float32([0.5, 1.5]), "count": np.array([1, 2])}
    torch_file.save({3: layer, "note": ["x", 1.5, (1, 2), torch_file.Size([1]), b"ab"]}, out)
    return out.getvalue()


VALID = _valid_file()


def load_all(value: object) -> None:
    if isinstance(value, StoredArray):
        value.load()
    elif isinstance(value, dict):
        for part in value.values():
            load_all(part)
    elif isinstance(value, list | tuple):
        for part in value:
            load_all(part)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4),
    end=st.one_of(st.none(), st.integers(0, len(VALID))),
)
def test_damaged_files_raise_only_score_errors(
    tmp_path: Path, edits: list[tuple[int, int]], end: int | None
) -> None:
    raw = bytearray(VALID)
    for place, byte in edits:
        raw[place] = byte
    path = tmp_path / "a.pt"
    path.write_bytes(raw[:end])
    with contextlib.suppress(ScoreError):
        load_all(read(path))


PICKLED = zipfile.ZipFile(io.BytesIO(VALID)).read("archive/data.pkl")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, len(PICKLED) - 1), st.integers(0, 255)), min_size=1),
    tail=st.binary(max_size=20),
)
def test_damaged_pickles_raise_only_score_errors(
    tmp_path: Path, edits: list[tuple[int, int]], tail: bytes
) -> None:
    raw = bytearray(PICKLED)
    for place, byte in edits:
        raw[place] = byte
    path = archive(tmp_path / "a.pt", bytes(raw) + tail, {"0": bytes(8), "1": bytes(16)})
    with contextlib.suppress(ScoreError):
        load_all(read(path))


OPCODES = st.sampled_from([bytes([code]) for code in pickle_reader._OPERATIONS])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(OPCODES, OPCODES, OPCODES, st.binary(max_size=3)), max_size=30))
def test_random_opcodes_raise_only_score_errors(tmp_path: Path, parts: list[bytes]) -> None:
    with contextlib.suppress(ScoreError):
        load_all(read(archive(tmp_path / "a.pt", b"".join(parts) + b".")))
