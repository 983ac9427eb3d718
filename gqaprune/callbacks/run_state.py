"""State that the callbacks of a run share: each writes its own part, and all of them read it, in any order."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from lightning.pytorch import Callback, Trainer

from gqaprune.datamodules import TextDataModule
from gqaprune.evaluation.predictions import Predictions
from gqaprune.module import CausalLMModule
from gqaprune.placement.layer_store import Placement
from gqaprune.plan import PruningPlan
from gqaprune.planning.config import PruningConfig
from gqaprune.reporting.page import Sample
from gqaprune.reporting.report import Report
from gqaprune.scoring.criteria.base import Scores
from gqaprune.scoring.sensitivity import Importance


@dataclass(frozen=True)
class Exported:
    """A checkpoint that was written.

    Args:
        folder: folder of the checkpoint.
        format: one of `checkpoints.formats.FORMATS`.
        plan: plan that turns the dense model into this one.
        quantization: quantization of its weights that was asked for.
    """

    folder: Path
    format: str
    plan: PruningPlan | None
    quantization: str | None = None


@dataclass
class RunState:
    """The state of one run that its callbacks share.

    Args:
        model_attribute: attribute of a module of another class that holds the causal LM.
        calibration: batches to calibrate on if the data module is of another class; None looks for some.
        calibration_limit: largest number of training batches to calibrate on.
        config: what is pruned and how; None if no callback prunes.
        placement: where the decoder layers are during pruning.
        report: the measured stages; None before the first one.
        scores: scores of the last cut's units, without outliers.
        importance: importance of the dense model's blocks.
        exported: the checkpoint, once it is written.
        guard: content of `guard.json`; None if there is no guard.
        samples: continuations of prompts at several steps.
        predictions: texts that `predict` wrote, with their verdicts.
        module: `CausalLMModule` around the causal LM of a module of another class.
        data: `TextDataModule` around the text of a data module of another class.
    """

    model_attribute: str = "model"
    calibration: Iterable[Any] | None = None
    calibration_limit: int = 64
    config: PruningConfig | None = None
    placement: Placement = Placement.MEMORY
    report: Report | None = None
    scores: Scores = field(default_factory=dict)
    importance: Importance = field(default_factory=dict)
    exported: Exported | None = None
    guard: Mapping[str, Any] | None = None
    samples: Sequence[Sample] = ()
    predictions: Predictions | None = None
    module: CausalLMModule | None = None
    data: TextDataModule | None = None


@runtime_checkable
class JoinsRun(Protocol):
    """A callback that shares its settings with the others of its run, before any of them works."""

    def join(self, run: RunState) -> None:
        """Write the settings that are known before the run into its state."""


_RUNS: "WeakKeyDictionary[Trainer, RunState]" = WeakKeyDictionary()


def get_run(trainer: Trainer) -> RunState:
    """Return the run state of a trainer, which all its callbacks have joined."""
    if trainer not in _RUNS:
        run = _RUNS[trainer] = RunState()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, JoinsRun):
                callback.join(run)
    return _RUNS[trainer]
