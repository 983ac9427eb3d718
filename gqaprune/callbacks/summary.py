"""Measure the recovered model and report the run: on the console, in TensorBoard, in files of the run's folder."""

import json
import os
import re
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from gqaprune.callbacks.lookup import get_run_folder, get_tensorboards
from gqaprune.callbacks.order import Phase
from gqaprune.callbacks.page import write_page
from gqaprune.callbacks.parts import get_parts
from gqaprune.callbacks.run_state import get_run
from gqaprune.checkpoints.card import describe_padding, write_card
from gqaprune.checkpoints.formats import FORMATS
from gqaprune.checkpoints.save import measure_weights
from gqaprune.common.console import console, keep_going
from gqaprune.common.provenance import get_command
from gqaprune.common.run_log import LOG_FILE
from gqaprune.models.loading import load_model
from gqaprune.models.sources import load_config
from gqaprune.models.wrapping import unwrap_model
from gqaprune.plan import PLAN_FILE, PruningPlan
from gqaprune.reporting.charts import save_figure
from gqaprune.reporting.figures import draw_importance, draw_plan
from gqaprune.reporting.page import PAGE_FILE
from gqaprune.reporting.report import REPORT_FILE, Report, Stage, build_table

FIGURE_FILE = "pruning.png"
FINAL = "ppl/final"
"""The metric by which TensorBoard compares runs: perplexity of the last stage."""


class RunSummary(Callback):
    """Writes plan, figure, report and page into the run's folder, logs to TensorBoard, prints the table and the paths.

    It writes the page, `report.html`, after pruning, at each validation, and when the run ends or is stopped.
    """

    phase: ClassVar = Phase.EXPORT

    def __init__(self) -> None:
        self._finished = False
        self._stages_logged = 0
        self._began = datetime.now().astimezone()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the plan, and the perplexity before and after pruning."""
        self._finished, self._stages_logged = False, 0
        report = get_run(trainer).report
        plan = get_parts(trainer, pl_module)[0].plan
        if report is None or plan is None or not trainer.is_global_zero:
            return
        for layer in range(plan.geometry.num_layers):
            damages = [damage.describe() for damage in report.damages if damage.layer == layer]
            console.print("  ".join([plan.describe_layer(layer), *damages]))
        console.print(plan.describe_ratio())
        if report.outliers:
            console.print(report.describe_outliers())
        if report.repairs:
            console.print(report.describe_repair())
        if report.distillation is not None:
            console.print(report.distillation.describe())
        self._write(trainer, report, plan)
        self._write_page(trainer, pl_module, "pruned, not trained yet")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write the report again if a further cut has changed it."""
        report, plan = get_run(trainer).report, get_parts(trainer, pl_module)[0].plan
        if trainer.is_global_zero and report is not None and plan is not None and report.stages[self._stages_logged :]:
            self._write(trainer, report, plan)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page at this step."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write_page(trainer, pl_module, f"in training, at step {trainer.global_step:,}")

    def _write_page(self, trainer: Trainer, pl_module: LightningModule, state: str) -> None:
        report = get_run(trainer).report
        is_rehearsal = trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.is_global_zero and report is not None and report.stages and not is_rehearsal:
            with keep_going(PAGE_FILE):
                write_page(trainer, pl_module, state, self._began)

    def _write(self, trainer: Trainer, report: Report, plan: PruningPlan) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = get_run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        with keep_going(PLAN_FILE):
            plan.save(folder / PLAN_FILE)
        with keep_going(FIGURE_FILE):
            save_figure(draw_plan(plan), folder / FIGURE_FILE)
        with keep_going(REPORT_FILE):
            report.save(folder / REPORT_FILE)
        new, self._stages_logged = report.stages[self._stages_logged :], len(report.stages)
        with keep_going("the plan in TensorBoard"):
            for stage in new:
                _log_perplexity(trainer, stage)
            if len(new) == len(report.stages):
                _lay_out_charts(trainer, report)
            for logger in get_tensorboards(trainer):
                logger.experiment.add_text("plan", _describe_plan(plan), trainer.global_step)
                logger.experiment.add_figure("pruning", draw_plan(plan), trainer.global_step)
            _log_scores(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the recovered model and finish."""
        _stop_progress_bar(trainer, pl_module)
        self._finish(trainer, pl_module)

    def _measure_quantized(self, trainer: Trainer, pl_module: LightningModule, report: Report) -> None:
        """Measure the exported checkpoint if its weights are quantised."""
        exported = get_run(trainer).exported
        if exported is None or exported.quantization is None:
            return
        module, data = get_parts(trainer, pl_module)
        remote = module.source.trust_remote_code
        if not hasattr(load_config(exported.folder, remote), "quantization_config"):
            return  # it could not be quantised, and the export has said so
        model = load_model(exported.folder, "auto", module.source.attn_implementation, remote).to(module.device)
        name = f"{report.stages[-1].name}, {exported.quantization}"
        report.add_stage(name, model, data.evaluation_batches(), measure_weights(exported.folder))
        if trainer.is_global_zero:
            _log_perplexity(trainer, report.stages[-1])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish if nothing was trained, or if a resumed run had no steps left to train."""
        if not self._finished:
            self._finish(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the judged predictions to a page."""
        if trainer.is_global_zero and get_run(trainer).predictions is not None:
            with keep_going(PAGE_FILE):
                path = write_page(trainer, pl_module, "texts of the model beside the dense one's", self._began)
                console.print(f"{'page':<14} {_shorten(path)}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write on the page why the run stopped; remove the run's folder if it has no results yet."""
        folder = get_run_folder(trainer)
        if not trainer.is_global_zero or not folder.is_dir():
            return
        if (folder / PLAN_FILE).exists():
            step = f" at step {trainer.global_step:,}" if trainer.global_step else ""
            is_error = isinstance(exception, Exception)  # else Ctrl-C or a signal
            reason = (
                f": {' '.join(str(exception).split()) or type(exception).__name__}" if is_error else " from outside"
            )
            self._write_page(trainer, pl_module, f"stopped{step}{reason}")
        _remove_if_empty(folder)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finished = True
        module, data = get_parts(trainer, pl_module)
        report, plan = get_run(trainer).report, module.plan
        if report is not None:
            if trainer.limit_train_batches != 0:
                report.add_stage("recovered", module.model, data.evaluation_batches())
                if trainer.is_global_zero:
                    _log_perplexity(trainer, report.stages[-1])
            self._measure_quantized(trainer, pl_module, report)
        if report is None or plan is None or not trainer.is_global_zero:
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            console.print(build_table(report))
            console.print("trainer.fast_dev_run: one batch of each kind was tried, and nothing was written")
            return
        folder = get_run_folder(trainer)
        with keep_going(REPORT_FILE):
            report.save(folder / REPORT_FILE)
        remarks: list[str] = []
        if (exported := get_run(trainer).exported) is not None:
            assert exported.plan is not None
            entry = FORMATS[exported.format]
            shapes = entry.read_shapes(unwrap_model(module.model).config)
            with keep_going("the checkpoint's model card with measurements"):
                write_card(exported.folder, exported.plan, exported.format, shapes, report, get_command())
            padding = describe_padding(plan.pruned_geometry, shapes, exported.plan.geometry)
            remarks = [remark for remark in (padding, entry.describe(exported.folder)) if remark]
        hparams = _flatten(report.settings | dict(pl_module.hparams))
        with keep_going("the end in TensorBoard"):
            for logger in get_tensorboards(trainer):
                if report.stages[-1].perplexity:
                    # The first validation corpus if there is one: settings may be chosen by it.
                    metric = next(iter(report.stages[-1].perplexity.values()))
                    logger.log_hyperparams(hparams, metrics={FINAL: metric})
                logger.save()
        self._write_page(trainer, pl_module, "finished")
        console.print(build_table(report))
        console.print(plan.describe_ratio())
        for remark in remarks:
            console.print(remark)
        _print_paths(trainer, folder)


def _remove_if_empty(folder: Path) -> None:
    """Remove a run's folder if it has nothing but its log and the empty event file that Lightning may have opened."""
    files = [file for file in folder.iterdir() if file.name != LOG_FILE]
    if len(files) <= 1 and all(file.name.startswith("events.out.tfevents") for file in files):  # others: earlier runs
        shutil.rmtree(folder)


def _stop_progress_bar(trainer: Trainer, pl_module: LightningModule) -> None:
    """End Lightning's display, which would otherwise overwrite the lines that are printed next."""
    bar = trainer.progress_bar_callback
    if bar is not None:
        bar.on_train_end(trainer, pl_module)
        bar.teardown(trainer, pl_module, "fit")


def _print_paths(trainer: Trainer, folder: Path) -> None:
    files = {
        "configuration": folder / "config.yaml",
        "plan": folder / PLAN_FILE,
        "figure": folder / FIGURE_FILE,
        "report": folder / REPORT_FILE,
        "page": folder / PAGE_FILE,
        "log": folder / LOG_FILE,
    }
    written = {name: _shorten(path) for name, path in files.items() if path.exists()}
    if get_tensorboards(trainer):
        written = {"TensorBoard": f"tensorboard --logdir {_shorten(folder)}", **written}
    if (exported := get_run(trainer).exported) is not None:
        needs = " (load with trust_remote_code=True)" if FORMATS[exported.format].needs_remote_code else ""
        written["checkpoint"] = f"{_shorten(exported.folder)}  {exported.format} format{needs}"
    for what, path in written.items():
        console.print(f"{what:<14} {path}")


def _log_perplexity(trainer: Trainer, stage: Stage) -> None:
    """Log `ppl/<corpus>/<stage>` for validation text and `ppl_test/<corpus>/<stage>` for test text."""
    metrics = {}
    for name, value in stage.perplexity.items():
        stream, corpus = name.split("/", 1)
        tag = f"{'ppl' if stream == 'val' else 'ppl_test'}/{corpus}"
        metrics[f"{tag}/{stage.name}"] = value
        if stage.name == "pruned" and stream == "val":  # the first point of the validation curve
            metrics[tag] = value
    with keep_going("perplexity in TensorBoard"):
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


def _lay_out_charts(trainer: Trainer, report: Report) -> None:
    """Add to TensorBoard, for each validation corpus, one chart of the loss and every stage's perplexity."""
    corpora = [name.split("/", 1)[1] for name in report.stages[0].perplexity if name.startswith("val/")]
    # Tags are regular expressions here, and TensorBoard has replaced characters that it does not accept in names.
    names = {corpus: re.sub(r"[^-/\w]", ".", corpus) for corpus in corpora}
    charts = {
        f"loss and perplexity, {corpus}": ["Multiline", ["^train/loss$", f"^ppl/{name}(/.*)?$"]]
        for corpus, name in names.items()
    }
    for logger in get_tensorboards(trainer) if charts else []:
        logger.experiment.add_custom_scalars({"dense, pruned, recovered": charts})


def _log_scores(trainer: Trainer) -> None:
    """Log a histogram of every block's scores, and a figure of the blocks' importance."""
    run = get_run(trainer)
    assert run.config is not None
    for logger in get_tensorboards(trainer):
        for key, score_U in run.scores.items():
            if not len(score_U):
                continue  # all of them are outliers
            logger.experiment.add_histogram(f"scores_{key.kind}/layer_{key.layer:02}", score_U, trainer.global_step)
        if run.importance:
            figure = draw_importance(run.importance, run.config.sensitivity.method)
            logger.experiment.add_figure("sensitivity", figure, trainer.global_step)


def _describe_plan(plan: PruningPlan) -> str:
    lines = [plan.describe_layer(layer) for layer in range(plan.geometry.num_layers)]
    return "\n".join(f"    {line}" for line in [*lines, plan.describe_ratio()])


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Convert values to numbers, strings and booleans, the only types that TensorBoard's hparams accept."""
    simple = (bool, int, float, str)
    return {
        name: value if isinstance(value, simple) else json.dumps(value, default=str)
        for name, value in values.items()
        if not name.startswith("_")  # Lightning's internal entries
    }


def _shorten(path: Path) -> str:
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
