"""Write a run's page from the results that its callbacks share."""

from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from gqaprune.callbacks.lookup import get_run_folder
from gqaprune.callbacks.parts import get_parts
from gqaprune.callbacks.run_state import get_run
from gqaprune.checkpoints.card import find_loading_code
from gqaprune.checkpoints.formats import FORMATS
from gqaprune.common.atomic_files import write_atomically
from gqaprune.common.provenance import get_command, get_versions
from gqaprune.reporting.page import PAGE_FILE, Checkpoint, Page, build_page


def write_page(trainer: Trainer, pl_module: LightningModule, state: str, began: datetime) -> Path:
    """Write `report.html` into the run's folder, atomically.

    Args:
        trainer: trainer of the run.
        pl_module: its module.
        state: progress of the run, in words.
        began: time at which the run began.
    """
    module, _ = get_parts(trainer, pl_module)
    run = get_run(trainer)
    known: dict[str, Any] = {"command": get_command(), "versions": get_versions()}
    if run.report is not None and run.config is not None:
        known |= {"report": run.report, "plan": module.plan, "importance": run.importance}
        known |= {"importance_method": run.config.sensitivity.method}
    known |= {"guard": run.guard, "samples": run.samples}
    if (exported := run.exported) is not None:
        files = {file.name: file.stat().st_size for file in sorted(exported.folder.iterdir()) if file.is_file()}
        code = find_loading_code(exported.folder, exported.format)
        needs_code = FORMATS[exported.format].needs_remote_code
        known |= {"checkpoint": Checkpoint(str(exported.folder), exported.format, files, code, needs_code)}
    if run.predictions is not None:
        known |= {"predictions": run.predictions.to_dict()}
    path = get_run_folder(trainer) / PAGE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    content = build_page(Page(module.source.pretrained, state, began, datetime.now().astimezone(), **known))
    write_atomically(path, content.encode())
    return path
