"""Find where a run writes: its folder, its TensorBoard loggers."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


def get_run_folder(trainer: Trainer) -> Path:
    """Where a run writes. Unlike `trainer.log_dir` this does not broadcast, so that one rank alone may ask."""
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return Path(next((folder for folder in folders if folder), trainer.default_root_dir))


def get_tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The loggers that take text and figures."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
