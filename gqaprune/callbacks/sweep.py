"""Prune at several rates in place of pruning once, and show what each rate costs."""

import os
from pathlib import Path
from typing import ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from gqaprune.callbacks.export import CheckpointExport
from gqaprune.callbacks.order import Phase
from gqaprune.callbacks.parts import check_own_parts, get_parts
from gqaprune.callbacks.pruning import TaylorPruning
from gqaprune.checkpoints.save import check_output_folder, save
from gqaprune.commands.sweep import FIGURE_FILE, SWEEP_FILE, SweepSettings, build_sweep_table, draw_sweep, sweep_rates
from gqaprune.common.atomic_files import check_can_be_folder
from gqaprune.common.console import console
from gqaprune.common.distributed import get_rank_and_world_size
from gqaprune.models.tokenizer import check_tokenizer
from gqaprune.plan import PruningPlan
from gqaprune.reporting.charts import name_model, save_figure


class RateSweep(Callback):
    """Prunes the dense model at every rate in `setup`. It only connects hooks.

    Args:
        pruning: the pruning callback, whose settings are used.
        export: the export callback, whose settings checkpoints are written with.
        settings: the rates and the folder.
    """

    phase: ClassVar = Phase.WORK

    def __init__(self, pruning: TaylorPruning, export: CheckpointExport, settings: SweepSettings) -> None:
        self.pruning = pruning
        self.export = export
        self.settings = settings

    def check_settings(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, before any work, that the model is dense and in memory and that the folders can be written."""
        check_own_parts(trainer, pl_module, "sweep")
        module, _ = get_parts(trainer, pl_module)
        if module.plan is not None:
            raise ValueError("sweep needs the dense model, got one with a plan: leave model.plan unset")
        for name in ("offload", "sharded"):
            if getattr(self.pruning, name):
                raise ValueError(f"sweep prunes the whole model in memory: set pruning.{name} to false")
        folder = Path(self.settings.folder)
        check_can_be_folder(folder)
        if self.settings.export:
            for rate in self.settings.rates:
                check_output_folder(folder / f"rate-{rate:g}")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prune at every rate; write results, curve and checkpoints."""
        module, data = get_parts(trainer, pl_module)
        config = self.pruning.config
        if config.needs_text:
            data.read_calibration_windows()  # so that missing text raises before a model is loaded

        def load() -> PreTrainedModel:
            module.release()
            module.load()
            return module.model.to(trainer.strategy.root_device)

        def export(model: PreTrainedModel, plan: PruningPlan, folder: Path) -> None:
            if get_rank_and_world_size()[0] == 0:
                options = self.export.format, self.export.max_shard_size, self.export.quantization
                save(model, data.tokenizer, folder, plan, None, None, *options)

        model = load()
        check_tokenizer(data.tokenizer, model)
        sweep = sweep_rates(
            model,
            load,
            self.pruning.read_calibration_set(module, data, model, config),
            config,
            self.settings,
            data.evaluation_batches(),
            data.held_out_batches() if config.needs_text else (),
            export if self.settings.export else None,
        )
        if trainer.is_global_zero:
            folder = Path(self.settings.folder)
            title = f"{name_model(module.source.pretrained)}: perplexity by share of parameters removed"
            save_figure(draw_sweep(sweep, title), folder / FIGURE_FILE)
            console.print(build_sweep_table(sweep, data.protocol))
            for what, name in (("results", SWEEP_FILE), ("figure", FIGURE_FILE)):
                console.print(f"{what:<14} {os.path.join(folder, name)}")
            for rate in self.settings.rates if self.settings.export else ():
                console.print(f"{f'at {rate:g}':<14} {os.path.join(folder, f'rate-{rate:g}')}")
