"""Runs to make reports of, and a reader of the pages."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from matplotlib.colors import to_hex

from tests.conftest import run_ok
from tests.train.runs import lines_of, train_arguments
from train.experiments.report import kinds, lengths, page, plots
from train.experiments.report.data import gather

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

VOID = {"meta", "link", "br", "img", "input", "hr"}
Points = list[tuple[float, float | None]]


def make_runs(cache: Path, folder: Path) -> list[Path]:
    """Two runs: one with everything there is to measure, one with nothing."""
    full, bare = folder / "full", folder / "bare"
    run_ok(*train_arguments(cache, full, train__eval_every=10))
    run_ok("evaluate", "--cache", cache, "--run", full, "--device", "cpu")
    add_calibration(full)
    add_speculation(full)
    run_ok(*train_arguments(cache, bare, draft__block_size=5, train__max_steps=10, train__lr=1e-3))
    return [full, bare]


def figures_of(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "best" / name).read_text())


def write_figures(run: Path, name: str, figures: Any) -> None:
    (run / "best" / name).write_text(json.dumps(figures))


def add_calibration(run: Path) -> None:
    """What calibration would write, by hand: a smaller error, the bins nearer to the diagonal.

    Every figure differs between before and after.
    """
    evaluation = figures_of(run, "evaluation.json")
    before, after = evaluation["confidence"], json.loads(json.dumps(evaluation["confidence"]))
    for part in after.values():
        part["ece"] /= 8
        for number, row in enumerate(part["bins"]):
            if row["count"]:
                row["actual"] += 0.75 * (row["predicted"] - row["actual"])
                row["predicted"] += 0.01
                row["count"] += 100 * number
    sweep = json.loads(json.dumps(evaluation["thresholds"]))
    for row in sweep:
        row["tokens"] = 1 + 0.75 * (row["tokens"] - 1)
        row["acceptance"] = None if row["acceptance"] is None else 0.1 + row["acceptance"] / 2
    figures = {
        "step": evaluation["step"],
        "temperatures": [1.25, 1.5, 0.75],
        "dataset": "held out",
        "num_samples": 4,
        "ece_before": before["prefix"]["ece_by_position"],
        "ece_after": after["prefix"]["ece_by_position"],
        "fit": {"samples": 4, "blocks": 40},
        "report": {"samples": 4, "blocks": 40, "before": before, "after": after},
        "thresholds": {"before": evaluation["thresholds"], "after": sweep},
    }
    write_figures(run, "calibration.json", figures)


def add_speculation(run: Path, temperatures: tuple[float, ...] = (0.0, 1.0)) -> None:
    """What live decoding would write, by hand; another at each temperature."""
    lengths = [
        {
            "length": length,
            "draft_ms": length / 2,
            "verify_ms": 4.0 + length / 4,
            "tokens_per_round": None if length == 3 else 1 + length / 4,
            "speedup": None if length == 3 else 1.5 - length / 8,
        }
        for length in (1, 2, 3)
    ]
    rows = [
        {
            "temperature": temperature,
            "tokens": 512,
            "rounds": 300,
            "tokens_per_round": 1.75 - temperature / 4,
            "accept_given_prefix": [0.5125 - temperature / 8, 0.2575 + temperature / 16, None],
            "verified_per_round": 3.0,
            "draft_ms": 1.25,
            "verify_ms": 4.5,
            "plain_ms": 4.25,
            "speculative_ms": 3.375,
            "speedup": 1.25 + temperature,
            "identical": None if temperature else 8,
            "partings": [],
            "offline": {
                "tokens_per_round": 1.6875 - temperature / 4,
                "accept_given_prefix": [0.5 - temperature / 8, 0.25, 0.125 + temperature / 16],
            },
            "lengths": {
                "plain_ms": 4.125,
                "acceptance": "held out",
                "rows": lengths,
                "num_speculative_tokens": 1,
            },
        }
        for temperature in temperatures
    ]
    about = {"step": 20, "target": "tiny", "device": "cpu", "dtype": "float32", "prompts": 8}
    figures = {**about, "max_new_tokens": 64, "threshold": 0.0, "runs": rows}
    write_figures(run, "speculation.json", figures)


def change_figures(run: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a file beside the draft; `change` alters what it is given."""
    figures = figures_of(run, name)
    change(figures)
    write_figures(run, name, figures)


def write_log(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def log_of(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of a run's log: of training, and of evaluations."""
    lines = lines_of(run)
    held_out = [line["held_out"] for line in lines if "held_out" in line]
    return [line for line in lines if "held_out" not in line], held_out


def drawn(*runs: Path) -> dict[str, Axes]:
    """What the page draws: the axes of each figure, by its key."""
    found: dict[str, Axes] = {}
    real = plots.panel

    def kept(
        key: str, title: str, caption: str, alt: str, draw: Callable[[Axes], object], **more: str
    ) -> object:
        def both(axes: Axes) -> None:
            draw(axes)
            found[key] = axes

        return real(key, title, caption, alt, both, **more)

    with (
        patch.object(plots, "panel", kept),
        patch.object(kinds, "panel", kept),
        patch.object(lengths, "panel", kept),
    ):
        page.render(gather(runs))
    return found


def seen(axes: Axes) -> list[Line2D]:
    """The lines with data that one can see."""
    return [
        line
        for line in axes.lines
        if len(line.get_xydata())
        and line.get_visible()
        and line.get_alpha() in (None, 1)
        and (line.get_linestyle() != "None" or line.get_marker() not in ("", "None", None))
    ]


def points(line: Line2D) -> Points:
    """Its data; None for a gap."""
    return [(float(x), None if y != y else float(y)) for x, y in line.get_xydata()]


def style(line: Line2D) -> tuple[str, bool]:
    """What tells it from others: colour, and whether it is a line or mere marks."""
    return to_hex(line.get_color()), line.get_linestyle() != "None"


def by_label(axes: Axes) -> dict[str, Points]:
    """What is drawn as the legend says, by its words."""
    legend = axes.get_legend()
    found = {}
    for handle, text in zip(legend.get_lines(), legend.get_texts(), strict=True):
        (line,) = (line for line in seen(axes) if style(line) == style(handle))
        found[text.get_text()] = points(line)
    return found


def numbered(values: list[float | None]) -> Points:
    """A figure by position, from 1."""
    return [(k, value) for k, value in enumerate(values, start=1)]


def copy_run(run: Path, to: Path) -> Path:
    return shutil.copytree(run, to, symlinks=True)


class Page(HTMLParser):
    """A page taken apart: its elements with their attributes, its tables, its text."""

    def __init__(self, html: str):
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._open: list[str] = []
        self._cell: str | None = None
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th", "caption"):
            self._cell = ""

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("td", "th"):
            self._rows[-1].append(" ".join((self._cell or "").split()))
        elif tag == "caption":
            self._caption = self._cell or ""
        elif tag == "table":
            self.tables[self._caption] = self._rows
        if tag in ("td", "th", "caption"):
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None:
            self._cell += data

    def column(self, table: str, title: str) -> list[str]:
        """The cells under a title."""
        header, *rows = self.tables[table]
        return [row[header.index(title)] for row in rows]

    def labels(self) -> dict[str, str]:
        """What each figure says in words, by its key."""
        keys = [values["id"] for tag, values in self.elements if tag == "figure"]
        said = [values["aria-label"] for tag, values in self.elements if values.get("role") == "img"]
        return dict(zip(keys, said, strict=True))

    def ids(self) -> list[str]:
        return [values["id"] for _, values in self.elements if "id" in values]

    def svgs(self) -> list[str]:
        return re.findall(r"<svg\b.*?</svg>", self.html, re.DOTALL)


def report(*runs: Path, out: Path, title: str | None = None) -> Page:
    """The page that the command writes."""
    run_ok("report", *runs, "--out", out, *(["--title", title] if title else []))
    return Page(out.read_text(encoding="utf-8"))


def check_whole(page: Page) -> None:
    """The page is well formed and refers to nothing outside."""
    ids = page.ids()
    assert len(ids) == len(set(ids))
    assert not [tag for tag, _ in page.elements if tag in ("script", "iframe", "object", "embed", "base")]
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{name}={value}"
            if name in ("href", "src"):
                assert value.startswith(("#", "data:")), value
                assert not value.startswith("#") or value[1:] in ids
            if name not in ("xmlns", "aria-label", "content"):
                assert "//" not in (value or ""), f"{name}={value}"
            for reference in re.findall(r"url\(([^)]*)", value or ""):
                assert reference[1:] in ids
    (style,) = re.findall(r"<style>(.*?)</style>", page.html, re.DOTALL)
    assert not re.search(r"url\(|@import|//", style)
    for svg in page.svgs():
        assert ET.fromstring(svg).tag.endswith("svg")
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for tag, attributes in page.elements:
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    policy = next(values for _, values in page.elements if "http-equiv" in values)["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for rows in page.tables.values():
        assert len({len(row) for row in rows}) == 1
