"""Find what the callbacks of a run share: module, data, folder, TensorBoard loggers."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gqaprune.datamodules import TextDataModule
from gqaprune.module import CausalLMModule


def get_parts(trainer: Trainer, pl_module: LightningModule) -> tuple[CausalLMModule, TextDataModule]:
    """The module and the streams, checked.

    Raises:
        ValueError: if they are not gqaprune's.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(pl_module, CausalLMModule) or not isinstance(data, TextDataModule):
        raise ValueError(
            "gqaprune's callbacks need trainer.fit(CausalLMModule(...), datamodule=TextDataModule(...)), got "
            f"{type(pl_module).__name__} and {type(data).__name__}"
        )
    return pl_module, data


def get_run_folder(trainer: Trainer) -> Path:
    """Where a run writes. Unlike `trainer.log_dir` this does not broadcast, so that one rank alone may ask."""
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return Path(next((folder for folder in folders if folder), trainer.default_root_dir))


def get_tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The loggers that take text and figures."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
