"""The page of `report` as a reader meets it: opened from the disk, in Chromium."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shardsurgeon.operations.page import report_page
from tests.support import pages

pytestmark = pytest.mark.browser

DESKTOP, PHONE = (1280, 900), (360, 740)
# Luminance contrast of text that WCAG asks for.
LEGIBLE = 4.5
WHITE = "rgb(255, 255, 255)"
# What each text on the page is written in, and the first colour behind it.
CONTRASTS = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = channels(getComputedStyle(at).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
  };
  const found = [];
  for (const element of document.querySelectorAll("main *, header *, footer")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || element.closest("noscript, title") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const text = element.closest("svg") ? style.fill : style.color;
    const pair = [light(channels(text)), light(behind(element))].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    found.push([contrast, element.tagName, element.textContent.slice(0, 30)]);
  }
  return found;
}"""
REDRAWS = """() => ["id", "sorted", "all", "layer", "id", "sorted"].map((value) => {
  const start = performance.now();
  document.querySelector(`input[value=${value}]`).click();
  return performance.now() - start;
})"""
FRAMES = """() => new Promise((done) => {
  const canvas = document.getElementById("canvas"), box = canvas.getBoundingClientRect();
  const times = []; let last = null;
  const step = (now) => {
    if (last !== null) times.push(now - last);
    last = now;
    if (times.length === 30) { done(times); return; }
    const clientX = box.left + 60 + times.length * 30, clientY = box.top + 20 + times.length * 15;
    canvas.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY, bubbles: true }));
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
})"""


@contextmanager
def opened(
    chromium: Any, page: Path, size: tuple[int, int] = DESKTOP, dark: bool = False
) -> Iterator[Any]:
    """A tab with the page. Whatever the console says, and every request but for the page, fails."""
    context = chromium.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light"
    )
    said: list[str] = []
    tab = context.new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.append(request.url))
    tab.goto(page.as_uri())
    yield tab
    assert said == [page.as_uri()]
    context.close()


def embedded(page: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found
    document: dict[str, Any] = json.loads(found[1])
    return document


def point_at(tab: Any, row: int, column: int, rows: int, columns: int) -> str:
    """What is said of a cell of the map, by where it must lie: 40 pixels are for the labels."""
    box = tab.locator("#canvas").bounding_box()
    x = 40 + (column + 0.5) * (box["width"] - 40) / columns
    tab.locator("#canvas").hover(position={"x": x, "y": (row + 0.5) * box["height"] / rows})
    return str(tab.locator("#detail").inner_text())


def leave(tab: Any, name: str) -> None:
    """A picture for the eye, where a folder is named for them."""
    if folder := os.environ.get("SHARDSURGEON_PICTURES"):
        tab.screenshot(path=Path(folder, f"{name}.png"), full_page=True)


def test_pointing_at_a_cell_shows_the_expert_that_the_json_has_there(
    chromium: Any, full_page: Path
) -> None:
    layers = embedded(full_page)["layers"]
    with opened(chromium, full_page) as tab:
        for row, column in ((0, 0), (24, 134), (24, 135), (59, 383)):
            layer = layers[row]
            saliency = layer["saliency"]
            order = sorted(range(384), key=lambda old_id: -saliency[old_id])
            expert = order[column]
            said = point_at(tab, row, column, 60, 384)
            assert f"layer {layer['layer']}, expert {expert}" in said
            assert f"saliency {saliency[expert]:.4g}" in said
            assert f"rank {column + 1} of 384" in said
            assert f"frequency {layer['frequency'][expert]:,}" in said
            stays = expert in layer["retained"]
            assert ("kept: among the 135" in said) is stays
            assert ("pruned: below the 135" in said) is not stays
            if stays:
                assert f", now {layer['retained'].index(expert)}" in said
        leave(tab, "desktop")


def test_by_id_a_cell_is_the_expert_of_its_place_and_the_one_pointed_at_stays(
    chromium: Any, full_page: Path
) -> None:
    layers = embedded(full_page)["layers"]
    with opened(chromium, full_page) as tab:
        before = point_at(tab, 10, 5, 60, 384)
        tab.get_by_label("by id").check()
        assert tab.locator("#detail").inner_text() == before
        assert not tab.locator("#key-cut").is_visible()
        for row, expert in ((3, 17), (40, 300)):
            said = point_at(tab, row, expert, 60, 384)
            assert f"layer {layers[row]['layer']}, expert {expert}" in said
        leave(tab, "by-id")
        tab.get_by_label("by saliency").check()
        assert tab.locator("#key-cut").is_visible()


def test_a_preserved_expert_is_told_from_one_kept_for_its_saliency(
    chromium: Any, full_page: Path
) -> None:
    first = embedded(full_page)["layers"][0]
    with opened(chromium, full_page) as tab:
        tab.get_by_label("by id").check()
        said = point_at(tab, 0, first["preserved"][0], 60, 384)
        assert "kept: preserved whatever its saliency" in said


def test_the_cut_is_drawn_where_the_last_kept_expert_ends(chromium: Any, full_page: Path) -> None:
    """The colour of the line stands in row 30 at the edge between ranks 135 and 136, and there
    alone."""
    with opened(chromium, full_page) as tab:
        row = tab.evaluate(
            """() => {
              const canvas = document.getElementById("canvas");
              const y = Math.floor((30.5 / 60) * canvas.height);
              return [...canvas.getContext("2d").getImageData(0, y, canvas.width, 1).data];
            }"""
        )
        pixels = [tuple(row[start : start + 3]) for start in range(0, len(row), 4)]
        orange = [x for x, (red, green, _) in enumerate(pixels) if red > 200 and green < 120]
        edge = 40 + 135 * (len(pixels) - 40) / 384
        assert orange and all(abs(x + 0.5 - edge) <= 1.5 for x in orange)


def test_the_arrow_keys_go_from_expert_to_expert(chromium: Any, full_page: Path) -> None:
    with opened(chromium, full_page) as tab:
        tab.get_by_label("by id").check()
        tab.locator("#canvas").focus()
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp", "ArrowDown"):
            tab.keyboard.press(key)
        assert re.match("layer 2, expert 1\\b", tab.locator("#detail").inner_text())


def test_sixty_layers_of_384_experts_load_and_redraw_quickly(
    chromium: Any, full_page: Path
) -> None:
    with opened(chromium, full_page) as tab:
        loaded = tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        assert loaded < 2000
        assert max(tab.evaluate(REDRAWS)) < 50
        frames = sorted(tab.evaluate(FRAMES))
        assert frames[len(frames) // 2] < 50


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(
    chromium: Any, full_page: Path, dark: bool
) -> None:
    with opened(chromium, full_page, PHONE, dark) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") == PHONE[0]
        tab.mouse.click(180, tab.locator("#canvas").bounding_box()["y"] + 100)
        assert "layer" in tab.locator("#detail").inner_text()
        leave(tab, "phone-dark" if dark else "phone")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_can_be_read_in_light_and_in_dark_mode(
    chromium: Any, full_page: Path, dark: bool
) -> None:
    with opened(chromium, full_page, DESKTOP, dark) as tab:
        found = tab.evaluate(CONTRASTS)
        assert len(found) > 100
        assert [each for each in found if each[0] < LEGIBLE] == []
        leave(tab, "dark" if dark else "light")


def test_paper_is_light_whatever_the_screen_is(chromium: Any, full_page: Path) -> None:
    with opened(chromium, full_page, DESKTOP, dark=True) as tab:
        tab.emulate_media(media="print")
        assert not tab.locator("#controls").is_visible()
        assert not tab.locator("#detail").is_visible()
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == WHITE
        found = tab.evaluate(CONTRASTS)
        assert [each for each in found if each[0] < LEGIBLE] == []
        printed = tab.pdf(format="A4")
        assert printed.startswith(b"%PDF")
        if folder := os.environ.get("SHARDSURGEON_PICTURES"):
            Path(folder, "printed.pdf").write_bytes(printed)


def test_a_hostile_name_is_text_and_runs_nothing(chromium: Any, tmp_path: Path) -> None:
    name = "</script><img src=x onerror=document.title='taken'><script>document.title='taken'//"
    keep = pages.keep_list(pages.saliencies(2, 8), 4)
    out = tmp_path / "report.html"
    report_page(pages.lay_plan(tmp_path / "plan.json", keep, name), out)
    with opened(chromium, out) as tab:
        assert tab.title().startswith(name)
        assert tab.locator("h1").inner_text().startswith(name)
        assert tab.locator("img").count() == 0
