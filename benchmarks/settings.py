"""What the settings of recovery cost and give: types, attention kernels, recomputed or compiled layers, a teacher.

    python benchmarks/settings.py --text valid.txt

Each row trains in a process of its own, through gqaprune's module and Lightning's Trainer, on the same windows.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from measuring import describe_machine
from quality import select_names
from quality_report import format_table, splice

from gqaprune.commands.speed import read_clock, read_peak, start_peak
from gqaprune.datamodules import TextDataModule
from gqaprune.module import CausalLMModule
from gqaprune.training.recovery import RecoveryConfig

HERE = Path(__file__).parent
BEGIN, END = "<!-- settings:begin -->", "<!-- settings:end -->"
DISTILLATION = RecoveryConfig("distill")
"""From the model that is trained itself: what it costs does not depend on what there is to learn."""
ROWS: Mapping[str, Mapping[str, Any]] = {
    "float32, sdpa": {},
    "eager attention": {"attn_implementation": "eager"},
    "activations recomputed": {"gradient_checkpointing": True},
    "compiled layers": {"compile": True},
    "bfloat16 products": {"precision": "bf16-mixed"},
    "bfloat16 weights": {"dtype": "bfloat16"},
    "distillation": {"recovery": DISTILLATION},
    "distillation, bfloat16 products": {"recovery": DISTILLATION, "precision": "bf16-mixed"},
}
"""Row -> what differs from float32 weights and products with sdpa."""


class Clock(Callback):
    """When each step ended, and the loss of the last."""

    def __init__(self, device: str) -> None:
        self.device, self.times, self.loss = device, [read_clock(device)], 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.times.append(read_clock(self.device))
        self.loss = float(trainer.callback_metrics["train/loss"])


def train(name: str, options: argparse.Namespace) -> tuple[float, float, int, float]:
    """Seconds of the first step and of a later one (the median), bytes above what was there before, the last loss."""
    torch.set_num_threads(options.threads)
    settings = dict(ROWS[name])
    precision = settings.pop("precision", "bf16-true" if settings.get("dtype") == "bfloat16" else "32-true")
    module = CausalLMModule(options.model, **{"dtype": "float32", "attn_implementation": "sdpa", **settings})
    data = TextDataModule(
        options.model,
        training={"corpora": [options.text], "window": options.window, "batch_size": options.batch},
        evaluation={"val": [], "test": []},
        calibration={"corpora": []},
    )
    torch.manual_seed(0)
    clock = Clock(options.device)
    before = start_peak(options.device)
    Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        max_steps=options.steps,
        precision=precision,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        callbacks=[clock],
    ).fit(module, datamodule=data)
    seconds = [end - start for start, end in pairwise(clock.times)]
    return seconds[0], statistics.median(seconds[2:]), read_peak(options.device) - before, clock.loss


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the table into results/training_speed.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, metavar="FILE", help="text to train on")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="at least 3; the first two are not in the median")
    parser.add_argument("--rows", default="*", help="names or patterns, with commas between them")
    parser.add_argument("--results", type=Path, default=HERE / "results/training_speed.md")
    options = parser.parse_args(arguments)
    names = select_names(options.rows, list(ROWS))
    measured = {}
    for name in names:
        with get_context("spawn").Pool(1) as pool:
            measured[name] = pool.apply(train, (name, options))
        print(name, *measured[name], flush=True)
    tokens, first = options.batch * options.window, measured[names[0]]
    rows = [
        [name, f"{start:.1f}", f"{tokens / step:,.0f}", f"{first[1] / step:.2f}", f"{peak / 2**20:,.0f}", f"{loss:.3f}"]
        for name, (start, step, peak, loss) in measured.items()
    ]
    lines = [
        f"{Path(options.model).name}, every weight by AdamW, {options.batch} windows of {options.window} tokens a "
        f"step, {options.threads} thread(s), its seconds; memory above what the process had before the model. "
        f"{describe_machine(options.device)}",
        "",
        *format_table(["setting", "first step, s", "tokens/s", "of the first row", "peak MiB", "last loss"], rows),
    ]
    print("\n".join(lines))
    splice(options.results, "\n".join([BEGIN, "", *lines, "", END]), BEGIN, END, "Settings of recovery")
    return 0


if __name__ == "__main__":
    sys.exit(main())
