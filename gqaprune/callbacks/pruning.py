"""Prune before Lightning builds the optimizer; accumulate gradients during fit; prune again between rounds."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedModel

from gqaprune.callbacks.checks import (
    check_adapters,
    check_compile,
    check_offload,
    check_placement,
    check_rounds,
    check_schedule,
    check_sharded,
    check_teacher,
    list_doubts,
)
from gqaprune.callbacks.order import Phase, check_copies_follow, order_callbacks, sort_callbacks
from gqaprune.callbacks.parts import can_be_pruned_yet, check_own_parts, get_parts, read_work, take_plan, uses_own_parts
from gqaprune.callbacks.run_state import RunState, get_run
from gqaprune.callbacks.trainer_checks import check_accumulation, check_batches, check_scheduling, check_trainer
from gqaprune.common.console import console
from gqaprune.common.paths import expand_path
from gqaprune.common.precision import use_default_dtype
from gqaprune.common.renamed import RenamedAttributes, name_successors
from gqaprune.common.stage_cache import StageCache
from gqaprune.common.stop_signals import stop_signals
from gqaprune.data.calibration import CalibrationSet
from gqaprune.datamodules import TextDataModule
from gqaprune.models.tokenizer import check_tokenizer
from gqaprune.module import CausalLMModule, ChecksSettings
from gqaprune.pipeline import Pruner
from gqaprune.placement.layer_store import Placement, find_store
from gqaprune.placement.model_source import ModelInMemory
from gqaprune.planning.allocation.steps import Spending
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.stages import END, SAMPLING, TRAINING, StageCounter, list_stages
from gqaprune.planning.target import resolve_target
from gqaprune.reporting.report import Report
from gqaprune.scoring.criteria.base import Scores
from gqaprune.scoring.sensitivity import Importance
from gqaprune.training.accumulation import find_round_start, go_back_to_step, validate_between_steps
from gqaprune.training.lightning_internals import find_resumed_checkpoint, read_epoch, run_after_configuring
from gqaprune.training.resume import UNFINISHED, find_pruning_plan, read_plan


class TaylorPruning(RenamedAttributes, GradientAccumulationScheduler):
    """Scores units on calibration micro-batches and cuts the model in `setup`; then schedules gradient accumulation.

    It works with any LightningModule that builds a causal LM of transformers in `__init__`, `setup` or
    `configure_model`: the model is cut in place, before optimizers are built and strategies wrap it. `CausalLMModule`
    and `TextDataModule` add perplexity before and after, layers on disk or sharded, rounds, and resuming between steps.

    Calibration accumulates gate gradients over as many micro-batches as training does in its first epoch. Callbacks
    with a method `on_before_pruning(trainer, pl_module)` see the dense model and must not change it; those with
    `on_after_pruning` see the pruned one. During training this callback is the `GradientAccumulationScheduler` that it
    inherits from; if `recovery.rounds` is above 1, it also cuts between steps, on a single device or with DDP, where
    every rank has the whole model. It only connects hooks: the method itself is `gqaprune.pipeline`.

    Args:
        scheduling: epoch -> micro-batches per optimizer step, from that epoch on.
        stages: folder for the finished stages of a run that has not ended; null means `lightning_logs/unfinished` under
            `trainer.default_root_dir`. A run that ends removes them.
        offload: keep the decoder layers in the model's safetensors files and read one at a time, to prune a model that
            is larger than memory, with the same result; changed layers are written beside `stages`. Such a run cannot
            train or use an allocation that needs a sensitivity, and its criterion must work layer by layer: `obs`,
            `wanda`, `wifv`, `l1`, `l2`, `random`, or two of them joined.
        sharded: shard the decoder layers over the devices of a `ModelParallelStrategy` from the start and gather one at
            a time, to prune a model that is larger than one device, with the same plan. Unlike `offload`, it allows
            gate criteria (`fisher`, `taylor`) and recovery in the same run.
        model_attribute: attribute of a module of another class that holds the causal LM; dots lead to attributes of
            attributes.
        calibration: batches to calibrate on if the data module is of another class: a DataLoader, or any iterable of
            token ids `[batch, tokens]` or of mappings with `input_ids` and `attention_mask`. None uses
            `calibration_batches()` of the data module or the module, else the first training batches.
        calibration_limit: largest number of training batches to calibrate on if there is no other calibration text; at
            least 1.
        settings: what to remove and how, the fields of `gqaprune.PruningConfig`.

    Raises:
        ValueError: if a setting is out of its bounds.

    Example::

        Trainer(callbacks=[TaylorPruning(scheduling={0: 4}, rate=0.2)]).fit(my_module, my_data)
    """

    phase: ClassVar = Phase.WORK

    @name_successors("pruning")
    def __init__(
        self,
        scheduling: dict[int, int] = {0: 1},  # noqa: B006
        stages: str | None = None,
        offload: bool = False,
        sharded: bool = False,
        model_attribute: str = "model",
        calibration: Iterable[Any] | None = None,
        calibration_limit: int = 64,
        **settings: Any,
    ) -> None:
        super().__init__(dict(scheduling))
        if calibration_limit < 1:
            raise ValueError(f"calibration_limit must be at least 1 training batch, got {calibration_limit}; try 64")
        self.stages = stages and expand_path(stages)
        self.offload = offload
        self.sharded = sharded
        self.model_attribute = model_attribute
        self.calibration = calibration
        self.calibration_limit = calibration_limit
        self.config = PruningConfig(**settings)
        self._run = RunState()
        self._pruner: Pruner | None = None
        self._spending: Spending | None = None
        self._counter = StageCounter()

    def join(self, run: RunState) -> None:
        """Share the pruning settings, and where the model and its text are, with the other callbacks."""
        run.config, run.placement = self.config, self.placement
        run.model_attribute, run.calibration = self.model_attribute, self.calibration
        run.calibration_limit = self.calibration_limit
        self._run = run

    def check_settings(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check for settings that exclude one another or would stop training later; sort the callbacks by phase."""
        if not isinstance(pl_module, CausalLMModule):
            return  # `setup` has done it
        order_callbacks(trainer)
        module, data = get_parts(trainer, pl_module)
        if self.config.removes_something:
            self.config = self._run.config = resolve_target(module.source.build_in_its_type(), self.config)
        check_rounds(trainer, module, self.config)
        check_schedule(trainer, module)
        check_teacher(trainer, module, self.config)
        check_adapters(trainer, module)
        check_compile(trainer, module)
        if trainer.limit_train_batches != 0:
            check_trainer(trainer, module)
            check_scheduling(trainer, module, self.scheduling)
        if self.offload:
            check_offload(trainer, module)
        if self.placement is not Placement.MEMORY:
            check_own_parts(trainer, pl_module, f"pruning.{self.placement.value}")
            check_placement(trainer, module, data, self.config, self.placement)
        for doubt in list_doubts(trainer, module, data, self.config) if trainer.is_global_zero else ():
            console.print(doubt)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prune, unless the module is already pruned by a plan that it was given or that its checkpoint carries."""
        if stage != "fit":
            return
        get_run(trainer).data = None  # an earlier fit of this trainer may have had other text
        self._pruner = self.report = None
        if not isinstance(pl_module, CausalLMModule):
            self._set_up_given(trainer, pl_module)
            return
        module, data = get_parts(trainer, pl_module)
        if module.plan is None and (checkpoint := find_resumed_checkpoint(trainer)) is not None:
            take_plan(module, read_plan(Path(checkpoint)))
        if trainer.limit_train_batches != 0 and uses_own_parts(trainer, pl_module):
            check_batches(trainer, data)
        if self.sharded:
            check_sharded(trainer)
        if module.plan is None and self.config.needs_text:
            data.read_calibration_windows()  # so that missing text raises before a model is loaded
        folder = self._get_folder(trainer).with_name("offloaded") if self.offload else None
        module.load(folder, self.sharded or self._only_trains_sharded(trainer, module, data))
        self._prune(trainer, module, data)

    def _set_up_given(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune the causal LM of a module of another class now, or as soon as it is built."""
        for name in ("offload", "sharded"):
            if getattr(self, name):
                check_own_parts(trainer, pl_module, f"pruning.{name}")
        check_copies_follow(trainer, self)
        if trainer.limit_train_batches != 0:
            check_accumulation(trainer)
            check_scheduling(trainer, pl_module, self.scheduling)
        prune = partial(self._prune_given, trainer, pl_module)
        if can_be_pruned_yet(trainer, pl_module):
            prune()
        else:
            run_after_configuring(pl_module, prune)

    def _prune_given(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, data = get_parts(trainer, pl_module)
        trainer.callbacks = sort_callbacks(trainer)  # type: ignore[attr-defined]  # a copy: Lightning iterates over it
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ChecksSettings):
                callback.check_settings(trainer, pl_module)
        take_plan(module, find_pruning_plan(find_resumed_checkpoint(trainer), self.state_key))
        with use_default_dtype(torch.float32):  # half precision calls `configure_model` with another default
            self._prune(trainer, module, data)

    def _prune(self, trainer: Trainer, module: CausalLMModule, data: TextDataModule) -> None:
        try:
            self._cut(trainer, module, data)
        finally:  # the cut is known even if measuring the pruned model raises
            if self._pruner is not None:
                module.plan, self.report = self._pruner.plan, self._pruner.report
        _tell(trainer, "on_after_pruning")

    def _cut(self, trainer: Trainer, module: CausalLMModule, data: TextDataModule) -> None:
        model, trains = module.model, trainer.limit_train_batches != 0
        find_store(model).move_to(trainer.strategy.root_device)
        if data.tokenizer is not None:
            check_tokenizer(data.tokenizer, model)
        if module.plan is None:
            self._counter = StageCounter(list_stages(self.config, read_work(trainer, data, trains)))
            self._counter.begin(SAMPLING)
        if data.training.sampled_windows and trains:
            dense = model if module.plan is None else module.source.load().to(trainer.strategy.root_device)
            data.sample_train_windows(dense)
        if module.plan is not None:
            if not module.plan_is_from_checkpoint:
                self.report = Report(module.source.pretrained, protocol=data.protocol)
                self.report.add_stage("pruned", model, data.evaluation_batches())
            return
        self._pruner = self._start(module, data, model, self._open_stages(trainer), self.config)
        self._pruner.measure("dense")
        _tell(trainer, "on_before_pruning")
        self._spend(1 / module.recovery.rounds if trains else 1.0)

    def _spend(self, share: float, stage: str = "pruned") -> None:
        """Cut until a share of the budget is spent, and share scores and importance with the other callbacks."""
        assert self._pruner is not None
        self._pruner.spend(share, stage)
        self._run.scores, self._run.importance = self._pruner.scores, self._pruner.importance

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the trainer's accumulation, unless the strategy or the module accumulates by itself."""
        self._counter.begin(TRAINING)
        if not trainer.strategy.handles_gradient_accumulation and pl_module.automatic_optimization:
            super().on_train_start(trainer, pl_module)
            self.on_train_epoch_start(trainer)  # Lightning skips it when it resumes within an epoch

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Accumulate as scheduled, and validate between optimizer steps."""
        super().on_train_epoch_start(trainer)
        validate_between_steps(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume at the beginning of an optimizer step."""
        is_ours = trainer.state.fn == TrainerFn.FITTING and uses_own_parts(trainer, pl_module)
        if is_ours and not trainer.strategy.handles_gradient_accumulation:
            go_back_to_step(checkpoint, self.get_accumulate_grad_batches(read_epoch(checkpoint)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prune again once a round of recovery has done its steps."""
        if not isinstance(pl_module, CausalLMModule):
            return
        module, data = get_parts(trainer, pl_module)
        done, rounds = module.rounds_done + 1, module.recovery.rounds
        if done >= rounds or trainer.global_step < find_round_start(trainer, done, rounds):
            return
        if self._pruner is None and self._spending is None:
            return  # the plan was given and spends the whole budget
        stop_signals.stop_at_once()
        module.merge_adapters()
        if self._pruner is None:
            self._pruner = self._resume(module, data, done / rounds, self._open_stages(trainer))
        self._spend((done + 1) / rounds, f"pruned, round {done + 1}")
        module.plan, module.rounds_done = self._pruner.plan, done
        module.prepare_recovery()
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model = module  # without its wrapper, which keeps the weights that were cut
            trainer.strategy.configure_ddp()
        trainer.strategy.setup_optimizers(trainer)
        stop_signals.defer()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a warning if training ended before its last round."""
        self._counter.begin(END)
        if self._pruner is not None and self._pruner.share < 1:
            console.print(
                f"training ended before its last round and only {self._pruner.share:.0%} of the budget is spent: train "
                "for more steps, or set recovery.rounds to 1"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the last stage if nothing was trained."""
        self._counter.begin(END)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the finished stages of a run that has ended; a stopped run does not call this and keeps them."""
        if stage == "fit":
            self._open_stages(trainer).clear()

    @property
    def report(self) -> Report | None:
        """The measured stages; None before the first one."""
        return self._run.report

    @report.setter
    def report(self, report: Report | None) -> None:
        self._run.report = report

    @property
    def scores(self) -> Scores:
        """Scores of the last cut's units, without outliers; empty if nothing was scored."""
        return self._run.scores

    @property
    def importance(self) -> Importance:
        """Importance of the dense model's blocks; empty if the allocation does not use it."""
        return self._run.importance

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: the report, the plan, and the budget spent by earlier rounds."""
        spending = self._pruner.spending if self._pruner is not None else self._spending
        state = {} if self.report is None else {"report": self.report.to_dict()}
        if (wrapped := self._run.module) is not None and wrapped.plan is not None:
            state["plan"] = wrapped.plan.to_dict()  # modules of other classes do not keep it
        return state if spending is None else state | {"spending": spending.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        if "report" in state_dict:
            self.report = Report.from_dict(state_dict["report"])
        if "spending" in state_dict:
            self._spending = Spending.from_dict(state_dict["spending"])

    @property
    def placement(self) -> Placement:
        """Where the settings keep the model's decoder layers while it is pruned."""
        return Placement.DISK if self.offload else Placement.DEVICES if self.sharded else Placement.MEMORY

    def _only_trains_sharded(self, trainer: Trainer, module: CausalLMModule, data: TextDataModule) -> bool:
        """Return whether no rank ever needs the whole model, because this run trains and has nothing to prune."""
        return (
            isinstance(trainer.strategy, ModelParallelStrategy)
            and trainer.limit_train_batches != 0
            and (module.plan is not None or not self.config.removes_something)
            and not data.training.sampled_windows
            and module.source.can_be_read_by_layer
        )

    def _get_folder(self, trainer: Trainer) -> Path:
        return Path(self.stages) if self.stages else Path(trainer.default_root_dir) / UNFINISHED

    def _open_stages(self, trainer: Trainer) -> StageCache:
        is_rehearsal = trainer.fast_dev_run  # type: ignore[attr-defined]
        return StageCache(None if is_rehearsal else self._get_folder(trainer), trainer.strategy.root_device)

    def read_calibration_set(
        self, module: CausalLMModule, data: TextDataModule, dense: PreTrainedModel, config: PruningConfig
    ) -> CalibrationSet:
        """Read the calibration text that a config needs, with the accumulation of the first training epoch."""
        return CalibrationSet(
            data.calibration_batches(dense) if config.needs_text else [],
            accumulation=self.get_accumulate_grad_batches(0),
            seed=data.seed,
            corpora=tuple(data.calibration_sources) if config.needs_text else (),
            source=module.source.pretrained,
        )

    def _start(
        self,
        module: CausalLMModule,
        data: TextDataModule,
        dense: PreTrainedModel,
        stages: StageCache,
        config: PruningConfig,
    ) -> Pruner:
        pruner = Pruner(
            dense,
            self.read_calibration_set(module, data, dense, config),
            config,
            evaluation=data.evaluation_batches(),
            held_out=data.held_out_batches() if config.needs_text else (),
            stages=stages,
            counter=self._counter,
        )
        if isinstance(module.source, ModelInMemory):  # its weights may differ from the files that it names
            pruner.plan = replace(pruner.plan, fingerprint="")
        pruner.report.protocol = data.protocol
        return pruner

    def _resume(self, module: CausalLMModule, data: TextDataModule, share: float, stages: StageCache) -> Pruner:
        """Build a pruner that continues from the checkpoint's plan and spending."""
        assert module.plan is not None and self._spending is not None and self.report is not None
        settled = self.report.settings["repair"]["products"]  # settled by the run's first cut
        config = replace(self.config, repair=replace(self.config.repair, products=settled))
        pruner = self._start(module, data, module.source.load().to(module.device), stages, config)
        pruner.resume(module.model, module.plan, share, self._spending)
        pruner.report = self.report
        return pruner


def _tell(trainer: Trainer, hook: str) -> None:
    """Call a hook that Lightning does not know, on the callbacks that have it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (call := getattr(callback, hook, None)) is not None:
            call(trainer, trainer.lightning_module)
