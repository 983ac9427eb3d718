"""Reports: numbers as data, as a table, and the figure of what each layer kept."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from gqaprune.plan import Geometry, KeptUnits, PruningPlan
from gqaprune.report import Report, Stage, build_table, describe_model, draw_plan

from tiny import make_model


def make_report(**settings: Any) -> Report:
    return Report(
        settings={"rate": 0.2, "rate_base": "decoder", "criterion": "fisher"} | settings,
        protocol="perplexity: token-weighted, whole split",
        stages=[
            Stage(
                "dense", 134_515_008, 106_203_456, 46_080, {"val/embedded": 12.345, "test/wikitext2": 20.0}, 269_030_016
            ),
            Stage(
                "pruned",
                113_274_432,
                84_962_880,
                30_720,
                {"val/embedded": 45.678, "test/wikitext2": 1234.5},
                226_548_864,
            ),
            Stage("recovered", 113_274_432, 84_962_765, 30_720, {"val/embedded": 23.456}, 226_548_864),
        ],
    )


def make_plan(layers: int = 6) -> PruningPlan:
    geometry = Geometry("llama", 48, 8, (9,) * layers, (3,) * layers, (20,) * layers)
    kept = [KeptUnits(tuple(range(1 + i % 3)), tuple(range(20 - 3 * i))) for i in range(layers)]
    return PruningPlan(geometry, tuple(kept), "tiny", "fisher", "global", 0.25)


def render(report: Report) -> list[str]:
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(build_table(report))
    return console.export_text().splitlines()


def find_row(lines: list[str], label: str) -> list[str]:
    """The cells of the row with that label."""
    rows = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in lines]
    found = [cells[1:] for cells in rows if cells[0] == label]
    assert len(found) == 1, f"{len(found)} rows {label!r} in\n" + "\n".join(lines)
    return found[0]


def test_rate_reached_is_a_share_of_decoder_parameters() -> None:
    assert make_report().rate_reached == pytest.approx(1 - 84_962_765 / 106_203_456)


def test_rate_reached_is_a_share_of_all_parameters_if_the_rate_is() -> None:
    assert make_report(rate_base="all").rate_reached == pytest.approx(1 - 113_274_432 / 134_515_008)


def test_report_as_data_survives_json() -> None:
    data = json.loads(json.dumps(make_report().to_dict()))
    assert data == make_report().to_dict()
    assert data["settings"] == {"rate": 0.2, "rate_base": "decoder", "criterion": "fisher"}
    assert data["protocol"] == "perplexity: token-weighted, whole split"
    assert data["rate_reached"] == pytest.approx(0.2, abs=1e-5)
    assert data["stages"][2] == {
        "name": "recovered",
        "parameters": 113_274_432,
        "decoder_parameters": 84_962_765,
        "kv_cache_bytes_per_token": 30_720,
        "perplexity": {"val/embedded": 23.456},
        "weight_bytes": 226_548_864,
    }


def test_saved_report_holds_the_same_data(tmp_path: Path) -> None:
    make_report().save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == make_report().to_dict()
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_stage_counts_what_a_model_holds() -> None:
    model = make_model("qwen2-tied", kv_heads=2, ratio=3, head_dim=8, layers=3)
    stage = describe_model("dense", model, {"val/text": 3.0})
    assert stage.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert stage.decoder_parameters == sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert stage.kv_cache_bytes_per_token == 2 * 3 * 2 * 8 * 4  # keys and values, layers, KV heads, head_dim, float32
    assert stage.perplexity == {"val/text": 3.0}
    assert describe_model("half", model.to(torch.bfloat16), {}).kv_cache_bytes_per_token == 2 * 3 * 2 * 8 * 2


def test_table_has_a_column_for_every_stage_and_a_row_for_every_corpus() -> None:
    lines = render(make_report())
    header = next(line for line in lines if "dense" in line)
    assert header.index("dense") < header.index("pruned") < header.index("recovered")
    assert find_row(lines, "ppl val/embedded") == ["12.35", "45.68", "23.46"]
    assert find_row(lines, "ppl test/wikitext2") == ["20.00", "1234.50", "–"]


def test_table_gives_counts_with_their_change_in_percent() -> None:
    lines = render(make_report())
    assert find_row(lines, "parameters") == ["134.52 M", "113.27 M (-15.8%)", "113.27 M (-15.8%)"]
    assert find_row(lines, "decoder parameters") == ["106.20 M", "84.96 M (-20.0%)", "84.96 M (-20.0%)"]
    assert find_row(lines, "weights") == ["269.0 MB", "226.5 MB (-15.8%)", "226.5 MB (-15.8%)"]
    assert find_row(lines, "KV-cache bytes/token") == ["46,080", "30,720 (-33.3%)", "30,720 (-33.3%)"]


def test_table_says_what_was_asked_what_was_reached_and_how_it_was_measured() -> None:
    text = "\n".join(render(make_report(rate=0.25)))
    assert "asked to remove 25.00% of decoder-layer parameters, removed 20.00%" in text
    assert "perplexity: token-weighted, whole split" in text
    assert "25.00% of all parameters, removed 15.79%" in "\n".join(render(make_report(rate=0.25, rate_base="all")))


def test_table_of_a_model_pruned_by_a_given_plan_claims_no_rate() -> None:
    report = make_report()
    report.settings, report.stages = {}, report.stages[1:]
    lines = render(report)
    assert "pruned by a given plan" in lines[0]
    assert report.rate_reached is None and "%" not in lines[0]


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


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        ({"rate": 0.25}, "asked to remove 25.00% of decoder-layer parameters, removed 24.00%"),
        ({"rate": 0.0, "kv_rate": 0.5}, "asked to remove 50.00% of the KV heads, removed 40.00%"),
        (
            {"rate": 0.25, "kv_rate": 0.5, "rate_base": "all"},
            "asked to remove 25.00% of all parameters, removed 12.00%; 50.00% of the KV heads, removed 40.00%",
        ),
    ],
)
def test_table_says_what_was_asked_of_parameters_and_kv_heads(settings: dict[str, Any], title: str) -> None:
    stages = [Stage("dense", 200, 100, 10), Stage("pruned", 176, 76, 6)]
    assert build_table(Report("tiny", settings, stages=stages)).title == title


def test_figure_of_a_kv_budget_alone_says_so() -> None:
    figure = draw_plan(replace(make_plan(), rate=0.0, kv_rate=0.5))
    assert figure.get_suptitle() == "tiny: 50% of KV heads asked, fisher scores, global allocation"
