"""Figures as SVG for the inside of a page: one look for all, no display, no state that others see.

Text stays text, in the page's own font; the same figure gives the same bytes every time.
"""

from __future__ import annotations

import importlib.util
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pipeline.errors import RunError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (3.7, 2.7)
"""Inches of a panel; three stand beside each other."""
SWATCH = (0.4, 0.15)
INK, MUTED, RULE, FAINT = "#1f2933", "#5f6b76", "#e4e8eb", "#c9d2d9"
# Okabe and Ito's colours (jfly.uni-koeln.de/color), a brown in place of the yellow, which paper hides.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#8C564B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
STYLE = {
    "font.family": "DejaVu Sans",  # which comes with the library; the page's CSS has the last word
    "font.size": 8.5,
    "svg.fonttype": "none",
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.0,
    "legend.borderpad": 0.2,
    "text.color": INK,
}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
ET.register_namespace("", _SVG[1:-1])


@dataclass(frozen=True)
class Panel:
    """A figure of the page."""

    key: str
    """Its id, unlike any other's."""
    title: str
    caption: str
    """A sentence on reading it."""
    alt: str
    """Its main numbers, for who can't see it."""
    svg: Markup


def require_matplotlib() -> None:
    """Raises RunError when matplotlib is not installed; imports nothing."""
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:  # no origin: a mere folder of that name
        raise RunError("dspark report needs matplotlib: pip install 'dspark-pipeline[report]'")


def look(index: int, **more: Any) -> dict[str, Any]:
    """Look of a run's curves: by colour, and in greyscale by dashes and markers."""
    again = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + again) % len(MARKERS)],
        "linestyle": DASHES[(index + again) % len(DASHES)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
        **more,
    }


def dark(index: int) -> str:
    """A run's colour, halfway to black."""
    colour = COLOURS[index % len(COLOURS)]
    return "#" + "".join(f"{int(colour[i : i + 2], 16) // 2:02x}" for i in (1, 3, 5))


def panel(
    key: str, title: str, caption: str, alt: str, draw: Callable[[Axes], object], *, x: str, y: str
) -> Panel:
    """Draw a figure of the common size.

    Args:
        draw: puts the data into the axes.
        x: what the horizontal axis is.
        y: what the vertical one is, told in a line above it.
    """

    def whole(figure: Figure) -> None:
        # The same frame everywhere, so that figures beside each other line up.
        axes = figure.add_axes((0.125, 0.165, 0.855, 0.735))
        draw(axes)
        axes.set_xlabel(x, labelpad=3)
        axes.text(-0.143, 1.035, y, transform=axes.transAxes, color=MUTED, fontsize=8.5, va="bottom")

    return Panel(key, title, caption, alt, svg(whole, key, SIZE, alt))


def swatch(index: int) -> Markup:
    """A run's line and marker, to stand beside its name."""

    def draw(figure: Figure) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.markers import MarkerStyle
        from matplotlib.patches import PathPatch
        from matplotlib.transforms import Affine2D

        # In points from the corner: Chromium loses transforms where a table's head is printed again.
        width, height = 72 * SWATCH[0], 72 * SWATCH[1]
        own = look(index)
        style = MarkerStyle(own["marker"])
        place = style.get_transform() + Affine2D().scale(6.5).translate(width / 2, height / 2)
        path = style.get_path().transformed(place)
        line = Line2D([0, width], [height / 2] * 2, lw=1.8, color=own["color"], ls=own["linestyle"])
        for artist in (line, PathPatch(path, fc=own["color"], ec="white", lw=0.6, zorder=3)):
            artist.set_transform(Affine2D())
            artist.set_clip_on(False)
            figure.add_artist(artist)

    return svg(draw, f"swatch-{index}", SWATCH, None)


def svg(draw: Callable[[Figure], object], key: str, size: tuple[float, float], alt: str | None) -> Markup:
    """A figure as an `<svg>` element.

    Args:
        key: what its ids begin with.
        alt: what it says in words; None for one that says nothing.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": key})
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Markup(_inlined(buffer.getvalue(), key, alt))


def _inlined(source: bytes, key: str, alt: str | None) -> str:
    """SVG as part of a page: without prolog, metadata and style of its own, its ids told from all others."""
    root = ET.fromstring(source)
    for parent in list(root.iter()):
        for child in list(parent):
            empty = child.tag == f"{_SVG}defs" and all(item.tag == f"{_SVG}style" for item in child)
            if empty or child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    used: dict[str, str] = {}

    def renamed(match: re.Match[str]) -> str:
        return match[1] + used.setdefault(match[2], f"{key}-{len(used) + 1}")

    for element in root.iter():
        if _HREF in element.attrib:
            element.set("href", re.sub(r"^(#)(.+)", renamed, element.attrib.pop(_HREF)))
        for name, value in element.attrib.items():
            if "url(#" in value:
                element.set(name, re.sub(r"(url\(#)([^)]+)", renamed, value))
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in used:
            element.set("id", used[own])
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("preserveAspectRatio", "xMinYMin meet")  # on paper height decides, and the left edges line up
    if alt is None:
        root.set("aria-hidden", "true")
    else:
        root.set("role", "img")
        root.set("aria-label", "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in alt))
    return ET.tostring(root, encoding="unicode").replace("\n", "")
