"""Find a run's folder and its TensorBoard loggers."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


def get_run_folder(trainer: Trainer) -> Path:
    """Return the folder that a run writes to. Unlike `trainer.log_dir`, it does not broadcast: one rank may call it."""
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return Path(next((folder for folder in folders if folder), trainer.default_root_dir))


def get_tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """Return the loggers that accept text and figures."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
