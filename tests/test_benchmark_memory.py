"""The benchmark of memory: works are measured where they are said to be, and stand beside their formulas."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import memory
from measuring import make_model

SHAPE = argparse.Namespace(hidden=192, width=3072, layers=8, vocabulary=512, tokens=64, calibration_tokens=128)


def test_each_process_of_a_split_model_needs_less_than_one_alone(tmp_path: Path) -> None:
    model = make_model(memory.make_shape(SHAPE), torch.float32, "cpu")
    model.save_pretrained(tmp_path)
    weights = model.num_parameters() * 4
    alone, split = (memory.measure("recovery, full", place, str(tmp_path), SHAPE) for place in ("one device", "fsdp"))
    assert 3.5 * weights < alone < 6 * weights  # weights, gradients, two moments
    assert split < 0.8 * alone


def test_every_cell_stands_beside_its_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = []
    options = [word for name, value in vars(SHAPE).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(memory, "measure", lambda work, place, *_: cells.append((work, place)) or 3 * 2**20)
    assert memory.main([*options, "--works", "repair", "--results", str(tmp_path / "r.md")]) == 0
    assert cells == [("repair", "one device"), ("repair", "ddp"), ("repair", "sharded")]
    table = (tmp_path / "r.md").read_text()
    formula = memory.estimate_memory(memory.read_sizes(memory.make_shape(SHAPE)), 4, 2, 64, 128)["repair"]["ddp"]
    assert formula is not None
    assert f"| repair | ddp | {formula / 2**20:,.0f} | 3 | {3 * 2**20 / formula:.2f} |" in table
