"""Figures: what each layer kept, perplexity by stage and importance by layer, read back from what is drawn."""

import html
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_report import make_report

from gqaprune.geometry import Geometry
from gqaprune.plan import BlockKey, KeptUnits, PruningPlan
from gqaprune.reporting.charts import ATTENTION, MLP, REMOVED, encode_figure
from gqaprune.reporting.figures import draw_damages, draw_importance, draw_perplexities, draw_plan
from gqaprune.reporting.report import LayerDamage, Report, Stage


def make_plan(layers: int = 6) -> PruningPlan:
    geometry = Geometry("llama", 48, 8, (9,) * layers, (3,) * layers, (20,) * layers)
    kept = [KeptUnits(tuple(range(1 + i % 3)), tuple(range(20 - 3 * (i % 6)))) for i in range(layers)]
    return PruningPlan(geometry, tuple(kept), "tiny", "fisher", "global", 0.25)


def draw_pixels(figure: Figure) -> np.ndarray:
    picture = Image.open(io.BytesIO(encode_figure(figure)))
    assert picture.format == "PNG"
    return np.asarray(picture.convert("RGB")).reshape(-1, 3)


def read_svg(figure: Figure) -> str:
    """The words of a figure, as they are in its file."""
    text = re.findall(r"<text[^>]*>([^<]*)</text>", encode_figure(figure, "svg").decode())
    return "\n".join(html.unescape(line) for line in text)


def count_pixels(figure: Figure, color: str) -> int:
    rgb = tuple(bytes.fromhex(color.removeprefix("#")))
    return int((draw_pixels(figure) == rgb).all(axis=1).sum())


def test_figure_of_a_plan_has_kept_and_removed_units_of_both_kinds_and_their_totals_in_words() -> None:
    figure = draw_plan(make_plan())
    assert all(count_pixels(figure, color) > 5000 for color in (ATTENTION, MLP, REMOVED))
    text = read_svg(figure)
    assert "KV heads: 12 of 18 kept" in text and "MLP channels: 75 of 120 kept" in text
    assert text.count("kept\n") >= 2 and text.count("removed") == 2 and "decoder layer" in text


@pytest.mark.parametrize("layers", [1, 6, 80])
def test_figure_has_one_bar_of_kept_units_for_every_layer_in_each_panel(layers: int) -> None:
    plan = PruningPlan(
        Geometry("llama", 48, 8, (9,) * layers, (3,) * layers, (20,) * layers),
        tuple(KeptUnits(tuple(range(1 + i % 3)), tuple(range(1 + i % 20))) for i in range(layers)),
    )
    attention, mlp = draw_plan(plan).axes
    kept = plan.pruned_geometry
    for axes, dense, heights in ((attention, 3, kept.kv_heads), (mlp, 20, kept.channels)):
        kept_bars, removed_bars = axes.containers
        assert [bar.get_height() for bar in kept_bars] == list(heights)
        assert [bar.get_y() + bar.get_height() for bar in removed_bars] == [dense] * layers
        assert [round(bar.get_x() + bar.get_width() / 2) for bar in kept_bars] == list(range(layers))
        assert axes.get_yticks()[-1] == dense


@pytest.mark.parametrize("layers", [6, 80])
@pytest.mark.parametrize("width", [4.2, 7.0])
def test_every_figure_is_as_wide_as_asked(layers: int, width: float) -> None:
    assert draw_plan(make_plan(layers), width).get_figwidth() == width
    picture = Image.open(io.BytesIO(encode_figure(draw_plan(make_plan(layers), width))))
    assert picture.width == round(160 * width) and picture.height < picture.width * 1.5


def cut_channels(plan: PruningPlan) -> PruningPlan:
    heads = zip(plan.geometry.kv_heads, plan.layers, strict=True)
    return replace(plan, layers=tuple(KeptUnits(tuple(range(count)), kept.channels) for count, kept in heads))


def test_kind_that_was_not_cut_has_words_in_place_of_a_panel() -> None:
    figure = draw_plan(cut_channels(make_plan()))
    assert len(figure.axes) == 1 and count_pixels(figure, ATTENTION) == 0 < count_pixels(figure, MLP)
    assert "MLP channels: 75 of 120 kept; all 18 KV heads kept" in read_svg(figure)
    whole = tuple(KeptUnits(kept.groups, tuple(range(20))) for kept in make_plan().layers)
    figure = draw_plan(replace(make_plan(), layers=whole))
    assert len(figure.axes) == 1 and "KV heads: 12 of 18 kept; all 120 MLP channels kept" in read_svg(figure)


def test_long_titles_are_wrapped_on_a_narrow_figure() -> None:
    plan = replace(cut_channels(make_plan()), kv_rate=0.1)
    narrow, wide = (draw_plan(plan, width) for width in (3.0, 7.0))
    assert "\n" in narrow.axes[0].get_title(loc="left") and "\n" in narrow.get_suptitle()
    assert "\n" not in wide.axes[0].get_title(loc="left") + wide.get_suptitle()


def test_figure_of_one_kv_head_counts_the_query_heads_that_went() -> None:
    geometry = Geometry("gemma", 48, 8, (4, 4), (1, 1), (20, 20))
    layers = (KeptUnits((0,), tuple(range(20)), (0, 1)), KeptUnits((0,), tuple(range(10))))
    figure = draw_plan(PruningPlan(geometry, layers))
    assert len(figure.axes) == 2 and [bar.get_height() for bar in figure.axes[0].containers[0]] == [2, 4]
    assert "Query heads: 6 of 8 kept" in read_svg(figure) and "all 2 KV heads kept" in read_svg(figure)


def test_figure_of_a_plan_that_removes_nothing_shows_every_kind() -> None:
    whole = tuple(KeptUnits((0, 1, 2), tuple(range(20))) for _ in range(6))
    figure = draw_plan(replace(make_plan(), layers=whole))
    assert len(figure.axes) == 2 and figure.get_suptitle() == "tiny: nothing removed"


def test_figure_has_the_models_name_and_what_was_asked() -> None:
    plan = replace(make_plan(), model="/data/models/tiny")
    assert draw_plan(plan).get_suptitle() == "tiny, target: −25% parameters"
    assert draw_plan(replace(plan, kv_rate=0.5)).get_suptitle() == "tiny, target: −25% parameters, −50% KV heads"
    assert draw_plan(replace(plan, rate=0.0, kv_rate=0.5)).get_suptitle() == "tiny, target: −50% KV heads"
    assert draw_plan(replace(plan, rate=0.0)).get_suptitle() == "tiny, pruned by a given plan"


def test_perplexities_have_a_panel_per_text_and_a_bar_per_stage_that_measured_it() -> None:
    report = make_report()
    report.stages = [
        replace(stage, held_out=value) for stage, value in zip(report.stages, (3.0, 4.5, None), strict=True)
    ]
    figure = draw_perplexities(report)
    assert figure is not None
    texts = {axes.get_title(loc="left"): [label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes}
    assert texts == {
        "val/embedded": ["dense", "pruned", "recovered"],
        "test/wikitext2": ["dense", "pruned"],
        "held-out calibration text": ["dense", "pruned"],
    }
    ends = [[round(bar.get_x() + bar.get_width(), 3) for bar in axes.patches] for axes in figure.axes]
    assert ends == [[12.345, 45.678, 23.456], [20.0, 1234.5], [3.0, 4.5]]
    assert figure.axes[0].get_xscale() == "log" and figure.axes[0].get_xlim()[0] == pytest.approx(1.0)
    assert "logarithmic" in figure.get_suptitle()
    assert {"20.00", "1,234.50"} <= set(read_svg(figure).splitlines())


def test_perplexities_of_nothing_are_no_figure() -> None:
    assert draw_perplexities(Report(stages=[Stage("dense", 2, 1, 1)])) is None


def test_damages_stack_the_predicted_beside_the_measured() -> None:
    assert draw_damages(Report()) is None
    figure = draw_damages(Report(damages=[LayerDamage(4, 0.25, 0.5, 0.625), LayerDamage(5, 0.0, 0.5)]))
    assert figure is not None
    tops = [[bar.get_y() + bar.get_height() for bar in bars] for bars in figure.axes[0].containers]
    assert tops == [[0.25, 0.0], [0.75, 0.5], [0.625, 0.0]]
    assert {"attention, predicted", "MLP, predicted", "measured"} <= set(read_svg(figure).splitlines())


def test_importance_has_a_bar_per_layer_or_one_per_block_where_these_differ() -> None:
    alike = {BlockKey(layer, kind): float(layer + 1) for layer in range(3) for kind in ("attention", "mlp")}
    (axes,) = draw_importance(alike, "removal").axes
    assert [bar.get_height() for bar in axes.patches] == [1.0, 2.0, 3.0]
    assert draw_importance(alike, "removal").get_suptitle() == "Importance of each layer, by removal"
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
