"""The benchmark of costs by arithmetic: a table for each model, and counts beside the formulas."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import roofline
from measuring import GEOMETRIES, make_model

from gqaprune.planning.costs.device import Device
from gqaprune.planning.memory import read_sizes

SLOW = Device("slow", 1e12, 1e12, 1e12, 1e12)


def test_models_have_the_parameters_that_they_are_named_for() -> None:
    sizes = {name: read_sizes(config).parameters / 1e9 for name, config in roofline.MODELS.items()}
    assert sizes == pytest.approx(
        {"Llama-3-8B": 8.03, "Qwen2.5-7B": 7.62, "Mistral-7B": 7.24, "Llama-3-70B": 70.55}, rel=0.001
    )


def test_stages_that_a_device_does_not_hold_are_marked() -> None:
    lines = roofline.describe_model("tiny", GEOMETRIES["tiny"], [replace(SLOW, memory=1.0), SLOW])
    rows = {
        cells[1]: cells for cells in ([cell.strip() for cell in line.split("|")] for line in lines) if len(cells) > 2
    }
    assert rows["perplexity"][-3].endswith(" ×") and not rows["perplexity"][-2].endswith("×")
    assert (
        float(rows["a step: full"][2]) > float(rows["scores: fisher, taylor"][2]) > float(rows["perplexity"][2]) > 0.9
    )


def test_a_gpu_with_room_for_gram_matrices_passes_the_text_less_often() -> None:
    config = roofline.MODELS["Llama-3-8B"]
    name = "scores: fisher+obs, outliers"
    (large, small, cpu) = (
        next(row for row in roofline.list_rows(config, memory) if row.name == name)
        for memory in (80e9, 24e9, float("inf"))
    )
    assert large.cost.all_flops < small.cost.all_flops <= cpu.cost.all_flops
    assert large.peak > cpu.peak
    line = next(
        line
        for line in roofline.describe_model("8B", config, [replace(SLOW, memory=80e9), replace(SLOW, memory=24e9)])
        if line.startswith(f"| {name} ")
    )
    passes = line.split("|")[2].split("/")
    assert len(passes) == 2 and float(passes[0]) < float(passes[1])


def test_tables_are_written_between_their_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure_device", lambda *_, **__: SLOW)
    monkeypatch.setattr(roofline, "MODELS", {"tiny": GEOMETRIES["tiny"]})
    page = tmp_path / "r.md"
    for _ in range(2):
        assert roofline.main(["--results", str(page)]) == 0
    text = page.read_text()
    assert text.count(roofline.BEGIN) == text.count(roofline.END) == text.count("**tiny**") == 1
    assert "| RTX 4090 | 165 | 82.6 | 1.29 | 1,008 | 32 | 24 |" in text


def test_counts_stand_beside_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "make_wide", lambda: make_model(GEOMETRIES["tiny"], torch.float32, "cpu"))
    monkeypatch.setattr(roofline, "is_checked", lambda name, **_: name in ("perplexity", "predictions"))
    page = tmp_path / "r.md"
    assert roofline.main(["--check", "--checked", "random Llama", "--length", "32", "--results", str(page)]) == 0
    text = page.read_text()
    assert "| perplexity |" in text and "| +0.0% |" in text and "| – | – |" in text


def test_stages_that_pass_a_deep_model_once_for_every_block_are_left_out_unless_asked_for() -> None:
    assert roofline.is_checked("curves, repaired", 4, False) and not roofline.is_checked("curves, repaired", 30, False)
    assert roofline.is_checked("curves, repaired", 30, True) and roofline.is_checked("perplexity", 30, False)
