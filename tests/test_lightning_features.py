"""Lightning's features, one by one: each works with pruning before fit, or is refused before any work."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.tuner import Tuner

import gqaprune
from gqaprune.callbacks import CheckpointExport, PerplexityGuard, RunSummary, SampleGenerations, TaylorPruning
from gqaprune.common.console import console
from gqaprune.data.windows import make_batches
from gqaprune.datamodules import TextDataModule
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.module import CausalLMModule

from command import Run
from tiny import DATA, PLAIN, make_tokens, merge_settings

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}

FEATURES: dict[str, dict[str, Any]] = {
    "barebones": dict.fromkeys(QUIET) | {"barebones": True},
    "overfit_batches": {"overfit_batches": 1},
    "accumulated epochs": {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1},
    "max_time": {"max_time": "00:01:00:00", "max_epochs": -1, "max_steps": 3},
    "min_steps": {"min_steps": 3},
    "validation by batches": {"check_val_every_n_epoch": None, "val_check_interval": 3},
    "limit_train_batches": {"limit_train_batches": 2},
    "no step": {"max_steps": 0},
    "clipping": {"gradient_clip_val": 0.5},
    "profiler": {"profiler": "simple"},
    "detect_anomaly": {"detect_anomaly": True},
    "deterministic": {"deterministic": True},
    "inference_mode": {"inference_mode": False},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"precision": "16-mixed"},
    "ModelCheckpoint": {"callbacks": [ModelCheckpoint(monitor="ppl/embedded")], "enable_checkpointing": True},
    "EarlyStopping": {"callbacks": [EarlyStopping("ppl/embedded")]},
    "EMAWeightAveraging": {"callbacks": [EMAWeightAveraging()]},
    "StochasticWeightAveraging": {"callbacks": [StochasticWeightAveraging(1e-3, 1)], "max_epochs": 3},
    "ModelSummary": {"callbacks": [ModelSummary(2)], "enable_model_summary": True},
    "rich": {
        "callbacks": [RichModelSummary(), RichProgressBar()],
        "enable_model_summary": True,
        "enable_progress_bar": True,
    },
    "Timer": {"callbacks": [Timer("00:01:00:00")]},
    "CSVLogger": {"logger": CSVLogger, "callbacks": [LearningRateMonitor(), DeviceStatsMonitor()]},
    "TensorBoardLogger": {"logger": TensorBoardLogger, "callbacks": [LearningRateMonitor()]},
    "WandbLogger": {"logger": WandbLogger},
    "MLFlowLogger": {"logger": MLFlowLogger},
}
"""Feature -> what the trainer is built with, beside gqaprune's callbacks."""

NEEDS = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}
"""Feature -> the package that has to be installed for it."""


@pytest.fixture
def data(tiny_folder: Path) -> TextDataModule:
    return TextDataModule(str(tiny_folder), **DATA)


def make_trainer(folder: Path, callbacks: Any = (), **settings: Any) -> Trainer:
    ours = [TaylorPruning(rate=0.3, **PLAIN), CheckpointExport(str(folder / "out")), RunSummary(), SampleGenerations()]
    settings = {"accelerator": "cpu", "default_root_dir": folder, "max_epochs": 1, **QUIET, **settings}
    return Trainer(callbacks=[*callbacks, *ours, PerplexityGuard()], **settings)


def build_logger(kind: Any, folder: Path) -> Any:
    if kind is WandbLogger:
        return WandbLogger(save_dir=folder, offline=True)
    return MLFlowLogger(tracking_uri=f"sqlite:///{folder}/runs.db") if kind is MLFlowLogger else kind(folder / "logs")


@pytest.mark.parametrize("name", FEATURES)
def test_a_run_with_it_ends_with_a_checkpoint_that_loads(
    name: str, data: TextDataModule, tiny_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip(NEEDS.get(name, "torch"))
    settings = dict(FEATURES[name])
    if kind := settings.get("logger"):
        settings["logger"] = build_logger(kind, tmp_path)
    trainer, module = make_trainer(tmp_path, **settings), CausalLMModule(str(tiny_folder))
    trainer.fit(module, datamodule=data)
    windows = make_tokens(2, 32)
    batches = {"text": make_batches(windows, windows)}
    saved = measure_perplexity(gqaprune.load_model(tmp_path / "out"), batches)["text"]
    assert saved == pytest.approx(measure_perplexity(module.model, batches)["text"], rel=1e-5)
    assert module.plan is not None and module.plan.pruned_geometry != module.plan.geometry


def test_fast_dev_run_takes_a_batch_of_everything_and_writes_nothing(
    data: TextDataModule,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    data = TextDataModule(str(tiny_folder), **merge_settings(DATA, {"calibration": {"sampled_windows": 64}}))
    trainer, module = make_trainer(tmp_path, fast_dev_run=True), CausalLMModule(str(tiny_folder))
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 1 and not list(tmp_path.rglob("*"))
    assert [len(batch) for batch in data.calibration_batches(module.model)] == [2]
    assert "one batch of each kind was tried" in " ".join(capsys.readouterr().out.split())
    data.trainer = None
    data.setup("fit")
    assert len(data.read_calibration_windows()) == 8


def test_the_command_tries_a_run_without_a_trace_and_runs_barebones(run: Run) -> None:
    assert run("fit", "--trainer.fast_dev_run", "true") == 0
    assert not list(Path().rglob("*"))
    assert run("fit", "--trainer.barebones", "true", "--trainer.enable_progress_bar", "null") == 0
    assert gqaprune.load_model("checkpoint").num_parameters() > 0


@pytest.mark.parametrize(
    ("use", "sentence"),
    [
        (lambda trainer, *parts: Tuner(trainer).lr_find(parts[0], datamodule=parts[1]), "set model.optimizer.lr"),
        (
            lambda trainer, *parts: Tuner(trainer).scale_batch_size(parts[0], datamodule=parts[1]),
            "BatchSizeFinder searches a batch size, but data.training.batch_size sets",
        ),
    ],
)
def test_the_tuner_is_refused_with_the_setting_that_it_would_look_for(
    use: Any, sentence: str, data: TextDataModule, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        use(make_trainer(tmp_path), CausalLMModule(str(tiny_folder)), data)
    assert not (tmp_path / "lightning_logs").exists()


def test_a_batch_size_finder_is_refused_likewise(data: TextDataModule, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="and set data.training.batch_size"):
        make_trainer(tmp_path, [BatchSizeFinder()]).fit(CausalLMModule(str(tiny_folder)), datamodule=data)


def test_tensorboard_has_no_card_before_loss_and_perplexity(
    data: TextDataModule, tiny_folder: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, version=0, default_hp_metric=False)
    make_trainer(tmp_path, logger=logger).fit(CausalLMModule(str(tiny_folder)), datamodule=data)
    events = EventAccumulator(str(logger.log_dir))
    events.Reload()
    first = sorted(tag for tag in events.Tags()["scalars"] if tag != "epoch")[0]
    assert first.startswith("ppl/")
