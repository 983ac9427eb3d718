"""Write the model as a Hugging Face checkpoint once training, or pruning alone, is done."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from gqaprune.callbacks.pruning import get_parts, get_run_folder
from gqaprune.checkpoint import check_output_folder, save
from gqaprune.progress import console


class CheckpointExport(Callback):
    """Saves the pruned and recovered model with tokenizer and plan.

    Where a `ModelCheckpoint` monitors something, such as `ppl/wikitext2`, these are its best weights.

    Args:
        folder: where to; null means `checkpoint` in the run's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self.written: Path | None = None
        self.format = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an unusable folder before hours of work, not after."""
        self.written = None
        if stage == "fit":
            check_output_folder(self._get_folder(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export after training, while the strategy still holds the weights: the best ones, if some were kept."""
        _restore_best(trainer, get_parts(trainer, pl_module)[0].rounds_done)
        self._export(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export where there was nothing to train."""
        if self.written is None:
            self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, data = get_parts(trainer, pl_module)
        folder = self._get_folder(trainer)
        state_dict = module.gather_state_dict()
        if trainer.is_global_zero:
            self.format = save(module.model, data.tokenizer, folder, module.plan, state_dict, module.adapted)
        self.written = folder
        trainer.strategy.barrier("export")

    def _get_folder(self, trainer: Trainer) -> Path:
        if self.folder is not None:
            return Path(self.folder)
        return get_run_folder(trainer) / "checkpoint"


def _restore_best(trainer: Trainer, rounds_done: int) -> None:
    """Put back the weights of the best checkpoint, where a `ModelCheckpoint` monitors something. Every rank calls it.

    Args:
        trainer: at the end of training.
        rounds_done: rounds of pruning that the model has behind it; a best one with fewer is of other shapes.
    """
    monitors = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    best = next((callback for callback in monitors if callback.monitor and callback.best_model_path), None)
    if best is None:
        return
    checkpoint = trainer.strategy.load_checkpoint(best.best_model_path, weights_only=True)
    if checkpoint.get("rounds_done", rounds_done) != rounds_done:
        console.print(f"{best.best_model_path} is of an earlier round of pruning: the last weights are kept")
        return
    trainer.strategy.load_model_state_dict(checkpoint)
    console.print(f"best {best.monitor}: {float(best.best_model_score or 0):.4g}, in {best.best_model_path}")
