"""Lightning's checkpoints of a run: the best one, and the last whose weights are finite."""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from gqaprune.progress import console


def find_finite_checkpoint(callbacks: Sequence[Checkpoint]) -> Path | None:
    """The newest checkpoint file, in the folders that callbacks write to, whose weights are all finite.

    Args:
        callbacks: those that write checkpoints.
    """
    folders = {callback.dirpath for callback in callbacks if isinstance(callback, ModelCheckpoint) and callback.dirpath}
    paths = [path for folder in folders for path in Path(folder).glob("*.ckpt") if path.is_file()]
    newest_first = sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((path for path in newest_first if _is_finite(path)), None)


def restore_best(trainer: Trainer, rounds_done: int) -> None:
    """Put back the weights of the best checkpoint, where a `ModelCheckpoint` monitors something. Every rank calls it.

    Args:
        trainer: at the end of training.
        rounds_done: rounds of pruning that the model has behind it; a best one with fewer is of other shapes.
    """
    monitors = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    best = next((callback for callback in monitors if callback.monitor and callback.best_model_path), None)
    if best is None:
        return
    checkpoint = trainer.strategy.load_checkpoint(best.best_model_path, weights_only=True)
    if checkpoint.get("rounds_done", rounds_done) != rounds_done:
        console.print(f"{best.best_model_path} is of an earlier round of pruning: the last weights are kept")
        return
    trainer.strategy.load_model_state_dict(checkpoint)
    console.print(f"best {best.monitor}: {float(best.best_model_score or 0):.4g}, in {best.best_model_path}")


def _is_finite(path: Path) -> bool:
    try:
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
    except (OSError, RuntimeError, KeyError, UnpicklingError):
        return False  # cut short
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
