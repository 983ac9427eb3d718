"""Figures: what each layer kept, perplexity by stage and importance by layer, read back from what is drawn."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_report import make_report

from gqaprune.geometry import Geometry
from gqaprune.plan import BlockKey, KeptUnits, PruningPlan
from gqaprune.reporting.figures import draw_importance, draw_perplexities, draw_plan, encode_figure
from gqaprune.reporting.report import Report, Stage


def make_plan(layers: int = 6) -> PruningPlan:
    geometry = Geometry("llama", 48, 8, (9,) * layers, (3,) * layers, (20,) * layers)
    kept = [KeptUnits(tuple(range(1 + i % 3)), tuple(range(20 - 3 * i))) for i in range(layers)]
    return PruningPlan(geometry, tuple(kept), "tiny", "fisher", "global", 0.25)


def draw_pixels(figure: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    buffer.seek(0)
    assert buffer.read(8) == b"\x89PNG\r\n\x1a\n"
    buffer.seek(0)
    return np.asarray(Image.open(buffer).convert("RGB")).reshape(-1, 3)


def test_figure_is_drawn_with_kept_and_removed_units_in_both_panels() -> None:
    pixels = draw_pixels(draw_plan(make_plan()))
    for colour in ((0x3B, 0x6F, 0xB6), (0xD9, 0x82, 0x2B), (0xE4, 0xE4, 0xE4)):
        assert (pixels == colour).all(axis=1).sum() > 1000


@pytest.mark.parametrize("layers", [1, 6, 80])
def test_figure_has_one_bar_of_kept_units_for_every_layer_in_each_panel(layers: int) -> None:
    plan = PruningPlan(
        Geometry("llama", 48, 8, (9,) * layers, (3,) * layers, (20,) * layers),
        tuple(KeptUnits(tuple(range(1 + i % 3)), tuple(range(1 + i % 20))) for i in range(layers)),
    )
    attention, mlp = draw_plan(plan).axes[:2]
    kept = plan.pruned_geometry
    for axes, dense, heights in ((attention, 3, kept.kv_heads), (mlp, 20, kept.channels)):
        removed_bars, kept_bars = axes.containers
        assert [bar.get_height() for bar in kept_bars] == list(heights)
        assert [bar.get_height() for bar in removed_bars] == [dense] * layers
        assert [round(bar.get_x() + bar.get_width() / 2) for bar in kept_bars] == list(range(layers))


def test_figure_counts_query_heads_where_only_they_went() -> None:
    geometry = Geometry("llama", 48, 8, (6, 6), (2, 2), (20, 20))
    layers = (KeptUnits((0, 1), (0, 1), (0, 1, 3, 5)), KeptUnits((0, 1), (0,)))
    attention = draw_plan(PruningPlan(geometry, layers)).axes[0]
    assert [bar.get_height() for bar in attention.containers[1]] == [4, 6]
    assert attention.get_title(loc="left") == "Attention: query heads – 83.3% kept"


def test_figure_says_which_panel_is_which_and_what_was_asked() -> None:
    figure = draw_plan(make_plan())
    attention, mlp = figure.axes[:2]
    assert "KV heads" in attention.get_title(loc="left")
    assert "66.7% kept" in attention.get_title(loc="left")
    assert "channels" in mlp.get_title(loc="left")
    assert "62.5% kept" in mlp.get_title(loc="left")
    assert figure.get_suptitle() == "tiny: 25% asked, fisher scores, global allocation"


def test_figure_of_a_kv_budget_alone_says_so() -> None:
    figure = draw_plan(replace(make_plan(), rate=0.0, kv_rate=0.5))
    assert figure.get_suptitle() == "tiny: 50% of KV heads asked, fisher scores, global allocation"


def read_bars(axes: Any) -> list[float]:
    return [bar.get_x() + bar.get_width() for bar in axes.patches]


def test_perplexities_have_a_panel_per_text_and_a_bar_per_stage_that_measured_it() -> None:
    report = make_report()
    report.stages = [
        replace(stage, held_out=value) for stage, value in zip(report.stages, (3.0, 4.5, None), strict=True)
    ]
    figure = draw_perplexities(report)
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "val/embedded",
        "test/wikitext2",
        "held-out calibration text",
    ]
    bars = {str(group.get_label()): [bar.get_height() + bar.get_y() for bar in group] for group in axes.containers}
    assert bars["dense"] == pytest.approx([12.345, 20.0, 3.0]) and axes.get_yscale() == "log"
    assert bars["pruned"] == pytest.approx([45.678, 1234.5, 4.5]) and bars["recovered"] == pytest.approx([23.456])
    assert {"20.00", "1,234.50"} <= {text.get_text() for text in axes.texts}


def test_perplexities_of_nothing_are_no_figure() -> None:
    assert draw_perplexities(Report(stages=[Stage("dense", 2, 1, 1)])) is None


def test_importance_has_a_bar_per_layer_or_one_per_block_where_these_differ() -> None:
    alike = {BlockKey(layer, kind): float(layer + 1) for layer in range(3) for kind in ("attention", "mlp")}
    (axes,) = draw_importance(alike, "removal").axes
    assert [bar.get_height() for bar in axes.patches] == [1.0, 2.0, 3.0]
    assert axes.get_title(loc="left") == "Importance by removal"
    (axes,) = draw_importance(alike | {BlockKey(1, "mlp"): 7.0}, "activation").axes
    assert [bar.get_height() for bar in axes.patches] == [1.0, 2.0, 3.0, 1.0, 7.0, 3.0]


def test_names_that_no_font_has_are_drawn_all_the_same() -> None:
    name = "$\\frac{\ud800\x00"
    stages = [Stage("dense", 2, 1, 1, {name: 5.0})]
    figure = draw_perplexities(Report(stages=stages))
    assert figure is not None and b"<svg" in encode_figure(figure, "svg")
    assert encode_figure(draw_plan(replace(make_plan(), model=name))).startswith(b"\x89PNG")


def test_the_same_figure_gives_the_same_bytes() -> None:
    first, second = (encode_figure(draw_plan(make_plan()), "svg") for _ in range(2))
    assert first == second
