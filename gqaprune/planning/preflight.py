"""Checks before the work: settings that a model, its text or its budget does not allow are refused at once."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from gqaprune.common.sentences import join_choices
from gqaprune.data.call_checks import check_windows
from gqaprune.models.architecture import Block, check_biases, read_geometry
from gqaprune.placement.layer_store import Placement
from gqaprune.planning.allocation import ALLOCATIONS, AllocationOptions, Budget, Removed
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.counts import bind_allocation, make_options
from gqaprune.planning.selection import budget_blocks, keeps_equal_counts, list_allowed_layers
from gqaprune.scoring.scores import CRITERIA, parse_criterion


def check_config(config: object) -> None:
    """Refuse settings that are not a `PruningConfig`, whose own checks have not seen them.

    Raises:
        ValueError: with how to make one.
    """
    if not isinstance(config, PruningConfig):
        raise ValueError(
            f"config must be a PruningConfig, such as PruningConfig(rate=0.2), got {type(config).__name__}"
        )


def check_text(model: PreTrainedModel, batches: Sequence[Tensor], config: PruningConfig) -> None:
    """Refuse to measure on no text, or on text that the model cannot read.

    Raises:
        ValueError: if the config needs calibration text and there is none, or as `check_windows`.
    """
    check_windows(model, batches, "the calibration text")
    if config.needs_text and not batches:
        free = ", ".join(name for name, criterion in CRITERIA.items() if not criterion.needs_data)
        raise ValueError(
            f"criterion {config.criterion} with allocation {config.allocation} and repair.method "
            f"{config.repair.method} needs at least one calibration batch, got none; only {free} need no text, with "
            "allocation uniform and repair.method none, and where nothing else is measured either"
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
    by_layer = join_choices([name for name, allocation in ALLOCATIONS.items() if allocation.goes_by_layer])
    for name, is_used, way_out in (
        ("limits.frozen_layers", config.limits.frozen_layers > 0, "to 0"),
        ("allocation", not ALLOCATIONS[config.allocation].goes_by_layer, f"to {by_layer}"),
        ("damage", config.uses_damage_curves and not config.sees_repair, "to repaired"),
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
    dense_blocks: Sequence[Block], budget: Budget, config: PruningConfig, options: AllocationOptions | None = None
) -> Removed | None:
    """Refuse a budget that no scores can meet, before the long work.

    With `limits.frozen_layers` the blocks that may shrink follow from importance: until it is known, nothing more is
    refused.

    Args:
        dense_blocks: blocks that may lose units.
        budget: what has to go.
        config: limits and allocation.
        options: what the allocation looks at; None before importance is measured.

    Returns:
        Counts that meet it, of which scores and importance may change how they spread over layers; None where they do
        not follow yet.

    Raises:
        ValueError: with the nearest reachable rate.
    """
    if not dense_blocks:
        raise budget.unreachable("limits.attention_layers and limits.mlp_layers leave no block to prune")
    if config.limits.frozen_layers and options is None:
        return None
    scores = {block.key: torch.linspace(0, block.unit_parameters, block.units) for block in dense_blocks}
    options = options or make_options(config, dict.fromkeys(scores, 0.0))
    return bind_allocation(config, options)(budget_blocks(dense_blocks, scores, config), budget)


def check_equal_counts(model_config: PretrainedConfig, config: PruningConfig) -> None:
    """Refuse settings that leave layers of unequal shapes, which a stock checkpoint cannot hold.

    Raises:
        ValueError: with what would give equal ones.
    """
    if config.removes_something and not keeps_equal_counts(model_config, config):
        layers = read_geometry(model_config).num_layers
        ranges = " and ".join(
            f"limits.{kind}_layers: [0, {layers}]" for kind in list_allowed_layers(model_config, config)
        )
        equal = join_choices([name for name, allocation in ALLOCATIONS.items() if allocation.gives_equal_counts])
        raise ValueError(
            f"a stock checkpoint needs equal counts in every layer: set allocation: {equal}, limits.frozen_layers: 0, "
            f"swaps.generations: 0, {ranges}; or take the format per-layer, which keeps unequal ones, or padded"
        )


def check_repair(model_config: PretrainedConfig, dense_blocks: Sequence[Block], config: PruningConfig) -> None:
    """Refuse to fit biases that the family's checkpoints have no place for.

    Raises:
        ValueError: with the families that have.
    """
    if config.repair.fits_biases:
        kinds = {block.key.kind for block in dense_blocks}
        check_biases(model_config, ("attention", "mlp") if config.repair.refits_everywhere else sorted(kinds))
