"""The benchmark of large models, on a tiny one: rows are measured, targets stand beside the models they are of."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import large

import gqaprune
from gqaprune.data.corpora import parse_corpus
from gqaprune.data.windows import cut_windows, tokenize_corpus


def run(folder: Path, model: Path, *arguments: str) -> list[dict[str, object]]:
    few = ["--windows", "4", "--window", "32", "--test_window", "32", "--dtype", "float32", "--tasks", ""]
    text = ["--calibration", "embedded", "--test", "embedded", "--rates", "0.1"]
    large.main(["--models", str(model), "--folder", str(folder), *few, *text, *arguments])
    return large.read_rows(folder)  # type: ignore[return-value]


def test_rows_are_measured_and_those_there_are_not_made_again(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, pruned = run(tmp_path / "rows", tiny_folder)
    text = tokenize_corpus(gqaprune.load_tokenizer(tiny_folder), parse_corpus("embedded", "test"))
    ids, _ = cut_windows(text, 32)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        losses = [float(model(input_ids=some, labels=some).loss) * len(some) for some in ids.split(64)]
    assert dense["perplexity"] == pytest.approx(math.exp(sum(losses) / len(ids)), rel=1e-3)
    assert pruned["removed"] == pytest.approx(0.1, abs=0.02) and dense["removed"] == 0
    assert f"| {pruned['perplexity']:.2f} |" in capsys.readouterr().out
    monkeypatch.setattr(large, "run_row", lambda *_: pytest.fail("made again"))
    assert run(tmp_path / "rows", tiny_folder, "--resume") == [dense, pruned]


def test_targets_stand_beside_the_models_and_rates_they_are_of() -> None:
    def make(model: str, rate: float) -> dict[str, object]:
        tasks = {f"{task} acc": {"value": 0.5, "error": 0.01} for task in large.SEVEN}
        tasks["arc_easy acc_norm"] = {"value": 0.6, "error": 0.01}
        settings = {"model": model, "rate": rate, "test_window": 2048}
        return {"settings": settings, "perplexity": 7.0, "tasks": tasks, "removed": rate, "seconds": 1.0, "device": "x"}

    rows = [make("meta-llama/Llama-3.1-8B", 0.25), make("meta-llama/Llama-3.1-8B", 0.0), make("other/8B", 0.25)]
    first, dense, other = large.build_table(rows)[2:]  # type: ignore[arg-type]
    assert "five tasks 67 (UniQL, R); perplexity 7.53 (SARATHI, U)" in first and "| 52.0 |" in first
    assert "67" not in dense and "67" not in other
    assert large.average_five({"tasks": {}}) is None
    json.dumps(rows)
