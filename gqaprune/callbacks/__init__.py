"""Lightning callbacks: pruning before fit, guard, split search, rates, export, samples, predictions, the run's summary.

May import everything but the command line. A callback only connects Lightning's hooks to functions: put the work itself
into a package without Lightning. To add a callback, write a file named after its class and export the class here.
"""

from gqaprune.callbacks.export import CheckpointExport
from gqaprune.callbacks.guard import PerplexityGuard
from gqaprune.callbacks.judge import PredictionJudge
from gqaprune.callbacks.pruning import TaylorPruning
from gqaprune.callbacks.run_note import KeepRunNote
from gqaprune.callbacks.samples import SampleGenerations
from gqaprune.callbacks.search import SplitSearch
from gqaprune.callbacks.summary import RunSummary
from gqaprune.callbacks.sweep import RateSweep

__all__ = [
    "CheckpointExport",
    "KeepRunNote",
    "PerplexityGuard",
    "PredictionJudge",
    "RateSweep",
    "RunSummary",
    "SampleGenerations",
    "SplitSearch",
    "TaylorPruning",
]
