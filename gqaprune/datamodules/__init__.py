"""Lightning's data streams: text corpora as calibration, train, validation, test and prompt streams.

May import planning, evaluation and the packages below them; `data/` reads text and cuts windows. To add a setting of
the streams, add a field to a class in `config.py`.
"""

from gqaprune.datamodules.text import TextDataModule

__all__ = ["TextDataModule"]
