"""Explosions: SmolLM2-135M broken on purpose, each time in another way, and what the guard's diagnosis makes of it.

    python benchmarks/explosions.py --markdown table.md

Calibration and held-out windows are of the embedded text's train split; no evaluated text is read.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

import gqaprune
from gqaprune.data.windows import make_batches
from gqaprune.evaluation.diagnosis import Diagnosis, build_diagnosis_table, diagnose
from gqaprune.models.architecture import find_blocks, get_layers
from gqaprune.plan import BlockKey, PruningPlan
from gqaprune.planning.selection import choose_middle_layers, keep_everything
from gqaprune.scoring.outliers import find_outliers, protect_units
from gqaprune.scoring.scores import Scores, score_units
from gqaprune.surgery.cut import apply_plan

WINDOW, CALIBRATION, HELD_OUT = 512, 16, 4
TOO_LARGE = 8.0
"""Factor on the residual stream that takes SmolLM2's massive activations, some 18,000, past float16's 65,504."""


class Lab:
    """The dense model, its scores, and plans made from them.

    Args:
        model: the dense causal LM.
        windows: calibration windows and, last, held-out ones.
        held_out: how many of them are held out.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, held_out: int) -> None:
        self.model = model
        layers = len(get_layers(model))
        self.middle, self.early = choose_middle_layers(layers), range(max(1, layers // 10))
        self.calibration = list(windows[:-held_out].split(2))
        self.held_out = make_batches(windows[-held_out:], windows[-held_out:], 1)
        self.scores = score_units(model, find_blocks(model), self.calibration, "fisher")
        self.heads = score_units(model, find_blocks(model, "query"), self.calibration, "fisher")

    def cut_channels(self, scores: Scores, layers: range, share: float) -> PruningPlan:
        """Remove the channels of lowest score, as many in each of some layers."""
        return self._cut({layer: scores[BlockKey(layer, "mlp")] for layer in layers}, share, "channels")

    def cut_groups(self, score_of: Callable[[int], Tensor], layers: range, share: float) -> PruningPlan:
        """Remove the GQA groups of lowest score, as many in each of some layers."""
        return self._cut({layer: score_of(layer) for layer in layers}, share, "groups")

    def _cut(self, scores: dict[int, Tensor], share: float, name: str) -> PruningPlan:
        whole = keep_everything(self.model)
        layers = list(whole.layers)
        for layer, score_U in scores.items():
            kept = score_U.argsort(descending=True)[: len(score_U) - round(share * len(score_U))]
            layers[layer] = replace(layers[layer], **{name: tuple(sorted(kept.tolist()))})
        return replace(whole, layers=tuple(layers), rate=share)

    def align_wrongly(self, layer: int) -> Tensor:
        """LLM-Pruner's `imp.view(r, -1).sum(0)`: KV head k is credited with query heads k, k + K, k + 2K."""
        groups = self.scores[BlockKey(layer, "attention")].numel()
        return self.heads[BlockKey(layer, "attention")].view(-1, groups).sum(0)

    def invert_outliers(self) -> Scores:
        """The scores, those of units with massive activations the lowest."""
        outliers = find_outliers(self.model, find_blocks(self.model), self.calibration)
        protected = protect_units(self.scores, outliers)
        return {
            key: torch.where(protected[key] > score_U, torch.zeros_like(score_U), score_U)
            for key, score_U in self.scores.items()
        }


WAYS: dict[str, Callable[[Lab], PruningPlan]] = {
    "sound: a tenth of the middle layers' channels, by gates": lambda lab: lab.cut_channels(
        lab.scores, lab.middle, 0.1
    ),
    "scores of the neighbouring channel": lambda lab: lab.cut_channels(
        {key: score_U.roll(1) for key, score_U in lab.scores.items()}, lab.middle, 0.1
    ),
    "groups by LLM-Pruner's alignment": lambda lab: lab.cut_groups(lab.align_wrongly, lab.middle, 1 / 3),
    "groups by their own scores": lambda lab: lab.cut_groups(
        lambda layer: lab.scores[BlockKey(layer, "attention")], lab.middle, 1 / 3
    ),
    "channels with massive activations removed": lambda lab: lab.cut_channels(lab.invert_outliers(), lab.middle, 0.1),
    "nine tenths of the first layers' channels": lambda lab: merge(
        lab.cut_channels(lab.scores, lab.middle, 0.1), lab.cut_channels(lab.scores, lab.early, 0.9), lab.early
    ),
    "half of all channels": lambda lab: lab.cut_channels(lab.scores, lab.middle, 0.5),
}
"""Way -> plan."""


def merge(plan: PruningPlan, other: PruningPlan, layers: range) -> PruningPlan:
    """A plan with some layers of another."""
    kept = [(other if layer in layers else plan).layers[layer] for layer in range(len(plan.layers))]
    return replace(plan, layers=tuple(kept))


def main(arguments: Sequence[str] | None = None) -> int:
    """Break the model in every way, and print what the diagnosis says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the dense model")
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens of a window")
    parser.add_argument("--ways", default="", help="only ways whose names hold this text")
    parser.add_argument("--markdown", type=Path, help="file to write the table to")
    options = parser.parse_args(arguments)
    model, tokenizer = gqaprune.load(options.model, dtype="float32")
    windows = gqaprune.read_windows(tokenizer, ["embedded"], options.window, CALIBRATION + HELD_OUT)
    lab = Lab(model, windows, HELD_OUT)
    console = Console(width=160)
    rows = []
    for name, make_plan in WAYS.items():
        if options.ways in name:
            plan = make_plan(lab)
            rows.append((name, break_and_diagnose(lab, plan)))
            console.print(name, build_diagnosis_table(rows[-1][1]))
    if options.ways in (name := "float16, activations past its range"):
        rows.append((name, overflow(lab)))
        console.print(name, build_diagnosis_table(rows[-1][1]))
    lines = describe(rows)
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def break_and_diagnose(lab: Lab, plan: PruningPlan) -> Diagnosis:
    """The diagnosis of a model cut to a plan."""
    pruned = copy.deepcopy(lab.model)
    apply_plan(pruned, plan)
    return diagnose(lab.model, pruned, plan, lab.held_out, torch.bfloat16)


def overflow(lab: Lab) -> Diagnosis:
    """The diagnosis of a sound plan in float16, on the same model with a residual stream as many times as large.

    Norms take the factor out again, so that in float32 the model computes what it did.
    """
    model = copy.deepcopy(lab.model)
    with torch.no_grad():
        head = model.get_output_embeddings().weight.clone()
        model.get_input_embeddings().weight *= TOO_LARGE
        model.get_output_embeddings().weight = nn.Parameter(head)  # may be tied to the embedding until here
        for layer in get_layers(model):
            layer.self_attn.o_proj.weight *= TOO_LARGE
            layer.mlp.down_proj.weight *= TOO_LARGE
    plan = lab.cut_channels(lab.scores, lab.middle, 0.1)
    pruned = copy.deepcopy(model)
    apply_plan(pruned, plan)
    return diagnose(nn.Module.half(model), nn.Module.half(pruned), plan, lab.held_out, torch.bfloat16)


def describe(rows: Sequence[tuple[str, Diagnosis]]) -> list[str]:
    """A Markdown table."""
    lines = [
        "| way | dense | pruned | verdict | gives back | what it says |",
        "| --- | ---: | ---: | --- | ---: | --- |",
    ]
    for name, diagnosis in rows:
        verdict = diagnosis.verdict
        assert verdict is not None
        share = "" if verdict.explains is None else f"{verdict.explains:.0%}"
        numbers = f"{diagnosis.dense:,.1f} | {diagnosis.pruned:,.1f}"
        lines.append(f"| {name} | {numbers} | {verdict.cause} | {share} | {diagnosis.describe()} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
