"""numpy's .npz read without numpy's own loader, and the zip container under it."""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import ScoreError
from shardsurgeon.storage.formats import zip_reader
from shardsurgeon.storage.formats.dtypes import StoredArray
from shardsurgeon.storage.formats.npz import read_npz

Save = Callable[..., None]


def saved(tmp_path: Path, save: Save = np.savez, **arrays: object) -> Path:
    path = tmp_path / "scores.npz"
    save(path, **arrays)
    return path


def read(path: Path) -> dict[str, StoredArray]:
    return read_npz(path, "scores.npz")


def with_member(tmp_path: Path, content: bytes, name: str = "a.npy") -> Path:
    path = tmp_path / "scores.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, content)
    return path


def member(header: str, data: bytes = b"", version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + data


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "descr",
    [f"{order}{kind}{nbytes}" for order in "<>" for kind in "fiu" for nbytes in (2, 4, 8)]
    + ["<c8", ">c8", "<c16", ">c16", "|i1", "|u1", "|b1"],
)
def test_every_number_type_in_both_byte_orders(tmp_path: Path, descr: str, save: Save) -> None:
    array = np.array([[0, 1, 1], [0, 5, 100]]).astype(descr)
    stored = read(saved(tmp_path, save, a=array))["a"]
    assert stored.shape == (2, 3)
    np.testing.assert_array_equal(stored.load(), array)


@pytest.mark.parametrize(
    "array",
    [np.float32(1.5), np.zeros((0, 3)), np.zeros(0), np.arange(6.0).reshape(2, 3).T],
    ids=["scalar", "empty", "empty vector", "fortran"],
)
def test_unusual_layouts(tmp_path: Path, array: np.ndarray) -> None:
    np.testing.assert_array_equal(read(saved(tmp_path, a=array))["a"].load(), array)


def test_names_come_without_their_suffix(tmp_path: Path) -> None:
    path = saved(tmp_path, **{"model.layers.3.mlp": np.ones(2), "3/reap": np.ones(2)})
    assert sorted(read(path)) == ["3/reap", "model.layers.3.mlp"]


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.array([{"a": 1}], dtype=object), "type '|O'"),
        (np.array(["a"]), "type '<U1'"),
        (np.array([(1, 2.0)], dtype="i4,f4"), "holds records"),
        (np.array(["2024-01-01"], dtype="M8[D]"), "type '<M8[D]'"),
    ],
    ids=["objects", "text", "records", "dates"],
)
def test_arrays_that_are_not_numbers(tmp_path: Path, array: np.ndarray, problem: str) -> None:
    with pytest.raises(ScoreError) as caught:
        read(saved(tmp_path, a=array))
    assert problem in caught.value.problem
    assert caught.value.remedy == "save plain numbers, such as float32"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not a numpy array"),
        (b"\x93NUMPY", "is not a numpy array"),
        (b"{'descr': '<f4'}" * 3, "is not a numpy array"),
        (b"\x93NUMPY\x01\x00\xff\xff  ", "header of 65,535 bytes"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "header of 4,294,967,295 bytes"),
        (member("{'descr': '<f4'}"), "header that is not numpy's"),
        (member("[1]"), "header that is not numpy's"),
        (member("__import__('os')"), "header that is not numpy's"),
        (member("(" * 5000), "header that is not numpy's"),
        (member("{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}"), "says 12"),
        (member("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}"), "not numpy's"),
        (member("{'descr': '<f4', 'fortran_order': False, 'shape': 3}"), "not numpy's"),
        (member("{'descr': '<f4', 'fortran_order': False, 'shape': (1.0,)}"), "not numpy's"),
        (member("{'descr': '<f4', 'fortran_order': 0, 'shape': ()}"), "not numpy's"),
        (member(f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {2**62})}}"), "the shape"),
        (
            member(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'1,' * 40})}}"),
            "the shape",
        ),
        (member("{'descr': '', 'fortran_order': True, 'shape': ()}"), "type ''"),
    ],
)
def test_malformed_members(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(ScoreError) as caught:
        read(with_member(tmp_path, content))
    assert problem in caught.value.problem


def test_a_wide_header_is_read(tmp_path: Path) -> None:
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }"
    path = with_member(tmp_path, member(header, np.float32(2.5).tobytes(), version=2))
    assert read(path)["a"].load().tolist() == [2.5]


class TestContainer:
    def test_a_member_that_inflates_beyond_its_size_is_refused(self, tmp_path: Path) -> None:
        path = saved(tmp_path, np.savez_compressed, a=np.zeros(100_000))
        raw = path.read_bytes()
        nbytes = struct.pack("<I", 800_128)
        assert raw.count(nbytes) >= 1
        path.write_bytes(raw.replace(nbytes, struct.pack("<I", 200)))
        with pytest.raises(ScoreError):
            read(path)["a"].load()

    def test_a_member_that_claims_too_much_is_refused_before_inflating(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = saved(tmp_path, np.savez_compressed, a=np.zeros(1000))
        monkeypatch.setattr(zip_reader, "MAX_MEMBER_NBYTES", 8000)
        with pytest.raises(ScoreError, match=r"claims 8,128 bytes, more than 8,000"):
            read(path)

    @pytest.mark.parametrize("limit", ["MAX_ENTRIES", "MAX_DIRECTORY_NBYTES"])
    def test_an_absurd_directory_is_refused_before_it_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
    ) -> None:
        monkeypatch.setattr(zip_reader, limit, 1)
        with pytest.raises(ScoreError, match="a zip directory of 2 members"):
            read(saved(tmp_path, a=np.ones(1), b=np.ones(1)))

    @pytest.mark.parametrize(
        "name", ["../a.npy", "/etc/a.npy", "a/../../b.npy", "..\\a.npy", "C:a.npy", "a\n.npy"]
    )
    def test_names_that_leave_the_archive_are_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ScoreError, match=r"leaves the archive.*do not trust"):
            read(with_member(tmp_path, b"", name))

    def test_the_same_name_twice(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.npy", b"x")
            with pytest.warns(UserWarning, match="Duplicate"):
                file.writestr("a.npy", b"y")
        with pytest.raises(ScoreError, match=r"two members are named a\.npy"):
            read(path)

    def test_overlapping_members(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.npy", bytes(100))
            file.writestr("b.npy", bytes(100))
        raw = bytearray(path.read_bytes())
        second = raw.rfind(b"PK\x01\x02")
        struct.pack_into("<I", raw, second + 42, 10)  # where b.npy is said to begin
        path.write_bytes(raw)
        with pytest.raises(ScoreError, match="overlaps"):
            read(path)

    def test_an_encrypted_member(self, tmp_path: Path) -> None:
        path = with_member(tmp_path, bytes(10))
        raw = bytearray(path.read_bytes())
        raw[raw.rfind(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(raw)
        with pytest.raises(ScoreError, match="encrypted"):
            read(path)

    def test_a_damaged_array_does_not_match_its_checksum(self, tmp_path: Path) -> None:
        path = saved(tmp_path, a=np.array([1.5, 2.5]))
        raw = path.read_bytes()
        path.write_bytes(raw.replace(np.float64(2.5).tobytes(), np.float64(9.5).tobytes()))
        with pytest.raises(ScoreError, match=r"member a\.npy does not match its checksum"):
            read(path)["a"].load()

    def test_zip64_sizes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        array = io.BytesIO()
        np.save(array, np.arange(3.0))
        with (
            zipfile.ZipFile(path, "w") as file,
            file.open("a.npy", "w", force_zip64=True) as inner,
        ):
            inner.write(array.getvalue())
        assert read(path)["a"].load().tolist() == [0.0, 1.0, 2.0]


def _valid_file() -> bytes:
    out, array = io.BytesIO(), io.BytesIO()
    np.save(array, np.array([0.5, 1.5]))
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("3.npy", array.getvalue())
        file.writestr("a.npy", array.getvalue(), zipfile.ZIP_DEFLATED)
    return out.getvalue()


VALID = _valid_file()


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
    path = tmp_path / "a.npz"
    path.write_bytes(raw[:end])
    with contextlib.suppress(ScoreError):
        for stored in read(path).values():
            stored.load()
