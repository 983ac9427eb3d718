"""What all figures share: size, fonts, colours, and how a panel looks.

A figure is drawn 7 inches wide: a README shows it on about 830 pixels, a phone on about 350, and 11 points are readable
on both. Colours are those of Okabe and Ito, which colour-blind readers tell apart; text and values never rest on colour
alone.
"""

import io
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib
import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from gqaprune.common.atomic_files import write_atomically

WIDTH = 7.0
"""Inches."""
ATTENTION, MLP, REMOVED, DENSE = "#0072b2", "#e69f00", "#d3d7dc", "#8a8f96"
SERIES = (ATTENTION, MLP, "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")
"""Colours of lines and marks, in this order."""
_BODY, _HEADING = 11, 13
"""Points."""
_LETTERS = 11.0
"""Letters of the body in an inch; a heading has three quarters as many."""
_WIDE = 20.0
"""Ratio of the largest to the smallest value above which an axis is logarithmic."""
_UNREADABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def make_figure(title: str, height: float, width: float = WIDTH) -> matplotlib.figure.Figure:
    """Make an empty figure with a heading that is wrapped to its width; sizes are in inches."""
    lines = _wrap(title, 0.75 * width)
    figure = matplotlib.figure.Figure(figsize=(width, height + 0.25 * len(lines)), layout="constrained")
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=_HEADING, fontweight="bold", parse_math=False)
    return figure


def style_panel(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Give a panel its title, which is wrapped, and labels, readable sizes, and no frame."""
    figure, place = axes.get_figure(root=True), axes.get_subplotspec()
    assert figure is not None and place is not None
    lines = _wrap(title, figure.get_figwidth() / place.get_gridspec().ncols - 0.9)
    axes.set_title("\n".join(lines), loc="left", fontsize=_BODY, parse_math=False)
    axes.set_xlabel(x, fontsize=_BODY)
    axes.set_ylabel(y, fontsize=_BODY)
    axes.tick_params(labelsize=_BODY)
    axes.spines[["top", "right"]].set_visible(False)


def _wrap(title: str, inches: float) -> list[str]:
    return textwrap.wrap(make_readable(title), round(_LETTERS * inches), break_on_hyphens=False) or [""]


def style_layers(axes: Axes, layers: int) -> None:
    """Make the horizontal axis that of decoder layers."""
    axes.set_xlim(-0.6, layers - 0.4)
    axes.set_xlabel("decoder layer", fontsize=_BODY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def add_legend(axes: Axes, columns: int, place: Literal["upper right", "upper left", "best"] = "upper right") -> None:
    """Explain a panel's colours inside it."""
    legend = axes.legend(loc=place, ncols=columns, frameon=False, fontsize=_BODY, borderaxespad=0.2)
    _read_literally(legend)


def add_shared_legend(figure: matplotlib.figure.Figure, axes: Axes, columns: int) -> None:
    """Explain colours that all panels share, below them."""
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=_BODY)
    _read_literally(legend)


def _read_literally(legend: matplotlib.legend.Legend) -> None:
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_text(make_readable(text.get_text()))


def draw_bars(
    axes: Axes, title: str, values: Sequence[tuple[str, float, str]], pattern: str, is_logarithmic: bool = False
) -> None:
    """Draw a horizontal bar per value, with its name before it and its number behind it, so that no axis is needed.

    Args:
        axes: panel to draw in.
        title: title of the panel.
        values: names, values and colours, from top to bottom.
        pattern: format of the numbers.
        is_logarithmic: begin at 1 on a logarithmic axis, not at 0.
    """
    bottom = float(is_logarithmic)
    places = range(len(values))
    lengths = [value - bottom for _, value, _ in values]
    bars = axes.barh(places, lengths, height=0.8, left=bottom, color=[color for *_, color in values])
    axes.bar_label(bars, [pattern.format(value) for _, value, _ in values], padding=4, fontsize=_BODY)
    if is_logarithmic:
        axes.set_xscale("log")
    axes.margins(x=0.15)  # on the right: bars stick to where they begin
    style_panel(axes, title)
    axes.set_yticks(places, [make_readable(name) for name, *_ in values], parse_math=False)
    axes.tick_params(left=False)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)


def is_wide(values: Sequence[float]) -> bool:
    """Return whether values differ so much that the small ones are visible on a logarithmic axis only."""
    return max(values) / min(values) > _WIDE


def encode_figure(figure: matplotlib.figure.Figure, format: str = "png") -> bytes:
    """Encode a figure as `png`, or as `svg` with its text as text and no background; equal figures have equal bytes."""
    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "gqaprune", "svg.fonttype": "none"}):
        is_svg = format == "svg"
        figure.savefig(picture, format=format, dpi=160, metadata={"Date": None} if is_svg else None, transparent=is_svg)
    return picture.getvalue()


def save_figure(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    write_atomically(path, encode_figure(figure))


def name_model(model: str) -> str:
    """Return the last part of a model's name or path, as figures show it."""
    return make_readable(Path(model).name or "model")


def make_readable(text: str) -> str:
    """Replace control characters and halves of characters, which neither fonts nor files support."""
    return _UNREADABLE.sub("�", text)
