"""Stop all ranks of a run together after a signal to one of them, a loss that is not finite, or an error."""

import os
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from gqaprune.common.console import console
from gqaprune.common.distributed import reduce_to_largest
from gqaprune.common.errors import first_line
from gqaprune.common.ranks import RankEndedError, Ranks
from gqaprune.common.stop_signals import Stopped, stop_signals
from gqaprune.training.lightning_internals import (
    find_requeue_signal,
    is_last_step,
    is_validation_due,
    put_before_validation,
    take_over_child_processes,
    take_over_signals,
)
from gqaprune.training.loss_watch import LossWatch
from gqaprune.training.resume import list_checkpoint_folders


class StopTogether(Callback):
    """Stops all ranks of a run at the end of the same step, and tells them when a rank ends at any other time.

    While the model trains, a signal sets a flag. Once per optimizer step, and before each validation batch, the ranks
    check whether one of them has the flag or a loss that is not finite. If so, they write a checkpoint (if the run has
    a `ModelCheckpoint`) and exit with 128 plus the signal's number. At any other time, a signal or an error ends its
    rank at once, and the others as soon as they are told. `CausalLMModule` adds this callback to its trainer.

    Args:
        losses: the watch in which the module records its losses.
    """

    def __init__(self, losses: LossWatch) -> None:
        self.losses = losses
        self._ranks = Ranks()
        self._handles_signals = False
        self._trains, self._validates = False, False
        self._stop = 0

    def begin(self, trainer: Trainer) -> None:
        """Take over signals and child processes from Lightning, before there is a process group."""
        self._handles_signals = not stop_signals.is_installed
        stop_signals.install()
        take_over_signals(trainer)
        self._trains, self._validates, self._stop = False, False, 0
        self._ranks = Ranks()
        if trainer.world_size > 1:
            self._ranks.start(take_over_child_processes(trainer))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect the ranks."""
        if trainer.world_size > 1 and dist.is_initialized():
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            self._ranks.connect(trainer.global_rank, trainer.world_size, host, trainer.strategy.broadcast)

    def on_train_batch_start(self, *_: Any) -> None:
        """Defer signals to the end of the step from here on."""
        self._trains = True
        stop_signals.defer()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Check with the other ranks before a loss that is not finite reaches the weights."""
        self._agree(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop here, unless a validation follows or the epoch ends, which a resumed run would skip."""
        if self._stop and not is_validation_due(trainer) and not is_last_step(trainer):
            self._save_and_stop(trainer, pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop here as well: a resumed run repeats the validation."""
        if self._trains:
            self._agree(trainer, pl_module)
            if self._stop:
                self._validates = True
                self._save_and_stop(trainer, pl_module)

    on_validation_epoch_end = on_validation_batch_start

    def on_validation_end(self, *_: Any) -> None:
        """Let signals stop the run at once while other callbacks use the results."""
        stop_signals.stop_at_once()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Finish writing the checkpoint; make one from within a validation resume at its first batch."""
        if self._trains:
            stop_signals.defer()
        if self._validates:
            put_before_validation(checkpoint)

    def on_train_end(self, *_: Any) -> None:
        """Let signals stop the run at once from here on."""
        self._trains = False
        stop_signals.stop_at_once()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the other ranks why this one ends; if another rank's end is the cause, name that rank."""
        is_own = isinstance(exception, Stopped) or not isinstance(exception, RuntimeError) or trainer.world_size == 1
        heard = None if is_own else self._ranks.wait()
        if heard is not None and not isinstance(exception, RankEndedError):
            exception.__cause__ = heard.make_error()
        if isinstance(exception, Stopped):
            self._ranks.tell_stopped(exception.number)
        else:
            self._ranks.tell(1, first_line(exception))
        stop_signals.leave_to_end()
        self._give_back_signals()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove checkpoints that were written for a signal, because the run has ended now."""
        if stage == "fit":
            for path in _list_written(trainer, pl_module):
                trainer.strategy.remove_checkpoint(path)
        self._ranks.close()
        self._give_back_signals()

    def _agree(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check in one reduction whether any rank has to stop.

        Raises:
            ValueError: on every rank, if the loss of one rank is not finite.
        """
        rank, ranks = trainer.global_rank, trainer.world_size
        is_bad = self.losses.is_bad.to(trainer.strategy.root_device)
        numbers = torch.stack([torch.full_like(is_bad, stop_signals.number), is_bad * (ranks - rank)])
        self._stop, worst = reduce_to_largest(numbers)
        if worst:
            first = ranks - worst
            reason = self._describe_loss(trainer, pl_module) if rank == first else ""
            raise ValueError(trainer.strategy.broadcast(reason, first))

    def _describe_loss(self, trainer: Trainer, pl_module: LightningModule) -> str:
        rank = trainer.global_rank if trainer.world_size > 1 else None
        folders = list_checkpoint_folders(trainer.checkpoint_callbacks)
        return self.losses.describe(rank, folders, str(pl_module.run_id))

    def _save_and_stop(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint, if the run writes any, and end with the signal's exit code."""
        folder = next(iter(list_checkpoint_folders(trainer.checkpoint_callbacks)), None)
        is_over = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps  # nothing is left to resume
        if folder is not None and not is_over:
            before = _list_written(trainer, pl_module)
            path = Path(folder) / f"{_name_checkpoints(pl_module)}-step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            for other in before:
                if other != path:
                    trainer.strategy.remove_checkpoint(other)
            if trainer.is_global_zero:
                console.print(
                    f"stopped at step {trainer.global_step}; the training state is in {path}: run the same command "
                    "again to resume",
                    markup=False,
                )
        if self._stop == find_requeue_signal(trainer) and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", get_slurm_job()], check=False)
        raise Stopped(self._stop)

    def _give_back_signals(self) -> None:
        if self._handles_signals:
            stop_signals.restore()


def get_slurm_job() -> str:
    """Return the name that `scontrol` has for the job of this process."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]


def _name_checkpoints(pl_module: LightningModule) -> str:
    return f"stopped-{str(pl_module.run_id)[:8]}"


def _list_written(trainer: Trainer, pl_module: LightningModule) -> list[Path]:
    """List the checkpoints that this run wrote because of a signal."""
    folders = list_checkpoint_folders(trainer.checkpoint_callbacks)
    return [path for folder in folders for path in Path(folder).glob(f"{_name_checkpoints(pl_module)}-*.ckpt")]
