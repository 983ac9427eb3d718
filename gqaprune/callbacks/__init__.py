"""Lightning callbacks: pruning before fit, perplexity guard, split search, checkpoint export, the run's summary."""

from gqaprune.callbacks.export import CheckpointExport
from gqaprune.callbacks.guard import PerplexityGuard
from gqaprune.callbacks.note import KeepRunNote
from gqaprune.callbacks.pruning import TaylorPruning
from gqaprune.callbacks.search import SplitSearch
from gqaprune.callbacks.summary import RunSummary

__all__ = ["CheckpointExport", "KeepRunNote", "PerplexityGuard", "RunSummary", "SplitSearch", "TaylorPruning"]
