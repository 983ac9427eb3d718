"""Settings of Lightning's trainer that would end a run only once its model is pruned, refused before any work."""

import math
from pathlib import Path

from lightning.pytorch import Callback, Trainer
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
    """Refuse what Lightning would refuse when training starts, or later. Nothing is read for it but configs.

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
    """Refuse a second say on how many micro-batches accumulate, which Lightning would refuse when training starts.

    Raises:
        ValueError: with what to set.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if trainer.accumulate_grad_batches != 1 and not trainer.strategy.handles_gradient_accumulation:
        factor = trainer.accumulate_grad_batches
        raise ValueError(
            f"trainer.accumulate_grad_batches {factor} is what pruning.scheduling sets: leave it out, and set "
            f"pruning.scheduling to {{0: {factor}}}"
        )
    schedulers = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    if len(schedulers) > 1:
        names = ", ".join(type(scheduler).__name__ for scheduler in schedulers)
        raise ValueError(f"{names} each set how many micro-batches accumulate: set pruning.scheduling alone")


def _check_interval(trainer: Trainer) -> None:
    interval = getattr(trainer, "val_check_interval", None)
    if not isinstance(interval, (int, float)):
        raise ValueError(
            "trainer.val_check_interval is a time, and validation comes between optimizer steps: set it to a number of "
            "training batches, or to a share of an epoch such as 0.25"
        )
    if interval <= 0 and trainer.limit_val_batches != 0:
        raise ValueError(
            f"trainer.val_check_interval must be above 0, got {interval}; 1.0 validates after each epoch, and "
            "trainer.limit_val_batches 0 never"
        )


def _check_optimizer(trainer: Trainer, module: CausalLMModule) -> None:
    optimizer = module.optimizer_config.rehearse()
    if trainer.gradient_clip_val and trainer.precision == "16-mixed" and unscales_gradients(optimizer):
        raise ValueError(
            f"trainer.gradient_clip_val {trainer.gradient_clip_val} clips gradients, which {type(optimizer).__name__} "
            f"unscales itself under precision {trainer.precision}: set model.optimizer.fused to false, or "
            "trainer.precision to bf16-mixed"
        )
    is_by_value = trainer.gradient_clip_algorithm == "value"
    if trainer.gradient_clip_val and is_by_value and isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ValueError("DeepSpeed clips gradients by norm alone: set trainer.gradient_clip_algorithm to norm")


def _check_callback(trainer: Trainer, callback: Callback) -> None:
    name = type(callback).__name__
    if isinstance(callback, LearningRateFinder):
        raise ValueError(f"{name} looks for a rate that model.optimizer sets: leave it out, and set model.optimizer.lr")
    if isinstance(callback, BatchSizeFinder):
        raise ValueError(
            f"{name} looks for a size that data.training.batch_size sets: leave it out, and set "
            "data.training.batch_size"
        )
    if isinstance(callback, LearningRateMonitor) and not trainer.loggers:
        raise ValueError(f"{name} logs to a logger, and trainer.logger is false: leave one of them out")
    if isinstance(callback, ModelCheckpoint) and callback.dirpath:
        check_can_be_folder(Path(callback.dirpath))


def _check_copy(trainer: Trainer, module: CausalLMModule, callback: Callback) -> None:
    """Refuse what changes the model after a callback has copied it, or splits it."""
    name = type(callback).__name__
    if module.recovery.uses_lora or module.recovery.rounds > 1:
        setting = f"rounds {module.recovery.rounds}" if module.recovery.rounds > 1 else f"mode {module.recovery.mode}"
        raise ValueError(
            f"{name} copies the model before recovery.{setting} changes it: set recovery.mode to full or distill and "
            f"recovery.rounds to 1, or leave {name} out"
        )
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            f"{name} copies the whole model, which {type(trainer.strategy).__name__} shards: set trainer.strategy to "
            f"ddp or auto, or leave {name} out"
        )


def _check_monitors(trainer: Trainer, module: CausalLMModule, callbacks: list[Callback]) -> None:
    """Refuse to watch a metric that nothing logs; modules and callbacks of other classes may log any."""
    known = module.name_metrics()
    is_all_known = type(module) is CausalLMModule and all(
        type(callback).__module__.startswith("gqaprune.") or is_of_lightning(callback) for callback in callbacks
    )
    for callback in callbacks:
        if not isinstance(callback, (EarlyStopping, ModelCheckpoint)) or callback.monitor is None:
            continue
        own = ("epoch", "step") if isinstance(callback, ModelCheckpoint) else ()
        is_ours = callback.monitor.startswith(("ppl/", "train/"))
        if callback.monitor not in (*known, *own) and (is_ours or is_all_known):
            raise ValueError(
                f"{type(callback).__name__} monitors {callback.monitor}, which this run does not log: set its monitor "
                f"to one of {', '.join(known)}; each corpus of data.evaluation.val has a ppl/, unless "
                "trainer.limit_val_batches is 0"
            )
        if callback.monitor.startswith("ppl/") and (epochs := trainer.max_epochs or 1) != -1:
            every = trainer.check_val_every_n_epoch or 1
            if every > epochs:
                raise ValueError(
                    f"{type(callback).__name__} monitors {callback.monitor}, which is never measured: "
                    f"trainer.check_val_every_n_epoch is {every}, and there are {epochs} epochs; set it to 1"
                )


def _check_best(callbacks: list[Callback]) -> None:
    """Refuse an average beside best weights: one of them alone can be exported."""
    monitors = [one.monitor for one in callbacks if isinstance(one, ModelCheckpoint) and one.monitor is not None]
    if monitors and any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise ValueError(
            "StochasticWeightAveraging averages weights when training ends, and the export takes the weights that "
            f"ModelCheckpoint found best by {monitors[0]}: leave one of them out, or take EMAWeightAveraging, whose "
            "checkpoints hold averages"
        )


def check_batches(trainer: Trainer, data: TextDataModule) -> None:
    """Refuse limits that leave no batch, and validation after more batches than an epoch has on each device.

    Args:
        trainer: whose strategy knows the number of devices.
        data: has read its corpora.

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
                f"trainer.limit_{name}_batches {limit} of {count} batches is none: set it to at least "
                f"{math.ceil(1000 / count) / 1000:g}, or to a number of batches such as 1"
            )
    batches, interval = count_epoch_batches(trainer), trainer.val_check_interval
    if validates and trainer.check_val_every_n_epoch is not None and isinstance(interval, int) and interval > batches:
        raise ValueError(
            f"trainer.val_check_interval {interval} is more than the {batches} training batches that an epoch has on "
            f"each device: set it to at most {batches}, to a share of an epoch such as 0.25, or "
            "trainer.check_val_every_n_epoch to null, which counts on over epochs"
        )
