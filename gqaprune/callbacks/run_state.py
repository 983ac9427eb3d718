"""What the callbacks of a run know together: each writes its own part, any of them may read it, in whatever order."""

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
        folder: where it is.
        format: one of `checkpoints.formats.FORMATS`.
        plan: from the dense model to it.
        quantization: of its weights, as it was asked for.
    """

    folder: Path
    format: str
    plan: PruningPlan | None
    quantization: str | None = None


@dataclass
class RunState:
    """One run, as its callbacks know it.

    Args:
        model_attribute: of modules of other classes, which holds the causal LM.
        calibration: batches to calibrate on, if the data module is of another class; None finds some.
        calibration_limit: training batches that are read for it at most.
        config: what is pruned and how; None where no callback prunes.
        placement: where the decoder layers are meanwhile.
        report: stages as measured; None before the first one.
        scores: of the last cut's units, but for outliers.
        importance: of the dense model's blocks.
        exported: the checkpoint, once it is written.
        guard: what the guard found, as `guard.json` holds it; None where there is no guard.
        samples: continuations of prompts at several steps.
        predictions: what `predict` wrote and how it was judged.
        module: of a module of another class, ours around its causal LM.
        data: likewise around another data module's text.
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
    """A callback that tells the others of its run what it is going to do, before any of them works."""

    def join(self, run: RunState) -> None:
        """Write into a run's state what is known before the run."""


_RUNS: "WeakKeyDictionary[Trainer, RunState]" = WeakKeyDictionary()


def get_run(trainer: Trainer) -> RunState:
    """The run of a trainer; all its callbacks have joined it."""
    if trainer not in _RUNS:
        run = _RUNS[trainer] = RunState()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, JoinsRun):
                callback.join(run)
    return _RUNS[trainer]
