"""The report in a headless Chromium: it renders, fetches nothing, says nothing on the console, and prints."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train.browser import Browser, find_browser
from tests.train.reports import add_speculation, copy_run, log_of, report, write_log

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")

FIGURES = """
[...document.querySelectorAll("figure")].map(figure => {
    const box = element => {
        const found = element.getBoundingClientRect();
        return [found.left, found.top, found.right, found.bottom];
    };
    const texts = [...figure.querySelectorAll("svg text")];
    return {id: figure.id, svg: box(figure.querySelector("svg")), figure: box(figure),
            texts: texts.map(text => [text.textContent, box(text)]),
            paths: figure.querySelectorAll("svg path").length};
})
"""


@pytest.fixture(scope="module")
def pages(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of a page of one run, of one of two, and of one with much in its figures."""
    folder = tmp_path_factory.mktemp("pages")
    full = copy_run(runs[0], folder / "full")
    add_speculation(full, (0.0, 0.25, 0.75, 1.0))
    log, held_out = log_of(full)
    write_log(full, log + [{"step": n, "held_out": {**held_out[0], "step": n}} for n in range(1, 61)])
    shown = {"one": runs[:1], "both": runs, "full": [full]}
    for name, found in shown.items():
        report(*found, out=folder / f"{name}.html")
    return {name: (folder / f"{name}.html").as_uri() for name in shown}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def fetched(browser: Browser) -> list[str]:
    """What was asked for; data: addresses are answered by the page itself."""
    return [url for url in browser.requests if not url.startswith("data:")]


def test_the_browser_tells_what_a_bad_page_does(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<link rel=stylesheet href=http://127.0.0.1:9/x.css><img src=http://127.0.0.1:9/x.png>"
        "<script>console.warn('mind'); throw new Error('boom')</script>"
    )
    browser.open(bad.as_uri())
    assert set(fetched(browser)) == {bad.as_uri(), "http://127.0.0.1:9/x.css", "http://127.0.0.1:9/x.png"}
    said = "\n".join(browser.problems)
    assert "mind" in said
    assert "boom" in said
    assert "ERR_" in said  # nobody answers there
    policy = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">"
    bad.write_text(f"{policy}<script>1</script>")
    browser.open(bad.as_uri())
    assert "Content Security Policy" in "\n".join(browser.problems)


@pytest.mark.parametrize("name", ["one", "both"])
@pytest.mark.parametrize("width", [1200, 800, 390])
def test_it_renders_alone_and_silently(
    browser: Browser, pages: dict[str, str], name: str, width: int
) -> None:
    browser.open(pages[name], width=width)
    assert fetched(browser) == [pages[name]]
    assert browser.problems == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    figures = browser.evaluate(FIGURES)
    assert len(figures) == {"one": 17, "both": 20}[name]
    for figure in figures:
        left, top, right, bottom = figure["svg"]
        assert right - left >= 240
        assert (right - left) / (bottom - top) == pytest.approx(3.7 / 2.7, rel=0.01)
        assert 0 <= left < right <= width
        assert figure["paths"] > 10
    columns = {round(figure["figure"][0]) for figure in figures}
    assert len(columns) == {1200: 3, 800: 2, 390: 1}[width]
    assert len({round(figure["svg"][2] - figure["svg"][0]) for figure in figures}) == 1  # all of one size


def overlaps(texts: list[Any]) -> list[tuple[str, str]]:
    """Pairs of texts that share more than a sliver."""
    found = []
    for i, (one, (left, top, right, bottom)) in enumerate(texts):
        for other, box in texts[:i]:
            across = min(right, box[2]) - max(left, box[0])
            down = min(bottom, box[3]) - max(top, box[1])
            if across > 2 and down > 5:  # a line's box is higher than its letters
                found.append((other, one))
    return found


def test_labels_neither_overlap_nor_leave_their_figure(browser: Browser, pages: dict[str, str]) -> None:
    assert overlaps([("a", [0, 0, 20, 10]), ("b", [15, 2, 30, 12]), ("c", [40, 0, 50, 10])]) == [("a", "b")]
    for name in pages:
        browser.open(pages[name])
        for figure in browser.evaluate(FIGURES):
            assert len(figure["texts"]) >= 5
            assert overlaps(figure["texts"]) == [], figure["id"]
            left, top, right, bottom = figure["svg"]
            for text, box in figure["texts"]:
                assert box[0] >= left - 4, (figure["id"], text)
                assert box[2] <= right + 6, (figure["id"], text)
                assert top - 4 <= box[1] <= box[3] <= bottom + 4, (figure["id"], text)


def test_every_figure_has_ink(browser: Browser, pages: dict[str, str]) -> None:
    from PIL import Image

    browser.open(pages["one"])
    for figure in browser.evaluate(FIGURES):
        left, top, right, bottom = figure["svg"]
        shot = browser.screenshot(x=left, y=top, width=right - left, height=bottom - top)
        colours = Image.open(io.BytesIO(shot)).convert("RGB").getcolors(2**24)
        pixels = sum(count for count, _ in colours)
        white = next(count for count, colour in colours if colour == (255, 255, 255))
        assert 0.5 < white / pixels < 0.985, figure["id"]
        coloured = sum(count for count, rgb in colours if max(rgb) - min(rgb) > 100)
        assert coloured / pixels > 0.001, figure["id"]


def test_settings_are_folded_on_a_screen_and_printed(browser: Browser, pages: dict[str, str]) -> None:
    height = "document.querySelector('.folded').getBoundingClientRect().height"
    browser.open(pages["one"])
    assert browser.evaluate(height) == 0
    browser.evaluate("document.querySelector('details').open = true")
    assert browser.evaluate(height) > 300
    browser.evaluate("document.querySelector('details').open = false")
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert browser.evaluate(height) > 300
        assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        inside = "[...document.querySelectorAll('figure')].map(f => getComputedStyle(f).breakInside)"
        assert set(browser.evaluate(inside)) == {"avoid"}
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize(("name", "most"), [("one", 9), ("both", 11)])
def test_it_prints_on_a4(browser: Browser, pages: dict[str, str], name: str, most: int) -> None:
    browser.open(pages[name])
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF")
    boxes = re.findall(rb"/MediaBox \[([\d. ]+)\]", pdf)
    assert 4 <= len(boxes) <= most
    for box in boxes:
        _, _, width, height = map(float, box.split())
        assert (width, height) == (pytest.approx(842, abs=1), pytest.approx(595, abs=1))
    assert fetched(browser) == [pages[name]]
    assert browser.problems == []
