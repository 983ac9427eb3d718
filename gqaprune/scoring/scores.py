"""Score units: one number per unit, by the criterion of the caller's choice.

`CRITERIA` names all criteria; each is a class in `criteria/`. Scores are non-negative; higher means more important.
They can be normalised by block, and any two criteria can be combined.
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

    Criteria that read only activations record them in another criterion's pass if there is one, and run a forward pass
    only for the layers that they could not watch.

    In a process group each rank takes whole accumulations and the sums are reduced once, so the scores are those of one
    process on the same batches.

    Args:
        model: the dense causal LM, which is not changed.
        blocks: blocks to score.
        calibration: the text or only its batches; ignored by criteria that read no text.
        criterion: a name in `CRITERIA`, or two joined by `+` for their geometric mean, each normalised first.
        scoring: further settings of the scores; the defaults do not modify the criterion.
        stages: stages of a run with this model and this text, which keep the scores of each criterion.
        watchers: further criteria that watch the same pass. They need the same blocks, and text that this text begins
            with.

    Returns:
        Scores of all units by block, float64 `[units]` on the CPU.

    Raises:
        ValueError: if a criterion is unknown or needs text and has none; or if a loss, an activation or a score is NaN
            or infinite, naming the batch or the block.
    """
    calibration = CalibrationSet.wrap(calibration)
    scoring, stages = scoring or ScoringConfig(), stages or StageCache()
    names = parse_criterion(criterion)
    _check_text(names, calibration)
    inputs = {name: _list_inputs(name, blocks, calibration, scoring) for name in names}
    titles = {name: f"scores of {name}" for name in names}
    finished = [name for name in titles if stages.find([titles[name]], inputs[name], titles[name])]
    results = {name: stages.read(titles[name]) for name in finished}
    pending = {
        name: CRITERIA[name](ScoringRun(model, blocks, calibration, f"calibration: {name}"), scoring)
        # Criteria that can watch come last.
        for name in sorted(inputs, key=lambda name: issubclass(CRITERIA[name], ActivationCriterion))
        if name not in results
    }
    for name in list(pending):
        current = pending.pop(name)
        later = [member for member in pending.values() if isinstance(member, ActivationCriterion)]
        results[name] = _score(current, [*later, *watchers])
        stages.write(titles[name], inputs[name], results[name])
    scored = [
        normalize_scores({block.key: results[name].tensors[str(block.key)] for block in blocks}, scoring.normalization)
        for name in names
    ]
    return scored[0] if len(scored) == 1 else combine_scores(*scored)


def _check_text(names: Sequence[str], calibration: CalibrationSet) -> None:
    for name in names:
        if CRITERIA[name].needs_data and not calibration.batches:
            without_text = ", ".join(other for other, member in CRITERIA.items() if not member.needs_data)
            raise ValueError(
                f"criterion {name} needs at least one calibration batch, got none; "
                f"criteria that need no text: {without_text}"
            )


def _list_inputs(
    name: str, blocks: Sequence[Block], calibration: CalibrationSet, scoring: ScoringConfig
) -> dict[str, Any]:
    """List what the scores of a criterion depend on, besides model and text."""
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
    """Split a setting into names of criteria: one, as in `fisher`, or two, as in `fisher+obs`.

    Raises:
        ValueError: if a name is unknown, or there are more than two.
    """
    names = text.split("+")
    if len(names) > 2 or not all(name in CRITERIA for name in names):
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)} or two of them joined by +, got {text!r}")
    return names


def needs_data(criterion: str) -> bool:
    """Whether a criterion, or one of two joined by `+`, reads calibration batches."""
    return any(CRITERIA[name].needs_data for name in parse_criterion(criterion))


def normalize_scores(scores: Scores, normalization: str) -> Scores:
    """Divide each block's scores by their mean, sum or maximum, so that blocks can be compared; zeros stay zeros."""
    smallest = torch.finfo(torch.float64).tiny
    divisor = NORMALIZATIONS[normalization]
    return {key: score_U / divisor(score_U).clamp_min(smallest) for key, score_U in scores.items()}


def combine_scores(first: Scores, second: Scores) -> Scores:
    """Combine two criteria by their geometric mean: units are important if both say so."""
    return {key: first[key].sqrt() * second[key].sqrt() for key in first}


def check_finite_scores(scores: Scores) -> None:
    """Refuse scores that are not finite, with which the choice of units would be arbitrary.

    Raises:
        ValueError: naming the first block with a NaN or infinite score.
    """
    for key, score_U in scores.items():
        invalid = (~torch.isfinite(score_U)).nonzero().flatten().tolist()
        if invalid:
            raise ValueError(
                f"{key}: {len(invalid)} of {len(score_U)} scores are NaN or infinite (first: unit {invalid[0]}); "
                "load the model with dtype bfloat16 or float32"
            )


def check_finite_weights(model: PreTrainedModel) -> None:
    """Refuse a model whose weights contain NaN or infinite values.

    Raises:
        ValueError: naming the first such parameter and its layer.
    """
    for name, parameter in find_store(model).named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(
                f"weights of {name_parameter_place(name)} contain NaN or infinite values: the checkpoint is damaged, "
                "or was saved in a dtype that overflows; use a checkpoint in bfloat16 or float32"
            )
