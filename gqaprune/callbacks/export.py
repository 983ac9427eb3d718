"""Write the model as a Hugging Face checkpoint once training, or pruning alone, is done."""

from pathlib import Path
from typing import ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from gqaprune.callbacks.lookup import get_run_folder
from gqaprune.callbacks.order import Phase, order_callbacks
from gqaprune.callbacks.parts import get_parts
from gqaprune.callbacks.run_state import Exported, get_run
from gqaprune.checkpoints.adapters import check_merges
from gqaprune.checkpoints.formats import (
    AUTO,
    check_unequal_by_layer,
    check_written_by_layer,
    choose_format,
    needs_equal_counts,
)
from gqaprune.checkpoints.save import SHARD_SIZE, check_can_be_saved, check_output_folder, check_shard_size, save
from gqaprune.common.atomic_files import remove_leftovers
from gqaprune.common.console import console
from gqaprune.common.paths import expand_path
from gqaprune.datamodules import TextDataModule
from gqaprune.models.wrapping import check_no_adapters, unwrap_model
from gqaprune.module import CausalLMModule
from gqaprune.placement.fsdp import gather_state_dict
from gqaprune.placement.layer_store import find_store
from gqaprune.plan import PruningPlan, find_plan
from gqaprune.planning.preflight import check_equal_counts
from gqaprune.planning.selection import keeps_equal_counts


class CheckpointExport(Callback):
    """Saves the pruned and recovered model with tokenizer and plan; with `fast_dev_run` it saves nothing.

    If a `ModelCheckpoint` monitors a metric, such as `ppl/wikitext2`, its best weights are saved.

    Args:
        folder: folder to write the checkpoint to; null means `checkpoint` in the run's folder.
        format: one of `checkpoints.formats.FORMATS`, or `auto`: `stock` if all layers have equal counts, else
            `per-layer`.
        max_shard_size: largest size of a weights file, such as `5GB`; larger checkpoints are divided into several
            files. With `pruning.offload` or `pruning.sharded` every layer has a file of its own.
        quantization: `int8` stores the matrices of the decoder layers in 8 bits, with torchao, and the quantised model
            is measured as well; null stores them in the type of the weights.
    """

    phase: ClassVar = Phase.EXPORT

    def __init__(
        self,
        folder: str | None = None,
        format: str = AUTO,
        max_shard_size: str = SHARD_SIZE,
        quantization: str | None = None,
    ) -> None:
        self.folder = folder and expand_path(folder)
        self.format = format
        self.max_shard_size = max_shard_size
        self.quantization = quantization
        self.written: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the checkpoint of an earlier fit."""
        self.written = get_run(trainer).exported = None

    def check_settings(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check folder and format before hours of work, not after; sort the callbacks by phase."""
        order_callbacks(trainer)
        folder = self._get_folder(trainer)
        if trainer.is_global_zero:
            remove_leftovers(folder.parent)
        check_output_folder(folder)
        module, data = get_parts(trainer, pl_module)
        config = module.source.read_config()
        format = choose_format(config, self.format, self.quantization)
        check_can_be_saved(module.source.build_without_weights(), data.tokenizer, format)
        check_shard_size(self.max_shard_size)
        run = get_run(trainer)
        if run.config is not None and trainer.limit_train_batches == 0:
            check_written_by_layer(self.format, self.quantization, run.placement)
            if run.config.removes_something and not keeps_equal_counts(config, run.config):
                check_unequal_by_layer(config, run.placement)
        if needs_equal_counts(self.format) and run.config is not None and module.plan is None:
            check_equal_counts(config, run.config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise an error, before training, for adapters that cannot be merged into the checkpoint."""
        module = get_parts(trainer, pl_module)[0]
        if module.adapters.view is None:
            check_no_adapters(unwrap_model(module.model))
        else:
            check_merges(module.adapters.view)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export while the strategy still has the weights: the best ones if a `ModelCheckpoint` kept them."""
        _restore_best(trainer, get_parts(trainer, pl_module)[0].rounds_done)
        self._export(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export if nothing was trained, or if a resumed run had no steps left to train."""
        if self.written is None and trainer.limit_train_batches != 0:
            self.on_train_end(trainer, pl_module)
        elif self.written is None:
            self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module, data = get_parts(trainer, pl_module)
        folder = self._get_folder(trainer)
        state_dict = gather_state_dict(module.model)
        plan, written = _find_whole_plan(module), ""
        if trainer.is_global_zero or not find_store(module.model).is_in_memory:
            written = self._save(module, data, folder, plan, state_dict)
        self.written = folder
        get_run(trainer).exported = Exported(folder, written, plan, self.quantization)
        trainer.strategy.barrier("export")

    def _save(
        self,
        module: CausalLMModule,
        data: TextDataModule,
        folder: Path,
        plan: PruningPlan | None,
        state_dict: dict[str, Tensor] | None,
    ) -> str:
        what = (unwrap_model(module.model), data.tokenizer, folder, plan, state_dict, module.adapters.view)
        try:
            return save(*what, self.format, self.max_shard_size, self.quantization)
        except ValueError as error:
            if self.format == AUTO and self.quantization is None:
                raise
            written = save(*what, max_shard_size=self.max_shard_size)  # a format that fails must not lose the model
            console.print(f"{error}; saved in {written} format instead")
            return written

    def _get_folder(self, trainer: Trainer) -> Path:
        if self.folder is not None:
            return Path(self.folder)
        return get_run_folder(trainer) / "checkpoint"


def _find_whole_plan(module: CausalLMModule) -> PruningPlan | None:
    """Return the plan from the dense model to this one; if this run cut nothing, the plan of an earlier run."""
    if module.plan is None or not module.plan.removes_nothing:
        return module.plan
    return find_plan(module.source.pretrained, module.plan.geometry) or module.plan


def _restore_best(trainer: Trainer, rounds_done: int) -> None:
    """Load the weights of the best checkpoint if a `ModelCheckpoint` monitors a metric. Every rank calls it.

    Args:
        trainer: the trainer, at the end of training.
        rounds_done: pruning rounds that the model has been through; a checkpoint with fewer has other shapes.
    """
    monitors = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    best = next((callback for callback in monitors if callback.monitor and callback.best_model_path), None)
    if best is None:
        return
    optimizers, trainer.strategy.optimizers = trainer.strategy.optimizers, []
    try:  # FSDP would look for optimizer states, and a checkpoint of weights alone has none
        checkpoint = trainer.strategy.load_checkpoint(best.best_model_path, weights_only=True)
    finally:
        trainer.strategy.optimizers = optimizers
    if checkpoint.get("rounds_done", rounds_done) != rounds_done:
        console.print(
            f"the best checkpoint, {best.best_model_path}, is from an earlier pruning round and has other shapes: the "
            "export uses the last weights"
        )
        return
    trainer.strategy.load_model_state_dict(checkpoint)
    console.print(f"best {best.monitor}: {float(best.best_model_score or 0):.4g}, in {best.best_model_path}")
