"""gqaprune: prune GQA groups and MLP channels of decoder-only language models, repair, measure, and save them."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gqaprune.common.renamed import name_moved_modules
from gqaprune.common.threads import let_threads_sleep
from gqaprune.version import __version__

if TYPE_CHECKING:
    from gqaprune.checkpoints.save import save
    from gqaprune.data.calibration import CalibrationSet
    from gqaprune.data.windows import read_windows
    from gqaprune.models.loading import load, load_model
    from gqaprune.models.tokenizer import load_tokenizer
    from gqaprune.pipeline import prune
    from gqaprune.placement.loading_by_layer import load_offloaded_model, load_sharded_model
    from gqaprune.plan import PruningPlan
    from gqaprune.planning.config import PruningConfig
    from gqaprune.surgery.cut import apply_plan

let_threads_sleep()  # must come before torch is imported
for _name in ("torchao", "torch.utils._pytree"):
    # transformers imports torchao if it is installed, and torchao warns about kernels for missing hardware.
    logging.getLogger(_name).setLevel(logging.ERROR)
name_moved_modules()

_HOMES = {
    "CalibrationSet": "data.calibration",
    "PruningConfig": "planning.config",
    "PruningPlan": "plan",
    "apply_plan": "surgery.cut",
    "load": "models.loading",
    "load_model": "models.loading",
    "load_offloaded_model": "placement.loading_by_layer",
    "load_sharded_model": "placement.loading_by_layer",
    "load_tokenizer": "models.tokenizer",
    "prune": "pipeline",
    "read_windows": "data.windows",
    "save": "checkpoints.save",
}
"""Public name -> its module, which is imported when the name is first used, because torch takes seconds to import."""

__all__ = [
    "CalibrationSet",
    "PruningConfig",
    "PruningPlan",
    "__version__",
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
