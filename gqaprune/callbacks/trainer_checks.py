"""Check, before any work, settings of Lightning's trainer that would otherwise stop a run only after pruning."""

import math
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from gqaprune.callbacks.order import copies_model, is_of_lightning
from gqaprune.common.atomic_files import check_can_be_folder
from gqaprune.datamodules import TextDataModule
from gqaprune.module import CausalLMModule
from gqaprune.training.accumulation import count_epoch_batches
from gqaprune.training.lightning_internals import unscales_gradients


def check_trainer(trainer: Trainer, module: CausalLMModule) -> None:
    """Raise an error for settings that Lightning refuses when training starts, or later. It reads only configs.

    Raises:
        ValueError: with a setting that works.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    check_accumulation(trainer)
    _check_interval(trainer)
    _check_optimizer(trainer, module)
    for callback in callbacks:
        _check_callback(trainer, callback)
        if copies_model(callback):
            _check_copy(trainer, module, callback)
    _check_monitors(trainer, module, callbacks)
    _check_best(callbacks)


def check_accumulation(trainer: Trainer) -> None:
    """Raise an error if accumulation is set in more than one place, which Lightning refuses when training starts.

    Raises:
        ValueError: with the setting to change.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if trainer.accumulate_grad_batches != 1 and not trainer.strategy.handles_gradient_accumulation:
        factor = trainer.accumulate_grad_batches
        raise ValueError(
            f"trainer.accumulate_grad_batches {factor} is set, but pruning.scheduling sets the accumulation: leave it "
            f"out, and set pruning.scheduling to {{0: {factor}}}"
        )
    schedulers = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    if len(schedulers) > 1:
        names = ", ".join(type(scheduler).__name__ for scheduler in schedulers)
        raise ValueError(f"{names} all set the accumulation: leave out all but pruning.scheduling")


def check_scheduling(trainer: Trainer, pl_module: LightningModule, scheduling: Mapping[int, int]) -> None:
    """Raise an error if the strategy or the module accumulates by itself, and differently from the schedule.

    Raises:
        ValueError: with the setting to change.
    """
    factors = sorted(set(scheduling.values()))
    if not pl_module.automatic_optimization and factors != [1]:
        raise ValueError(
            f"{type(pl_module).__name__} optimizes manually, so that pruning.scheduling {dict(scheduling)} would have "
            "no effect on its training: leave pruning.scheduling out"
        )
    if not trainer.strategy.handles_gradient_accumulation:
        return
    name = type(trainer.strategy).__name__
    if len(factors) > 1:
        raise ValueError(
            f"{name} accumulates the same number of micro-batches in every epoch, but pruning.scheduling is "
            f"{dict(scheduling)}: set it to a single number, such as {{0: {factors[0]}}}"
        )
    if trainer.accumulate_grad_batches != factors[0]:
        raise ValueError(
            f"{name} accumulates trainer.accumulate_grad_batches {trainer.accumulate_grad_batches}, but "
            f"pruning.scheduling is {dict(scheduling)}: set trainer.accumulate_grad_batches to {factors[0]} as well"
        )


def _check_interval(trainer: Trainer) -> None:
    interval = getattr(trainer, "val_check_interval", None)
    if not isinstance(interval, (int, float)):
        raise ValueError(
            "trainer.val_check_interval is a time, but validation can only run between optimizer steps: set it to a "
            "number of training batches, or to a share of an epoch such as 0.25"
        )
    if interval <= 0 and trainer.limit_val_batches != 0:
        raise ValueError(
            f"trainer.val_check_interval must be above 0, got {interval}; set it to 1.0 to validate after each epoch, "
            "or set trainer.limit_val_batches to 0 to never validate"
        )


def _check_optimizer(trainer: Trainer, module: CausalLMModule) -> None:
    optimizer = module.optimizer_config.rehearse()
    if trainer.gradient_clip_val and trainer.precision == "16-mixed" and unscales_gradients(optimizer):
        raise ValueError(
            f"trainer.gradient_clip_val {trainer.gradient_clip_val} needs unscaled gradients, but under precision "
            f"{trainer.precision} {type(optimizer).__name__} unscales them only within its step: set "
            "model.optimizer.fused to false, or trainer.precision to bf16-mixed"
        )
    is_by_value = trainer.gradient_clip_algorithm == "value"
    if trainer.gradient_clip_val and is_by_value and isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ValueError(
            "DeepSpeed can clip gradients only by norm, got trainer.gradient_clip_algorithm value: set it to norm"
        )


def _check_callback(trainer: Trainer, callback: Callback) -> None:
    name = type(callback).__name__
    if isinstance(callback, LearningRateFinder):
        raise ValueError(
            f"{name} searches a learning rate, but model.optimizer sets it: leave {name} out, and set "
            "model.optimizer.lr"
        )
    if isinstance(callback, BatchSizeFinder):
        raise ValueError(
            f"{name} searches a batch size, but data.training.batch_size sets it: leave {name} out, and set "
            "data.training.batch_size"
        )
    if isinstance(callback, LearningRateMonitor) and not trainer.loggers:
        raise ValueError(f"{name} needs a logger, but trainer.logger is false: leave out one of the two")
    if isinstance(callback, ModelCheckpoint) and callback.dirpath:
        check_can_be_folder(Path(callback.dirpath))


def _check_copy(trainer: Trainer, module: CausalLMModule, callback: Callback) -> None:
    """Raise an error if the model is changed after a callback has copied it, or is sharded."""
    name = type(callback).__name__
    if module.recovery.uses_lora or module.recovery.rounds > 1:
        setting = f"rounds {module.recovery.rounds}" if module.recovery.rounds > 1 else f"mode {module.recovery.mode}"
        raise ValueError(
            f"{name} copies the model before recovery.{setting} changes it: set recovery.mode to full or distill and "
            f"recovery.rounds to 1, or leave {name} out"
        )
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            f"{name} copies the whole model, but {type(trainer.strategy).__name__} shards it: set trainer.strategy to "
            f"ddp or auto, or leave {name} out"
        )


def _check_monitors(trainer: Trainer, module: CausalLMModule, callbacks: list[Callback]) -> None:
    """Raise an error if a callback monitors a metric that nothing logs; modules of other classes may log any."""
    known = module.name_metrics()
    is_all_known = type(module) is CausalLMModule and all(
        type(callback).__module__.startswith("gqaprune.") or is_of_lightning(callback) for callback in callbacks
    )
    for callback in callbacks:
        if not isinstance(callback, (EarlyStopping, ModelCheckpoint)) or callback.monitor is None:
            continue
        counters = ("epoch", "step") if isinstance(callback, ModelCheckpoint) else ()
        is_ours = callback.monitor.startswith(("ppl/", "train/"))
        if callback.monitor not in (*known, *counters) and (is_ours or is_all_known):
            raise ValueError(
                f"{type(callback).__name__} monitors {callback.monitor}, which this run does not log: set its monitor "
                f"to one of {', '.join(known)}; ppl/<corpus> is logged for each corpus of data.evaluation.val, unless "
                "trainer.limit_val_batches is 0"
            )
        if callback.monitor.startswith("ppl/") and (epochs := trainer.max_epochs or 1) != -1:
            every = trainer.check_val_every_n_epoch or 1
            if every > epochs:
                raise ValueError(
                    f"{type(callback).__name__} monitors {callback.monitor}, which is never measured, because "
                    f"trainer.check_val_every_n_epoch is {every} and trainer.max_epochs is {epochs}: set "
                    "trainer.check_val_every_n_epoch to 1"
                )


def _check_best(callbacks: list[Callback]) -> None:
    """Raise an error if weights are both averaged and chosen as best: only one of them can be exported."""
    monitors = [one.monitor for one in callbacks if isinstance(one, ModelCheckpoint) and one.monitor is not None]
    if monitors and any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise ValueError(
            "StochasticWeightAveraging averages weights when training ends, but the export uses the weights that "
            f"ModelCheckpoint found best by {monitors[0]}: leave one of them out, or use EMAWeightAveraging, whose "
            "checkpoints contain averages"
        )


def check_batches(trainer: Trainer, data: TextDataModule) -> None:
    """Raise an error if limits leave no batch, or validation comes after more batches than an epoch has per device.

    Args:
        trainer: trainer whose strategy knows the number of devices.
        data: data module that has read its corpora.

    Raises:
        ValueError: with a setting that works.
    """
    validates = trainer.limit_val_batches != 0
    counts = {"train": data.count_train_batches()}
    if validates:
        counts["val"] = min(data.count_evaluation_batches("val"), default=0)
    for name, count in counts.items():
        limit = getattr(trainer, f"limit_{name}_batches")
        if isinstance(limit, float) and limit and count and int(count * limit) == 0:
            raise ValueError(
                f"trainer.limit_{name}_batches {limit} of {count} batches leaves none: set it to at least "
                f"{math.ceil(1000 / count) / 1000:g}, or to a number of batches such as 1"
            )
    batches, interval = count_epoch_batches(trainer), trainer.val_check_interval
    if validates and trainer.check_val_every_n_epoch is not None and isinstance(interval, int) and interval > batches:
        raise ValueError(
            f"trainer.val_check_interval {interval} is more than the {batches} training batches that an epoch has on "
            f"each device: set it to at most {batches}, or to a share of an epoch such as 0.25, or set "
            "trainer.check_val_every_n_epoch to null to count batches across epochs"
        )
