"""Count a run's optimizer steps, and keep validation and resuming between steps.

A checkpoint has no gradients, so a run that resumed in the middle of an accumulation would lose the gradients of its
first micro-batches.
"""

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from gqaprune.training.lightning_internals import (
    count_batches_done,
    count_loaded_batches,
    go_back_by_batches,
    set_validation_interval,
)


def count_optimizer_steps(trainer: Trainer) -> int:
    """Count the optimizer steps of the whole run, at least 1, with the accumulation factor of each epoch.

    Lightning's own estimate uses the current factor, which a scheduler sets only when training starts.
    """
    if trainer.limit_train_batches == 0:
        return 1
    if trainer.max_epochs == -1:
        return max(trainer.max_steps, 1)
    schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    factors = [
        schedulers[0].get_accumulate_grad_batches(epoch) if schedulers else trainer.accumulate_grad_batches
        for epoch in range(trainer.max_epochs or 1)
    ]
    batches = count_epoch_batches(trainer)
    if not math.isfinite(batches):
        if trainer.max_steps == -1:
            raise ValueError(
                "the training batches have no length, so the number of steps that model.schedule needs is unknown: set "
                "trainer.max_steps or trainer.limit_train_batches to a number"
            )
        return trainer.max_steps
    steps = sum(math.ceil(batches / factor) for factor in factors)
    return max(steps if trainer.max_steps == -1 else min(steps, trainer.max_steps), 1)


def find_round_start(trainer: Trainer, rounds_done: int, rounds: int) -> int:
    """Find the optimizer step at which the next round begins; each round has an equal share of the steps."""
    return count_optimizer_steps(trainer) * rounds_done // rounds


def count_round_steps(trainer: Trainer, rounds_done: int, rounds: int) -> int:
    """Count the optimizer steps of the next round, at least 1."""
    start, end = (find_round_start(trainer, done, rounds) for done in (rounds_done, rounds_done + 1))
    return max(1, end - start)


def count_epoch_batches(trainer: Trainer) -> float:
    """Count the training batches of an epoch, on each device; infinite if the loader has no length.

    Lightning knows their number only after setting up its loader, but a checkpoint's place must be read before that.
    """
    data, limit = trainer.datamodule, trainer.limit_train_batches  # type: ignore[attr-defined]
    count = getattr(data, "count_train_batches", None)
    if count is None:
        return count_loaded_batches(trainer)
    batches = count()
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def validate_between_steps(trainer: Trainer) -> None:
    """Postpone validation within an epoch to the end of the current accumulation."""
    interval, batches = trainer.val_check_interval, trainer.num_training_batches
    if isinstance(interval, (int, float)) and trainer.check_val_every_n_epoch is not None and math.isfinite(batches):
        every = interval if isinstance(interval, int) else max(1, int(batches * interval))
        whole = math.ceil(every / trainer.accumulate_grad_batches) * trainer.accumulate_grad_batches
        set_validation_interval(trainer, max(every, min(whole, int(batches))))


def go_back_to_step(checkpoint: dict[str, Any], factor: int) -> None:
    """Make a checkpoint resume at the first micro-batch after its last optimizer step.

    Args:
        checkpoint: content that Lightning has loaded; its place in the epoch is changed.
        factor: micro-batches per optimizer step in that epoch.
    """
    if surplus := count_batches_done(checkpoint) % factor:
        go_back_by_batches(checkpoint, surplus)
