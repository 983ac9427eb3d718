"""Lightning's data streams: text corpora as calibration, train, validation, test and prompt streams.

May import planning and evaluation and what stands below them; reading text and cutting windows is in `data/`. A setting
of the streams is a field of `config.py`.
"""

from gqaprune.datamodules.text import TextDataModule

__all__ = ["TextDataModule"]
