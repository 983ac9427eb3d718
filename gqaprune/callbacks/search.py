"""Search the best split in place of pruning, and show the trials."""

import os
from pathlib import Path
from typing import ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from gqaprune.callbacks.order import Phase
from gqaprune.callbacks.parts import check_own_parts, get_parts
from gqaprune.callbacks.pruning import TaylorPruning
from gqaprune.commands.search import FIGURE_FILE, SEARCH_FILE, SearchSettings, find_best_split
from gqaprune.commands.trials import Trials, build_trials_table, draw_trials
from gqaprune.common.atomic_files import check_can_be_folder
from gqaprune.common.console import console
from gqaprune.models.tokenizer import check_tokenizer
from gqaprune.reporting.charts import name_model, save_figure


class SplitSearch(Callback):
    """Finds the best split of attention and MLP in `setup`, on the dense model. It only connects hooks.

    Args:
        pruning: the pruning callback, whose settings every trial uses.
        settings: steps, patience and folder of the search.
    """

    phase: ClassVar = Phase.WORK

    def __init__(self, pruning: TaylorPruning, settings: SearchSettings) -> None:
        self.pruning = pruning
        self.settings = settings

    def check_settings(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, before any work, that the model is dense and in memory and that the folder can be written."""
        check_own_parts(trainer, pl_module, "search")
        module, _ = get_parts(trainer, pl_module)
        if module.plan is not None:
            raise ValueError("search needs the dense model, got one with a plan: leave model.plan unset")
        for name in ("offload", "sharded"):
            if getattr(self.pruning, name):
                raise ValueError(f"search tries splits on the whole model in memory: set pruning.{name} to false")
        check_can_be_folder(Path(self.settings.folder))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Search on validation text; write the trials, their curve and the best split."""
        module, data = get_parts(trainer, pl_module)
        config = self.pruning.config
        if trainer.is_global_zero and (config.steps > 1 or config.swaps.generations):
            console.print("search tries single cuts: pruning.steps and pruning.swaps are ignored")
        if config.needs_text:
            data.read_calibration_windows()  # so that missing text raises before a model is loaded
        module.load()
        model = module.model.to(trainer.strategy.root_device)
        check_tokenizer(data.tokenizer, model)
        trials = find_best_split(
            model,
            self.pruning.read_calibration_set(module, data, model, config),
            config,
            self.settings,
            data.evaluation_batches(("val",)),
            protocol=data.protocol,
        )
        if trainer.is_global_zero:
            self._show(
                trials,
                data.protocol,
                f"{name_model(module.source.pretrained)}, {config.rate:.0%} removed: perplexity by split",
            )

    def _show(self, trials: Trials, protocol: str, title: str) -> None:
        folder = Path(self.settings.folder)
        save_figure(draw_trials(trials, title), folder / FIGURE_FILE)
        console.print(build_trials_table(trials, protocol))
        for what, name in (("trials", SEARCH_FILE), ("figure", FIGURE_FILE)):
            console.print(f"{what:<14} {os.path.join(folder, name)}")
        assert trials.best is not None
        console.print(f"best split     --pruning.split {trials.best.split}")
