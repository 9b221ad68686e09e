"""Score files of every shape and format become the same table; what means nothing is refused."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardsurgeon.checkpoint.layer_names import parse_layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.scores.checks import check_values
from shardsurgeon.scores.files import read_scores
from shardsurgeon.scores.table import Scores
from tests.support import torch_file

NAN = math.nan
ROWS = {1: [0.5, 1.5, 2.5, 0.25], 2: [4.0, 3.0, 2.0, 1.0]}


def tensor(values: object) -> np.ndarray:
    """An array of the type that a tensor of these values has."""
    array = np.array(values)
    narrow = {"float64": np.float32, "complex128": np.complex64}
    return array.astype(narrow.get(array.dtype.name, array.dtype))


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def pt(tmp_path: Path, value: object, name: str = "scores.pt") -> Path:
    return torch_file.save(value, tmp_path / name)


def js(tmp_path: Path, value: object, name: str = "scores.json") -> Path:
    (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return tmp_path / name


def plain(scores: Scores) -> dict[int | str, dict[str, list[float]]]:
    for layer in scores.layers.values():
        for vector in layer.values():
            assert vector.dtype == np.float64
            assert not vector.flags.writeable
    return {
        layer: {name: vector.tolist() for name, vector in metrics.items()}
        for layer, metrics in scores.layers.items()
    }


def named(metric: str) -> dict[int | str, dict[str, list[float]]]:
    return {layer: {metric: row} for layer, row in ROWS.items()}


def refused(path: Path) -> ScoreError:
    with pytest.raises(ScoreError) as caught:
        read_scores(path)
    assert caught.value.where == str(path)
    return caught.value


class TestShapes:
    @pytest.mark.parametrize(
        "key",
        [
            lambda n: n,
            str,
            lambda n: f"layer_{n}",
            lambda n: f"layers.{n}",
            lambda n: f"blk.{n}",
            lambda n: f"model.layers.{n}.mlp",
            lambda n: f"language_model.model.layers.{n}.mlp.experts",
            lambda n: f"h2.transformer.blocks.{n}.ffn",
        ],
    )
    @pytest.mark.parametrize("wrapper", [None, "scores", "saliency", "saliency_scores", "layers"])
    def test_a_table_of_layers_under_every_spelling(
        self, tmp_path: Path, key: Callable[[int], object], wrapper: str | None
    ) -> None:
        unnamed: dict[object, object] = {key(n): tensor(row) for n, row in ROWS.items()}
        with_metric: dict[object, object] = {
            key(n): {"reap": tensor(row)} for n, row in ROWS.items()
        }
        for table, metric in ((unnamed, "saliency"), (with_metric, "reap")):
            value = {wrapper: table, "seed": 7, "model": "x"} if wrapper else table
            scores = read_scores(pt(tmp_path, value))
            assert plain(scores) == named(metric)
            assert scores.facts == ({"seed": 7, "model": "x"} if wrapper else {})

    def test_the_reap_observers_file(self, tmp_path: Path) -> None:
        experts, hidden = 4, 6
        layer = {
            "total_tokens": tensor(1000),
            "expert_frequency": tensor([10, 0, 5, 7]),
            "pairwise_expert_frequency": np.ones((experts, experts), np.int64),
            "ean_sum": np.ones(experts),
            "reap": tensor([0.5, NAN, 2.5, 0.25]),
            "max_activations": tensor([1.0, 0.0, 300.0, 2.0]),
            "ttm_similarity_matrix": ones(experts, experts),
            "routed_characteristic_activation": ones(experts, hidden),
        }
        scores = read_scores(pt(tmp_path, {3: layer, 5: layer}))
        assert list(scores.layers) == [3, 5]
        assert scores.metrics == ("ean_sum", "expert_frequency", "max_activations", "reap")
        assert scores.facts == {"total_tokens": 1000}
        name, table = scores.select()
        assert name == "reap"
        np.testing.assert_array_equal(table[5], [0.5, NAN, 2.5, 0.25])
        assert scores.frequencies()[3].tolist() == [10, 0, 5, 7]

    @pytest.mark.torch
    def test_matrices_beside_the_scores_are_never_read(self, tmp_path: Path) -> None:
        import torch

        packed = torch.empty((4, 4), dtype=torch.bits8)  # whose load is refused
        path = tmp_path / "scores.pt"
        torch.save({0: {"reap": torch.tensor([1.0, 2.0]), "matrix": packed}}, path)
        scores = read_scores(path)
        assert scores.metrics == ("reap",)

    def test_llama_cpp_scores_with_counts(self, tmp_path: Path) -> None:
        layers = {str(n): {"cnt": [3, 0, 1, 1], "gate": row, "sal": row} for n, row in ROWS.items()}
        value = {"arch": "glm", "n_expert": 4, "tokens": 99, "layers": layers}
        scores = read_scores(js(tmp_path, value))
        assert scores.select()[0] == "sal"
        assert scores.frequencies()[2].tolist() == [3, 0, 1, 1]
        assert scores.facts == {"arch": "glm", "n_expert": 4, "tokens": 99}

    def test_layers_come_in_order_and_mtp_layers_last(self, tmp_path: Path) -> None:
        keys = ["mtp.layers.1.mlp", 10, "mtp", "2", "model.layers.7.mlp"]
        scores = read_scores(pt(tmp_path, {key: tensor([1.0]) for key in keys}))
        assert list(scores.layers) == [2, 7, 10, "mtp.0", "mtp.1"]

    @pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 3)])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.int64])
    def test_rows_and_columns_of_every_number_type(
        self, tmp_path: Path, shape: tuple[int, ...], dtype: type[np.generic]
    ) -> None:
        array = np.array([3, 1, 2], dtype).reshape(shape)
        assert plain(read_scores(pt(tmp_path, {0: array}))) == {0: {"saliency": [3, 1, 2]}}

    @pytest.mark.torch
    @pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 3)])
    @pytest.mark.parametrize("name", ["bfloat16", "float64", "int32", "uint16"])
    def test_rows_and_columns_of_torchs_number_types(
        self, tmp_path: Path, shape: tuple[int, ...], name: str
    ) -> None:
        import torch

        tensor = torch.tensor([3, 1, 2]).to(getattr(torch, name)).reshape(shape)
        torch.save({0: tensor}, tmp_path / "scores.pt")
        assert plain(read_scores(tmp_path / "scores.pt")) == {0: {"saliency": [3, 1, 2]}}

    @pytest.mark.parametrize(
        ("value", "metric"),
        [
            (tensor(list(ROWS.values())), "saliency"),
            ({"scores": tensor(list(ROWS.values())), "seed": 1}, "saliency"),
            ({"reap": tensor(list(ROWS.values())), "seed": 1}, "reap"),
            (list(ROWS.values()), "saliency"),
        ],
    )
    def test_one_table_without_layer_names(
        self, tmp_path: Path, value: object, metric: str
    ) -> None:
        scores = read_scores(pt(tmp_path, value))
        assert scores.layers == {}
        with pytest.raises(ScoreError, match="does not say which layer"):
            scores.select()
        assert plain(scores.assign_rows([1, 2])) == named(metric)
        with pytest.raises(ScoreError, match="has 2 rows, the model has 3 MoE layers"):
            scores.assign_rows([1, 2, 3])

    def test_assigning_rows_leaves_named_layers_alone(self, tmp_path: Path) -> None:
        scores = read_scores(pt(tmp_path, {7: tensor([1.0])}))
        assert scores.assign_rows([1, 2, 3]) is scores


class TestFormats:
    def test_safetensors(self, tmp_path: Path) -> None:
        path = tmp_path / "scores.safetensors"
        tensors = {f"model.layers.{n}.mlp.reap": tensor(row) for n, row in ROWS.items()}
        tensors |= {f"model.layers.{n}.mlp/expert_frequency": tensor([1, 2, 3, 4]) for n in ROWS}
        safetensors.numpy.save_file(tensors, path, {"dataset": "c4", "seed": "1"})
        scores = read_scores(path)
        assert scores.metrics == ("expert_frequency", "reap")
        assert {n: row.tolist() for n, row in scores.select()[1].items()} == ROWS
        assert scores.facts == {"dataset": "c4", "seed": "1"}

    @pytest.mark.torch
    def test_safetensors_of_bfloat16(self, tmp_path: Path) -> None:
        import safetensors.torch
        import torch

        path = tmp_path / "scores.safetensors"
        rows = {n: torch.tensor(row, dtype=torch.bfloat16) for n, row in ROWS.items()}
        safetensors.torch.save_file({f"layers.{n}.mlp.reap": row for n, row in rows.items()}, path)
        expected = {n: row.double().tolist() for n, row in rows.items()}
        assert {n: row.tolist() for n, row in read_scores(path).select()[1].items()} == expected

    @pytest.mark.parametrize("key", ["{}", "layers.{}", "model.layers.{}.mlp", "{}.saliency"])
    @pytest.mark.parametrize("save", [safetensors.numpy.save_file, None], ids=["st", "npz"])
    def test_unnamed_arrays(
        self, tmp_path: Path, key: str, save: Callable[[object, Path], None] | None
    ) -> None:
        arrays = {key.format(n): np.array(row, np.float32) for n, row in ROWS.items()}
        path = tmp_path / ("scores.safetensors" if save else "scores.npz")
        save(arrays, path) if save else np.savez_compressed(path, **arrays)
        assert plain(read_scores(path)) == named("saliency")

    def test_a_single_table_as_safetensors_and_npz(self, tmp_path: Path) -> None:
        table = np.array(list(ROWS.values()))
        safetensors.numpy.save_file({"any_name": table}, tmp_path / "a.safetensors")
        np.savez(tmp_path / "a.npz", reap=table)
        for name, metric in (("a.safetensors", "any_name"), ("a.npz", "reap")):
            scores = read_scores(tmp_path / name).assign_rows([1, 2])
            assert plain(scores) == named(metric)
            assert scores.select()[0] == metric

    def test_json(self, tmp_path: Path) -> None:
        table = {str(n): row for n, row in ROWS.items()}
        assert plain(read_scores(js(tmp_path, table))) == named("saliency")
        rows = read_scores(js(tmp_path, list(ROWS.values()))).assign_rows([1, 2])
        assert plain(rows) == named("saliency")

    def test_json_as_powershell_writes_it(self, tmp_path: Path) -> None:
        path = tmp_path / "scores.json"
        path.write_bytes(b'\xef\xbb\xbf{\r\n"3": [1, NaN, Infinity]}\r\n')
        np.testing.assert_array_equal(read_scores(path).layers[3]["saliency"], [1.0, NAN, math.inf])

    @pytest.mark.parametrize("suffix", [".pth", ".bin", "", ".PT"])
    def test_torch_files_of_any_name(self, tmp_path: Path, suffix: str) -> None:
        path = pt(tmp_path, {1: tensor(ROWS[1]), 2: tensor(ROWS[2])}, f"scores{suffix}")
        assert plain(read_scores(path)) == named("saliency")

    def test_other_formats_of_any_name(self, tmp_path: Path) -> None:
        arrays = {str(n): np.array(row) for n, row in ROWS.items()}
        safetensors.numpy.save_file(arrays, tmp_path / "a")
        with (tmp_path / "b").open("wb") as file:
            np.savez(file, **arrays)
        js(tmp_path, {str(n): row for n, row in ROWS.items()}, "c")
        for name in "abc":
            assert plain(read_scores(tmp_path / name)) == named("saliency")

    @pytest.mark.parametrize(
        ("name", "content", "problem"),
        [
            ("a", b"hello", "not a score file"),
            ("a", b"", "not a score file"),
            ("a", b"\x80\x04N.", "a plain pickle"),
            ("a.json", b"", "not JSON"),
            ("a.json", b"3", "not a JSON object"),
            ("a.json", b'[1], "x": [2]', "not JSON"),
            ("a.json", b'{"1": [1], "1": [2]}', "names '1' twice"),
            ("a.json", b'{"1": {"a": [1], "a": [2]}}', "layer '1' names 'a' twice"),
            ("a.json", b'{"scores": {"1": [1], "1": [2]}}', "under 'scores' names '1' twice"),
            ("a.json", b'{"1": ' + b"[" * 100_000, "nested too deeply"),
            ("a.safetensors", b"{}", "2 bytes"),
            ("a.safetensors", b"\xff" * 8 + b"{}", "header is said to be"),
            ("a.npz", b"{}", "no zip directory"),
            ("a.pt", b"{}", "not a file of torch.save"),
        ],
    )
    def test_broken_files(self, tmp_path: Path, name: str, content: bytes, problem: str) -> None:
        (tmp_path / name).write_bytes(content)
        assert problem in refused(tmp_path / name).problem

    @pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors", ".json", ""])
    def test_missing_files_and_folders(self, tmp_path: Path, suffix: str) -> None:
        (tmp_path / f"folder{suffix}").mkdir()
        assert refused(tmp_path / f"folder{suffix}").problem == "is a folder, not a score file"
        assert refused(tmp_path / f"missing{suffix}").problem == "there is no such file"


class TestRefusals:
    @pytest.mark.parametrize(
        ("value", "problem"),
        [
            ({}, "no key names a layer"),
            ({"scores": {}}, "no key names a layer"),
            (5, "holds one number instead"),
            ({1: tensor([1.0]), "1": tensor([2.0])}, "keys 1 and '1' are both layer 1"),
            ({"model.layers.1.mlp": [1.0], "layer_1": [2.0]}, "are both layer 1"),
            ({1: ones(0)}, "shape [0]"),
            ({1: []}, "shape [0]"),
            ({1: ones(2, 3)}, "shape [2, 3], one number per expert"),
            ({1: tensor([True, False])}, "holds true and false"),
            ({1: [True, False]}, "holds true or false"),
            ({1: tensor([1j])}, "complex numbers"),
            ({1: [1.0, None]}, "layer 1, saliency holds null"),
            ({1: ["a"]}, "holds text"),
            ({1: [10**18, [2]]}, "holds a list"),
            ({1: [[1.0, 2.0], [3.0]]}, "rows of different lengths"),
            ({1: {"reap": tensor([1.0, 2.0]), "count": tensor([1.0])}}, "reap 2, count 1"),
            ({1: {"matrix": ones(2, 2)}}, "no metric with one number per expert"),
            ({1: {"note": "x"}}, "no metric with one number per expert"),
            ({1: {2: tensor([1.0])}}, "has a metric with the key 2"),
            ({1: 3.5}, "no metric with one number per expert"),
            ({-1: tensor([1.0])}, "key -1 names no layer"),
            ({"encoder.layers.1.layers.2": tensor([1.0])}, "names no layer"),
            ({1: tensor([1.0]), "other": tensor([1.0])}, "key 'other' names no layer"),
            (
                {"saliency": {1: tensor([1.0])}, "scores": {1: tensor([1.0])}},
                "under 'scores' and 'saliency'",
            ),
            ({"scores": {1: tensor([1.0])}, 1: tensor([1.0])}, "under 'scores' and 1"),
            ({"scores": tensor([1.0, 2.0])}, "[MoE layers, experts] is needed"),
            ({"a": ones(2, 2), "b": ones(3, 2)}, "2 2-D tables of shapes"),
            ({1: np.broadcast_to(ones(1), 70_000)}, "more scores than any model"),
        ],
    )
    def test_shapes_that_mean_nothing(self, tmp_path: Path, value: object, problem: str) -> None:
        assert problem in refused(pt(tmp_path, value)).problem

    def test_a_layer_of_one_metric_named_twice(self, tmp_path: Path) -> None:
        arrays = {"model.layers.3.mlp.reap": np.ones(2), "3.reap": np.ones(2)}
        safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
        assert "are both layer 3" in refused(tmp_path / "a.safetensors").problem

    def test_integers_beyond_all_floats(self, tmp_path: Path) -> None:
        assert "beyond all floats" in refused(js(tmp_path, {"1": [10**400]})).problem

    def test_expanded_tensors_cannot_ask_for_endless_memory(self, tmp_path: Path) -> None:
        wide = np.broadcast_to(ones(1), 60_000)
        value = {n: {f"m{m}": wide for m in range(200)} for n in range(2)}
        assert "more scores than any model" in refused(pt(tmp_path, value)).problem


class TestSelect:
    def scores(self, *metrics: str, also: str | None = None) -> Scores:
        row = np.ones(2)
        layers: dict[int | str, dict[str, np.ndarray]] = {
            n: dict.fromkeys(metrics, row) for n in (1, 2)
        }
        if also:
            layers[1][also] = row
        return Scores("s.pt", layers)

    @pytest.mark.parametrize(
        ("metrics", "chosen"),
        [
            (("ean_sum", "reap"), "reap"),
            (("saliency",), "saliency"),
            (("saliency", "cnt"), "saliency"),
            (("ean_sum",), "ean_sum"),
            (("cnt", "gate", "sal"), "sal"),
        ],
    )
    def test_the_default_metric(self, metrics: tuple[str, ...], chosen: str) -> None:
        assert self.scores(*metrics).select()[0] == chosen

    def test_an_asked_for_metric_must_be_there(self) -> None:
        assert self.scores("ean_sum", "reap").select("ean_sum")[0] == "ean_sum"
        with pytest.raises(ScoreError, match=r"no metric 'reap'; choose with --metric: ean_sum$"):
            self.scores("ean_sum").select("reap")
        with pytest.raises(ScoreError, match=r"no metric 'ean_sum'; .*--metric: saliency$"):
            self.scores("saliency").select("ean_sum")

    def test_the_default_may_be_asked_for_where_no_metric_is_named(self) -> None:
        assert self.scores("saliency").select("reap")[0] == "saliency"
        assert self.scores("saliency", "reap").select("reap")[0] == "reap"
        with pytest.raises(ScoreError, match="no metric 'reap'"):
            self.scores("saliency", "ean_sum").select("reap")

    def test_a_choice_between_others_is_left_to_the_user(self) -> None:
        with pytest.raises(ScoreError, match=r"--metric: ean_mean, ean_sum$"):
            self.scores("ean_sum", "ean_mean").select()

    def test_the_mean_activation_norm_is_found_under_both_its_names(self) -> None:
        scores = self.scores("ean_mean", "reap")
        name, rows = scores.select("man")
        assert (name, scores.choices) == ("ean_mean", ("ean_mean", "man", "reap"))
        assert rows == scores.select("ean_mean")[1]
        with pytest.raises(ScoreError, match="no metric 'ean_mean'"):
            self.scores("reap").select("man")

    def test_a_file_may_have_a_metric_of_its_own_by_that_name(self) -> None:
        scores = self.scores("ean_mean", "man")
        assert scores.select("man")[0] == "man"
        assert scores.choices == ("ean_mean", "man")

    def test_a_metric_must_be_there_for_every_layer(self) -> None:
        with pytest.raises(ScoreError, match="no metric 'reap' for layer 2;"):
            self.scores("ean_sum", also="reap").select()


class TestValues:
    def check(self, values: list[float], frequency: list[float] | None = None) -> tuple[int, ...]:
        counted = None if frequency is None else np.array(frequency, np.float64)
        return check_values(3, np.array(values, np.float64), counted, "s.pt")

    def test_nan_is_never_routed_where_nothing_is_counted(self) -> None:
        assert self.check([1.0, NAN, math.inf, NAN]) == (1, 3)
        assert self.check([1.0, 2.0]) == ()

    def test_nan_is_never_routed_where_the_count_says_so(self) -> None:
        assert self.check([1.0, NAN, 0.0], [5, 0, 0]) == (1, 2)

    def test_nan_of_a_routed_expert_is_refused(self) -> None:
        with pytest.raises(ScoreError, match=r"layer 3, expert 2 .* NaN though 1,500 tokens"):
            self.check([1.0, NAN, NAN], [5, 0, 1500])

    def test_minus_infinity_is_refused(self) -> None:
        with pytest.raises(ScoreError, match="layer 3, expert 1 has the score -inf"):
            self.check([NAN, -math.inf])

    def test_a_layer_of_nan_is_refused(self) -> None:
        with pytest.raises(ScoreError, match="layer 3 has no score: all 2 are NaN"):
            self.check([NAN, NAN], [0, 0])


class TestLayerNames:
    @pytest.mark.parametrize(
        ("key", "layer"),
        [
            (0, 0),
            ("007", 7),
            ("layers_12", 12),
            ("block.3", 3),
            ("model.layers.3.mlp.experts.5", 3),
            ("model.language_model.layers.40.mlp", 40),
            ("vision2.layers.3", 3),
            ("mtp", "mtp.0"),
            ("mtp.2", "mtp.2"),
            ("mtp_1", "mtp.1"),
            ("model.mtp.layers.1.mlp", "mtp.1"),
            (True, None),
            (-1, None),
            (1.0, None),
            ("", None),
            ("-1", None),
            ("3x", None),
            ("1.5", None),
            ("3.reap", 3),
            ("layers.3x", None),
            ("layers.3.5", None),
            ("layers.1234567", None),
            ("expert_3", None),
            ("mylayers.3", None),
            ("layers.3.layers.4", None),
            ("layers.", None),
            ("mtpx.3", None),
            ("٣", None),
            ("9" * 7, None),
            ("layers.3" + "." * 400, None),
            (None, None),
        ],
    )
    def test_spellings(self, key: object, layer: int | str | None) -> None:
        name = parse_layer(key)
        assert (name.layer if name else None) == layer

    @given(st.one_of(st.text(), st.integers(), st.binary(), st.floats()))
    def test_no_key_is_too_strange(self, key: object) -> None:
        parse_layer(key)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.floats(), max_size=3),
)
KEYS = st.one_of(
    st.sampled_from(["1", "2", "mtp", "scores", "layers", "reap", "ranking", "order", "layer"]),
    st.sampled_from(["expert", "experts", "kept", "keep_maps", "rank"]),
    st.text(max_size=3),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
        max_leaves=12,
    )
)
def test_any_json_gives_scores_or_a_score_error(tmp_path: Path, value: object) -> None:
    with contextlib.suppress(ScoreError):
        read_scores(js(tmp_path, value)).select()
