"""Leave a note of a run while it trains, so that the same command finds where it stopped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock
from lightning.pytorch import Callback, LightningModule, Trainer

from gqaprune.callbacks.lookup import get_parts, get_run_folder
from gqaprune.callbacks.order import Phase
from gqaprune.common.atomic_files import remove_lock
from gqaprune.common.console import console
from gqaprune.training.resume import UNFINISHED, RunNote, list_checkpoint_folders, lock_note


class KeepRunNote(Callback):
    """Says under the run's root folder what the run is and where its checkpoints are, until it has ended.

    Args:
        root: the run's root folder.
        settings: all settings of the run, as plain data.
        before: folders with checkpoints of the run that it goes on with.
        run: what those are known by; empty where a run begins.
    """

    phase: ClassVar = Phase.EXPORT

    def __init__(self, root: Path, settings: Mapping[str, Any], before: Sequence[str] = (), run: str = "") -> None:
        self.root, self.settings, self.before, self.run = root, settings, before, run
        self._lock: FileLock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lock the note; let checkpoints of all ranks have the same name, that of the run which this one resumes."""
        if stage == "fit" and trainer.is_global_zero:
            self._lock = lock_note(self.root)
            if self._lock is None:
                console.print(
                    f"another run uses {self.root / UNFINISHED}: if this one is stopped, the same command begins anew"
                )
        module = get_parts(trainer, pl_module)[0]
        module.run_id = trainer.strategy.broadcast(self.run or module.run_id)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the note: from here on there may be checkpoints."""
        if self._lock is not None:
            folder = get_run_folder(trainer)
            checkpoints = dict.fromkeys([*self.before, *list_checkpoint_folders(trainer.checkpoint_callbacks)])
            run = get_parts(trainer, pl_module)[0].run_id
            RunNote(self.settings, str(folder), tuple(checkpoints), run).save(self.root)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove it; a run that is stopped does not come here."""
        if self._lock is not None:
            RunNote.remove(self.root, self._lock)
            self._lock = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the note to the next run, in this process too."""
        if self._lock is not None:
            remove_lock(self._lock)
            self._lock = None
