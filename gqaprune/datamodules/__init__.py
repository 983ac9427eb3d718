"""Data streams: text corpora as calibration, train, validation, test and prompt streams."""

from gqaprune.datamodules.text import TextDataModule

__all__ = ["TextDataModule"]
