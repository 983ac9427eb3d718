"""Stop before money is spent on a broken model: watch perplexity on held-out windows and explain why it exploded."""

import json
import math
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gqaprune.callbacks.lookup import get_run_folder
from gqaprune.callbacks.order import Phase
from gqaprune.callbacks.parts import GivenText, get_parts
from gqaprune.callbacks.run_state import RunState, get_run
from gqaprune.common.atomic_files import write_atomically
from gqaprune.common.console import console, keep_going
from gqaprune.datamodules import TextDataModule
from gqaprune.evaluation.diagnosis import Diagnosis, build_diagnosis_table, diagnose
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.dtypes import read_dtype
from gqaprune.models.wrapping import is_sharded
from gqaprune.module import CausalLMModule
from gqaprune.placement.layer_store import find_store
from gqaprune.plan import PLAN_FILE
from gqaprune.reporting.report import REPORT_FILE, Report

GUARD_FILE = "guard.json"


class PerplexityGuard(Callback):
    """Warns or stops after pruning, and at each validation, when perplexity is too far above the dense model's.

    It measures `data.calibration.held_out_windows`, text that is not used for calibration. When it fires, it loads the
    dense model again, undoes one possible cause after another, and prints the cause that explains most of the loss and
    the setting to change; it writes all of this to `guard.json` in the run's folder, beside the plan. If a strategy
    shards the model, or its layers are on disk, it fires without a diagnosis. If it has nothing to measure or nothing
    to compare with, it prints why it is off.

    Args:
        warn_ratio: multiple of the dense model's perplexity at which it warns, above 1.
        stop_ratio: multiple of the dense model's perplexity at which it stops the run, at least `warn_ratio`.
        max_perplexity: perplexity at which it stops the run if the dense model's is lower; above 1.
        diagnoses: whether to look for the cause.

    Attributes:
        facts: the content of `guard.json`; empty until the guard fires.

    Raises:
        ValueError: if a bound is out of range.
    """

    phase: ClassVar = Phase.WORK

    def __init__(
        self,
        warn_ratio: float = 3.0,
        stop_ratio: float = 10.0,
        max_perplexity: float = 100.0,
        diagnoses: bool = True,
    ) -> None:
        if not 1 < warn_ratio <= stop_ratio:
            raise ValueError(
                f"guard needs 1 < warn_ratio <= stop_ratio, got {warn_ratio} and {stop_ratio}; try 3 and 10"
            )
        if max_perplexity <= 1:
            raise ValueError(f"guard.max_perplexity must be above 1, got {max_perplexity}; try 100")
        self.warn_ratio, self.stop_ratio, self.max_perplexity = warn_ratio, stop_ratio, max_perplexity
        self.diagnoses = diagnoses
        self.diagnosis: Diagnosis | None = None
        self.facts: dict[str, Any] = {}

    def join(self, run: RunState) -> None:
        """Share `facts` with the run, so that its page shows them."""
        run.guard = self.facts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print that the guard is off if no callback prunes."""
        if stage == "fit" and get_run(trainer).config is None and trainer.is_global_zero:
            console.print("PerplexityGuard is off: no callback prunes, so there is no dense perplexity to compare with")

    def on_after_pruning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier results and judge the pruned model."""
        self.diagnosis = None
        self.facts.clear()
        report = _get_report(trainer)
        if trainer.is_global_zero and (reason := _find_reason_for_silence(trainer, pl_module)):
            console.print(f"PerplexityGuard is off: {reason}", markup=False)
        if report is not None and report.stages[-1].held_out is not None:
            self._judge(trainer, pl_module, report, report.stages[-1].held_out, is_trained=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print that training is not judged if there is no validation."""
        report = _get_report(trainer)
        is_on = report is not None and report.stages[0].held_out is not None
        validates = is_on and trainer.enable_validation and bool(get_parts(trainer, pl_module)[1].corpora["val"])
        if is_on and not validates and trainer.is_global_zero:
            console.print(
                "PerplexityGuard judges the model after pruning but not during training, because there is no "
                "validation: name a corpus in data.evaluation.val and leave trainer.limit_val_batches above 0"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the model at this step of training."""
        report = _get_report(trainer)
        if trainer.sanity_checking or report is None or report.stages[0].held_out is None:
            return
        module, data = get_parts(trainer, pl_module)
        perplexity = measure_perplexity(module.model, {"text": data.held_out_batches()}, "guard")["text"]
        self._judge(trainer, pl_module, report, perplexity, is_trained=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the plan of a cut model that could not be measured, and print where its values are not finite."""
        report = _get_report(trainer)
        if report is None or report.stages[-1].name != "dense" or not isinstance(exception, ValueError):
            return
        module, data = get_parts(trainer, pl_module)
        if module.plan is not None and not module.plan.removes_nothing and trainer.is_global_zero:
            if self.diagnoses and find_store(module.model).is_in_memory and trainer.world_size == 1:
                self.diagnosis = _diagnose(module, data, is_trained=False)
                console.print(f"PerplexityGuard: {self.diagnosis.describe()}")
            self._write(trainer, module, report, {"error": str(exception), "stopped": True})

    def _judge(
        self, trainer: Trainer, pl_module: LightningModule, report: Report, perplexity: float, is_trained: bool
    ) -> None:
        dense = report.stages[0].held_out
        assert dense is not None
        ratio = perplexity / dense
        is_over = dense < self.max_perplexity < perplexity
        if ratio < self.warn_ratio and not is_over:
            return
        stops = ratio >= self.stop_ratio or is_over
        module, data = get_parts(trainer, pl_module)
        is_whole = not is_sharded(module.model) and find_store(module.model).is_in_memory
        # The cause of an earlier warning may differ from the cause of the stop.
        if self.diagnoses and is_whole and (self.diagnosis is None or stops):
            self.diagnosis = _diagnose(module, data, is_trained)
        found = f"; {self.diagnosis.describe()}" if self.diagnosis is not None else ""
        when = f"at step {trainer.global_step}" if is_trained else "after pruning"
        bound = f"perplexity {self.max_perplexity:g}" if is_over else f"{self.stop_ratio:g} times"
        sentence = (
            f"{when} the perplexity on held-out calibration text is {perplexity:,.2f}, {ratio:,.1f} times the dense "
            f"model's {dense:,.2f}"
        )
        if trainer.is_global_zero:
            self._write(trainer, module, report, {"perplexity": perplexity, "dense": dense, "stopped": stops})
        if stops:
            folder = trainer.strategy.broadcast(str(get_run_folder(trainer)))  # other ranks number their folders anew
            raise ValueError(
                f"PerplexityGuard: {sentence} (it stops at {bound}){found}; the plan is in {folder} and finished "
                "stages are kept; to continue all the same, raise guard.stop_ratio or guard.max_perplexity"
            )
        if trainer.is_global_zero:
            console.print(f"PerplexityGuard: {sentence} (it warns at {self.warn_ratio:g} times){found}")

    def _write(self, trainer: Trainer, module: CausalLMModule, report: Report, facts: dict[str, Any]) -> None:
        """Write plan, report and diagnosis to the run's folder, and print the diagnosis."""
        folder = get_run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        assert module.plan is not None
        with keep_going(PLAN_FILE):
            module.plan.save(folder / PLAN_FILE)
        with keep_going(REPORT_FILE):
            report.save(folder / REPORT_FILE)
        if self.diagnosis is not None:
            facts["diagnosis"] = self.diagnosis.to_dict()
            console.print(build_diagnosis_table(self.diagnosis))
        self.facts.update(facts)
        with keep_going(GUARD_FILE):
            write_atomically(folder / GUARD_FILE, (json.dumps(_make_plain(facts), indent=2) + "\n").encode())


def _make_plain(value: Any) -> Any:
    """Replace numbers that are not finite by null, because JSON cannot express them."""
    if isinstance(value, dict):
        return {key: _make_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_make_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _diagnose(module: CausalLMModule, data: TextDataModule, is_trained: bool) -> Diagnosis:
    assert module.plan is not None
    with torch.inference_mode(False), torch.enable_grad():  # validation disables gradients, and scores need them
        dense = module.source.load().to(module.model.device)
        made_for = read_dtype(module.source.read_config())
        return diagnose(dense, module.model, module.plan, data.held_out_batches(), made_for, is_trained)


def _get_report(trainer: Trainer) -> Report | None:
    """Return the report if this run pruned; None if it was given a plan, or removes nothing."""
    report = get_run(trainer).report
    return report if report is not None and report.stages and report.stages[0].name == "dense" else None


def _find_reason_for_silence(trainer: Trainer, pl_module: LightningModule) -> str:
    """Return why nothing is judged; empty if it is judged, is switched off by a setting, or the run is resumed."""
    run = get_run(trainer)
    assert run.config is not None, "a callback has pruned"
    if run.report is None or not run.report.stages:
        return ""
    if run.report.stages[0].name != "dense":
        return "the plan was given, so the dense model is not measured"
    data = get_parts(trainer, pl_module)[1]
    settings = data.calibration
    if isinstance(data, GivenText):
        return "it measures held-out calibration windows, which only a TextDataModule has"
    if run.report.stages[0].held_out is not None or not settings.held_out_windows:
        return ""
    if not run.config.needs_text:
        return "these settings need no calibration text, so there are no held-out windows to measure"
    if not settings.corpora:
        return "data.calibration.corpora is empty, so there are no held-out windows to measure"
    return (
        f"the calibration corpora fill only one window of {settings.window} tokens: add text to "
        "data.calibration.corpora or shorten data.calibration.window"
    )
