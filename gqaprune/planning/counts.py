"""How many units each block loses: measures what the config's allocation looks at, and runs it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.sentences import join_choices
from gqaprune.common.stage_cache import Stage, Stages
from gqaprune.models.architecture import Block, find_blocks
from gqaprune.placement.layer_store import LayersApart
from gqaprune.placement.model_hash import hash_tensors
from gqaprune.plan import BlockKey
from gqaprune.planning.allocation import ALLOCATIONS, AllocationOptions, BlockBudget, Budget, Removed, refine_by_swaps
from gqaprune.planning.allocation.budget import find_free_blocks
from gqaprune.planning.allocation.optimal import thin_counts
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.selection import budget_blocks
from gqaprune.scoring.damage import measure_damage, measure_damage_curves
from gqaprune.scoring.scores import CRITERIA, Scores, parse_criterion
from gqaprune.scoring.sensitivity import Importance, measure_sensitivity

BoundAllocation = Callable[[Sequence[BlockBudget], Budget], Removed]
"""An allocation that has its options."""


def bind_allocation(config: PruningConfig, options: AllocationOptions) -> BoundAllocation:
    """The config's allocation, as a function of blocks and budget alone."""
    return lambda blocks, budget: ALLOCATIONS[config.allocation](blocks, budget, options)


def check_text(batches: Sequence[Tensor], config: PruningConfig) -> None:
    """Refuse to measure on no text.

    Raises:
        ValueError: if the config needs calibration text and there is none.
    """
    if config.needs_text and not batches:
        free = ", ".join(name for name, criterion in CRITERIA.items() if not criterion.needs_data)
        raise ValueError(
            f"criterion {config.criterion} with allocation {config.allocation} and repair {config.repair} needs at "
            f"least one calibration batch, got none; only {free} need no text, with repair none and where nothing else "
            "is measured either"
        )


def check_goes_by_layer(config: PruningConfig, apart: LayersApart | type[LayersApart]) -> None:
    """Refuse settings that need the whole model in memory, where its decoder layers are kept apart.

    Args:
        config: what to remove.
        apart: how they are.

    Raises:
        ValueError: with what goes layer by layer instead.
    """
    if not config.removes_something:
        return
    names = [
        name
        for name, criterion in CRITERIA.items()
        if criterion.goes_by_layer or (criterion.runs_held and apart.can_score_gates)
    ]
    if not set(parse_criterion(config.criterion)) <= set(names):
        raise ValueError(
            f"criterion {config.criterion} needs the whole model in memory, which {apart.reason}: set criterion to "
            f"one of {', '.join(names)}, or two of them joined by +"
        )
    by_layer = join_choices([name for name, allocation in ALLOCATIONS.items() if allocation.goes_by_layer])
    for name, is_used, way_out in (
        ("frozen_layers", config.frozen_layers > 0, "to 0"),
        ("allocation", not ALLOCATIONS[config.allocation].goes_by_layer, f"to {by_layer}"),
        ("damage_levels", config.uses_damage_curves, "to 0"),
        ("swap_generations", config.swap_generations > 0, "to 0"),
        ("repair", config.repair == "bias", "to least_squares or none"),
        ("repair_bias", config.repair_bias, "to false"),
    ):
        if is_used:
            raise ValueError(
                f"{name} {getattr(config, name)} needs the whole model in memory, which {apart.reason}: "
                f"set {name} {way_out}"
            )


def check_reachable(
    dense_blocks: Sequence[Block], budget: Budget, config: PruningConfig, importance: Importance | None = None
) -> None:
    """Refuse a budget that no scores can meet, before the long work.

    With `frozen_layers` the blocks that may shrink follow from importance: nothing more is refused before it is known.

    Raises:
        ValueError: with the nearest reachable rate.
    """
    if not dense_blocks:
        raise budget.unreachable("attention_layers and mlp_layers leave no block to prune")
    if config.frozen_layers and importance is None:
        return
    scores = {block.key: torch.linspace(0, block.unit_parameters, block.units) for block in dense_blocks}
    options = _make_options(config, importance or dict.fromkeys(scores, 0.0))
    bind_allocation(config, options)(budget_blocks(dense_blocks, scores, config), budget)


def measure_options(
    model: PreTrainedModel,
    dense_blocks: Sequence[Block],
    budget: Budget,
    batches: Sequence[Tensor],
    config: PruningConfig,
    *,
    source: str = "",
    seed: int = 0,
    corpora: Sequence[str] = (),
    stages: Stages,
) -> AllocationOptions:
    """What the allocation looks at besides scores: importance, where something depends on it.

    Importance is of all blocks of the dense model, so that a saved one fits whatever layers a later run prunes.

    Raises:
        ValueError: if a saved sensitivity does not fit; if the budget cannot be met with the layers that are then free.
    """
    if not config.uses_importance:
        return _make_options(config, None)
    blocks, path = find_blocks(model), config.sensitivity_path

    def measure() -> Stage:
        sensitivity = measure_sensitivity(
            model, blocks, batches, config.sensitivity, path, source=source, seed=seed, corpora=corpora
        )
        return Stage(list_values(sensitivity.importance))

    # A path is a place of the user's own to keep it in, and to read it from.
    stage = measure() if path else stages.recall("sensitivity", {"sensitivity": config.sensitivity}, measure)
    importance = {BlockKey(layer, kind): value for layer, kind, value in stage.facts}
    check_reachable(dense_blocks, budget, config, importance)
    return _make_options(config, importance)


def measure_curves(
    model: PreTrainedModel,
    dense_blocks: Sequence[Block],
    scores: Scores,
    batches: Sequence[Tensor],
    config: PruningConfig,
    options: AllocationOptions,
    stages: Stages,
) -> AllocationOptions:
    """Add measured damage of each block to the options, where the config asks for it."""
    if not config.uses_damage_curves:
        return options
    budgets = budget_blocks(dense_blocks, scores, config)
    levels = {block.key: thin_counts(block.removable_counts(), config.damage_levels) for block in budgets}
    inputs = {"scores": hash_tensors(list(scores.values())), "levels": list_values(levels)}
    stage = stages.recall(
        "damage curves",
        inputs,
        lambda: Stage(list_values(measure_damage_curves(model, dense_blocks, scores, levels, batches))),
    )
    curves = {BlockKey(layer, kind): [tuple(point) for point in points] for layer, kind, points in stage.facts}
    return replace(options, curves=curves)


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
    """Move removals between blocks while the divergence from the dense model falls, where the config asks for it."""
    if not config.swap_generations:
        return removed
    return refine_by_swaps(
        removed,
        find_free_blocks(budget_blocks(dense_blocks, scores, config), budget, options),
        budget,
        lambda counts: measure_damage(model, dense_blocks, scores, counts, batches),
        config.swap_generations,
        config.swap_offspring,
        seed,
    )


def list_values(values: Mapping[BlockKey, Any]) -> list[list[Any]]:
    """What blocks have, in plain types: layer, kind and value of each."""
    return [[*key, value] for key, value in values.items()]


def _make_options(config: PruningConfig, importance: Importance | None) -> AllocationOptions:
    return AllocationOptions(importance, config.alpha, config.log_importance, config.frozen_layers)
