"""The results of a run: measured stages as data and as a table."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from gqaprune.common.atomic_files import write_atomically
from gqaprune.evaluation.perplexity import Evaluation, measure_perplexity
from gqaprune.models.architecture import (
    count_layer_parameters,
    count_parameters,
    measure_parameter_size,
    read_geometry,
)
from gqaprune.plan import BlockKey
from gqaprune.surgery.distillation import Distillation
from gqaprune.surgery.repair import BlockRepair

REPORT_FILE = "report.json"
CONTEXTS = (8_192, 32_768)
"""Numbers of tokens for which the size of the KV cache is shown."""


@dataclass(frozen=True)
class Stage:
    """A model as measured at one point of a run.

    Args:
        name: `dense`, `pruned`, `pruned, round 2` and so on, `recovered`.
        parameters: all parameters, tied ones once.
        decoder_parameters: parameters of the decoder layers.
        kv_cache_bytes_per_token: bytes of the keys and values of one token, in the model's type.
        perplexity: perplexity by corpus.
        weight_bytes: size of the weights.
        held_out: perplexity on held-out calibration text, by which settings may be judged; None if not measured.
        kv_heads: KV heads of all layers; 0 if not counted.
    """

    name: str
    parameters: int
    decoder_parameters: int
    kv_cache_bytes_per_token: int
    perplexity: Mapping[str, float] = field(default_factory=dict)
    weight_bytes: int = 0
    held_out: float | None = None
    kv_heads: int = 0


@dataclass(frozen=True)
class Outlier:
    """A unit that carries massive activations, found in calibration.

    Args:
        key: block of the unit.
        unit: index in the dense block.
        ratio: its largest output relative to that of the block's median unit.
    """

    key: BlockKey
    unit: int
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """Convert it to plain types, for reports."""
        return asdict(self) | {"key": str(self.key)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Outlier":
        """Build it from the result of `to_dict`."""
        return cls(**dict(data) | {"key": BlockKey.parse(data["key"])})


@dataclass(frozen=True)
class LayerDamage:
    """Predicted and measured damage of cutting one layer alone, in nats per token.

    Args:
        layer: index of the layer.
        attention: predicted damage of its attention, after repair.
        mlp: predicted damage of its MLP, after repair.
        measured: measured damage of the layer after repair; None if it was not measured.
    """

    layer: int
    attention: float
    mlp: float
    measured: float | None = None

    def describe(self) -> str:
        """Describe predicted and measured damage in words."""
        measured = "" if self.measured is None else f", measured {self.measured:.4f}"
        return f"damage predicted {self.attention + self.mlp:.4f}{measured} nats"


@dataclass
class Report:
    """The stages of a run, and its settings.

    Args:
        model: name or folder of the dense model.
        settings: the pruning settings, as plain data.
        protocol: description of how perplexities were measured.
        stages: stages in the order in which they were measured.
        repairs: result of repair for each block, in the last cut.
        note: a further remark about the model, in a sentence.
        outliers: units with massive activations, which are removed last.
        rounding: difference between the request and whole units, in a sentence; empty if it is small.
        damages: predicted and measured damage of each layer's cut, in the last cut; empty if the allocation does not
            use it.
        distillation: result of training towards the dense model's predictions, after the last cut; None without it.
    """

    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    protocol: str = ""
    stages: list[Stage] = field(default_factory=list)
    repairs: list[BlockRepair] = field(default_factory=list)
    note: str = ""
    outliers: list[Outlier] = field(default_factory=list)
    rounding: str = ""
    damages: list[LayerDamage] = field(default_factory=list)
    distillation: Distillation | None = None

    @property
    def rate_reached(self) -> float | None:
        """Share of the rate's base that is removed in the last stage; None if the dense model was not measured."""
        if self.stages[0].name != "dense":
            return None
        base = "parameters" if self.settings.get("rate_base") == "all" else "decoder_parameters"
        before, after = getattr(self.stages[0], base), getattr(self.stages[-1], base)
        return float(1 - after / before)

    def add_stage(
        self, name: str, model: PreTrainedModel, evaluation: Evaluation, weight_bytes: int | None = None
    ) -> None:
        """Measure a model as the next stage; counts are taken from the stage before, if there is one.

        Training changes no shapes, and sharded parameters do not show theirs. The type of the parameters may change,
        for example with a trainer's precision of `bf16-true`.

        Args:
            name: name of the stage.
            model: the causal LM.
            evaluation: corpus name -> batches of `input_ids` and `labels` to measure perplexity on.
            weight_bytes: size of its weights, if it differs from the size of its parameters.

        Raises:
            ValueError: if a perplexity is not finite.
        """
        perplexity = measure_perplexity(model, evaluation, name)
        if not self.stages:
            self.stages.append(describe_model(name, model, perplexity, weight_bytes))
            return
        last = self.stages[-1]
        cache = last.kv_cache_bytes_per_token
        if weight_bytes is None:
            weight_bytes = round(last.parameters * measure_parameter_size(model))
            cache = read_geometry(model.config).kv_cache_bytes_per_token(model.dtype.itemsize)
        self.stages.append(
            replace(
                last,
                name=name,
                kv_cache_bytes_per_token=cache,
                perplexity=perplexity,
                weight_bytes=weight_bytes,
                held_out=None,
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert it to plain types, for `report.json`."""
        stages = [asdict(stage) for stage in self.stages]
        return {
            "model": self.model,
            "settings": self.settings,
            "protocol": self.protocol,
            "note": self.note,
            "rate_reached": self.rate_reached,
            "stages": stages,
            "repairs": [repair.to_dict() for repair in self.repairs],
            "outliers": [outlier.to_dict() for outlier in self.outliers],
            "rounding": self.rounding,
            "distillation": self.distillation and asdict(self.distillation),
            "damages": [asdict(damage) for damage in self.damages],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """Build it from the result of `to_dict`."""
        repairs = [BlockRepair.from_dict(repair) for repair in data["repairs"]]
        stages = [Stage(**stage) for stage in data["stages"]]
        outliers = [Outlier.from_dict(outlier) for outlier in data["outliers"]]
        return cls(
            data["model"],
            dict(data["settings"]),
            data["protocol"],
            stages,
            repairs,
            data["note"],
            outliers,
            data.get("rounding", ""),
            [LayerDamage(**damage) for damage in data.get("damages", [])],
            Distillation(**data["distillation"]) if data.get("distillation") else None,
        )

    def describe_repair(self) -> str:
        """Describe the result of repair in a sentence."""
        better = [repair for repair in self.repairs if repair.ridge is not None]
        before, after = (
            sum(getattr(repair, name) for repair in self.repairs) / len(self.repairs)
            for name in ("error_before", "error_after")
        )
        sentence = (
            f"repair: {len(better)} of {len(self.repairs)} blocks refitted; their mean error on held-out calibration "
            f"windows {before:.1%} → {after:.1%}"
        )
        refinements = [repair.refinement for repair in self.repairs if repair.refinement is not None]
        if not refinements:
            return sentence
        kept = [refinement for refinement in refinements if refinement.is_kept]
        before = sum(refinement.error_before for refinement in refinements) / len(refinements)
        after = sum(refinement.error_after for refinement in refinements) / len(refinements)
        return f"{sentence}; {len(kept)} of {len(refinements)} MLPs refined, {before:.1%} → {after:.1%}"

    def describe_outliers(self) -> str:
        """Describe the outliers in a sentence: the strongest of them, and the number of others."""
        strongest = sorted(self.outliers, key=lambda outlier: -outlier.ratio)
        named = [f"{outlier.key} unit {outlier.unit} ({outlier.ratio:,.0f}×)" for outlier in strongest[:3]]
        more = f" and {len(strongest) - 3} more" if len(strongest) > 3 else ""
        return f"outliers, removed last: {', '.join(named)}{more}; × the largest output of the block's median unit"

    def save(self, path: Path) -> None:
        """Write `report.json`, atomically."""
        write_atomically(path, (json.dumps(self.to_dict(), indent=2) + "\n").encode())


def describe_model(
    name: str,
    model: PreTrainedModel,
    perplexity: Mapping[str, float],
    weight_bytes: int | None = None,
    held_out: float | None = None,
) -> Stage:
    """Count a model's parameters and units; the size of its weights is computed unless it is given."""
    parameters, geometry = count_parameters(model), read_geometry(model.config)
    return Stage(
        name=name,
        parameters=parameters,
        decoder_parameters=sum(count_layer_parameters(model)),
        kv_cache_bytes_per_token=geometry.kv_cache_bytes_per_token(model.dtype.itemsize),
        perplexity=dict(perplexity),
        weight_bytes=round(parameters * measure_parameter_size(model)) if weight_bytes is None else weight_bytes,
        held_out=held_out,
        kv_heads=sum(geometry.kv_heads),
    )


def build_table(report: Report) -> Table:
    """Build a table with one row per quantity and one column per stage."""
    table = Table(
        title=describe_request(report),
        caption="; ".join(filter(None, (report.rounding, report.protocol, report.note))) or None,
        caption_style="dim",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for stage in report.stages:
        table.add_column(stage.name, justify="right", overflow="fold")
    for label, cells in list_rows(report):
        table.add_row(label, *cells)
    return table


def list_rows(report: Report) -> list[tuple[str, list[str]]]:
    """List the results as text: a quantity, and its value in every stage."""
    rows = []
    for label, name, divisor, pattern in (
        ("parameters", "parameters", 1e6, "{:,.2f} M"),
        ("decoder parameters", "decoder_parameters", 1e6, "{:,.2f} M"),
        ("weights", "weight_bytes", 1e6, "{:,.1f} MB"),
        ("KV-cache bytes/token", "kv_cache_bytes_per_token", 1, "{:,.0f}"),
        *((f"KV cache, {n:,} tokens", "kv_cache_bytes_per_token", 1e6 / n, "{:,.1f} MB") for n in CONTEXTS),
    ):
        counts = [getattr(stage, name) for stage in report.stages]
        rows.append((label, [pattern.format(n / divisor) + show_change(n, counts[0]) for n in counts]))
    for corpus in report.stages[0].perplexity:
        values = (stage.perplexity.get(corpus) for stage in report.stages)
        rows.append((f"ppl {corpus}", ["–" if value is None else f"{value:.2f}" for value in values]))
    return rows


def describe_request(report: Report) -> str:
    """Describe the requested and the reached rates in words."""
    if report.rate_reached is None:
        return "pruned by a given plan"
    rate, kv_rate = report.settings["rate"], report.settings.get("kv_rate", 0.0)
    parts = []
    if rate or not kv_rate:
        base = "all parameters" if report.settings.get("rate_base") == "all" else "decoder-layer parameters"
        parts.append(f"{rate:.2%} of {base}, removed {report.rate_reached:.2%}")
    if kv_rate:
        ends = (report.stages[i] for i in (0, -1))
        before, after = (stage.kv_heads or stage.kv_cache_bytes_per_token for stage in ends)  # bytes follow the type
        parts.append(f"{kv_rate:.2%} of the KV heads, removed {1 - after / before:.2%}")
    return f"asked to remove {'; '.join(parts)}"


def describe_verdict(report: Report) -> str | None:
    """Describe the change of size, perplexity and KV cache in a sentence; None before anything was cut."""
    if len(report.stages) < 2:
        return None
    dense, last = report.stages[0], report.stages[-1]
    if dense.name != "dense":
        return None
    parts = [f"{1 - last.parameters / dense.parameters:.1%} fewer parameters"]
    both = [name for name in last.perplexity if name in dense.perplexity]
    tested = [name for name in both if name.startswith("test/")] or both
    if tested:
        ratios = [f"{last.perplexity[name] / dense.perplexity[name]:.2f}" for name in tested]
        names = " and ".join(name.partition("/")[2] for name in tested)
        parts.append(f"{' and '.join(ratios)} times the perplexity on {names}")
    before, after = (stage.kv_heads or stage.kv_cache_bytes_per_token for stage in (dense, last))
    parts.append("the same KV cache" if before == after else f"a KV cache {1 - after / before:.1%} smaller")
    return ", ".join(parts)


def show_change(value: float, dense: float) -> str:
    """Format a relative change in parentheses; empty if there is none."""
    return "" if value == dense else f" ({value / dense - 1:+.1%})"
