"""Choose the units that a cut removes: score them, measure damage, allocate, and make the plan."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.distributed import check_same_on_all_ranks
from gqaprune.common.stage_cache import StageCache, StageResult
from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import Block
from gqaprune.plan import BlockKey, PruningPlan
from gqaprune.planning.allocation import AllocationOptions, Budget, allocate_global
from gqaprune.planning.allocation.steps import Spending, spend_share
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.counts import bind_allocation, list_values, measure_curves, refine_counts
from gqaprune.planning.selection import budget_blocks, make_plan, score_blocks
from gqaprune.planning.stages import CURVES, StageCounter, name_scores
from gqaprune.scoring.criteria.base import Scores
from gqaprune.scoring.repaired_damage import predict_damage


@dataclass(frozen=True)
class CutChoice:
    """What a cut removes, and what the choice was made from.

    Args:
        plan: the plan for the model in its current state.
        spending: units that each block of the dense model has lost after the cut.
        outliers: pairs of outlier and ratio (see `Outliers`), by block.
        damages: predicted damage after repair of the blocks that lose units, in nats per token; empty if it was not
            measured.
        scores: scores of the units that were chosen among, by block, without outliers.
    """

    plan: PruningPlan
    spending: Spending
    outliers: dict[BlockKey, list[tuple[int, float]]]
    damages: dict[BlockKey, float]
    scores: Scores

    @classmethod
    def from_stage(cls, stage: StageResult) -> "CutChoice":
        """Build from the result of the stage `plan`."""
        facts = stage.facts
        return cls(
            PruningPlan.from_dict(facts["plan"]),
            Spending.from_dict(facts["spending"]),
            {
                BlockKey(layer, kind): [(unit, ratio) for unit, ratio in units]
                for layer, kind, units in facts["outliers"]
            },
            {BlockKey(layer, kind): value for layer, kind, value in facts["damages"]},
            {BlockKey.parse(name): score_U for name, score_U in stage.tensors.items()},
        )


@dataclass(frozen=True)
class CutChooser:
    """Chooses the units that each cut of a run removes.

    Args:
        dense_blocks: blocks that may lose units, as they were in the dense model.
        budget: parameters to remove from the dense model in total.
        calibration: the calibration text.
        config: what to remove.
        counter: announces stages.
    """

    dense_blocks: Sequence[Block]
    budget: Budget
    calibration: CalibrationSet
    config: PruningConfig
    counter: StageCounter

    def choose(
        self,
        model: PreTrainedModel,
        share: float,
        spent: Spending | None,
        options: AllocationOptions,
        stages: StageCache,
    ) -> CutChoice:
        """Choose what to remove until a share of the budget is spent, or recall what was chosen before.

        Args:
            model: the model in its current state.
            share: share of the budget that is spent after the cut.
            spent: units that earlier cuts have removed; None for the first cut.
            options: what the allocation depends on besides scores.
            stages: stages of a run with this model and this text, which keep the choice.

        Raises:
            ValueError: if the budget cannot be met, a score or a damage is not finite, or ranks choose different plans.
        """
        inputs = self._list_inputs(spent, options)
        stage = stages.recall("plan", inputs, lambda: self._choose(model, share, spent, options, stages))
        # Before the cut, because ranks with different plans would wait for one another in repair.
        check_same_on_all_ranks("the pruning plans", json.dumps(stage.facts), model.device)
        return CutChoice.from_stage(stage)

    def _list_inputs(self, spent: Spending | None, options: AllocationOptions) -> dict[str, Any]:
        """List what the choice depends on, besides model and text."""
        config = self.config
        return {
            **{name: value for name, value in asdict(config).items() if name != "repair"},
            "accumulation": self.calibration.accumulation,
            "seed": self.calibration.seed,
            "importance": None if options.importance is None else list_values(options.importance),
            "spent before": spent and spent.to_dict(),
            "repair that damage is measured after": (
                [config.repair.holdout, config.repair.refits_weights] if config.sees_repair else None
            ),
        }

    def _choose(
        self,
        model: PreTrainedModel,
        share: float,
        spent: Spending | None,
        options: AllocationOptions,
        stages: StageCache,
    ) -> StageResult:
        blocks, config, batches = self.dense_blocks, self.config, self.calibration.batches
        self.counter.begin(name_scores(config))
        scores, outliers = score_blocks(model, self.calibration, config, stages)
        self.counter.begin(CURVES)
        scores, options, points = measure_curves(model, blocks, scores, outliers, batches, config, options, stages)
        allocate, budgets = bind_allocation(config, options), budget_blocks(blocks, scores, config)
        # With damage curves, scores cannot be compared between blocks.
        allocate_part = allocate if config.uses_damage_curves else allocate_global
        spending = spend_share(budgets, self.budget, allocate, share, spent, allocate_part)
        removed = refine_counts(
            model, blocks, scores, batches, config, options, self.budget, spending.so_far, self.calibration.seed
        )
        removed_before = spent.so_far if spent else dict.fromkeys(removed, 0)
        facts = {
            "plan": make_plan(model, blocks, scores, removed, config).to_dict(),
            "spending": spending.to_dict(),
            "outliers": list_values({key: list(units.items()) for key, units in outliers.items()}),
            "damages": [
                [*key, predict_damage(key.kind, measured, removed[key] - removed_before[key])]
                for key, measured in points.items()
                if removed[key] > removed_before[key]
            ],
        }
        ordinary = {str(key): _leave_out(score_U, outliers.get(key, ())) for key, score_U in scores.items()}
        return StageResult(facts, ordinary)


def _leave_out(score_U: Tensor, outliers: Collection[int]) -> Tensor:
    return score_U[[unit for unit in range(len(score_U)) if unit not in outliers]]
