"""Reports: numbers as data and as a table."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gqaprune.reporting.report import Report, Stage, build_table, describe_model, describe_request

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
        "held_out": None,
        "kv_heads": 0,
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


def test_stage_that_training_left_in_another_type_is_counted_in_it() -> None:
    model = make_model("qwen2")
    report = Report(settings={"rate": 0.0, "kv_rate": 0.5}, stages=[describe_model("dense", model, {})])
    dense = report.stages[0]
    assert dense.weight_bytes == 4 * dense.parameters
    report.add_stage("recovered", model.to(torch.bfloat16), {})
    recovered = report.stages[-1]
    assert recovered.weight_bytes == 2 * dense.parameters
    assert recovered.kv_cache_bytes_per_token * 2 == dense.kv_cache_bytes_per_token
    assert "50.00% of the KV heads, removed 0.00%" in describe_request(report)
    report.add_stage("recovered, int8", model, {}, weight_bytes=123)
    assert report.stages[-1].weight_bytes == 123


def test_weights_of_several_types_are_added_up() -> None:
    model = make_model("llama")
    whole = sum(parameter.numel() for parameter in model.parameters())
    model.lm_head.to(torch.float16)
    half = model.lm_head.weight.numel()
    assert describe_model("dense", model, {}).weight_bytes == 4 * (whole - half) + 2 * half


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
    assert find_row(lines, "KV cache, 8,192 tokens") == ["377.5 MB", "251.7 MB (-33.3%)", "251.7 MB (-33.3%)"]
    assert find_row(lines, "KV cache, 32,768 tokens")[0] == "1,509.9 MB"


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
