"""One row of the recovery table: train and measure, in a process of its own.

python recovery_row.py spec.json result.json    # recovery.py does this
"""

import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from peers import read_peak_rss
from quality_row import name_calibration, prune_by_own, read_calibration, read_test
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import gqaprune
from gqaprune.callbacks import TaylorPruning
from gqaprune.data.windows import Batch
from gqaprune.datamodules import TextDataModule
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.module import CausalLMModule
from gqaprune.training.recovery import RecoveryConfig

Result = dict[str, Any]
HELD_OUT = 1 / 7
"""Last part of the training text that a sweep measures on, and does not train on."""


def run_row(spec: Mapping[str, Any]) -> Result:
    """Train as the spec says (see `recovery.run_or_skip`) and measure on the way.

    Raises:
        ValueError: if pruning, training or measuring fails, with its reason.
    """
    row, training = spec["row"], spec["training"]
    dense, tokenizer = gqaprune.load(spec["model"], dtype="float32")
    tests = {name: read_test(tokenizer, test, spec["protocol"]) for name, test in spec["tests"].items()}
    train = Path(spec["train"])
    if row.get("sweep"):
        train, held = split_text(train, Path(spec["scratch"]))
        own = {
            "held-out": {"corpus": str(held), "split": "all"},
            "embedded": {"corpus": "embedded", "split": "validation"},
        }
        tests = {name: read_test(tokenizer, test, spec["protocol"]) for name, test in own.items()}
    start = spec["model"] if row.get("start") == "dense" else prepare_pruned(spec)
    teacher = prepare_teacher(spec, train, tokenizer) if row.get("trains_teacher") else spec["model"]
    dtype, fields = row.get("dtype", "float32"), {field.name for field in dataclasses.fields(RecoveryConfig)}
    recovery = {name: value for name, value in row.items() if name in fields}
    module = CausalLMModule(
        str(start),
        dtype=dtype,
        recovery=RecoveryConfig(**recovery, teacher=str(teacher), teacher_dtype="float32"),
        optimizer=make_optimizer(row["rate"], row["mode"], training),
    )
    data = make_data(spec, train, dense if row.get("text") == "sampled" else None)
    points = Points(spec["points"], training, tests)
    callbacks: list[Callback] = [points]
    if row.get("rounds", 1) > 1:
        callbacks.append(make_pruning(spec))
    torch.manual_seed(training["seed"])
    trainer = make_trainer(training["precision"] if dtype == "float32" else "bf16-true", callbacks)
    trainer.fit(module, datamodule=data)
    return {
        "points": points.measured,
        "losses": points.losses,
        "peak_rss": read_peak_rss(),
        "threads": torch.get_num_threads(),
    }


def split_text(file: Path, folder: Path) -> tuple[Path, Path]:
    """The first lines of a text and its last ones, as files."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = round(len(lines) * (1 - HELD_OUT))
    parts = {folder / "train.txt": lines[:cut], folder / "held.txt": lines[cut:]}
    for part, own in parts.items():
        part.write_text("".join(own), encoding="utf-8")
    train, held = parts
    return train, held


class Points(Callback):
    """Measures perplexity after so many tokens; its seconds are not the training's."""

    def __init__(self, points: list[int], training: Mapping[str, Any], tests: Mapping[str, list[Batch]]) -> None:
        self.left, self.tests = sorted(points), tests
        self.tokens_per_step = training["window"] * training["batch"]
        self.measured: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.seconds = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.left[0] == 0:
            self._measure(trainer, pl_module)
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        is_last = trainer.global_step == trainer.num_training_batches
        if self.left and ((trainer.global_step + 1) * self.tokens_per_step > self.left[0] or is_last):
            self.seconds += time.perf_counter() - self._since
            self._measure(trainer, pl_module)
            self._since = time.perf_counter()

    def _measure(self, trainer: Trainer, module: Any) -> None:
        point = self.left.pop(0)
        with torch.autocast("cpu", enabled=False):
            model = module.model if module.model.dtype == torch.float32 else copy.deepcopy(module.model).float()
            perplexity = measure_perplexity(model, self.tests, f"{point:,} tokens")
        tokens = trainer.global_step * self.tokens_per_step
        self.measured.append({"point": point, "tokens": tokens, "seconds": self.seconds, "perplexity": perplexity})


def make_optimizer(rate: float, mode: str, training: Mapping[str, Any]) -> Callable[..., torch.optim.Optimizer]:
    """AdamW at a peak rate; adapters do not decay, for they are a change and not weights."""
    decay = 0.0 if "lora" in mode else training["weight_decay"]
    return partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=decay, fused=True)


def make_trainer(precision: Any, callbacks: list[Callback]) -> Trainer:
    """A Trainer of one pass on a CPU that keeps nothing."""
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        precision=precision,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )


def make_data(spec: Mapping[str, Any], train: Path, writer: PreTrainedModel | None) -> TextDataModule:
    """So many tokens of a text, or of what the dense model writes if there is one to write."""
    training = spec["training"]
    data = TextDataModule(
        spec["model"],
        **name_calibration(spec["pruning"]["calibration"]),
        training={
            "corpora": [] if writer else [str(train)],
            "window": training["window"],
            "tokens": training["tokens"],
            "sampled_windows": training["tokens"] // training["window"] if writer else 0,
            "batch_size": training["batch"],
        },
        evaluation={"val": [], "test": []},
        seed=training["seed"],
    )
    if writer:
        data.sample_train_windows(writer)
    return data


def make_pruning(spec: Mapping[str, Any]) -> TaylorPruning:
    """The callback that prunes as the pruned model was pruned."""
    return TaylorPruning(**spec["pruning"]["settings"], rate=spec["pruning"]["rate"])


def prepare_pruned(spec: Mapping[str, Any]) -> Path:
    """The folder of the pruned model that rows start from; pruned on the first call unless quality.py has kept it."""
    folder = Path(spec["work"]) / f"{spec['pruning']['method']}@{spec['pruning']['rate']:g}"
    if not folder.exists():
        model, tokenizer = gqaprune.load(spec["model"], dtype="float32")
        windows = read_calibration(model, spec["model"], spec["pruning"]["calibration"])
        plan, _ = prune_by_own(model, windows, spec["pruning"])
        gqaprune.save(model, tokenizer, folder, plan)
    return folder


def prepare_teacher(spec: Mapping[str, Any], train: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The folder of the dense model trained on the row's text as the row `dense` is; trained on the first call.

    Teaching by a model that knows the text itself: Minitron's teacher correction (arXiv 2408.11796).
    """
    training = spec["training"]
    folder = Path(spec["work"]) / f"dense, {training['tokens']} tokens of {train.stem}"
    if not folder.exists():
        module = CausalLMModule(
            spec["model"],
            dtype="float32",
            recovery=RecoveryConfig(mode="full"),
            optimizer=make_optimizer(spec["teacher_rate"], "full", training),
        )
        torch.manual_seed(training["seed"])
        make_trainer(training["precision"], []).fit(module, datamodule=make_data(spec, train, None))
        gqaprune.save(module.model, tokenizer, folder)
    return folder


if __name__ == "__main__":
    spec_file, result_file = map(Path, sys.argv[1:])
    try:
        outcome = run_row(json.loads(spec_file.read_text()))
    except Exception as error:  # whatever stops one row is that row's result
        outcome = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    result_file.write_text(json.dumps(outcome))
