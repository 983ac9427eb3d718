"""Where gradients accumulate over micro-batches: validate, and go on after a stop, only between optimizer steps.

A checkpoint holds no gradients: one from the midst of a window of micro-batches would go on without its first ones.
"""

import math
from typing import Any

from lightning.pytorch import Trainer


def validate_between_steps(trainer: Trainer) -> None:
    """Put off validation within an epoch to the end of the window of micro-batches that it comes in."""
    interval, batches = trainer.val_check_interval, trainer.num_training_batches
    if isinstance(interval, (int, float)) and trainer.check_val_every_n_epoch is not None and math.isfinite(batches):
        every = interval if isinstance(interval, int) else max(1, int(batches * interval))
        whole = math.ceil(every / trainer.accumulate_grad_batches) * trainer.accumulate_grad_batches
        trainer.val_check_batch = max(every, min(whole, int(batches)))


def go_back_to_step(checkpoint: dict[str, Any], factor: int) -> None:
    """Let a checkpoint go on with the first micro-batch after its last optimizer step.

    Args:
        checkpoint: as Lightning has loaded it; its place in the epoch is changed.
        factor: micro-batches per optimizer step in that epoch.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    surplus = 0 if progress["is_last_batch"] else progress["current"]["ready"] % factor
    if surplus:
        for span in ("current", "total"):
            place = progress[span]["ready"] - surplus
            progress[span] |= dict.fromkeys(("ready", "started", "processed", "completed"), place)
        for loader in loops["state_dict"].get("combined_loader", ()):
            loader["yielded"] -= surplus
