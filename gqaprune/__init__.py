"""gqaprune: prune GQA groups and MLP channels of decoder-only language models, repair, measure, and save them."""

import logging

for _name in ("torchao", "torch.utils._pytree"):
    # transformers imports torchao wherever it is, which then warns of kernels for hardware that is not there.
    logging.getLogger(_name).setLevel(logging.ERROR)

from gqaprune.checkpoint import save
from gqaprune.config import PruningConfig
from gqaprune.loading import load, load_model
from gqaprune.loading_by_layer import load_offloaded_model, load_sharded_model
from gqaprune.pipeline import prune
from gqaprune.plan import PruningPlan
from gqaprune.surgery import apply_plan
from gqaprune.tokenizer import load_tokenizer
from gqaprune.windows import read_windows

__version__ = "0.1.0"

__all__ = [
    "PruningConfig",
    "PruningPlan",
    "apply_plan",
    "load",
    "load_model",
    "load_offloaded_model",
    "load_sharded_model",
    "load_tokenizer",
    "prune",
    "read_windows",
    "save",
]
