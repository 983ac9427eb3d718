"""`sweep`: prune one model at several rates, to choose one; it is scored once, and cut and repaired for each rate.

Stages that do not depend on the rate (scores, damage, the dense model's perplexity) are kept in the sweep's folder and
reused for the next rate. Results of finished rates are kept as well, so that the same command resumes a stopped sweep.
"""

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import matplotlib.figure
import torch
from matplotlib.ticker import PercentFormatter
from rich.table import Table
from transformers import PreTrainedModel

from gqaprune.common.atomic_files import write_atomically
from gqaprune.common.distributed import get_rank_and_world_size
from gqaprune.common.json_files import read_json
from gqaprune.common.stage_cache import StageCache, describe_change
from gqaprune.data.calibration import CalibrationSet
from gqaprune.evaluation.perplexity import Evaluation
from gqaprune.pipeline import Pruner
from gqaprune.placement.model_hash import hash_model, hash_tensors
from gqaprune.plan import PruningPlan
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.preflight import check_reachable
from gqaprune.planning.selection import read_budget, select_blocks
from gqaprune.reporting.charts import SERIES, add_legend, make_figure, style_panel
from gqaprune.reporting.report import Stage, show_change

FORMAT = "gqaprune-sweep/1"
SWEEP_FILE = "sweep.json"
FIGURE_FILE = "sweep.png"
STAGES = "stages"


@dataclass(frozen=True)
class SweepSettings:
    """Which rates to try, and where to write the results.

    Args:
        rates: shares to remove, as `pruning.rate`, each above 0 and below 1 and all different; tried in this order.
        context: number of tokens in the KV cache for which decoding time is predicted, at least 0.
        export: write a checkpoint for every rate, into `rate-<rate>` in the folder.
        folder: folder for `sweep.json`, `sweep.png` and the checkpoints; a sweep resumes from its own results there.

    Raises:
        ValueError: if a setting is out of its bounds.
    """

    rates: tuple[float, ...] = (0.1, 0.2, 0.3)
    context: int = 8192
    export: bool = True
    folder: str = "lightning_logs/sweep"

    def __post_init__(self) -> None:
        if not self.rates or not all(0 < rate < 1 for rate in self.rates) or len(set(self.rates)) < len(self.rates):
            raise ValueError(
                f"sweep.rates must be different numbers between 0 and 1, got {list(self.rates)}; try 0.1,0.2,0.3"
            )
        if self.context < 0:
            raise ValueError(f"sweep.context must be at least 0 tokens, got {self.context}; try 8192")


class Sweep:
    """The results of a sweep, written to a file after each rate.

    Args:
        origin: everything that results depend on besides the rate, as plain data.
        path: the JSON file.
        context: number of tokens for which decoding time is predicted.

    Attributes:
        results: rate -> measured stage; 0 is the dense model.
    """

    def __init__(self, origin: Mapping[str, Any], path: Path, context: int) -> None:
        self.origin = json.loads(json.dumps(origin))
        self.path, self.context = path, context
        self.results: dict[float, Stage] = {}

    def read(self) -> None:
        """Read the results of an earlier sweep.

        Raises:
            ValueError: if the file is not a sweep, or has other settings.
        """
        data = read_json(self.path, "sweep")
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"found {data['format']!r}")
            origin = dict(data["origin"])
            results = {float(row.pop("rate")): Stage(**row) for row in map(dict, data["results"])}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is not a sweep of format {FORMAT!r} ({reprlib.repr(str(error))})") from None
        if origin != self.origin:
            raise ValueError(
                f"{self.path} belongs to a sweep with other settings: {describe_change(origin, self.origin)}; set "
                "sweep.folder to another folder"
            )
        self.results = results

    def add(self, rate: float, stage: Stage) -> None:
        """Add a result, and write the file."""
        self.results[rate] = stage
        if get_rank_and_world_size()[0] == 0:
            rows = [{"rate": rate, **asdict(stage)} for rate, stage in self.results.items()]
            data = {"format": FORMAT, "origin": self.origin, "results": rows}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, (json.dumps(data, indent=1) + "\n").encode())

    def predict_decoding(self, rate: float) -> float:
        """Predict the time per decoded token relative to the dense model, from the bytes of weights and KV cache."""
        before, after = (
            stage.weight_bytes + self.context * stage.kv_cache_bytes_per_token
            for stage in (self.results[0.0], self.results[rate])
        )
        return after / before


def sweep_rates(
    dense: PreTrainedModel,
    load: Callable[[], PreTrainedModel],
    calibration: CalibrationSet,
    config: PruningConfig,
    settings: SweepSettings,
    evaluation: Evaluation,
    held_out: Sequence[Mapping[str, torch.Tensor]],
    export: Callable[[PreTrainedModel, PruningPlan, Path], None] | None,
) -> Sweep:
    """Prune a model at every rate. In a process group rank 0 writes.

    Args:
        dense: the dense causal LM, on the device to work on, which is pruned first.
        load: loads the same model again, for every other rate.
        calibration: the text, and where it comes from.
        config: how to prune; its `rate` is replaced.
        settings: the rates and the folder.
        evaluation: corpus name -> batches of `input_ids` and `labels` to measure perplexity on.
        held_out: held-out calibration text.
        export: writes a pruned model into a folder; None writes none.

    Raises:
        ValueError: if a rate cannot be met, before any work, or if the results in the folder have other settings.
    """
    folder = Path(settings.folder)
    for rate in settings.rates:
        at_rate = replace(config, rate=rate)
        check_reachable(select_blocks(dense, at_rate), read_budget(dense, at_rate), at_rate)
    texts = [tensor for batches in evaluation.values() for batch in batches for tensor in batch.values()]
    origin = {
        "weights": hash_model(dense),
        "pruning": {**asdict(config), "rate": None},
        "calibration text": hash_tensors(calibration.batches),
        "test text": hash_tensors(texts),
    }
    sweep = Sweep(origin, folder / SWEEP_FILE, settings.context)
    if sweep.path.exists():
        sweep.read()
    stages = StageCache(folder / STAGES, dense.device, origin="from an earlier rate or run")
    left = [rate for rate in settings.rates if rate not in sweep.results]
    for rate in left:
        model = dense if rate == left[0] else load()
        pruner = Pruner(
            model, calibration, replace(config, rate=rate), evaluation=evaluation, held_out=held_out, stages=stages
        )
        pruner.measure("dense")
        sweep.add(0.0, pruner.report.stages[0])
        pruner.spend()
        if export is not None:
            export(pruner.model, pruner.plan, folder / f"rate-{rate:g}")
        sweep.add(rate, pruner.report.stages[-1])
        stages.forget("plan", "repair of", "distillation", "perplexity, pruned")
    stages.clear()
    return sweep


def build_sweep_table(sweep: Sweep, protocol: str = "") -> Table:
    """Build a table with one row per rate, the dense model first."""
    table = Table(title="by rate", caption=protocol or None, caption_style="dim", title_justify="left")
    corpora = list(sweep.results[0.0].perplexity)
    for name in ("rate", "parameters", "KV-cache bytes/token", f"decode @{sweep.context:,}", *corpora):
        table.add_column(name, justify="right", overflow="fold")
    for rate, stage in sorted(sweep.results.items()):
        dense = sweep.results[0.0]
        table.add_row(
            f"{rate:g}" if rate else "dense",
            f"{stage.parameters / 1e6:,.2f} M{show_change(stage.parameters, dense.parameters)}",
            f"{stage.kv_cache_bytes_per_token:,}"
            f"{show_change(stage.kv_cache_bytes_per_token, dense.kv_cache_bytes_per_token)}",
            f"{sweep.predict_decoding(rate):.2f}×",
            *(f"{stage.perplexity[name]:.2f}" for name in corpora),
        )
    return table


def draw_sweep(sweep: Sweep, title: str) -> matplotlib.figure.Figure:
    """Draw perplexity on each corpus over the rate, with KV cache and predicted decoding time below each rate."""
    dense, rates = sweep.results[0.0], sorted(sweep.results)
    figure = make_figure(title, 4.2)
    axes = figure.subplots()
    for corpus, color in zip(dense.perplexity, cycle(SERIES), strict=False):
        values = [sweep.results[rate].perplexity[corpus] for rate in rates]
        axes.plot(rates, values, marker="o", color=color, label=corpus)
    if min(after - before for before, after in pairwise(rates)) >= rates[-1] / 5:  # else the words would overlap
        axes.set_xticks(rates, [_describe_rate(sweep, rate) for rate in rates])
        others = f"\nKV cache and predicted decode time at {sweep.context:,} tokens: shares of the dense model's"
    else:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        others = ""
    axes.margins(x=0.08)
    style_panel(axes, x=f"share of parameters removed{others}", y="perplexity")
    if dense.perplexity:
        add_legend(axes, 1, "upper left")
    return figure


def _describe_rate(sweep: Sweep, rate: float) -> str:
    """Describe a rate and what it leaves of the dense model on short lines."""
    cache, whole = (sweep.results[one].kv_cache_bytes_per_token for one in (rate, 0.0))
    kept = {"KV cache": cache / (whole or 1), "decode time": sweep.predict_decoding(rate)}
    return (
        "\n".join([f"{100 * rate:.3g}%", *(f"{name} {share:.0%}" for name, share in kept.items())]) if rate else "dense"
    )
