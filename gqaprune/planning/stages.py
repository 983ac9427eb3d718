"""The stages of a run in their order, what each costs in forward passes, and which one it is in."""

from collections.abc import Sequence
from dataclasses import dataclass

from gqaprune.common.console import console
from gqaprune.common.distributed import get_rank_and_world_size
from gqaprune.planning.config import PruningConfig

SAMPLING = "the model writes text"
DENSE = "perplexity of the dense model"
LESSONS = "predictions of the dense model"
IMPORTANCE = "importance of layers"
CURVES = "damage of each block after repair"
CUT = "cut and repair, layer by layer"
DISTILLATION = "distillation"
PRUNED = "perplexity of the pruned model"
TRAINING = "training"
END = "perplexity, checkpoint, report"

_BACKWARD = 3.0
"""Forward passes that forward and backward together cost."""
_SAMPLED = 3.4
"""Forward passes that a token costs which the model writes itself, one after the other."""
_PASSES = {"gates": 2.2, "weight gradients": 3.0, "activations": 1.2, "outliers": 0.75, "curves": 1.5, "repair": 1.3}
"""Forward passes over the calibration text, estimates: of gates, activations and outliers as counted once, each alone.
Beside gates, activations cost 0.4 to 1.2: the rest is a pass over layers whose Gram matrices memory has no room for."""
_REFINED = 0.7
"""Likewise of each pass of refinement."""
_KINDS = {"fisher": "gates", "taylor": "gates", "wanda": "activations", "wifv": "activations", "obs": "activations"}
_WITHOUT_TEXT = ("l1", "l2", "random")


@dataclass(frozen=True)
class Work:
    """What a run reads and trains.

    Args:
        calibration_tokens: of corpora and the model's own.
        sampled_tokens: that the model writes itself, for calibration and for training.
        training_tokens: of all epochs together; None where the text has not been counted, 0 without training.
    """

    calibration_tokens: int
    sampled_tokens: int
    training_tokens: int | None


def name_scores(config: PruningConfig) -> str:
    """The stage that scores units."""
    return f"scores, {config.criterion}"


def list_stages(config: PruningConfig, work: Work) -> list[tuple[str, float]]:
    """The stages of a run in their order, each with the tokens of forward passes that it costs."""
    tokens = work.calibration_tokens
    stages = [(SAMPLING, _SAMPLED * work.sampled_tokens)] if work.sampled_tokens else []
    stages.append((DENSE, 0.0))
    repair = config.repair
    if config.removes_something:
        if repair.distills:
            stages.append((LESSONS, tokens))
        if config.uses_importance:
            stages.append((IMPORTANCE, 2.0 * tokens))
        names = [name for name in config.criterion.split("+") if name not in _WITHOUT_TEXT]
        kinds = [_KINDS.get(name, "weight gradients") for name in names]
        is_watched = "gates" in kinds or "activations" in kinds  # outliers are then looked for in the same pass
        kinds += ["outliers"] * (config.scoring.protect_outliers and not is_watched)
        stages.append((name_scores(config), sum(_PASSES[kind] for kind in kinds) * tokens))
        if config.uses_damage_curves:
            stages.append((CURVES, _PASSES["curves"] * tokens))
        passes = (_PASSES["repair"] if repair.refits_weights else 0.0) + _REFINED * repair.epochs * repair.refines
        stages.append((CUT, passes * tokens))
        if repair.distills:
            stages.append((DISTILLATION, _BACKWARD * repair.distill_tokens))
    stages.append((PRUNED, 0.0))
    if work.training_tokens != 0:
        stages.append((TRAINING, _BACKWARD * (work.training_tokens or 0)))
    return [*stages, (END, 0.0)]


class StageCounter:
    """Says on the console which stage of how many begins.

    Args:
        stages: names of those to come, in their order; a stage of another name is not said.
    """

    def __init__(self, stages: Sequence[str] = ()) -> None:
        self._stages = tuple(stages)
        self._begun = ""

    def begin(self, name: str) -> None:
        """Say that a stage begins, on rank 0, unless it has begun."""
        if name == self._begun or name not in self._stages:
            return
        self._begun = name
        if get_rank_and_world_size()[0] == 0:
            console.print(f"stage {self._stages.index(name) + 1} of {len(self._stages)}: {name}")
