"""The benchmark of memory: works are measured where they are said to be, and stand beside their formulas."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import memory
from measuring import GEOMETRIES, make_model

from gqaprune.cli.lightning_cli import PruningCLI
from gqaprune.planning.memory import GIB, estimate_memory, read_sizes

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


@pytest.mark.parametrize(
    ("base", "geometry"), [("llama3_8b", "llama-3-8b"), ("qwen2_5_7b_mlp_only", "qwen2.5-7b")], ids=str
)
def test_models_of_7b_and_8b_are_pruned_and_recovered_on_a_gpu_of_24_gib(
    base: str, geometry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By formula, with a tenth to spare: in repair inputs and targets are then in the host's memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gqaprune"])
    names = (f"{base}.yaml", "recovery/lora.yaml", "strategy/single_24gb_gpu.yaml")
    files = [argument for name in names for argument in ("--config", str(ROOT / "configs" / name))]
    config = PruningCLI(run=False, args=[*files, "--trainer.accelerator", "cpu"]).config
    data, model, shape = config.data, config.model, GEOMETRIES[geometry]
    tokens = (data.calibration.windows + data.calibration.sampled_windows) * data.calibration.window
    micro = max(data.calibration.batch_size * data.calibration.window, data.training.batch_size * data.training.window)
    needed = estimate_memory(read_sizes(shape), 2, 1, micro, tokens, model.gradient_checkpointing)
    most = {work: needed[work]["one device"] or 0 for work in ("scoring", "repair", f"recovery, {model.recovery.mode}")}
    assert model.recovery.mode == "lora" and most["repair"] > 0.9 * 24 * GIB
    most["repair"] -= 2 * 2 * shape.hidden_size * tokens
    assert all(size < 0.9 * 24 * GIB for size in most.values()), most
