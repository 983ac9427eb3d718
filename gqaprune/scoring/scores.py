"""Score units: one number per unit, from the criterion of the caller's choice.

`CRITERIA` names every criterion; each is a class in `criteria/`. Scores are non-negative, higher is more
important. Blocks compare as they are or relative to their own mean, and any two criteria may be combined.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.precision import multiply_exactly
from gqaprune.common.stage_cache import StageCache, StageResult
from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import Block, name_parameter_place
from gqaprune.placement.layer_store import find_store
from gqaprune.scoring.criteria.activations import BrainSurgeon, Wanda, WeightedVariance
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
) -> Scores:
    """Score the units of blocks on calibration batches.

    In a process group each rank takes whole accumulations and the sums are reduced once, so that the scores are
    those of one process on the same batches.

    Args:
        model: the dense causal LM; it is left as it was.
        blocks: blocks to score.
        calibration: the text, or its batches alone; criteria that read no text ignore it.
        criterion: a name in `CRITERIA`, or two joined by `+`: the geometric mean of both, each normalised first.
        scoring: what shapes the scores; the defaults leave the criterion as it is.
        stages: of a run with this model and this text, where each criterion's scores are kept.

    Raises:
        ValueError: if a criterion is unknown or has no text to read; if a loss, an activation or a score is NaN or
            infinite, with its place.
    """
    calibration = CalibrationSet.wrap(calibration)
    scoring, stages = scoring or ScoringConfig(), stages or StageCache()
    scored = []
    for name in parse_criterion(criterion):
        if CRITERIA[name].needs_data and not calibration.batches:
            free = ", ".join(other for other, member in CRITERIA.items() if not member.needs_data)
            raise ValueError(f"criterion {name} needs at least one calibration batch, got none; {free} need no text")
        run = ScoringRun(model, blocks, calibration, f"calibration: {name}")
        inputs = {"blocks": [[*block.key, block.units] for block in blocks], "accumulation": calibration.accumulation}
        inputs |= {setting: getattr(scoring, setting) for setting in CRITERIA[name].uses}
        inputs |= {"seed": calibration.seed} if CRITERIA[name].uses_seed else {}
        stage = stages.recall(f"scores of {name}", inputs, lambda: _score(CRITERIA[name](run, scoring)))  # noqa: B023
        scores = {block.key: stage.tensors[str(block.key)] for block in blocks}
        scored.append(normalize_scores(scores, scoring.normalization))
    return scored[0] if len(scored) == 1 else combine_scores(*scored)


def _score(criterion: Criterion) -> StageResult:
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
