"""Choose how many units each block loses: measure what the config's allocation depends on, and run it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.stage_cache import StageCache, StageResult
from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import Block, find_blocks
from gqaprune.placement.model_hash import hash_tensors
from gqaprune.plan import BlockKey, BlockKind
from gqaprune.planning.allocation import ALLOCATIONS, AllocationOptions, BlockBudget, Budget, Removed, refine_by_swaps
from gqaprune.planning.allocation.budget import find_free_blocks
from gqaprune.planning.allocation.optimal import thin_counts
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.selection import budget_blocks, select_blocks
from gqaprune.scoring.damage import measure_damage, measure_damage_curves
from gqaprune.scoring.outliers import Outliers
from gqaprune.scoring.repaired_damage import Points, choose_levels, draw_curves, measure_repaired_damage
from gqaprune.scoring.scores import Scores
from gqaprune.scoring.sensitivity import Importance, measure_sensitivity
from gqaprune.surgery.repair import choose_held_out

_ATTENTION_WEIGHT = 4 / 3
"""Weight of attention's damage after repair relative to an MLP's. Refinement and distillation repair MLPs better than
attention, and removing attention does more damage on text unlike the calibration text. On validation text, six groups
with the same measured damage as the channels that they replaced left a gap larger by 0.015
(benchmarks/results/trials.md)."""
Curves = dict[BlockKey, list[tuple[int, float]]]
"""Pairs of units removed and damage, for each block."""
BoundAllocation = Callable[[Sequence[BlockBudget], Budget], Removed]
"""An allocation with its options applied."""


def bind_allocation(config: PruningConfig, options: AllocationOptions) -> BoundAllocation:
    """Return the config's allocation as a function of only blocks and budget."""
    return lambda blocks, budget: ALLOCATIONS[config.allocation](blocks, budget, options)


def measure_options(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    config: PruningConfig,
    stages: StageCache,
) -> AllocationOptions:
    """Measure what the allocation depends on besides scores: importance, if it is used.

    Importance is measured for all blocks of the dense model, so a saved one also fits runs that prune other layers.

    Raises:
        ValueError: if a saved sensitivity does not fit.
    """
    if not config.uses_importance:
        return make_options(config, None)
    blocks, path = find_blocks(model), config.sensitivity.path

    def measure() -> StageResult:
        sensitivity = measure_sensitivity(model, blocks, calibration, config.sensitivity.method, path)
        return StageResult(list_values(sensitivity.importance))

    # With a path, the user's file keeps the sensitivity, and no stage does.
    stage = measure() if path else stages.recall("sensitivity", {"sensitivity": config.sensitivity.method}, measure)
    importance = {BlockKey(layer, kind): value for layer, kind, value in stage.facts}
    return make_options(config, importance)


def measure_curves(
    model: PreTrainedModel,
    dense_blocks: Sequence[Block],
    scores: Scores,
    outliers: Outliers,
    batches: Sequence[Tensor],
    config: PruningConfig,
    options: AllocationOptions,
    stages: StageCache,
) -> tuple[Scores, AllocationOptions, dict[BlockKey, Points]]:
    """Measure the damage of each block, if the config uses it, and add it to the options.

    Returns:
        Scores of all units; those of attention are replaced if damage after repair was measured. The options with
        damage curves. And for damage after repair, the measured points of each block, in which units are counted from
        the current model.
    """
    if not config.uses_damage_curves:
        return scores, options, {}
    budgets = budget_blocks(dense_blocks, scores, config)
    # The first count is 0 units, which does no damage and is not measured.
    levels = {block.key: thin_counts(block.removable_counts(), config.damage_levels + 1)[1:] for block in budgets}
    inputs: dict[str, Any] = {"scores": hash_tensors(list(scores.values())), "levels": list_values(levels)}
    if not config.sees_repair:
        stage = stages.recall(
            "damage curves",
            inputs,
            lambda: StageResult(list_values(measure_damage_curves(model, dense_blocks, scores, levels, batches))),
        )
        return scores, replace(options, curves=_read_curves(stage.facts)), {}
    blocks = select_blocks(model, config)
    # Budgets count the dense model's units, and curves those of the current model.
    removed_before = {
        budget.key: budget.units - block.units // block.groups for budget, block in zip(budgets, blocks, strict=True)
    }
    most = {block.key: max(0, block.removable_counts()[-1] - removed_before[block.key]) for block in budgets}
    levels = {
        block.key: choose_levels(block.key.kind, block.units - removed_before[block.key], most[block.key])
        for block in budgets
    }

    def measure() -> StageResult:
        damage = measure_repaired_damage(
            model,
            blocks,
            scores,
            {key: set(units) for key, units in outliers.items()},
            levels,
            batches,
            choose_held_out(len(batches), config.repair.holdout),
            refits=config.repair.refits_weights,
        )
        tensors = {str(key): score_U for key, score_U in damage.scores.items()}
        return StageResult([[*key, removed, value] for (key, removed), value in damage.points.items()], tensors)

    inputs |= {"levels": list_values(levels), "holdout": config.repair.holdout, "refits": config.repair.refits_weights}
    stage = stages.recall("damage after repair", inputs, measure)
    points: dict[BlockKey, Points] = {key: [] for key in levels}
    for layer, kind, removed, value in stage.facts:
        points[BlockKey(layer, kind)].append((removed, value))
    curves = {
        key: [(0, 0.0), *((removed_before[key] + count, damage * _weigh(key)) for count, damage in enumerate(curve))]
        for key, curve in draw_curves(points, most).items()
    }
    attention = {BlockKey.parse(name): score_U for name, score_U in stage.tensors.items()}
    return scores | attention, replace(options, curves=curves), points


def _weigh(key: BlockKey) -> float:
    return _ATTENTION_WEIGHT if key.kind == "attention" else 1.0


def _read_curves(facts: Sequence[tuple[int, BlockKind, Sequence[Sequence[float]]]]) -> Curves:
    return {BlockKey(layer, kind): [(int(count), value) for count, value in points] for layer, kind, points in facts}


def refine_counts(
    model: PreTrainedModel,
    dense_blocks: Sequence[Block],
    scores: Scores,
    batches: Sequence[Tensor],
    config: PruningConfig,
    options: AllocationOptions,
    budget: Budget,
    removed: Removed,
    seed: int,
) -> Removed:
    """Move removals between blocks to lower the divergence from the dense model, if the config asks for swaps."""
    if not config.swaps.generations:
        return removed
    return refine_by_swaps(
        removed,
        find_free_blocks(budget_blocks(dense_blocks, scores, config), budget, options),
        budget,
        lambda counts: measure_damage(model, dense_blocks, scores, counts, batches),
        config.swaps.generations,
        config.swaps.offspring,
        seed,
    )


def list_values(values: Mapping[BlockKey, Any]) -> list[list[Any]]:
    """Convert values of blocks to plain types: layer, kind and value of each."""
    return [[*key, value] for key, value in values.items()]


def make_options(config: PruningConfig, importance: Importance | None) -> AllocationOptions:
    """Make allocation options from the config and from importance, if there is any; damage curves are added later."""
    return AllocationOptions(importance, config.sensitivity.alpha, config.sensitivity.log, config.limits.frozen_layers)
