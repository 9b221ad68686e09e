"""torch.save's files read without torch, compared with torch's own numbers."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shardsurgeon.errors import ScoreError
from shardsurgeon.storage.formats.dtypes import StoredArray
from shardsurgeon.storage.formats.torch_file import read_torch_file

NUMBER_DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
    *(torch.complex128, torch.complex64, torch.complex32),
]
ONE_BYTE_FLOATS = [
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz),
    *(torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]
OPAQUE_DTYPES = ["bits8", "bits16", "bits1x8", "bits2x4", "bits4x2", "float4_e2m1fn_x2"]
PROTOCOLS = [1, 2, 3, 4, 5]


def saved(tmp_path: Path, value: object, **options: object) -> Path:
    path = tmp_path / "scores.pt"
    torch.save(value, path, **options)
    return path


def read(path: Path) -> object:
    return read_torch_file(path, "scores.pt")


def loaded(value: object) -> np.ndarray:
    assert isinstance(value, StoredArray)
    numbers = value.load()
    assert numbers.shape == value.shape
    return numbers


def numbers_of(tensor: torch.Tensor) -> np.ndarray:
    """torch's own conversion to the widest type of the kind."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype == torch.uint64:
        return tensor.numpy()
    if tensor.dtype == torch.bool:
        return tensor.numpy()
    if tensor.is_complex():
        return tensor.to(torch.complex128).numpy()
    wide = torch.float64 if tensor.is_floating_point() else torch.int64
    if tensor.dtype in ONE_BYTE_FLOATS:
        tensor = tensor.to(torch.float32)
    return tensor.to(wide).numpy()


class TestValuesEqualTorch:
    @pytest.mark.parametrize("dtype", NUMBER_DTYPES, ids=str)
    def test_every_number_type(self, tmp_path: Path, dtype: torch.dtype) -> None:
        raw = torch.tensor([0, 1, 0, 0, 255, 7, 66, 200] * 8, dtype=torch.uint8)
        raw = raw % 2 if dtype == torch.bool else raw
        tensor = raw.view(dtype).reshape(2, -1)
        value = read(saved(tmp_path, {"a": tensor}))
        assert isinstance(value, dict)
        np.testing.assert_array_equal(loaded(value["a"]), numbers_of(tensor))
        assert loaded(value["a"]).dtype == numbers_of(tensor).dtype

    @pytest.mark.parametrize("dtype", ONE_BYTE_FLOATS, ids=str)
    def test_every_code_of_the_eight_bit_floats(self, tmp_path: Path, dtype: torch.dtype) -> None:
        tensor = torch.arange(256).to(torch.uint8).view(dtype)
        np.testing.assert_array_equal(loaded(read(saved(tmp_path, tensor))), numbers_of(tensor))

    def test_every_code_of_the_sixteen_bit_floats(self, tmp_path: Path) -> None:
        dtypes = (torch.bfloat16, torch.float16)
        tensors = {str(d): torch.arange(65536).to(torch.uint16).view(d) for d in dtypes}
        value = read(saved(tmp_path, tensors))
        assert isinstance(value, dict)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(loaded(value[name]), numbers_of(tensor))

    @pytest.mark.parametrize("name", OPAQUE_DTYPES)
    def test_packed_bits_are_described_but_give_no_numbers(self, tmp_path: Path, name: str) -> None:
        tensor = torch.empty(4, dtype=getattr(torch, name))
        value = read(saved(tmp_path, tensor))
        assert isinstance(value, StoredArray)
        assert (value.dtype, value.shape) == (name, (4,))
        with pytest.raises(ScoreError, match=f"torch.{name} holds packed bits"):
            value.load()

    @pytest.mark.parametrize(
        "view",
        [
            lambda t: t[3:9],
            lambda t: t[1::5],
            lambda t: t.view(4, 6).t(),
            lambda t: t.view(2, 3, 4).permute(2, 0, 1)[1:, :, ::2],
            lambda t: t[5],
            lambda t: t[7:8].expand(1000),
            lambda t: t.view(4, 6)[:, 2:3].expand(4, 5),
            lambda t: t.as_strided((5, 3), (1, 1), 2),
            lambda t: t[24:],
            lambda t: t.view(4, 6)[2:2],
        ],
    )
    def test_views_with_offsets_and_strides(
        self, tmp_path: Path, view: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        tensor = view(torch.arange(24, dtype=torch.float32))
        np.testing.assert_array_equal(loaded(read(saved(tmp_path, tensor))), tensor.numpy())

    def test_tensors_that_share_a_storage(self, tmp_path: Path) -> None:
        whole = torch.arange(12, dtype=torch.int32)
        tensors = {layer: whole[3 * layer : 3 * layer + 3] for layer in range(4)}
        path = saved(tmp_path, tensors)
        value = read(path)
        assert isinstance(value, dict)
        assert [loaded(value[layer]).tolist() for layer in range(4)] == [
            [0, 1, 2],
            [3, 4, 5],
            [6, 7, 8],
            [9, 10, 11],
        ]

    def test_one_storage_viewed_under_two_types(self, tmp_path: Path) -> None:
        raw = torch.arange(8, dtype=torch.uint8)
        tensors = [raw.view(torch.uint16), raw.view(torch.float8_e5m2)]
        value = read(saved(tmp_path, tensors))
        assert isinstance(value, list)
        for mine, tensor in zip(value, tensors, strict=True):
            np.testing.assert_array_equal(loaded(mine), numbers_of(tensor))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.uint16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1)])
    def test_scalars_and_empty_tensors(
        self, tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        numbers = loaded(read(saved(tmp_path, torch.ones(shape).to(dtype))))
        np.testing.assert_array_equal(numbers, np.ones(shape))

    def test_parameters_and_tensors_with_attributes(self, tmp_path: Path) -> None:
        parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        marked = torch.nn.Parameter(torch.tensor([3.0]))
        marked.note = "x"
        plain = torch.tensor([4.0])
        plain.note = 5
        needs_grad = torch.tensor([5.0], requires_grad=True)
        value = read(saved(tmp_path, [parameter, marked, plain, needs_grad]))
        assert isinstance(value, list)
        assert [loaded(one).tolist() for one in value] == [[1.0, 2.0], [3.0], [4.0], [5.0]]

    def test_conjugation_and_negation_that_torch_only_noted(self, tmp_path: Path) -> None:
        conjugated = torch.tensor([1 + 2j, 3 - 4j]).conj()
        negated = conjugated.imag
        assert conjugated.is_conj() and negated.is_neg()
        assert loaded(read(saved(tmp_path, conjugated))).tolist() == [1 - 2j, 3 + 4j]
        assert loaded(read(saved(tmp_path, negated))).tolist() == [-2.0, 4.0]

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_plain_values_of_every_pickle_protocol(self, tmp_path: Path, protocol: int) -> None:
        plain = {
            "nested": {3: {"b": [1, (2, 3, 4, 5), ()]}, -1: None},
            "numbers": [0, 255, 65535, -(2**31), 2**63 - 1, 2**64 - 1, 1.5, float("inf")],
            "bools": (True, False),
            "texts": ["", "größe", "a" * 300, b"", b"\x00\xff", b"b" * 300],
            "sets": [{1, "a"}, frozenset({2.5})],
            "complex": 1 - 2j,
        }
        # Equal parts are one object, which the pickle then refers to.
        plain["again"] = plain["nested"]
        assert read(saved(tmp_path, plain, pickle_protocol=protocol)) == plain

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_kinds_of_dict_come_as_dict(self, tmp_path: Path, protocol: int) -> None:
        ordered = OrderedDict([(2, "b"), (1, "a")])
        state = torch.nn.Linear(1, 1, bias=False).state_dict()  # an OrderedDict with attributes
        value = read(
            saved(
                tmp_path,
                [ordered, defaultdict(dict, {1: {}}), Counter("aab"), state],
                pickle_protocol=protocol,
            )
        )
        assert isinstance(value, list)
        assert value[:3] == [{2: "b", 1: "a"}, {1: {}}, {"a": 2, "b": 1}]
        assert list(value[0]) == [2, 1]
        assert loaded(value[3]["weight"]).shape == (1, 1)

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_torch_and_numpy_scalars_come_as_plain_values(
        self, tmp_path: Path, protocol: int
    ) -> None:
        value = read(
            saved(
                tmp_path,
                [
                    *(torch.Size([2, 3]), torch.bfloat16, torch.device("cpu")),
                    *(torch.device("cuda", 1), np.float64(0.1), np.int64(-5), np.bool_(True)),
                    np.float32(0.5),
                ],
                pickle_protocol=protocol,
            )
        )
        assert value == [(2, 3), "torch.bfloat16", "cpu", "cuda:1", 0.1, -5, True, 0.5]

    def test_a_file_saved_without_checksums_is_read(self, tmp_path: Path) -> None:
        torch.serialization.set_crc32_options(False)
        try:
            path = saved(tmp_path, torch.tensor([1.0, 2.0]))
        finally:
            torch.serialization.set_crc32_options(True)
        assert loaded(read(path)).tolist() == [1.0, 2.0]

    def test_a_tensor_is_read_only_when_asked_for(self, tmp_path: Path) -> None:
        path = saved(tmp_path, torch.tensor([1.0]))
        value = read(path)
        assert isinstance(value, StoredArray)
        path.unlink()
        with pytest.raises(ScoreError, match="cannot be read"):
            value.load()
