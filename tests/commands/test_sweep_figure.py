"""The sweep's curve: one panel, whatever was cut, with what each rate leaves in words."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from gqaprune.commands.sweep import Sweep, draw_sweep
from gqaprune.reporting.charts import encode_figure
from gqaprune.reporting.report import Stage


def make_sweep(*rates: float) -> Sweep:
    sweep = Sweep({}, Path("sweep.json"), 1_000)
    for rate in (0.0, *rates):
        left = 1 - rate
        perplexity = {"val/a": 10 + 20 * rate, "test/b": 20 + 50 * rate}
        sweep.results[rate] = Stage("pruned", 100, 100, round(100 * left), perplexity, round(300_000 * left))
    return sweep


def test_curve_has_a_line_per_text_and_words_below_each_rate() -> None:
    figure = draw_sweep(make_sweep(0.2, 0.1, 0.3), "tiny")
    (axes,) = figure.axes
    lines = {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines}
    assert lines["val/a"] == [(0.0, 10.0), (0.1, 12.0), (0.2, 14.0), (0.3, 16.0)] and len(lines) == 2
    words = [label.get_text() for label in axes.get_xticklabels()]
    assert words == ["dense", *(f"{n}0%\nKV cache {10 - n}0%\ndecode time {10 - n}0%" for n in (1, 2, 3))]
    assert "1,000 tokens" in axes.get_xlabel()
    picture = Image.open(io.BytesIO(encode_figure(figure)))
    assert picture.width == 1120 and np.asarray(picture.convert("L")).std() > 10


def test_curve_of_many_rates_has_no_words_that_would_overlap() -> None:
    (axes,) = draw_sweep(make_sweep(0.05, 0.1, 0.15, 0.2, 0.3, 0.4), "tiny").axes
    assert axes.get_xlabel() == "share of parameters removed"
    assert not any("KV" in label.get_text() for label in axes.get_xticklabels())
