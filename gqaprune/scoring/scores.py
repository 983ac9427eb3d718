"""Score units: one number per unit, from the criterion of the caller's choice.

`CRITERIA` names every criterion; each is a class in `criteria/`. Scores are non-negative, higher is more
important. Blocks compare as they are or relative to their own mean, and any two criteria may be combined.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.precision import multiply_exactly
from gqaprune.common.stage_cache import StageCache, StageResult
from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import Block, name_parameter_place
from gqaprune.placement.layer_store import find_store
from gqaprune.scoring.criteria.activations import ActivationCriterion, BrainSurgeon, Wanda, WeightedVariance
from gqaprune.scoring.criteria.base import NORMALIZATIONS, REDUCTIONS, Criterion, Scores, ScoringConfig, ScoringRun
from gqaprune.scoring.criteria.gates import GateFisher, GateTaylor
from gqaprune.scoring.criteria.gradients import ParamFirst, ParamMix, ParamSecond, Vectorize
from gqaprune.scoring.criteria.weights import MagnitudeL1, MagnitudeL2, Random

__all__ = [
    "CRITERIA",
    "NORMALIZATIONS",
    "REDUCTIONS",
    "Scores",
    "ScoringConfig",
    "check_finite_scores",
    "check_finite_weights",
    "needs_data",
    "parse_criterion",
    "score_units",
]

CRITERIA: Mapping[str, type[Criterion]] = {
    "fisher": GateFisher,
    "taylor": GateTaylor,
    "param_first": ParamFirst,
    "param_second": ParamSecond,
    "param_mix": ParamMix,
    "vectorize": Vectorize,
    "l1": MagnitudeL1,
    "l2": MagnitudeL2,
    "wanda": Wanda,
    "wifv": WeightedVariance,
    "obs": BrainSurgeon,
    "random": Random,
}
"""Name -> criterion."""


@multiply_exactly()
def score_units(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    calibration: CalibrationSet | Sequence[Tensor],
    criterion: str,
    scoring: ScoringConfig | None = None,
    stages: StageCache | None = None,
    watchers: Sequence[ActivationCriterion[Any]] = (),
) -> Scores:
    """Score the units of blocks on calibration batches.

    A criterion of activations watches the pass that another one makes, and makes one itself only for what it could not
    see there.

    In a process group each rank takes whole accumulations and the sums are reduced once, so that the scores are
    those of one process on the same batches.

    Args:
        model: the dense causal LM; it is left as it was.
        blocks: blocks to score.
        calibration: the text, or its batches alone; criteria that read no text ignore it.
        criterion: a name in `CRITERIA`, or two joined by `+`: the geometric mean of both, each normalised first.
        scoring: what shapes the scores; the defaults leave the criterion as it is.
        stages: of a run with this model and this text, where each criterion's scores are kept.
        watchers: further criteria for the same blocks, on text that begins this one, that are to watch, too.

    Raises:
        ValueError: if a criterion is unknown or has no text to read; if a loss, an activation or a score is NaN or
            infinite, with its place.
    """
    calibration = CalibrationSet.wrap(calibration)
    scoring, stages = scoring or ScoringConfig(), stages or StageCache()
    names = parse_criterion(criterion)
    _check_text(names, calibration)
    inputs = {name: _list_inputs(name, blocks, calibration, scoring) for name in names}
    titles = {name: f"scores of {name}" for name in names}
    are_there = [name for name in titles if stages.find([titles[name]], inputs[name], titles[name])]
    results = {name: stages.read(titles[name]) for name in are_there}
    left = {
        name: CRITERIA[name](ScoringRun(model, blocks, calibration, f"calibration: {name}"), scoring)
        for name in sorted(inputs, key=lambda name: issubclass(CRITERIA[name], ActivationCriterion))  # who watch, last
        if name not in results
    }
    for name in list(left):
        member = left.pop(name)
        others = [other for other in left.values() if isinstance(other, ActivationCriterion)]
        results[name] = _score(member, [*others, *watchers])
        stages.write(titles[name], inputs[name], results[name])
    scored = [
        normalize_scores({block.key: results[name].tensors[str(block.key)] for block in blocks}, scoring.normalization)
        for name in names
    ]
    return scored[0] if len(scored) == 1 else combine_scores(*scored)


def _check_text(names: Sequence[str], calibration: CalibrationSet) -> None:
    for name in names:
        if CRITERIA[name].needs_data and not calibration.batches:
            free = ", ".join(other for other, member in CRITERIA.items() if not member.needs_data)
            raise ValueError(f"criterion {name} needs at least one calibration batch, got none; {free} need no text")


def _list_inputs(
    name: str, blocks: Sequence[Block], calibration: CalibrationSet, scoring: ScoringConfig
) -> dict[str, Any]:
    """What the scores of a criterion depend on, besides model and text."""
    inputs = {"blocks": [[*block.key, block.units] for block in blocks], "accumulation": calibration.accumulation}
    inputs |= {setting: getattr(scoring, setting) for setting in CRITERIA[name].uses}
    return inputs | ({"seed": calibration.seed} if CRITERIA[name].uses_seed else {})


def _score(criterion: Criterion, watchers: Sequence[ActivationCriterion[Any]]) -> StageResult:
    with ExitStack() as passes:
        for watcher in watchers:
            passes.enter_context(watcher.watch(criterion))
        scores = criterion.score()
    check_finite_scores(scores)
    return StageResult(tensors={str(key): score_U for key, score_U in scores.items()})


def parse_criterion(text: str) -> list[str]:
    """The criteria that a setting names: `fisher` is one, `fisher+obs` is two.

    Raises:
        ValueError: if one is unknown, or there are more than two.
    """
    names = text.split("+")
    if len(names) > 2 or not all(name in CRITERIA for name in names):
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, or two of them joined by +, got {text!r}")
    return names


def needs_data(criterion: str) -> bool:
    """Whether a scoring reads calibration batches."""
    return any(CRITERIA[name].needs_data for name in parse_criterion(criterion))


def normalize_scores(scores: Scores, normalization: str) -> Scores:
    """Divide each block's scores by their own mean, sum or max, so that blocks compare by shares; all zeros stay so."""
    smallest = torch.finfo(torch.float64).tiny
    divisor = NORMALIZATIONS[normalization]
    return {key: score_U / divisor(score_U).clamp_min(smallest) for key, score_U in scores.items()}


def combine_scores(first: Scores, second: Scores) -> Scores:
    """Geometric mean of two criteria, unit by unit: important is what both say is."""
    return {key: first[key].sqrt() * second[key].sqrt() for key in first}


def check_finite_scores(scores: Scores) -> None:
    """Refuse scores that would make the choice of units arbitrary.

    Raises:
        ValueError: naming the first block with a NaN or infinite score.
    """
    for key, score_U in scores.items():
        bad = (~torch.isfinite(score_U)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{key}: {len(bad)} of {len(score_U)} scores are NaN or infinite (first: unit {bad[0]}); "
                "load the model with dtype bfloat16 or float32"
            )


def check_finite_weights(model: PreTrainedModel) -> None:
    """Refuse a model whose weights hold NaN or inf.

    Raises:
        ValueError: naming the first such parameter and its layer.
    """
    for name, parameter in find_store(model).named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(
                f"weights of {name_parameter_place(name)} hold NaN or inf: the checkpoint is broken or was saved in "
                "a type too narrow for it; load it again in bfloat16 or float32"
            )
