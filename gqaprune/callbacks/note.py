"""Leave a note of a run while it trains, so that the same command finds where it stopped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gqaprune.callbacks.lookup import get_parts, get_run_folder
from gqaprune.common.processes import name_process
from gqaprune.training.resume import RunNote, list_checkpoint_folders


class KeepRunNote(Callback):
    """Says under the run's root folder what the run is and where its checkpoints are, until it has ended.

    Args:
        root: the run's root folder.
        settings: all settings of the run, as plain data.
        before: folders with checkpoints of the run that it goes on with.
        run: what those are known by; empty where a run begins.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any], before: Sequence[str] = (), run: str = "") -> None:
        self.root, self.settings, self.before, self.run = root, settings, before, run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let checkpoints of all ranks be known by the same name, that of the run which this one goes on with."""
        module = get_parts(trainer, pl_module)[0]
        module.run_id = trainer.strategy.broadcast(self.run or module.run_id)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the note: from here on there may be checkpoints."""
        if trainer.is_global_zero:
            folder = get_run_folder(trainer)
            checkpoints = dict.fromkeys([*self.before, *list_checkpoint_folders(trainer.checkpoint_callbacks)])
            run = get_parts(trainer, pl_module)[0].run_id
            RunNote(self.settings, str(folder), tuple(checkpoints), run, name_process()).save(self.root)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove it; a run that is stopped does not come here."""
        if stage == "fit" and trainer.is_global_zero:
            RunNote.remove(self.root)
