"""gqaprune: prune GQA groups and MLP channels of decoder-only language models, repair, measure, and save them."""

from gqaprune.checkpoint import save
from gqaprune.config import PruningConfig
from gqaprune.loading import load, load_model, load_tokenizer
from gqaprune.pipeline import prune
from gqaprune.plan import PruningPlan
from gqaprune.surgery import apply_plan
from gqaprune.windows import read_windows

__version__ = "0.1.0"

__all__ = [
    "PruningConfig",
    "PruningPlan",
    "apply_plan",
    "load",
    "load_model",
    "load_tokenizer",
    "prune",
    "read_windows",
    "save",
]
