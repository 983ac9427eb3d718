"""What a run did: measured stages as data and as a table."""

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
"""Tokens for which the size of the KV cache is shown."""


@dataclass(frozen=True)
class Stage:
    """A model as measured at one point of a run.

    Args:
        name: `dense`, `pruned`, `pruned, round 2` and so on, `recovered`.
        parameters: all parameters, tied ones once.
        decoder_parameters: parameters of the decoder layers.
        kv_cache_bytes_per_token: keys and values of one token, in the model's own type.
        perplexity: by corpus.
        weight_bytes: size of the weights.
        held_out: perplexity on text like that of calibration, which settings may be judged by; None if not measured.
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
    """A unit that carries massive activations, as calibration found it.

    Args:
        key: its block.
        unit: its index in the dense block.
        ratio: its largest output relative to that of the block's median unit.
    """

    key: BlockKey
    unit: int
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as reports hold them."""
        return asdict(self) | {"key": str(self.key)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Outlier":
        """What `to_dict` gave."""
        return cls(**dict(data) | {"key": BlockKey.parse(data["key"])})


@dataclass(frozen=True)
class LayerDamage:
    """What a layer's cut was predicted to cost and what it did, in nats per token, each as if it were the only one.

    Args:
        layer: its index.
        attention: predicted of its attention, after repair.
        mlp: predicted of its MLP, after repair.
        measured: of the layer as repair left it; None where that was not measured.
    """

    layer: int
    attention: float
    mlp: float
    measured: float | None = None

    def describe(self) -> str:
        """Both in words."""
        measured = "" if self.measured is None else f", measured {self.measured:.4f}"
        return f"damage predicted {self.attention + self.mlp:.4f}{measured} nats"


@dataclass
class Report:
    """The stages of a run, and what was asked of it.

    Args:
        model: name or folder of the dense model.
        settings: the pruning settings, as plain data.
        protocol: how the perplexities were measured, in words.
        stages: in the order they were measured.
        repairs: what repair did to each block, in the last cut.
        note: what else has to be known of the model, in a sentence.
        outliers: units that carry massive activations and were kept for it, as long as others were left.
        rounding: what whole units made of the request, in a sentence; empty where they came near enough.
        damages: what each layer's cut was predicted to cost and did, in the last cut; empty where the allocation did
            not ask.
        distillation: what training towards the dense model's predictions did, after the last cut; None where there was
            none.
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
        """Share of the rate's base that is gone in the last stage; None where the dense model was not measured."""
        if self.stages[0].name != "dense":
            return None
        base = "parameters" if self.settings.get("rate_base") == "all" else "decoder_parameters"
        before, after = getattr(self.stages[0], base), getattr(self.stages[-1], base)
        return float(1 - after / before)

    def add_stage(
        self, name: str, model: PreTrainedModel, evaluation: Evaluation, weight_bytes: int | None = None
    ) -> None:
        """Measure a model as the next stage; its counts are those of the stage before, if there is one.

        Training changes no shape, and parameters that are split over devices do not tell theirs. Their type may be
        another one, as a trainer's precision of `bf16-true` makes it.

        Args:
            name: of the stage.
            model: the causal LM.
            evaluation: corpus name -> batches of `input_ids` and `labels` to measure perplexity on.
            weight_bytes: size of its weights, if that is not the size of its parameters.

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
        """Plain types, as `report.json` holds them."""
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
        """What `to_dict` gave."""
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
        """What repair did to the blocks, in a sentence."""
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
        """Which units were protected, in a sentence: the strongest of them, and how many more."""
        strongest = sorted(self.outliers, key=lambda outlier: -outlier.ratio)
        named = [f"{outlier.key} unit {outlier.unit} ({outlier.ratio:,.0f}×)" for outlier in strongest[:3]]
        more = f" and {len(strongest) - 3} more" if len(strongest) > 3 else ""
        return f"outliers, removed last: {', '.join(named)}{more}; largest output against the block's median unit"

    def save(self, path: Path) -> None:
        """Write `report.json`, whole or not at all."""
        write_atomically(path, (json.dumps(self.to_dict(), indent=2) + "\n").encode())


def describe_model(
    name: str,
    model: PreTrainedModel,
    perplexity: Mapping[str, float],
    weight_bytes: int | None = None,
    held_out: float | None = None,
) -> Stage:
    """Count what a model holds; its weights' size is that of its parameters unless it is given."""
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
    """One row per quantity, one column per stage."""
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
    """The results as text: a quantity, and its value in every stage."""
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
    """What was asked and what was reached, in words."""
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
    """What became of the model, in a sentence: size, perplexity and KV cache; None before anything was cut."""
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
    """A relative change in parentheses; empty where there is none."""
    return "" if value == dense else f" ({value / dense - 1:+.1%})"
