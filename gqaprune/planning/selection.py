"""From scores to a plan: select the blocks that may lose units, describe them to allocations, and choose kept units."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from gqaprune.common.stage_cache import StageCache
from gqaprune.data.calibration import CalibrationSet
from gqaprune.geometry import Geometry
from gqaprune.models.architecture import (
    Block,
    count_layer_parameters,
    count_parameters,
    find_blocks,
    make_stock_config,
    read_geometry,
    write_geometry,
)
from gqaprune.models.families import get_family
from gqaprune.plan import KeptUnits, PruningPlan
from gqaprune.planning.allocation import ALLOCATIONS, BlockBudget, Budget, Removed
from gqaprune.planning.allocation.budget import find_spared_kind
from gqaprune.planning.config import PruningConfig
from gqaprune.scoring.outliers import Outliers, list_outliers, prepare_search, protect_units
from gqaprune.scoring.scores import Scores, score_units

_WIDE = 1024
"""Width from which an MLP loses channels 32 at a time by default."""
_MULTIPLE = 32
"""Default multiple of kept channels: the block size of llama.cpp's q8_0."""


def select_blocks(model: PreTrainedModel, config: PruningConfig) -> list[Block]:
    """Select the blocks that may lose units, by the config's layer ranges and split.

    Raises:
        ValueError: if a range exceeds the model's layers, or the config needs attention or MLPs to lose units that the
            family keeps whole.
    """
    whole = get_family(model.config).whole
    if "mlp" in whole and config.attention_share == 0:
        raise ValueError(
            f"MLPs of {model.config.model_type} models stay whole: {whole['mlp']}; set split: free or kv_rate to "
            "remove GQA groups"
        )
    if "attention" in whole and (config.attention_share or config.kv_rate or config.granularity == "query"):
        raise ValueError(
            f"attention of {model.config.model_type} models stays whole: {whole['attention']}; "
            "leave split, kv_rate and granularity at their defaults to remove MLP channels"
        )
    blocks = find_blocks(model, config.granularity)
    heads = [block.units // block.groups for block in blocks if block.key.kind == "attention"]
    if config.granularity == "query" and config.attention_share != 0 and max(heads, default=2) == 1:
        raise ValueError(
            "granularity: query keeps one query head for every KV head, and this model has only one each; set "
            "granularity: group, or split: 0:10 to remove only MLP channels"
        )
    allowed = list_allowed_layers(model.config, config)
    return [block for block in blocks if block.key.layer in allowed.get(block.key.kind, ())]


def keeps_equal_counts(model_config: PretrainedConfig, config: PruningConfig) -> bool:
    """Whether all layers of a model will have equal shapes, whatever the scores."""
    dense = read_geometry(model_config)
    are_all = all(len(layers) in (0, dense.num_layers) for layers in list_allowed_layers(model_config, config).values())
    are_equal = (
        ALLOCATIONS[config.allocation].gives_equal_counts
        and not config.limits.frozen_layers
        and not config.swaps.generations
    )
    return dense.is_uniform and are_all and are_equal


def list_allowed_layers(model_config: PretrainedConfig, config: PruningConfig) -> dict[str, range]:
    """Map each kind of block to the layers in which it may lose units; kinds that lose nothing are left out.

    Raises:
        ValueError: if a range exceeds the model's layers.
    """
    whole, layers = get_family(model_config).whole, read_geometry(model_config).num_layers
    ranges = {"attention": config.limits.attention_layers, "mlp": config.limits.mlp_layers}
    for kind, bounds in ranges.items():
        if bounds is not None and not 0 <= bounds[0] <= bounds[1] <= layers:
            raise ValueError(
                f"limits.{kind}_layers must satisfy 0 <= first <= end <= {layers} on this model of {layers} layers, "
                f"got {list(bounds)}; [0, {layers}] is the whole model"
            )
    usual = {"attention": range(layers) if config.sees_repair else choose_middle_layers(layers)}
    usual["mlp"] = choose_middle_layers(layers)
    allowed = {kind: range(*bounds) if bounds else usual[kind] for kind, bounds in ranges.items()}
    spared = find_spared_kind(config.attention_share)
    return {kind: layers_of_kind for kind, layers_of_kind in allowed.items() if kind not in (spared, *whole)}


def choose_middle_layers(layers: int) -> range:
    """Choose the layers that may lose units by default: not those at the ends, which cost the most (4 and 2 of 30)."""
    return range(layers // 7, layers - layers // 14)


def read_budget(model: PreTrainedModel, config: PruningConfig) -> Budget:
    """Compute what must be removed from a dense model, and the limits of its layers."""
    layer_parameters = count_layer_parameters(model)
    return Budget(
        rate=config.rate,
        base_parameters=sum(layer_parameters) if config.rate_base == "decoder" else count_parameters(model),
        layer_parameters=layer_parameters,
        min_rate=config.limits.min_rate,
        max_rate=config.limits.max_rate,
        attention_share=config.attention_share,
        kv_rate=config.kv_rate,
        kv_heads=sum(read_geometry(model.config).kv_heads),
        spared_attention=_list_counts_without_stock_class(model, config),
    )


def score_blocks(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    config: PruningConfig,
    stages: StageCache,
) -> tuple[Scores, Outliers]:
    """Score the units that may be removed and, if the config protects outliers, find them and raise their scores.

    Outliers are searched in the forward pass of a criterion.

    Args:
        model: the causal LM in its current state.
        calibration: the text, and how it accumulates.
        config: criterion and protection of outliers.
        stages: stages of a run with this model and this text.

    Returns:
        The scores, and the outliers, which are empty if they are not protected.

    Raises:
        ValueError: if a loss, an activation or a score is not finite, naming the batch or the block.
    """
    blocks = select_blocks(model, config)
    if not (config.scoring.protect_outliers and config.needs_text):
        return score_units(model, blocks, calibration, config.criterion, config.scoring, stages), {}
    search = prepare_search(model, blocks, calibration)
    scores = score_units(model, blocks, calibration, config.criterion, config.scoring, stages, [search])
    outliers = list_outliers(search)
    return protect_units(scores, outliers), outliers


def budget_blocks(dense_blocks: Sequence[Block], scores: Scores, config: PruningConfig) -> list[BlockBudget]:
    """Describe blocks to allocations. If a block has several groups, one unit of each is a single unit there.

    Args:
        dense_blocks: blocks as they were in the dense model.
        scores: scores of the remaining units; removed units have the score 0.
        config: limits.
    """
    min_groups = 1 if config.granularity == "query" else config.limits.min_groups
    return [
        BlockBudget(
            key=block.key,
            scores=_sum_scores(block, scores[block.key]),
            unit_parameters=block.unit_parameters * block.groups,
            min_kept=min_groups if block.key.kind == "attention" else config.limits.min_channels,
            multiple=1 if block.key.kind == "attention" else _choose_multiple(block, config),
            unit_kv_heads=1 if block.key.kind == "attention" and config.granularity == "group" else 0,
        )
        for block in dense_blocks
    ]


def make_plan(
    model: PreTrainedModel, dense_blocks: Sequence[Block], scores: Scores, removed: Removed, config: PruningConfig
) -> PruningPlan:
    """Make the plan that keeps the units with the highest scores.

    Args:
        model: the model that was scored and that the plan is for.
        dense_blocks: blocks as they were in the dense model.
        scores: scores of the remaining units.
        removed: number of units that each dense block will have lost, from each of its groups.
        config: granularity of attention.
    """
    names = {"attention": {"group": "groups", "query": "queries"}[config.granularity], "mlp": "channels"}
    whole = keep_everything(model)
    layers = list(whole.layers)
    for block in dense_blocks:
        kept = _keep_highest(scores[block.key], block.units // block.groups - removed[block.key], block.groups)
        if len(kept) < len(scores[block.key]):
            layers[block.key.layer] = replace(layers[block.key.layer], **{names[block.key.kind]: kept})
    return replace(whole, layers=tuple(layers))


def keep_everything(model: PreTrainedModel) -> PruningPlan:
    """Make the plan that removes nothing."""
    geometry = read_geometry(model.config)
    counts = zip(geometry.kv_heads, geometry.channels, strict=True)
    return PruningPlan(geometry, tuple(KeptUnits(tuple(range(kv)), tuple(range(width))) for kv, width in counts))


def _list_counts_without_stock_class(model: PreTrainedModel, config: PruningConfig) -> frozenset[int]:
    """List numbers of kept attention units that no stock class supports; empty unless all layers keep equal counts.

    Args:
        model: the dense model.
        config: what to remove.
    """
    if not keeps_equal_counts(model.config, config):
        return frozenset()
    dense = read_geometry(model.config)
    groups, ratio = dense.kv_heads[0], dense.ratios[0]
    of_queries = config.granularity == "query"
    counts = range(1, ratio if of_queries else groups)
    heads = {count: (groups * count, groups) if of_queries else (count * ratio, count) for count in counts}
    return frozenset(count for count, pair in heads.items() if not _is_stock(model.config, dense, *pair))


def _is_stock(model_config: PretrainedConfig, dense: Geometry, query_heads: int, kv_heads: int) -> bool:
    layers = dense.num_layers
    pruned = replace(dense, query_heads=(query_heads,) * layers, kv_heads=(kv_heads,) * layers)
    candidate = copy.deepcopy(model_config)
    write_geometry(candidate, pruned)
    return make_stock_config(candidate) is not None


def _choose_multiple(block: Block, config: PruningConfig) -> int:
    if config.limits.channel_multiple is not None:
        return config.limits.channel_multiple
    return 1 if config.allocation == "uniform" or block.units < _WIDE else _MULTIPLE


def _sum_scores(block: Block, score_U: Tensor) -> list[float]:
    # The weakest units of all groups are removed together, then the next ones: ascending sums.
    sums = score_U.reshape(block.groups, -1).sort().values.sum(0).tolist()
    return [0.0] * (block.units // block.groups - len(sums)) + sums


def _keep_highest(score_U: Tensor, count: int, groups: int) -> tuple[int, ...]:
    # A stable sort keeps the lower index among equal scores on every machine.
    order_GU = torch.argsort(score_U.reshape(groups, -1), dim=1, descending=True, stable=True)
    offset_G1 = torch.arange(groups)[:, None] * order_GU.shape[1]
    return tuple(sorted((offset_G1 + order_GU[:, :count]).flatten().tolist()))
