"""Leave a note of a run while it trains, so that the same command finds where it stopped."""

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
    """Says under the run's root folder what the run is and where its checkpoints are, until it has ended.

    Args:
        root: the run's root folder.
        settings: all settings of the run, as plain data.
        found: where the run goes on.
    """

    phase: ClassVar = Phase.EXPORT

    def __init__(self, root: Path, settings: Mapping[str, Any], found: FoundRun = FoundRun()) -> None:  # noqa: B008
        self.root, self.settings, self.found = root, settings, found
        self._lock: FileLock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lock the note; let checkpoints of all ranks have the same name, that of the run which this one resumes.

        Raises:
            ValueError: if another run resumes the same one, or ranks would go on from several checkpoints.
        """
        check_same_on_all_ranks("checkpoints to resume from", str(self.found.checkpoint), trainer.strategy.root_device)
        if not isinstance(pl_module, CausalLMModule):
            return  # its checkpoints do not say which run they are of
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._lock = lock_note(self.root)
            if self._lock is None and self.found.run:
                raise ValueError(
                    f"another process resumes the run of {self.root / UNFINISHED} already: wait for its end, or set "
                    "trainer.default_root_dir to another folder"
                )
            if self._lock is None:
                console.print(
                    f"another run uses {self.root / UNFINISHED}: if this one is stopped, the same command begins anew"
                )
        pl_module.run_id = trainer.strategy.broadcast(self.found.run or pl_module.run_id)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the note: from here on there may be checkpoints."""
        if self._lock is not None and isinstance(pl_module, CausalLMModule):
            folder = get_run_folder(trainer)
            checkpoints = dict.fromkeys([*self.found.searched, *list_checkpoint_folders(trainer.checkpoint_callbacks)])
            RunNote(self.settings, str(folder), tuple(checkpoints), pl_module.run_id).save(self.root)

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
