"""The pictures of a model card: drawn from what a model carries, pushed beside its README.md."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import shardsurgeon
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.operations.card_pictures import card_pictures
from shardsurgeon.operations.plots import curve_of_damage, map_of_prune
from shardsurgeon.operations.push import push
from shardsurgeon.operations.request import Destination
from tests.operations.test_model_card import card_of, facts_of
from tests.operations.workbench import Shell, digests, downloaded, scores_of
from tests.support import pages
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub

MODEL, SCORES = fixture_folder("qwen3_moe"), scores_of("qwen3_moe")
MAP, CURVE = "calibration/saliency.png", "calibration/damage.png"


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of the model, in which its prune by half is the candidate of 0.65."""
    plan = shardsurgeon.plan(MODEL, SCORES, ratio=0.5)
    path = tmp_path_factory.mktemp("measured") / "evaluation.json"
    config = hashlib.sha256((MODEL / "config.json").read_bytes()).hexdigest()
    path.write_bytes(pages.evaluation(plan.decision.keep, config).file())
    return path


@pytest.fixture(scope="module")
def half(evaluation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prune that was measured. Not to be changed."""
    out = tmp_path_factory.mktemp("prunes") / "half"
    shardsurgeon.apply(shardsurgeon.plan(MODEL, SCORES, ratio=0.5, evaluation=evaluation), out)
    return out


def linked(card: bytes) -> dict[str, str]:
    """The pictures that a card shows, and what it says to those who cannot see them."""
    return {place: text for text, place in re.findall(r"!\[(.*?)\]\((.*?)\)", card.decode())}


def test_a_pushed_card_shows_what_was_pruned_and_what_it_costs(
    half: Path, online: LocalHub, tmp_path: Path
) -> None:
    before = digests(half)
    shardsurgeon.push(half, "me/half")
    there = downloaded(online, "me/half", tmp_path / "there")
    texts = linked((there / "README.md").read_bytes())
    assert texts.keys() == {MAP, CURVE}
    assert all(len(text) > 40 for text in texts.values())
    for name in texts:
        assert matplotlib.image.imread(there / name).shape[0] == 800
    assert digests(half) == before
    found, local = shardsurgeon.verify(MODEL, there), shardsurgeon.verify(MODEL, half)
    assert found.holds and found.notes == local.notes


@pytest.mark.parametrize("kept_in", ["git", "LFS"])
def test_a_second_push_finds_the_pictures_there(half: Path, online: LocalHub, kept_in: str) -> None:
    if kept_in == "LFS":
        rules = b"*.png filter=lfs diff=lfs merge=lfs -text\n"
        online.add_model("me/half", {".gitattributes": rules})
    shardsurgeon.push(half, "me/half")
    commits = online.commits("me/half")
    online.reset_counts()
    foreseen = push(half, Destination("me/half"), dry_run=True)
    again = shardsurgeon.push(half, "me/half")
    assert (foreseen.sent, again.sent, again.replaced) == (0, 0, ())
    assert online.uploads == {} and online.commits("me/half") == commits


def test_every_way_to_push_draws_the_same(
    half: Path, evaluation: Path, online: LocalHub, tmp_path: Path
) -> None:
    plan = shardsurgeon.plan(MODEL, SCORES, ratio=0.5, evaluation=evaluation)
    shardsurgeon.push(half, "me/one")
    shardsurgeon.apply(plan, tmp_path / "out", push_to_hub="me/two")
    shardsurgeon.apply(plan, stream_push="me/three")
    assert not list(tmp_path.rglob("*.png"))
    for name in (MAP, CURVE):
        assert len({online.read(f"me/{which}", name) for which in ("one", "two", "three")}) == 1


def test_a_machine_without_a_place_for_matplotlibs_cache_is_not_noticed(
    half: Path, shell: Shell
) -> None:
    words = json.loads(shell.good("push", str(half), "me/half", "--json", MPLCONFIGDIR="/dev/null"))
    assert words["notes"] == []
    assert MAP in shell.hub.files("me/half")


def test_without_matplotlib_the_card_is_one_of_words(
    half: Path, online: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shardsurgeon.push(half, "me/small")
    assert not {MAP, CURVE} & online.files("me/small").keys()
    assert linked(online.read("me/small", "README.md")) == {}
    words = card_of(half).partition("## Make it again")[0]
    assert words in online.read("me/small", "README.md").decode()


def test_a_card_that_is_not_written_has_no_pictures(
    half: Path, online: LocalHub, tmp_path: Path
) -> None:
    own = tmp_path / "card.md"
    own.write_text("---\nlicense: mit\n---\n# Mine\n")
    shardsurgeon.push(half, "me/none", card=False)
    shardsurgeon.push(half, "me/own", card=own)
    for repo_id in ("me/none", "me/own"):
        assert not {MAP, CURVE} & online.files(repo_id).keys()


def test_a_prune_of_a_pushed_prune_keeps_the_pictures_of_both(
    half: Path, online: LocalHub, tmp_path: Path
) -> None:
    shardsurgeon.push(half, "me/half")
    first = downloaded(online, "me/half", tmp_path / "first")
    plan = shardsurgeon.plan(first, SCORES, keep=4)
    shardsurgeon.apply(plan, tmp_path / "out", push_to_hub="me/quarter")
    second = downloaded(online, "me/quarter", tmp_path / "second")
    assert linked((second / "README.md").read_bytes()).keys() == {"calibration/saliency-2.png"}
    assert linked((second / "README.source.md").read_bytes()).keys() == {MAP, CURVE}
    for name in (MAP, CURVE):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    assert (second / "calibration/saliency-2.png").read_bytes() != (first / MAP).read_bytes()
    found = shardsurgeon.verify(first, second)
    assert found.holds and not any("png" in note for note in found.notes)


def test_a_layer_that_was_pruned_without_scores_is_not_drawn(half: Path) -> None:
    facts = facts_of(half)
    layers = dict(facts.provenance.layers)
    last = max(layers)
    layers[last] = replace(layers[last], policy="router-norm")
    others = replace(facts, provenance=replace(facts.provenance, layers=layers), costs=())
    (picture,) = card_pictures(others).values()
    assert f"in {len(layers) - 1} layers:" in picture.text
    layers = {n: replace(each, policy="router-norm") for n, each in layers.items()}
    none = replace(others, provenance=replace(facts.provenance, layers=layers))
    assert card_pictures(none) == {}
    assert card_pictures(facts)[PROVENANCE_NAME].data != picture.data


# What is drawn


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Which columns of pixels have a colour on more than a third of their height."""
    same = np.abs(picture[..., :3] - np.array(colour) / 255).max(axis=-1) < 0.02
    return np.flatnonzero(same.sum(axis=0) > picture.shape[0] / 3)


def test_what_stayed_lies_left_of_the_cut_whatever_its_saliency() -> None:
    layers = {"1": (np.zeros(4), np.ones(12)), "2": (np.zeros(4), np.ones(12))}
    picture = matplotlib.image.imread(io.BytesIO(map_of_prune("reap", layers)))
    dark, bright = near(picture, (68, 1, 84)), near(picture, (253, 231, 36))
    (cut,) = {round(near(picture, (0xD5, 0x5E, 0x00)).mean())}
    assert dark.max() < cut < bright.min()
    assert abs((cut - dark.min()) / (bright.max() - dark.min()) - 4 / 16) < 0.01


def test_the_curve_marks_the_model_by_a_ring(evaluation: Path) -> None:
    found = shardsurgeon.read_evaluation(evaluation)
    centres = []
    for this in (found.candidates[0], found.candidates[-2]):
        picture = matplotlib.image.imread(io.BytesIO(curve_of_damage(found, this)))
        grey = np.abs(picture[..., :3] - 0x8C / 255).max(axis=-1) < 0.02
        grey[:, :300][:200] = False  # the legend's own
        rows, columns = np.nonzero(grey)
        centres.append((columns.mean(), -rows.mean()))
    assert centres[0] < centres[1] and centres[0][1] < centres[1][1]
