"""gqaprune: prune GQA groups and MLP channels of decoder-only language models, repair, measure, and save them."""

import logging

from gqaprune.common.threads import let_threads_sleep

let_threads_sleep()  # before anything imports torch
for _name in ("torchao", "torch.utils._pytree"):
    # transformers imports torchao wherever it is, which then warns of kernels for hardware that is not there.
    logging.getLogger(_name).setLevel(logging.ERROR)

from gqaprune.checkpoints.save import save
from gqaprune.common.renamed import name_moved_modules
from gqaprune.data.calibration import CalibrationSet
from gqaprune.data.windows import read_windows
from gqaprune.models.loading import load, load_model
from gqaprune.models.tokenizer import load_tokenizer
from gqaprune.pipeline import prune
from gqaprune.placement.loading_by_layer import load_offloaded_model, load_sharded_model
from gqaprune.plan import PruningPlan
from gqaprune.planning.config import PruningConfig
from gqaprune.surgery.cut import apply_plan

__version__ = "0.1.0"
name_moved_modules()

__all__ = [
    "CalibrationSet",
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
