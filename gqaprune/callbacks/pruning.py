"""Prune before fit, while Lightning has not built the optimizer yet; accumulate gradients during fit."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from gqaprune.checkpoint import check_tokenizer
from gqaprune.config import PruningConfig
from gqaprune.datamodules import TextDataModule
from gqaprune.module import CausalLMModule
from gqaprune.perplexity import measure_perplexity
from gqaprune.pipeline import prune
from gqaprune.report import Report, describe_model


class TaylorPruning(GradientAccumulationScheduler):
    """Scores units on calibration micro-batches and cuts the model in `setup`; then schedules gradient accumulation.

    In calibration, gate gradients are accumulated over windows of as many micro-batches as training accumulates in its
    first epoch. In training it is the `GradientAccumulationScheduler` it inherits from. It only wires: the path is
    `gqaprune.pipeline.prune`.

    Args:
        scheduling: epoch -> micro-batches per optimizer step, from that epoch on.
        settings: what to remove and how, the fields of `gqaprune.PruningConfig`.

    Raises:
        ValueError: if a setting is out of its bounds.

    Example::

        Trainer(callbacks=[TaylorPruning(scheduling={0: 4}, rate=0.2, allocation="global")])
    """

    def __init__(self, scheduling: dict[int, int] = {0: 1}, **settings: Any) -> None:  # noqa: B006
        super().__init__(dict(scheduling))
        self.config = PruningConfig(**settings)
        self.report: Report | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prune, unless the module already is: by a plan that it was given, or that its checkpoint carries."""
        if stage != "fit":
            return
        module, data = get_parts(trainer, pl_module)
        calibrates = module.plan is None and self.config.needs_text
        if calibrates:
            data.read_calibration_windows()  # missing text is said before a model is loaded
        module.load()
        model = module.model.to(trainer.strategy.root_device)
        check_tokenizer(data.tokenizer, model)
        if data.train_sampled_windows and trainer.limit_train_batches != 0:
            dense = model if module.plan is None else module.load_dense().to(trainer.strategy.root_device)
            data.sample_train_windows(dense)
        if module.plan is not None:
            perplexity = measure_perplexity(model, data.evaluation_batches(), "pruned")
            stages = [describe_model("pruned", model, perplexity)]
            self.report = Report(module.pretrained, protocol=data.protocol, stages=stages)
            return
        plan, self.report = prune(
            model,
            data.calibration_batches(model) if calibrates else [],
            self.config,
            accumulate=self.get_accumulate_grad_batches(0),
            evaluation=data.evaluation_batches(),
            source=module.pretrained,
            seed=data.seed,
            corpora=data.calibration_sources if calibrates else [],
        )
        self.report.protocol = data.protocol
        module.plan = plan


def get_parts(trainer: Trainer, pl_module: LightningModule) -> tuple[CausalLMModule, TextDataModule]:
    """The module and the streams, checked.

    Raises:
        ValueError: if they are not gqaprune's.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(pl_module, CausalLMModule) or not isinstance(data, TextDataModule):
        raise ValueError(
            "gqaprune's callbacks need trainer.fit(CausalLMModule(...), datamodule=TextDataModule(...)), got "
            f"{type(pl_module).__name__} and {type(data).__name__}"
        )
    return pl_module, data


def get_run_folder(trainer: Trainer) -> Path:
    """Where a run writes. Unlike `trainer.log_dir` this does not broadcast, so that one rank alone may ask."""
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return Path(next((folder for folder in folders if folder), trainer.default_root_dir))
