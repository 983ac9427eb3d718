"""Lightning callbacks: pruning before fit, checkpoint export, the run's summary."""

from gqaprune.callbacks.export import CheckpointExport
from gqaprune.callbacks.pruning import TaylorPruning
from gqaprune.callbacks.summary import RunSummary

__all__ = ["CheckpointExport", "RunSummary", "TaylorPruning"]
