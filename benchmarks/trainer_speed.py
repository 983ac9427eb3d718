"""Tokens per second of recovery, gqaprune's and transformers' own Trainer, on the same pruned model and tokens.

    pip install accelerate    # which transformers' Trainer needs
    python benchmarks/trainer_speed.py --text valid.txt --precision bf16

Both sides train every weight with AdamW, a cosine and clipped gradients, on the same windows. They take turns in one
process, so that what else the machine does hits both; the first steps of each turn do not count.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from peers import read_versions
from quality_report import splice
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers import Trainer as TransformersTrainer

import gqaprune
from gqaprune.data.windows import read_windows
from gqaprune.datamodules import TextDataModule
from gqaprune.module import CausalLMModule

HERE = Path(__file__).parent
BEGIN, END = "<!-- trainer-speed:begin -->", "<!-- trainer-speed:end -->"
WARM_UP = 2
"""Steps of each turn that do not count."""
SIDES = ("gqaprune", "transformers")


class OwnClock(Callback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.perf_counter())


class PeerClock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def train_by_own(source: str, text: str, options: argparse.Namespace) -> list[float]:
    """Train with gqaprune; the moments at which steps ended."""
    clock = OwnClock()
    trainer = LightningTrainer(
        accelerator=options.accelerator,
        devices=1,
        max_steps=options.steps,
        precision="bf16-mixed" if options.precision == "bf16" else "32-true",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        callbacks=[clock],
    )
    data = TextDataModule(
        source,
        training={"corpora": [text], "window": options.window, "batch_size": options.batch},
        evaluation={"val": [], "test": []},
        calibration={"corpora": []},
    )
    trainer.fit(CausalLMModule(source, dtype="float32"), datamodule=data)
    return clock.times


def train_by_transformers(source: str, windows: Tensor, options: argparse.Namespace) -> list[float]:
    """Train with transformers' Trainer; the moments at which steps ended."""
    model: PreTrainedModel = gqaprune.load(source, dtype="float32")[0]
    clock = PeerClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=options.accelerator == "cpu",
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            bf16=options.precision == "bf16",
            learning_rate=1e-5,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        items = [{"input_ids": window, "labels": window} for window in windows]
        TransformersTrainer(model, arguments, train_dataset=items, callbacks=[clock]).train()  # type: ignore[arg-type]
    return clock.times


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of every turn of both sides."""
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    _, tokenizer = gqaprune.load(options.model, dtype="float32")
    windows = read_windows(tokenizer, [options.text], options.window, None, 0)
    for _ in range(options.turns):
        for side in SIDES:
            torch.manual_seed(0)
            if side == "gqaprune":
                times = train_by_own(options.model, options.text, options)
            else:
                times = train_by_transformers(options.model, windows, options)
            tokens = (len(times) - WARM_UP) * options.batch * options.window
            speeds[side].append(tokens / (times[-1] - times[WARM_UP - 1]))
            print(f"{side}: {speeds[side][-1]:.0f} tokens/s", flush=True)
    return speeds


def describe(speeds: Mapping[str, list[float]], options: argparse.Namespace) -> str:
    """The table, as Markdown."""
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    versions = read_versions(["torch", "lightning", "transformers", "accelerate"])
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "python")
    lines = [
        f"{Path(options.model).name}, every weight, float32 weights, {options.precision} products, {options.batch} "
        f"windows of {options.window} tokens a step; {options.turns} turns of {options.steps - WARM_UP} steps each, "
        f"taken alternately. {named}.",
        "",
        "| trained by | tokens/s, median | lowest | highest | of transformers' |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for side, values in speeds.items():
        share = medians[side] / medians["transformers"]
        lines.append(f"| {side} | {medians[side]:.0f} | {min(values):.0f} | {max(values):.0f} | {share:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and write the table into results/training_speed.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, metavar="FILE", help="text to train on")
    parser.add_argument(
        "--model", default=str(HERE / "work" / "default@0.2"), help="the pruned model; recovery.py makes one"
    )
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", choices=["bf16", "float32"], default="bf16")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--results", type=Path, default=HERE / "results/training_speed.md")
    options = parser.parse_args()
    table = describe(measure(options), options)
    print(table)
    splice(options.results, f"{BEGIN}\n\n{table}\n\n{END}", BEGIN, END, "Recovery, tokens per second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
