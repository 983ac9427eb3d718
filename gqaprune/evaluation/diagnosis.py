"""Diagnose why pruning broke a model, by undoing possible causes one at a time on the dense model.

A cause explains the share of the lost log-perplexity that undoing it restores. Causes are tried from the most specific
to the least: a few outliers, the choice of units, repair, attention, single layers. The first that explains half is the
verdict; if none does, it is the rate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.precision import multiply_exactly
from gqaprune.evaluation.gated_plan import GatedPlan, measure_perplexity_or_infinity
from gqaprune.models.architecture import get_layers, name_parameter_place
from gqaprune.models.dtypes import name_dtype
from gqaprune.models.gates import Gates, freeze_parameters
from gqaprune.models.layerwise import embed_batches, run_layer
from gqaprune.plan import PruningPlan
from gqaprune.scoring.outliers import find_outliers
from gqaprune.scoring.scores import score_units

EXPLAINS = 0.5
"""Share of the lost log-perplexity that undoing a cause must restore to be the verdict."""
_LAYER_BATCHES = 2
"""Batches on which layers are restored one at a time."""

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Finding:
    """One possible cause.

    Args:
        cause: name of the cause: `not finite`, `dtype`, `wrong cut`, `outliers`, `choice`, `repair`, `attention`,
            `layers`, `rate`.
        sentence: description in a sentence.
        setting: setting to change.
        perplexity: perplexity with the cause undone; None if it is not measured.
        explains: share of the lost log-perplexity that this restores; None if it is not measured.
    """

    cause: str
    sentence: str
    setting: str
    perplexity: float | None = None
    explains: float | None = None


@dataclass
class Diagnosis:
    """Possible causes of a pruned model's loss, measured on held-out windows.

    Args:
        dense: perplexity of the dense model.
        pruned: perplexity of the pruned model.
        cut: perplexity of the plan's cut without repair; None if it was not measured.
        findings: possible causes, in the order in which they were tried.
        layers: perplexity of the cut with one layer restored, by layer, on fewer windows.
        verdict: the finding that explains the loss.
    """

    dense: float
    pruned: float
    cut: float | None = None
    findings: list[Finding] = field(default_factory=list)
    layers: dict[int, float] = field(default_factory=dict)
    verdict: Finding | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert it to plain types, for `guard.json`."""
        return asdict(self)

    def describe(self) -> str:
        """Describe the verdict in words."""
        assert self.verdict is not None
        return f"{self.verdict.sentence}; {self.verdict.setting}"


@multiply_exactly()
def diagnose(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    plan: PruningPlan,
    batches: Batches,
    made_for: torch.dtype | None = None,
    is_trained: bool = False,
) -> Diagnosis:
    """Find out why a pruned model is so much worse than the dense one.

    In a process group every rank must call it with the same batches.

    Args:
        dense: the dense model, on the device to work on; it is not changed.
        pruned: the model pruned by the plan, repaired or not.
        plan: plan of the cut.
        batches: batches of `input_ids` and `labels`, text that neither calibration nor training has used.
        made_for: type in which the dense model's weights were published, if it is known.
        is_trained: whether the pruned model has been trained since.
    """
    found = find_not_finite(pruned, batches) or find_not_finite(dense, batches)
    diagnosis = Diagnosis(
        measure_perplexity_or_infinity(dense, batches, "dense"),
        measure_perplexity_or_infinity(pruned, batches, "pruned"),
    )
    add = diagnosis.findings.append
    if dense.dtype == torch.float16 and made_for not in (None, torch.float16):
        name = name_dtype(made_for)
        add(Finding("dtype", f"the model was trained in {name} but runs in float16", f"set model.dtype to {name}"))
    if found:
        setting = "load the model again; if the dense model is finite, lower the learning rate"
        if dense.dtype == torch.float16:
            setting = "set model.dtype to bfloat16 or float32"
        add(Finding("not finite", found, setting))
        diagnosis.verdict = diagnosis.findings[-1]
        return diagnosis
    with freeze_parameters(dense):
        _Causes(diagnosis, GatedPlan(dense, plan), batches, is_trained).try_all()
    explained = [finding for finding in diagnosis.findings if (finding.explains or 0.0) >= EXPLAINS]
    wrong = [finding for finding in diagnosis.findings if finding.cause == "wrong cut"]
    diagnosis.verdict = (wrong or explained or diagnosis.findings)[0 if wrong or explained else -1]
    return diagnosis


def find_not_finite(model: PreTrainedModel, batches: Batches) -> str | None:
    """Describe where a model's weights, or its activations on text, are first NaN or infinite; None if nowhere."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"weights of {name_parameter_place(name)} contain NaN or inf"
    with freeze_parameters(model), torch.no_grad():
        streams = embed_batches(model, [batch["input_ids"] for batch in batches[:_LAYER_BATCHES]])
        for layer in range(len(get_layers(model))):
            for stream in streams:
                stream.hidden_BTD = run_layer(model, layer, stream)
                if not torch.isfinite(stream.hidden_BTD).all():
                    largest = torch.finfo(stream.hidden_BTD.dtype).max
                    return f"activations of layer {layer} overflow: the largest {model.dtype} is {largest:,.0f}"
    return None


class _Causes:
    """Undoes possible causes one after the other and records how much each explains.

    Args:
        diagnosis: diagnosis to add findings to.
        gated: the plan on the dense model.
        batches: batches to measure on.
        is_trained: whether the pruned model has been trained since.
    """

    def __init__(self, diagnosis: Diagnosis, gated: GatedPlan, batches: Batches, is_trained: bool) -> None:
        self.diagnosis, self.gated, self.batches, self.is_trained = diagnosis, gated, batches, is_trained
        self.ids = [batch["input_ids"].to(gated.model.device) for batch in batches]
        self.cut = diagnosis.cut = gated.measure(gated.gates, batches)
        self.lost = _ratio(max(self.cut, diagnosis.pruned), diagnosis.dense)

    def try_all(self) -> None:
        """Try all causes, from the most specific to the least."""
        if wrong := self.gated.find_wrong_cuts(self.ids[0]):
            sentence = (
                f"the cut of {_name_layers(wrong)} differs from gating: query heads are not with their own KV head"
            )
            self._add("wrong cut", sentence, "report this with the model's family")
        self._try_outliers()
        half = self._try_choice()
        self._try_repair()
        self._try_attention()
        self._try_layers()
        sentence = f"rate {self.gated.plan.rate:.0%} is too high for this model"
        self._add(
            "rate",
            f"{sentence}; perplexity with half as many units removed, chosen by gates, is shown",
            "lower pruning.rate",
            half,
            0.0 if half is None else self._explain(self.cut, half),
        )

    def _add(self, cause: str, sentence: str, setting: str, mended: float | None = None, explains: float = 0.0) -> None:
        share = None if mended is None else explains
        self.diagnosis.findings.append(Finding(cause, sentence, setting, mended, share))

    def _add_undone(self, cause: str, sentence: str, setting: str, gates: Gates) -> None:
        mended = self.gated.measure(gates, self.batches, f"without {cause}")
        self._add(cause, sentence, setting, mended, self._explain(self.cut, mended))

    def _explain(self, broken: float, mended: float) -> float:
        if not self.lost or broken <= mended:
            return 0.0
        if math.isinf(self.lost):  # beside an infinite loss, a finite difference explains nothing
            return float(math.isinf(broken))
        return _ratio(broken, mended) / self.lost

    def _try_outliers(self) -> None:
        removed = {
            key: lost
            for key, units in find_outliers(self.gated.model, self.gated.cut, self.ids).items()
            if (lost := sorted(units.keys() & self.gated.list_removed(key)))
        }
        if removed:
            named = [f"{key} unit {unit}" for key, units in removed.items() for unit in units]
            more = f" and {len(named) - 3} more" if len(named) > 3 else ""
            sentence = f"units that carry massive activations were removed: {', '.join(named[:3])}{more}"
            setting = "set pruning.scoring.protect_outliers to true and calibrate on text"
            self._add_undone("outliers", sentence, setting, self.gated.restore_units(removed))

    def _try_choice(self) -> float | None:
        """Try other units; return the perplexity with half as many removed, chosen by gates on these windows."""
        try:
            scores = score_units(self.gated.model, self.gated.cut, self.ids, "fisher")
        except ValueError as error:
            self._add("choice", f"units cannot be scored: {error}", "set model.dtype to bfloat16 or float32")
            return None
        sentence = "other units of the same blocks would have cost less: the scores do not fit the units"
        setting = "set pruning.criterion to fisher+obs and calibrate on more text"
        self._add_undone("choice", sentence, setting, self.gated.choose_by_scores(scores))
        return self.gated.measure(self.gated.choose_by_scores(scores, 0.5), self.batches, "half of it")

    def _try_repair(self) -> None:
        pruned = self.diagnosis.pruned
        if pruned <= 1.01 * self.cut:  # rounding, or a negligible difference
            return
        what, setting = "repair", "set pruning.repair.method to none, or calibrate on more text"
        if self.is_trained:
            what, setting = "repair or training", "lower the learning rate of model.optimizer"
        sentence = f"{what} made the model worse than the cut alone"
        self._add("repair", sentence, setting, self.cut, self._explain(pruned, self.cut))

    def _try_attention(self) -> None:
        layers = sorted({key.layer for key in self.gated.gates if key.kind == "attention"})
        only_mlp = {key: gate_BU for key, gate_BU in self.gated.gates.items() if key.kind == "mlp"}
        if not layers:
            return
        heads = min(self.gated.plan.geometry.kv_heads)
        sentence = (
            f"too much attention was removed in {len(layers)} layers: one of {heads} KV heads is {1 / heads:.0%} of it"
        )
        setting = "set pruning.split to 0:10, which leaves attention whole, or pruning.granularity to query"
        self._add_undone("attention", sentence, setting, only_mlp)

    def _try_layers(self) -> None:
        if math.isinf(self.cut):
            return
        self.diagnosis.layers = self.gated.measure_restoring_each(self.ids[:_LAYER_BATCHES])
        ranked = sorted(self.diagnosis.layers, key=lambda layer: self.diagnosis.layers[layer])
        few = sorted(ranked[: max(1, self.gated.plan.geometry.num_layers // 7)])
        if len(few) < len(ranked):  # restoring all layers would undo everything
            setting = "exclude them with pruning.limits.mlp_layers and attention_layers, or set pruning.limits.max_rate"
            self._add_undone("layers", f"{_name_layers(few)} cost most", setting, self.gated.restore_layers(few))


def build_diagnosis_table(diagnosis: Diagnosis) -> Table:
    """Build a table with one row per cause."""
    table = Table(title="why: each cause undone by itself, on held-out windows", title_justify="left")
    table.add_column("cause", no_wrap=True)
    table.add_column("perplexity", justify="right", no_wrap=True)
    table.add_column("gives back", justify="right", no_wrap=True)
    table.add_column("what was found")
    table.add_row("none (dense)", _show(diagnosis.dense), "", "")
    table.add_row("pruned", _show(diagnosis.pruned), "", "as it is")
    if diagnosis.cut is not None:
        table.add_row("cut", _show(diagnosis.cut), "", "the plan by gates, without repair or training")
    for finding in diagnosis.findings:
        share = "" if finding.explains is None else f"{finding.explains:.0%}"
        name = Text(finding.cause, "bold" if finding is diagnosis.verdict else "")
        table.add_row(name, "" if finding.perplexity is None else _show(finding.perplexity), share, finding.sentence)
    return table


def _ratio(broken: float, mended: float) -> float:
    """Return the difference in log-perplexity; 0 if the first model is not worse."""
    return max(0.0, math.log(broken / mended)) if math.isfinite(broken) else math.inf


def _name_layers(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _show(perplexity: float) -> str:
    return f"{perplexity:,.2f}"
