"""How many units each block loses: measures what the config's allocation looks at, and runs it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.stage_cache import Stage, Stages
from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import Block, find_blocks
from gqaprune.placement.layer_store import Placement
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

Allocation = Callable[[Sequence[BlockBudget], Budget], Removed]
"""An allocation that has its options."""


def bind_allocation(config: PruningConfig, options: AllocationOptions) -> Allocation:
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
            f"criterion {config.criterion} with allocation {config.allocation} and repair.method "
            f"{config.repair.method} needs at least one calibration batch, got none; only {free} need no text, with "
            "repair.method none and where nothing else is measured either"
        )


def check_goes_by_layer(config: PruningConfig, placement: Placement) -> None:
    """Refuse settings that need the whole model in memory, where its decoder layers are not.

    Args:
        config: what to remove.
        placement: where the decoder layers are.

    Raises:
        ValueError: with what goes layer by layer instead.
    """
    if not config.removes_something or placement is Placement.MEMORY:
        return
    # Gates need every layer twice for each micro-batch: devices gather it fast enough, disks do not read it so.
    names = [
        name
        for name, criterion in CRITERIA.items()
        if criterion.goes_by_layer or (criterion.runs_held and placement is Placement.DEVICES)
    ]
    if not set(parse_criterion(config.criterion)) <= set(names):
        raise ValueError(
            f"criterion {config.criterion} needs the whole model in memory, which {placement.value} avoids: set "
            f"criterion to one of {', '.join(names)}, or two of them joined by +"
        )
    for name, is_used, way_out in (
        ("limits.frozen_layers", config.limits.frozen_layers > 0, "to 0"),
        ("allocation", config.uses_importance, "to uniform, global or optimal"),
        ("damage_levels", config.uses_damage_curves, "to 0"),
        ("swaps.generations", config.swaps.generations > 0, "to 0"),
        ("repair.method", config.repair.method == "bias", "to least_squares or none"),
        ("repair.bias", config.repair.bias, "to false"),
    ):
        if is_used:
            raise ValueError(
                f"{name} {attrgetter(name)(config)} needs the whole model in memory, which {placement.value} avoids: "
                f"set {name} {way_out}"
            )


def check_reachable(
    dense_blocks: Sequence[Block], budget: Budget, config: PruningConfig, importance: Importance | None = None
) -> None:
    """Refuse a budget that no scores can meet, before the long work.

    With `limits.frozen_layers` the blocks that may shrink follow from importance: until it is known, nothing more is
    refused.

    Raises:
        ValueError: with the nearest reachable rate.
    """
    if not dense_blocks:
        raise budget.unreachable("limits.attention_layers and limits.mlp_layers leave no block to prune")
    if config.limits.frozen_layers and importance is None:
        return
    scores = {block.key: torch.linspace(0, block.unit_parameters, block.units) for block in dense_blocks}
    options = _make_options(config, importance or dict.fromkeys(scores, 0.0))
    bind_allocation(config, options)(budget_blocks(dense_blocks, scores, config), budget)


def measure_options(
    model: PreTrainedModel,
    dense_blocks: Sequence[Block],
    budget: Budget,
    calibration: CalibrationSet,
    config: PruningConfig,
    stages: Stages,
) -> AllocationOptions:
    """What the allocation looks at besides scores: importance, where something depends on it.

    Importance is of all blocks of the dense model, so that a saved one fits whatever layers a later run prunes.

    Raises:
        ValueError: if a saved sensitivity does not fit; if the budget cannot be met with the layers that are then free.
    """
    if not config.uses_importance:
        return _make_options(config, None)
    blocks, path = find_blocks(model), config.sensitivity.path

    def measure() -> Stage:
        sensitivity = measure_sensitivity(model, blocks, calibration, config.sensitivity.method, path)
        return Stage(list_values(sensitivity.importance))

    # A path is a place of the user's own to keep it in, and to read it from.
    stage = measure() if path else stages.recall("sensitivity", {"sensitivity": config.sensitivity.method}, measure)
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
    """What blocks have, in plain types: layer, kind and value of each."""
    return [[*key, value] for key, value in values.items()]


def _make_options(config: PruningConfig, importance: Importance | None) -> AllocationOptions:
    return AllocationOptions(importance, config.sensitivity.alpha, config.sensitivity.log, config.limits.frozen_layers)
