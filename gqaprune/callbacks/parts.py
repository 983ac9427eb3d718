"""The module and the text that callbacks work on: gqaprune's own, or those of any other LightningModule."""

import math
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gqaprune.callbacks.run_state import RunState, get_run
from gqaprune.common.distributed import take_from_rank_0
from gqaprune.data.given_batches import read_given_batches
from gqaprune.data.prompts import Prompt
from gqaprune.data.sampling import BATCH
from gqaprune.datamodules import TextDataModule
from gqaprune.datamodules.config import CalibrationConfig, EvaluationConfig, TrainingConfig
from gqaprune.models.architecture import read_geometry
from gqaprune.models.tokenizer import load_tokenizer
from gqaprune.module import CausalLMModule
from gqaprune.placement.model_source import ModelInMemory
from gqaprune.plan import PruningPlan
from gqaprune.planning.costs.base import Text
from gqaprune.planning.stages import Work
from gqaprune.surgery.cut import apply_plan
from gqaprune.training.lightning_internals import get_train_batches, reads_from_module

_NAME_IT = (
    "name the attribute that holds one as TaylorPruning(model_attribute=...), pruning.model_attribute on the command "
    "line"
)


@runtime_checkable
class CalibrationSource(Protocol):
    """A module or data module that provides text to calibrate on."""

    def calibration_batches(self) -> Iterable[Any]:
        """Return batches of token ids: tensors `[batch, tokens]`, or mappings with `input_ids` and `attention_mask`."""


def get_parts(trainer: Trainer, pl_module: LightningModule) -> tuple[CausalLMModule, TextDataModule]:
    """Return the module and the data of a run: gqaprune's own, or wrappers around those of other classes.

    Raises:
        ValueError: if a module of another class has no causal LM at `model_attribute`.
    """
    run, data = get_run(trainer), trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(pl_module, CausalLMModule):
        module = pl_module
    else:
        module = run.module = _wrap(run, pl_module)
    if isinstance(data, TextDataModule):
        return module, data
    if run.data is None:
        run.data = _find_text(trainer, run, module, pl_module)
    return module, run.data


def _wrap(run: RunState, pl_module: LightningModule) -> CausalLMModule:
    held = find_causal_lm(pl_module, run.model_attribute)
    if held is None:
        raise ValueError(
            f"{type(pl_module).__name__} has no causal LM in .{run.model_attribute}: build it in __init__, setup or "
            f"configure_model, or {_NAME_IT}"
        )
    model = held.get_base_model() if isinstance(held, PeftModel) else held
    module = run.module if run.module is not None and run.module.model is model else CausalLMModule.wrap(model)
    module.adapters.view = held if isinstance(held, PeftModel) else None
    return module


def take_plan(module: CausalLMModule, plan: dict[str, Any] | None) -> None:
    """Give a module the plan of the checkpoint that the run resumes from, and cut a model that is in memory to it.

    Args:
        module: module, which keeps a plan that it has already.
        plan: plan in plain types; None changes nothing.

    Raises:
        ValueError: if the plan was made for another model.
    """
    if plan is None or module.plan is not None:
        return
    model = module.model if isinstance(module.source, ModelInMemory) else None  # others are cut when they are loaded
    module.plan, module.plan_is_from_checkpoint = PruningPlan.from_dict(plan), True
    if model is not None and read_geometry(model.config) != module.plan.pruned_geometry:
        apply_plan(model, module.plan)


def _find_text(trainer: Trainer, run: RunState, module: CausalLMModule, pl_module: LightningModule) -> "GivenText":
    holders = [one for one in (trainer.datamodule, pl_module) if one is not None]  # type: ignore[attr-defined]
    tokenizers = [getattr(holder, "tokenizer", None) for holder in holders]
    tokenizer = next((one for one in tokenizers if isinstance(one, PreTrainedTokenizerBase)), None)

    first = 1 if trainer.fast_dev_run else None  # type: ignore[attr-defined]
    limit = first or run.calibration_limit

    def read() -> list[Tensor]:
        with torch.random.fork_rng():  # so that training shuffles as it would without this
            if run.calibration is not None:
                return read_given_batches(run.calibration, first)
            for holder in holders:
                if isinstance(holder, CalibrationSource):
                    return read_given_batches(holder.calibration_batches(), first)
            return read_given_batches(get_train_batches(trainer), limit)

    return GivenText(module.source.pretrained, tokenizer, lambda: take_from_rank_0(read, trainer.strategy.root_device))


def uses_own_parts(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Return whether module and data module are gqaprune's, so that the settings of both are known."""
    return isinstance(pl_module, CausalLMModule) and isinstance(trainer.datamodule, TextDataModule)  # type: ignore[attr-defined]


def check_own_parts(
    trainer: Trainer, pl_module: LightningModule, what: str, data: LightningDataModule | None = None
) -> None:
    """Raise an error if module or data module are of other classes than gqaprune's.

    Args:
        trainer: trainer whose data module is checked.
        pl_module: the module.
        what: name of the feature that needs them, for the error.
        data: the data module, if the trainer does not have it yet.

    Raises:
        ValueError: with the classes it needs.
    """
    data = trainer.datamodule if data is None else data  # type: ignore[attr-defined]
    if not isinstance(pl_module, CausalLMModule) or not isinstance(data, TextDataModule):
        names = type(pl_module).__name__, type(data).__name__
        raise ValueError(f"{what} needs CausalLMModule and TextDataModule, got {' and '.join(names)}")


def find_causal_lm(pl_module: LightningModule, attribute: str) -> PreTrainedModel | PeftModel | None:
    """Return the causal LM of a module, without the wrapper of `torch.compile`; None if it has not been built yet.

    Args:
        pl_module: the module.
        attribute: name of the attribute that holds the causal LM; dots lead to attributes of attributes.

    Raises:
        ValueError: if the attribute holds something else.
    """
    try:
        model = attrgetter(attribute)(pl_module)
    except AttributeError:
        return None
    model = getattr(model, "_orig_mod", model)  # the wrapper runs this one, and compiles it anew after the cut
    if model is None or isinstance(model, (PreTrainedModel, PeftModel)):
        return model
    raise ValueError(
        f"{type(pl_module).__name__}.{attribute} is a {type(model).__name__}, not a causal LM of transformers: "
        f"{_NAME_IT}"
    )


def read_work(trainer: Trainer, data: TextDataModule, trains: bool) -> Work:
    """Compute from the settings what a run calibrates on, samples from the model and trains on."""
    calibration, training = data.calibration, data.training
    windows = (calibration.windows or 0) + calibration.sampled_windows
    written = calibration.sampled_windows * calibration.window
    written += training.sampled_windows * training.window if trains else 0
    document = min(data.sampling.document, calibration.window)
    tokens = training.tokens and training.tokens * (trainer.max_epochs or 1)
    return Work(
        Text(windows, calibration.window, calibration.batch_size),
        Text(math.ceil(written / document), document, BATCH) if written else None,
        trains,
        Text(tokens // training.window, training.window, training.batch_size) if tokens and trains else None,
    )


class GivenText(TextDataModule):
    """The text of another project: its calibration batches, and its tokenizer if it has one. Nothing is evaluated.

    Args:
        tokenizer: name of the model, whose tokenizer is used if `given` is None.
        given: tokenizer of the module or data module.
        read: function that reads the calibration batches.
        seed: seed of the order in which the batches are scored.
    """

    def __init__(
        self, tokenizer: str, given: PreTrainedTokenizerBase | None, read: Callable[[], list[Tensor]], seed: int = 0
    ) -> None:
        super().__init__(
            tokenizer,
            calibration=CalibrationConfig(corpora=[], held_out_windows=0),
            training=TrainingConfig(corpora=[]),
            evaluation=EvaluationConfig(val=[], test=[]),
            seed=seed,
        )
        self._tokenizer = given
        self._read = read
        self._batches: list[Tensor] | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer; None if none is found."""
        if self._tokenizer is None and self.tokenizer_source:
            try:
                self._tokenizer = load_tokenizer(self.tokenizer_source, trust_remote_code=False)
            except ValueError:
                self.tokenizer_source = ""
        return self._tokenizer

    @property
    def protocol(self) -> str:
        """An empty string, because nothing is measured."""
        return ""

    @property
    def calibration_sources(self) -> list[str]:
        """The source of the text, as the plan records it."""
        return ["given batches"]

    def encode_prompts(self) -> list[tuple[Prompt, dict[str, Tensor]]]:
        """Return an empty list: there are no prompts."""
        return []

    def calibration_batches(self, model: PreTrainedModel | None = None) -> list[Tensor]:
        """Return token ids, each `[batch, tokens]`; every rank gets those of rank 0."""
        if self._batches is None:
            self._batches = self._read()
        return self._batches


def can_be_pruned_yet(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Return whether a module of another class has its causal LM and its text already before its `setup`."""
    run, data = get_run(trainer), trainer.datamodule  # type: ignore[attr-defined]
    has_text = run.calibration is not None or data is not None or not reads_from_module(trainer)
    return has_text and find_causal_lm(pl_module, run.model_attribute) is not None
