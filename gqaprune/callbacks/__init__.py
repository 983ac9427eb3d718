"""Lightning callbacks: pruning before fit, split search, checkpoint export, the run's summary."""

from gqaprune.callbacks.export import CheckpointExport
from gqaprune.callbacks.note import KeepRunNote
from gqaprune.callbacks.pruning import TaylorPruning
from gqaprune.callbacks.search import SplitSearch
from gqaprune.callbacks.summary import RunSummary

__all__ = ["CheckpointExport", "KeepRunNote", "RunSummary", "SplitSearch", "TaylorPruning"]
