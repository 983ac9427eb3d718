"""Costs of the stages of a run, from its settings and the model's shapes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from gqaprune.models.architecture import Block, find_blocks
from gqaprune.plan import BlockKey
from gqaprune.planning.allocation.optimal import thin_counts
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.costs.base import Cost, ModelShape, Text, read_shape, run_model
from gqaprune.planning.costs.curves import Levels, cost_gated_damage, cost_repaired_damage
from gqaprune.planning.costs.peaks import find_watch_room
from gqaprune.planning.costs.repair import cost_cut, cost_distillation, cost_predictions
from gqaprune.planning.costs.scoring import cost_importance, cost_scores
from gqaprune.planning.costs.training import cost_recovery_step, cost_sampling
from gqaprune.planning.memory import read_sizes
from gqaprune.planning.selection import budget_blocks, read_budget, select_blocks
from gqaprune.planning.stages import (
    CURVES,
    CUT,
    DENSE_PREDICTIONS,
    DISTILLATION,
    IMPORTANCE,
    SAMPLING,
    TRAINING,
    Work,
    list_stages,
    name_scores,
)
from gqaprune.scoring.repaired_damage import choose_levels
from gqaprune.training.recovery import RecoveryConfig


@dataclass(frozen=True)
class StageCost:
    """The cost of a stage.

    Args:
        name: name of the stage, as a run prints it.
        cost: cost of the stage; zero if it depends on text that has not been counted.
        passes: number of forward passes, over the sampled, training or calibration text that the stage reads, with as
            many operations.
    """

    name: str
    cost: Cost
    passes: float


def cost_stages(
    model: PreTrainedModel,
    config: PruningConfig,
    work: Work,
    recovery: RecoveryConfig,
    itemsize: int,
    memory: float = float("inf"),
) -> list[StageCost]:
    """Compute the costs of the stages of a run, in order.

    The plan is not known yet: every MLP that may lose channels is assumed to lose the same share.

    Args:
        model: the dense causal LM, on the meta device.
        config: what to remove, with its target resolved.
        work: text that is read and trained on.
        recovery: settings of recovery.
        itemsize: bytes of a weight.
        memory: bytes that the GPU has free; infinite for a CPU.
    """
    shape, text = read_shape(model.config, itemsize), work.calibration
    costs: dict[str, tuple[Cost, Text]] = {}
    kept: dict[BlockKey, int] = {}
    if config.removes_something and text.windows:
        kept = spread_evenly(model, config)
        costs = {name: (cost, text) for name, cost in _cost_pruning(shape, model, config, text, kept, memory).items()}
    if work.sampled is not None:
        costs[SAMPLING] = cost_sampling(shape, work.sampled), work.sampled
    if work.training is not None:
        pruned = shape.cut(kept, find_blocks(model))
        training = work.training
        micro_batch = training.take(training.batch)
        step = cost_recovery_step(pruned, micro_batch, recovery.mode, recovery.lora_rank, teacher=shape)
        costs[TRAINING] = training.calls * step, training
    stages = []
    for name in list_stages(config, work):
        cost, text_read = costs.get(name, (Cost(), text))
        forward = run_model(shape, text_read).flops
        stages.append(StageCost(name, cost, cost.all_flops / forward if forward else 0.0))
    return stages


def _cost_pruning(
    shape: ModelShape,
    model: PreTrainedModel,
    config: PruningConfig,
    text: Text,
    kept: dict[BlockKey, int],
    memory: float,
) -> dict[str, Cost]:
    """Compute the costs of the stages that read calibration text."""
    blocks, every = select_blocks(model, config), find_blocks(model)
    finds_outliers = config.scoring.protect_outliers and config.needs_text
    room = find_watch_room(read_sizes(model.config), shape.itemsize, text, memory)
    scores = cost_scores(shape, text, blocks, config.criterion, finds_outliers, room)
    repair, pruned = config.repair, shape.cut(kept, every)
    return {
        DENSE_PREDICTIONS: cost_predictions(shape, text, repair),
        IMPORTANCE: cost_importance(shape, text, every, config.sensitivity.method),
        name_scores(config): config.steps * scores,
        CURVES: config.steps * _cost_curves(shape, model, config, text, blocks),
        CUT: config.steps * cost_cut(shape, text, every, kept, repair, measures_damage=config.sees_repair),
        DISTILLATION: cost_distillation(pruned, text, repair),
    }


def _cost_curves(
    shape: ModelShape, model: PreTrainedModel, config: PruningConfig, text: Text, blocks: Sequence[Block]
) -> Cost:
    levels = list_levels(model, config)
    if not config.sees_repair:
        return cost_gated_damage(shape, text, levels)
    return cost_repaired_damage(shape, text, blocks, levels, config.repair.holdout, config.repair.refits_weights)


def list_levels(model: PreTrainedModel, config: PruningConfig) -> Levels:
    """List the numbers of removed units at which each block's damage is measured, in the first cut of a dense model."""
    blocks = select_blocks(model, config)
    unknown = {block.key: torch.zeros(block.units) for block in blocks}
    counts = {budget.key: budget.removable_counts() for budget in budget_blocks(blocks, unknown, config)}
    if not config.sees_repair:
        return {key: thin_counts(removable, config.damage_levels + 1)[1:] for key, removable in counts.items()}
    return {
        block.key: choose_levels(block.key.kind, block.units // block.groups, counts[block.key][-1]) for block in blocks
    }


def spread_evenly(model: PreTrainedModel, config: PruningConfig) -> dict[BlockKey, int]:
    """Compute the columns that each cut block keeps if all blocks of a kind that may lose units lose the same share.

    Attention loses what `split` or `kv_rate` asks for; nothing if the allocation chooses and MLPs can lose channels.
    """
    blocks, budget = select_blocks(model, config), read_budget(model, config)
    size = {
        kind: sum(block.units * block.unit_parameters for block in blocks if block.key.kind == kind)
        for kind in ("attention", "mlp")
    }
    removed = budget.rate * budget.base_parameters
    from_attention = (config.attention_share or 0.0) * removed if size["mlp"] else removed
    shares = {"attention": from_attention / size["attention"] if size["attention"] else 0.0}
    if config.kv_rate:
        shares["attention"] = config.kv_rate
        from_attention = config.kv_rate * size["attention"]
    shares["mlp"] = max(0.0, removed - from_attention) / size["mlp"] if size["mlp"] else 0.0
    kept = {}
    for block in blocks:
        units = max(1, block.units - round(min(1.0, shares[block.key.kind]) * block.units))
        if units < block.units:
            kept[block.key] = units * block.columns_per_unit
    return kept
