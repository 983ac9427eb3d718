"""What Lightning would refuse once a model is pruned is refused before text is read, or before a model is loaded."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy

from gqaprune.callbacks import TaylorPruning
from gqaprune.callbacks.trainer_checks import check_batches, check_trainer
from gqaprune.datamodules import TextDataModule
from gqaprune.module import CausalLMModule

from command import Run

CALLBACKS = "lightning.pytorch.callbacks."
EARLY_STOPPING = ["--trainer.callbacks", CALLBACKS + "EarlyStopping", "--trainer.callbacks.monitor"]
BEST = ["--trainer.enable_checkpointing", "true", "--trainer.callbacks", CALLBACKS + "ModelCheckpoint"]
AVERAGING = ["--trainer.callbacks", CALLBACKS + "EMAWeightAveraging"]

SETTINGS = {
    "two accumulations": (["--trainer.accumulate_grad_batches", "2"], "set pruning.scheduling to {0: 2}"),
    "no interval": (["--trainer.val_check_interval", "0"], "val_check_interval must be above 0, got 0; set it to 1.0"),
    "an interval of time": (["--trainer.val_check_interval", "00:00:00:01"], "a share of an epoch such as 0.25"),
    "a rate below 0": (["--model.optimizer.lr=-1"], "model.optimizer cannot train: Invalid learning rate: -1"),
    "an optimizer without groups": (["--model.optimizer", "torch.optim.LBFGS"], "LBFGS doesn't support per-parameter"),
    "an optimizer of sparse gradients": (["--model.optimizer", "torch.optim.SparseAdam"], "does not support dense"),
    "an optimizer of matrices": (["--model.optimizer", "torch.optim.Muon"], "model.optimizer cannot train: Muon only"),
    "another corpus": ([*EARLY_STOPPING, "ppl/wikitext2"], "EarlyStopping monitors ppl/wikitext2, which this run does"),
    "a metric of nobody": ([*EARLY_STOPPING, "val_loss"], "to one of train/loss, ppl/embedded;"),
    "no validation": ([*EARLY_STOPPING, "ppl/embedded", "--trainer.limit_val_batches", "0"], "unless trainer.lim"),
    "validation too late": (
        [*EARLY_STOPPING, "ppl/embedded", "--trainer.check_val_every_n_epoch", "2"],
        "check_val_every_n_epoch is 2 and trainer.max_epochs is 1: set",
    ),
    "a part of no loss": ([*BEST, "--trainer.callbacks.monitor", "train/divergence"], "monitors train/divergence, whi"),
    "checkpoints in a file": ([*BEST, "--trainer.callbacks.dirpath", "file.txt"], "file.txt is a file; choose another"),
    "rates without a logger": (
        ["--trainer.callbacks", CALLBACKS + "LearningRateMonitor", "--trainer.logger", "false"],
        "LearningRateMonitor needs a logger, but trainer.logger is false",
    ),
    "a rate to be found": (["--trainer.callbacks", CALLBACKS + "LearningRateFinder"], "and set model.optimizer.lr"),
    "averages and adapters": ([*AVERAGING, "--model.recovery.mode", "lora"], "before recovery.mode lora changes it"),
    "averages and rounds": ([*AVERAGING, "--model.recovery.rounds", "2"], "before recovery.rounds 2 changes it"),
    "unknown format": (["--export.format", "stok"], "format must be one of auto, stock"),
    "unknown quantization": (["--export.quantization", "int3"], "int3"),
    "unknown target of adapters": (
        ["--model.recovery", '{"mode": "lora", "lora_targets": ["qkv_proj"]}'],
        "must be projections of the model, got ['qkv_proj']: use q_proj",
    ),
    "more of the teacher than it has": (
        ["--model.recovery", '{"mode": "distill", "teacher_top_k": 100000}'],
        "recovery.teacher_top_k must be 1 to 260, got 100000",
    ),
    "a checkpoint that is not there": (["--ckpt_path", "gone.ckpt"], "no checkpoint at gone.ckpt: set --ckpt_path to"),
    "a name that is too long": (["--export.folder", "x" * 250], "File name too long; choose another folder"),
    "a file system that takes nothing": (["--export.folder", "/proc/1/out"], "cannot write to /proc/1/out: "),
    "settings of a numbered run": (
        ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", ".", "--trainer.logger.version", "0"],
        "version_0/config.yaml already exists, and this run would write its settings there",
    ),
    "a precision that needs a package": (["--trainer.precision", "transformer-engine"], "trainer: "),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_would_end_a_run_are_refused_before_text_is_read(
    run: Run, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, sentence = SETTINGS[case]
    Path("file.txt").touch()
    Path("lightning_logs/version_0").mkdir(parents=True)
    Path("lightning_logs/version_0/config.yaml").touch()
    monkeypatch.setattr(TextDataModule, "setup", lambda *_, **__: pytest.fail("text was read"))
    capsys.readouterr()
    assert run("fit", *arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("gqaprune: error: ") and sentence in error


BATCHES = {
    "an interval above the epoch": (["--trainer.val_check_interval", "5000"], "val_check_interval 5000 is more than"),
    "an interval above the limit": (
        ["--trainer.val_check_interval", "3", "--trainer.limit_train_batches", "2"],
        "val_check_interval 3 is more than the 2 training batches that an epoch has on each device: set it",
    ),
    "a share of no batch": (["--trainer.limit_train_batches", "1e-6"], "limit_train_batches 1e-06 of "),
    "a share of no validation batch": (["--trainer.limit_val_batches", "1e-6"], "limit_val_batches 1e-06 of "),
    "overfitting a share": (["--trainer.overfit_batches", "1e-6"], "batches 1e-06 of "),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_that_are_not_there_are_said_before_a_model_is_loaded(
    run: Run, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, sentence = BATCHES[case]
    monkeypatch.setattr(CausalLMModule, "load", lambda *_: pytest.fail("a model was loaded"))
    assert run("fit", *arguments) == 1
    assert sentence in capsys.readouterr().err


def make_trainer(**settings: Any) -> Any:
    default = {
        "callbacks": [],
        "accumulate_grad_batches": 1,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
        "limit_train_batches": 1.0,
        "limit_val_batches": 1.0,
        "overfit_batches": 0,
        "fast_dev_run": False,
        "gradient_clip_val": None,
        "gradient_clip_algorithm": None,
        "precision": "32-true",
        "strategy": SingleDeviceStrategy(),
        "world_size": 1,
        "max_epochs": 1,
        "datamodule": None,
    }
    return SimpleNamespace(**default | settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"precision": "16-mixed", "gradient_clip_val": 1.0}, "under precision 16-mixed AdamW unscales them only"),
        (
            {"strategy": DeepSpeedStrategy.__new__(DeepSpeedStrategy), "gradient_clip_val": 1.0}
            | {"gradient_clip_algorithm": "value"},
            "DeepSpeed can clip gradients only by norm",
        ),
        (
            {"strategy": ModelParallelStrategy(), "callbacks": [EMAWeightAveraging()]},
            "copies the whole model, but ModelParallelStrategy shards",
        ),
        (
            {"callbacks": [StochasticWeightAveraging(1e-2), ModelCheckpoint(monitor="train/loss")]},
            "the export uses the weights that ModelCheckpoint found best by train/loss: leave one",
        ),
        (
            {"callbacks": [TaylorPruning(rate=0.1), GradientAccumulationScheduler({0: 2})]},
            "TaylorPruning, GradientAccumulationScheduler all set the accumulation",
        ),
    ],
)
def test_what_a_device_would_refuse_is_said_before(settings: dict[str, Any], sentence: str, tiny_folder: Path) -> None:
    module, trainer = CausalLMModule(str(tiny_folder)), make_trainer(**settings)
    module._trainer = trainer
    with pytest.raises(ValueError, match=sentence):
        check_trainer(trainer, module)


@pytest.mark.parametrize(("ranks", "is_refused"), [(1, False), (4, True)])
def test_an_interval_is_compared_with_the_batches_of_each_device(
    ranks: int, is_refused: bool, tiny_folder: Path
) -> None:
    data = TextDataModule(str(tiny_folder), training={"window": 32, "tokens": 32 * 16, "batch_size": 2})
    data.setup("fit")
    place = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": ranks, "rank": 0})
    trainer = make_trainer(strategy=place, world_size=ranks, datamodule=data, val_check_interval=6)
    data.trainer = trainer
    assert data.count_train_batches() == len(data.train_dataloader()) == 8 // ranks
    assert data.count_evaluation_batches("val") == [math.ceil(len(loader) / ranks) for loader in data.val_dataloader()]
    if is_refused:
        with pytest.raises(ValueError, match="val_check_interval 6 is more than the 2 training batches"):
            check_batches(trainer, data)
    else:
        check_batches(trainer, data)


class OwnModule(CausalLMModule):
    """Logs what it likes."""


@pytest.mark.parametrize("metric", ["val_loss", "ppl/gone"])
def test_modules_of_others_may_log_any_metric_but_perplexity_of_no_corpus(tiny_folder: Path, metric: str) -> None:
    module = OwnModule(str(tiny_folder))
    trainer = make_trainer(callbacks=[EarlyStopping(metric)])
    module._trainer = trainer
    if metric == "val_loss":
        check_trainer(trainer, module)
    else:
        with pytest.raises(ValueError, match="monitors ppl/gone, which this run does not log"):
            check_trainer(trainer, module)
