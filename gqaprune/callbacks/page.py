"""Put what the callbacks of a run know onto its page."""

from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from gqaprune.callbacks.guard import PerplexityGuard
from gqaprune.callbacks.judge import PredictionJudge
from gqaprune.callbacks.lookup import get_parts, get_run_folder
from gqaprune.callbacks.pruning import TaylorPruning
from gqaprune.callbacks.samples import SampleGenerations
from gqaprune.common.atomic_files import write_atomically
from gqaprune.common.provenance import get_command, get_versions
from gqaprune.reporting.page import PAGE_FILE, Page, Sample, build_page


def write_page(trainer: Trainer, pl_module: LightningModule, state: str, began: datetime) -> Path:
    """Write `report.html` into the run's folder, whole or not at all.

    Args:
        trainer: whose callbacks are asked.
        pl_module: the module.
        state: how far the run is, in words.
        began: when it began.
    """
    module, _ = get_parts(trainer, pl_module)
    known: dict[str, Any] = {"command": get_command(), "versions": get_versions()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, TaylorPruning) and callback.report is not None:
            known |= {"report": callback.report, "plan": module.plan, "importance": callback.importance}
            known |= {"importance_method": callback.config.sensitivity.method}
        elif isinstance(callback, PerplexityGuard):
            known |= {"guard": callback.facts}
        elif isinstance(callback, SampleGenerations):
            known |= {"samples": [Sample(*sample) for sample in callback.written.values()]}
        elif isinstance(callback, PredictionJudge) and callback.predictions is not None:
            known |= {"predictions": callback.predictions.to_dict()}
    path = get_run_folder(trainer) / PAGE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    content = build_page(Page(module.source.pretrained, state, began, datetime.now().astimezone(), **known))
    write_atomically(path, content.encode())
    return path
