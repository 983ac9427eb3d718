"""The stages of a run, in order, and messages when they begin."""

from collections.abc import Sequence
from dataclasses import dataclass

from gqaprune.common.console import console
from gqaprune.common.distributed import get_rank_and_world_size
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.costs.base import Text

SAMPLING = "the model writes text"
DENSE = "perplexity of the dense model"
DENSE_PREDICTIONS = "predictions of the dense model"
IMPORTANCE = "importance of layers"
CURVES = "damage of each block after repair"
CUT = "cut and repair, layer by layer"
DISTILLATION = "distillation"
PRUNED = "perplexity of the pruned model"
TRAINING = "training"
END = "perplexity, checkpoint, report"


@dataclass(frozen=True)
class Work:
    """The text that a run reads and trains on.

    Args:
        calibration: calibration text, in micro-batches; from corpora and written by the model.
        sampled: documents that the model writes for calibration and training, in batches that are written together;
            None if there are none.
        trains: whether training follows.
        training: training text of all epochs, in micro-batches; None if it has not been counted.
    """

    calibration: Text
    sampled: Text | None = None
    trains: bool = False
    training: Text | None = None


def name_scores(config: PruningConfig) -> str:
    """Name the stage that scores units."""
    return f"scores, {config.criterion}"


def list_stages(config: PruningConfig, work: Work) -> list[str]:
    """List the names of a run's stages in order. `cost_stages` computes their costs."""
    repair = config.repair
    pruning = {
        DENSE_PREDICTIONS: repair.distills,
        IMPORTANCE: config.uses_importance,
        name_scores(config): True,
        CURVES: config.uses_damage_curves,
        CUT: True,
        DISTILLATION: repair.distills,
    }
    stages = [SAMPLING] if work.sampled is not None else []
    stages.append(DENSE)
    if config.removes_something:
        stages += [name for name, takes_place in pruning.items() if takes_place]
    return [*stages, PRUNED, *[TRAINING] * work.trains, END]


class StageCounter:
    """Announces stages on the console with their number.

    Args:
        stages: names of the stages of the run, in order; others are not announced.
    """

    def __init__(self, stages: Sequence[str] = ()) -> None:
        self._stages = tuple(stages)
        self._begun = ""

    def begin(self, name: str) -> None:
        """Announce that a stage begins, on rank 0, unless it has begun already."""
        if name == self._begun or name not in self._stages:
            return
        self._begun = name
        if get_rank_and_world_size()[0] == 0:
            console.print(f"stage {self._stages.index(name) + 1} of {len(self._stages)}: {name}")
