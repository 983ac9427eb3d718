"""Private parts of Lightning and jsonargparse, on real objects: each test fails where a new version moves one."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities import load
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, fsdp, model_parallel
from torch.utils.data import DataLoader

from gqaprune.training.lightning_internals import (
    ALWAYS,
    HYPER_PARAMETERS,
    SHARDED,
    TRAINING_STATE,
    WEIGHTS,
    add_subcommand,
    count_batches_done,
    count_loaded_batches,
    describe_subcommands,
    find_trainer,
    get_parallel_sizes,
    get_setting,
    get_subcommand_parsers,
    go_back_by_batches,
    read_epoch,
    reserve_version,
    set_data_parallel_size,
    set_validation_interval,
    unscales_gradients,
    unwrap_factory,
)

BATCHES = 5


class Loader(DataLoader[torch.Tensor]):
    """Says where it is, and keeps what it is told to go on from."""

    told: dict[str, int] | None = None

    def state_dict(self) -> dict[str, int]:
        return {"yielded": 100}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.told = state_dict


class Model(BoringModel):
    """Keeps the batches that it was trained on and how many came before each validation."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.steps: list[tuple[int, int]] = []
        self.validated_after: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps.append((self.current_epoch, batch_idx))
        return super().training_step(batch, batch_idx)

    def on_validation_start(self) -> None:
        self.validated_after.append(len(self.steps))


def make_trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, **quiet, **settings)


def train(folder: Path, resume: dict[str, Any] | None = None, **settings: Any) -> tuple[Model, Trainer, Loader]:
    model, trainer, loader = Model(), make_trainer(folder, **settings), Loader(RandomDataset(32, BATCHES))
    path = folder / "resume.ckpt"
    if resume is not None:
        torch.save(resume, path)
    validation = DataLoader(RandomDataset(32, 1))
    trainer.fit(model, loader, validation, ckpt_path=path if resume is not None else None, weights_only=False)
    return model, trainer, loader


class SaveAt(Callback):
    """Writes a checkpoint while training goes on: after so many batches, or at the end of the first epoch."""

    def __init__(self, folder: Path, batches: int | None, weights_only: bool = False) -> None:
        self.path, self.batches, self.weights_only = folder / "some.ckpt", batches, weights_only

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.batches:
            trainer.save_checkpoint(self.path, self.weights_only)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.batches is None and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path, self.weights_only)


def save(folder: Path, batches: int | None, weights_only: bool = False) -> dict[str, Any]:
    train(folder, max_epochs=2, callbacks=[SaveAt(folder, batches, weights_only)])
    content: dict[str, Any] = torch.load(folder / "some.ckpt", weights_only=False)
    return content


def test_checkpoints_have_keys_for_weights_and_hyperparameters_and_for_training_unless_of_weights_alone(
    tmp_path: Path,
) -> None:
    whole, weights = (save(tmp_path, 1, weights_only) for weights_only in (False, True))
    for checkpoint in (whole, weights):
        assert checkpoint[WEIGHTS].keys() == Model().state_dict().keys()
        assert checkpoint[HYPER_PARAMETERS] == {"width": 32}
    assert ALWAYS | {WEIGHTS} <= whole.keys() & weights.keys()
    assert TRAINING_STATE in whole and TRAINING_STATE not in weights


def test_sharded_checkpoints_have_a_file_of_that_name() -> None:
    assert load._METADATA_FILENAME == fsdp._METADATA_FILENAME == model_parallel._METADATA_FILENAME == SHARDED


def test_checkpoints_tell_their_epoch_and_their_batch(tmp_path: Path) -> None:
    for batches, place in ((3, (0, 3)), (None, (1, 0)), (BATCHES + 2, (1, 2))):
        checkpoint = save(tmp_path, batches)
        assert (read_epoch(checkpoint), count_batches_done(checkpoint)) == place


def test_training_resumes_as_many_batches_earlier_as_it_is_told(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, BATCHES + 3)
    for count in (0, 2):
        earlier = copy.deepcopy(checkpoint)
        go_back_by_batches(earlier, count)
        model, _, loader = train(tmp_path, earlier, max_steps=BATCHES + 4)
        assert model.steps == [(1, 3 - count)]
        assert loader.told == {"yielded": 100 - count}


def test_batches_are_counted_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def configure(model: Model) -> torch.optim.Optimizer:
        counted.append(count_loaded_batches(model.trainer))
        return torch.optim.SGD(model.parameters(), lr=0.1)

    monkeypatch.setattr(Model, "configure_optimizers", configure)
    train(tmp_path, max_steps=1)
    train(tmp_path, max_steps=1, limit_train_batches=3)
    assert counted == [BATCHES, 3]


def test_validation_comes_after_as_many_batches_as_were_set_within_an_epoch(tmp_path: Path) -> None:
    class SetInterval(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            set_validation_interval(trainer, 3)

    assert train(tmp_path, max_epochs=1, val_check_interval=2)[0].validated_after == [2, 4]
    assert train(tmp_path, max_epochs=1, val_check_interval=2, callbacks=[SetInterval()])[0].validated_after == [3]


def test_trainer_is_found_in_a_run_alone(tmp_path: Path) -> None:
    assert find_trainer(Model()) is None
    model, trainer, _ = train(tmp_path, max_steps=1)
    assert find_trainer(model) is trainer


def test_parallel_sizes_are_what_the_strategy_was_given_and_what_its_mesh_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_parallel, "_setup_device_mesh", lambda data, tensor, *_: {"data": data, "tensor": tensor})
    monkeypatch.setattr(ModelParallelStrategy, "_setup_distributed", lambda _: None)  # no process group
    for size in ("auto", 7):
        strategy = ModelParallelStrategy(data_parallel_size="auto", tensor_parallel_size=1)
        assert get_parallel_sizes(strategy) == ("auto", 1)
        make_trainer(tmp_path, strategy=strategy, devices=1)
        strategy._lightning_module = Model()
        if isinstance(size, int):
            set_data_parallel_size(strategy, size)
        strategy.setup_environment()
        assert strategy.device_mesh == {"data": 7 if size == 7 else 1, "tensor": 1}


class OwnCLI(LightningCLI):
    """Notes what was built when a checkpoint's path is looked at; has a command that is not Lightning's."""

    built: bool | None = None

    def setup_parser(self, add_subcommands: bool, *arguments: Any) -> None:
        super().setup_parser(add_subcommands, *arguments)
        if add_subcommands:
            get_subcommand_parsers(self)["validate"].description = "described anew"
            tool = ArgumentParser()
            tool.add_argument("--number", type=int)
            add_subcommand(self, "tool", tool, "a tool")
            describe_subcommands(self, {"fit": "F", "validate": "V", "test": "T", "predict": "P", "tool": "a new tool"})

    def _parse_ckpt_path(self) -> None:
        type(self).built = hasattr(self, "config_init")


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> OwnCLI:
    monkeypatch.setattr("sys.argv", ["command", *arguments])
    defaults = {"accelerator": "cpu", "fast_dev_run": True, "enable_progress_bar": False, "enable_model_summary": False}
    return OwnCLI(BoringModel, trainer_defaults=defaults, save_config_callback=None, seed_everything_default=False)


def test_settings_of_a_command_are_found_and_a_checkpoints_path_is_looked_at_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert callable(LightningCLI._parse_ckpt_path)
    cli = run_cli(monkeypatch, "validate", "--trainer.max_steps", "3")
    assert cli.built is False
    assert get_setting(cli, "trainer").max_steps == 3
    assert isinstance(get_setting(cli, "model"), BoringModel)


def test_commands_are_added_and_described(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((["validate", "--help"], "described anew"), (["--help"], "a new tool")):
        with pytest.raises(SystemExit):
            run_cli(monkeypatch, *arguments)
        assert words in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_cli(monkeypatch, "tool", "--help")
    assert "--number" in capsys.readouterr().out


@pytest.mark.parametrize("fused", [True, False])
def test_lightning_clips_for_optimizers_that_do_not_unscale_gradients(fused: bool) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], fused=fused)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    assert unscales_gradients(optimizer) is fused
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping") if fused else nullcontext():
        plugin.clip_gradients(optimizer, 1.0)


def test_factories_of_a_parser_become_plain_ones() -> None:
    parser = ArgumentParser()
    parser.add_argument("--build", type=Callable[[Any], torch.optim.Optimizer])
    factory = parser.instantiate(parser.parse_args(["--build", "torch.optim.SGD", "--build.lr", "0.5"])).build
    plain = unwrap_factory(factory)
    assert plain.func is torch.optim.SGD and plain.keywords["lr"] == 0.5  # type: ignore[attr-defined]
    assert unwrap_factory(torch.optim.SGD) is torch.optim.SGD


def test_runs_that_begin_at_once_number_their_folders_apart(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path) for _ in range(3)]
    assert {logger.log_dir for logger in loggers} == {loggers[0].log_dir}
    for logger in loggers:
        reserve_version(logger)
    assert [Path(logger.log_dir).name for logger in loggers] == ["version_0", "version_1", "version_2"]
    assert all(Path(logger.log_dir).is_dir() for logger in loggers)
