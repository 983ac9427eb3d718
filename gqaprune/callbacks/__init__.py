"""Lightning callbacks: pruning before fit, guard, split search, export, samples, the run's summary, predictions."""

from gqaprune.callbacks.export import CheckpointExport
from gqaprune.callbacks.guard import PerplexityGuard
from gqaprune.callbacks.judge import PredictionJudge
from gqaprune.callbacks.pruning import TaylorPruning
from gqaprune.callbacks.run_note import KeepRunNote
from gqaprune.callbacks.samples import SampleGenerations
from gqaprune.callbacks.search import SplitSearch
from gqaprune.callbacks.summary import RunSummary

__all__ = [
    "CheckpointExport",
    "KeepRunNote",
    "PerplexityGuard",
    "PredictionJudge",
    "RunSummary",
    "SampleGenerations",
    "SplitSearch",
    "TaylorPruning",
]
