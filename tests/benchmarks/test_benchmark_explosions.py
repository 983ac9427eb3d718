"""The benchmark of explosions runs on any model, and its table is the diagnosis of what it did."""

import sys
from pathlib import Path

import pytest
import torch

import gqaprune

from tiny import make_model, make_tokenizer, train_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from explosions import WAYS, Lab, break_and_diagnose, main, overflow


@pytest.fixture(scope="module")
def learned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "learned"
    torch.manual_seed(0)
    windows = gqaprune.read_windows(make_tokenizer(), ["embedded"], 32, 32)
    train_model(make_model(layers=8, kv_heads=3), windows, steps=30).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_every_way_is_a_row_with_the_perplexities_and_the_verdict_of_its_diagnosis(
    learned_folder: Path, tmp_path: Path
) -> None:
    assert main(["--model", str(learned_folder), "--window", "32", "--markdown", str(tmp_path / "table.md")]) == 0
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == [*WAYS, "float16, activations past its range"]
    model, tokenizer = gqaprune.load(learned_folder, dtype="float32")
    lab = Lab(model, gqaprune.read_windows(tokenizer, ["embedded"], 32, 20), 4)
    for row, make_plan in zip(rows, WAYS.values(), strict=False):
        diagnosis = break_and_diagnose(lab, make_plan(lab))
        assert diagnosis.verdict is not None
        assert row[1:4] == [f"{diagnosis.dense:,.1f}", f"{diagnosis.pruned:,.1f}", diagnosis.verdict.cause]


def test_the_larger_residual_stream_leaves_the_model_what_it_was(learned_folder: Path) -> None:
    model, tokenizer = gqaprune.load(learned_folder, dtype="float32")
    lab = Lab(model, gqaprune.read_windows(tokenizer, ["embedded"], 32, 20), 4)
    sound = break_and_diagnose(lab, lab.cut_channels(lab.scores, lab.middle, 0.1))
    assert overflow(lab).pruned == pytest.approx(sound.pruned, rel=0.05)  # a tiny one stays within float16
