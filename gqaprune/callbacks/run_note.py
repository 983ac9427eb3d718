"""Keep a note of a run while it trains, so that the same command can resume it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock
from lightning.pytorch import Callback, LightningModule, Trainer

from gqaprune.callbacks.lookup import get_run_folder
from gqaprune.callbacks.order import Phase
from gqaprune.common.atomic_files import remove_lock
from gqaprune.common.console import console
from gqaprune.common.distributed import check_same_on_all_ranks
from gqaprune.module import CausalLMModule
from gqaprune.training.resume import UNFINISHED, FoundRun, RunNote, list_checkpoint_folders, lock_note


class KeepRunNote(Callback):
    """Keeps the run's settings and the paths of its checkpoints under its root folder until it has ended.

    Args:
        root: the run's root folder.
        settings: all settings of the run, as plain data.
        found: the run that this one resumes.
    """

    phase: ClassVar = Phase.EXPORT

    def __init__(self, root: Path, settings: Mapping[str, Any], found: FoundRun = FoundRun()) -> None:  # noqa: B008
        self.root, self.settings, self.found = root, settings, found
        self._lock: FileLock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lock the note; give the checkpoints of all ranks the same run id, that of the resumed run if there is one.

        Raises:
            ValueError: if another process resumes the same run, or ranks would resume from different checkpoints.
        """
        check_same_on_all_ranks("checkpoints to resume from", str(self.found.checkpoint), trainer.strategy.root_device)
        if not isinstance(pl_module, CausalLMModule):
            return  # its checkpoints do not say which run they belong to
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._lock = lock_note(self.root)
            if self._lock is None and self.found.run:
                raise ValueError(
                    f"another process is already resuming the run of {self.root / UNFINISHED}: wait until it ends, or "
                    "set trainer.default_root_dir to another folder"
                )
            if self._lock is None:
                console.print(
                    f"another run uses {self.root / UNFINISHED}: if this run is stopped, the same command starts again "
                    "instead of resuming; set trainer.default_root_dir to another folder to avoid that"
                )
        pl_module.run_id = trainer.strategy.broadcast(self.found.run or pl_module.run_id)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the note: from here on there may be checkpoints."""
        if self._lock is not None and isinstance(pl_module, CausalLMModule):
            folder = get_run_folder(trainer)
            checkpoints = dict.fromkeys([*self.found.searched, *list_checkpoint_folders(trainer.checkpoint_callbacks)])
            RunNote(self.settings, str(folder), tuple(checkpoints), pl_module.run_id).save(self.root)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the note; a stopped run does not call this and keeps it."""
        if self._lock is not None:
            RunNote.remove(self.root, self._lock)
            self._lock = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unlock the note, so that the next run can use it, in this process as well."""
        if self._lock is not None:
            remove_lock(self._lock)
            self._lock = None
