"""Checks before the work begins: refuse settings that the model, its text or the budget does not allow."""

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
    """Refuse settings that are not a `PruningConfig`, which checks them when it is created.

    Raises:
        ValueError: with an example.
    """
    if not isinstance(config, PruningConfig):
        raise ValueError(f"config must be a PruningConfig, got {type(config).__name__}; try PruningConfig(rate=0.2)")


def check_text(model: PreTrainedModel, batches: Sequence[Tensor], config: PruningConfig) -> None:
    """Refuse a config that needs calibration text if there is none, and text that the model cannot read.

    Raises:
        ValueError: in these cases, or as `check_windows`.
    """
    check_windows(model, batches, "the calibration text")
    if config.needs_text and not batches:
        without_text = ", ".join(name for name, criterion in CRITERIA.items() if not criterion.needs_data)
        raise ValueError(
            f"criterion {config.criterion} with allocation {config.allocation} and repair.method "
            f"{config.repair.method} needs at least one calibration batch, got none; to prune without text, set "
            f"criterion to one of {without_text}, allocation to uniform and repair.method to none, without "
            "swaps.generations and limits.frozen_layers"
        )


def check_goes_by_layer(config: PruningConfig, placement: Placement) -> None:
    """Refuse settings that need the whole model in memory if its decoder layers are elsewhere.

    Args:
        config: settings of pruning.
        placement: where the decoder layers are.

    Raises:
        ValueError: with a setting that works layer by layer.
    """
    if not config.removes_something or placement is Placement.MEMORY:
        return
    # Gates need each layer twice per micro-batch. Gathering it from devices is fast enough, reading from disk is not.
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
    """Refuse a budget that cannot be met with any scores, before the long work begins.

    With `limits.frozen_layers`, importance decides which blocks may lose units, so little can be checked before it is
    known.

    Args:
        dense_blocks: blocks that may lose units.
        budget: parameters or KV heads to remove.
        config: limits and allocation.
        options: what the allocation depends on besides scores; None before importance is measured.

    Returns:
        Numbers of removed units that meet the budget, though real scores may spread them differently; None if they
        depend on importance that is not known.

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
    """Refuse settings that lead to unequal layers, which a stock checkpoint cannot hold.

    Raises:
        ValueError: with settings that lead to equal layers.
    """
    if config.removes_something and not keeps_equal_counts(model_config, config):
        layers = read_geometry(model_config).num_layers
        ranges = " and ".join(
            f"limits.{kind}_layers: [0, {layers}]" for kind in list_allowed_layers(model_config, config)
        )
        equal = join_choices([name for name, allocation in ALLOCATIONS.items() if allocation.gives_equal_counts])
        raise ValueError(
            f"a stock checkpoint needs equal counts in every layer: set allocation: {equal}, limits.frozen_layers: 0, "
            f"swaps.generations: 0, {ranges}; or use the format per-layer, which keeps layers unequal, or padded"
        )


def check_repair(model_config: PretrainedConfig, dense_blocks: Sequence[Block], config: PruningConfig) -> None:
    """Refuse to fit biases if the family's checkpoints cannot hold them.

    Raises:
        ValueError: with families whose checkpoints can.
    """
    if config.repair.fits_biases:
        kinds = {block.key.kind for block in dense_blocks}
        check_biases(model_config, ("attention", "mlp") if config.repair.refits_everywhere else sorted(kinds))
