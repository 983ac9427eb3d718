"""Lightning's trainer with the additional commands `prune`, `search` and `sweep`, and checks of its settings."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from gqaprune.callbacks import (
    CheckpointExport,
    PerplexityGuard,
    RateSweep,
    SplitSearch,
    TaylorPruning,
)
from gqaprune.commands.search import SearchSettings
from gqaprune.commands.sweep import SweepSettings
from gqaprune.common.console import console
from gqaprune.common.disk_errors import explain_disk_errors
from gqaprune.common.errors import first_line
from gqaprune.training.lightning_internals import (
    get_parallel_sizes,
    set_data_parallel_size,
)
from gqaprune.training.resume import is_whole, read_strategy


class PruningTrainer(Trainer):
    """Lightning's Trainer, extended to prune without training."""

    def save_checkpoint(self, filepath: str | Path, *arguments: Any, **options: Any) -> None:
        """Save a checkpoint; the error of a full disk names the file, the space it needs and the space that is free."""
        module, optimizers = self.lightning_module, self.optimizers
        states = (value for optimizer in optimizers for state in optimizer.state.values() for value in state.values())
        tensors = (value for value in (*module.parameters(), *states) if isinstance(value, torch.Tensor))
        with explain_disk_errors(Path(filepath), sum(tensor.nbytes for tensor in tensors)):
            super().save_checkpoint(filepath, *arguments, **options)

    def prune(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Calibrate, prune and save a model, without training."""
        # A fit without steps: the callbacks do the work on any strategy, in the same order.
        self.limit_train_batches = 0
        self.limit_val_batches = 0
        self.fit(model, datamodule=datamodule)

    def search(self, model: LightningModule, datamodule: LightningDataModule, settings: SearchSettings) -> None:
        """Find the split of attention and MLP at which pruning costs the least perplexity."""
        callbacks: list[Callback] = getattr(self, "callbacks", [])
        pruning = next(callback for callback in callbacks if isinstance(callback, TaylorPruning))
        left_out = (TaylorPruning, PerplexityGuard, CheckpointExport)
        others = [callback for callback in callbacks if not isinstance(callback, left_out)]
        self.callbacks = [SplitSearch(pruning, settings), *others]
        self.limit_test_batches = 0  # test text must not choose settings
        self.prune(model, datamodule)

    def sweep(self, model: LightningModule, datamodule: LightningDataModule, settings: SweepSettings) -> None:
        """Prune at several rates, to compare what each costs."""
        callbacks: list[Callback] = getattr(self, "callbacks", [])
        pruning = next(callback for callback in callbacks if isinstance(callback, TaylorPruning))
        export = next(callback for callback in callbacks if isinstance(callback, CheckpointExport))
        left_out = (TaylorPruning, PerplexityGuard, CheckpointExport)
        others = [callback for callback in callbacks if not isinstance(callback, left_out)]
        self.callbacks = [RateSweep(pruning, export, settings), *others]
        self.prune(model, datamodule)


def keep_going_without(target: Logger) -> None:
    """Keep a run alive when a logger cannot write, and print the first error of the logger."""
    said: list[str] = []

    def forgive(method: Callable[..., object]) -> Callable[..., object]:
        @wraps(method)
        def call(*arguments: Any, **options: Any) -> object:
            try:
                return method(*arguments, **options)
            except Exception as error:  # no error of a logger is worth losing the run
                if not said:
                    said.append(first_line(error.__cause__ or error))  # for a full disk, Lightning blames the value
                    console.print(f"{type(target).__name__} is incomplete: {said[0]}")
                return None

        return call

    for name in ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint"):
        setattr(target, name, forgive(getattr(target, name)))


def split_over_all(trainer: Trainer) -> None:
    """Make `data_parallel_size: auto` mean all processes if there is no tensor parallelism; Lightning means nodes."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and get_parallel_sizes(strategy) == ("auto", 1):
        set_data_parallel_size(strategy, trainer.num_devices * trainer.num_nodes)


def check_checkpoint(path: Path, trainer: Trainer) -> None:
    """Raise an error if training cannot resume from a checkpoint: weights alone, or written by another strategy.

    Raises:
        ValueError: with a setting that works.
    """
    if not path.exists() and str(path) not in ("last", "best", "hpc"):
        raise ValueError(
            f"no checkpoint at {path}: set --ckpt_path to a checkpoint, or leave it out to train from the start"
        )
    if not path.exists():
        return
    name = type(trainer.strategy).__name__
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ValueError(
            f"{name} can resume only from files that have to be unpickled, which could run code: leave --ckpt_path out "
            "to train from the start, or use FSDP"
        )
    is_sharding = isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy))
    if is_sharding != path.is_dir():
        kind, other = ("one file", "folders") if is_sharding else ("a folder of shards", "single files")
        raise ValueError(
            f"{name} resumes from {other}, but {path} is {kind}: set trainer.strategy to the strategy that wrote it; "
            "one device, ddp, ModelParallelStrategy with save_distributed_checkpoint false and FSDPStrategy with "
            "state_dict_type full write single files"
        )
    if is_sharding and (writer := read_strategy(path)) != name:
        raise ValueError(f"{name} cannot read {path}, which {writer} wrote: set trainer.strategy to {writer}")
    if not is_whole(path):
        raise ValueError(
            f"{path} has only weights, so training cannot resume from it: set save_weights_only to false in "
            "ModelCheckpoint, and use --ckpt_path null to train from the start"
        )
