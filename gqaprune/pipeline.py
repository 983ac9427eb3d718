"""The whole path from a dense model to a pruned one, without Lightning. Reads top to bottom like the method itself."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.allocation import ALLOCATIONS, BlockBudget, Budget, Removed
from gqaprune.architecture import (
    GRANULARITIES,
    Block,
    count_layer_parameters,
    count_parameters,
    find_blocks,
    read_geometry,
)
from gqaprune.importance import CRITERIA, Scores, check_finite_weights, score_units
from gqaprune.perplexity import measure_perplexity
from gqaprune.plan import KeptUnits, PruningPlan
from gqaprune.report import Report, describe_model
from gqaprune.steps import spend_share
from gqaprune.surgery import apply_plan

LayerRange = tuple[int, int]


@dataclass(frozen=True)
class PruningConfig:
    """What to remove and how to choose it.

    Args:
        rate: share of parameters to remove, 0 to below 1. 0 leaves the model as it is.
        rate_base: what `rate` is a share of: `decoder` (parameters of all decoder layers) or `all` (embeddings too).
        criterion: what scores units: `fisher` (gate Fisher, per sample) or `taylor` (gate Taylor, per window).
        allocation: how the budget is spread: `uniform` (equal counts in every layer of a range, so that the checkpoint
            needs no remote code when the ranges cover the model) or `global` (lowest score per parameter anywhere).
        granularity: what attention loses: `group` (whole GQA groups: KV heads with their query heads) or `query` (the
            same number of query heads from every group of a layer, at most all but one; every KV head stays, and so
            does the KV cache), for models with too few KV heads to remove.
        attention_layers: decoder layers whose attention may lose units, first and one past the last; null means all,
            equal ends mean none.
        mlp_layers: decoder layers whose MLP may lose channels, likewise.
        min_groups: GQA groups that stay in every layer, at least 1; with `granularity: query` all of them stay.
        min_channels: MLP channels that stay in every layer, at least 1.
        min_rate: least share of its parameters that each layer loses that has a removable unit, 0 to 1.
        max_rate: largest share of its parameters that any layer loses, 0 to 1.
        channel_multiple: kept MLP widths are multiples of it (64 or 128 runs fast on GPUs).
        steps: cuts in which the budget is spent, in equal parts; what is left is scored anew before each.

    Raises:
        ValueError: if a setting is out of its bounds.
    """

    rate: float = 0.2
    rate_base: str = "decoder"
    criterion: str = "fisher"
    allocation: str = "uniform"
    granularity: str = "group"
    attention_layers: LayerRange | None = None
    mlp_layers: LayerRange | None = None
    min_groups: int = 1
    min_channels: int = 1
    min_rate: float = 0.0
    max_rate: float = 1.0
    channel_multiple: int = 1
    steps: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be in [0, 1), a share of the parameters, got {self.rate}; 0.2 removes 20 %")
        if not 0 <= self.min_rate <= self.max_rate <= 1:
            raise ValueError(
                "min_rate and max_rate must satisfy 0 <= min_rate <= max_rate <= 1, "
                f"got {self.min_rate} and {self.max_rate}"
            )
        for name in ("min_groups", "min_channels", "channel_multiple", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, members in (
            ("rate_base", ("decoder", "all")),
            ("criterion", tuple(CRITERIA)),
            ("allocation", tuple(ALLOCATIONS)),
            ("granularity", GRANULARITIES),
        ):
            if getattr(self, name) not in members:
                raise ValueError(f"{name} must be one of {', '.join(members)}, got {getattr(self, name)!r}")


def prune(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    config: PruningConfig,
    *,
    accumulate: int = 1,
    evaluation: Mapping[str, Sequence[Mapping[str, Tensor]]] | None = None,
    source: str = "",
    seed: int = 0,
    corpora: Sequence[str] = (),
) -> tuple[PruningPlan, Report]:
    """Prune a dense model in place: score, allocate, plan, cut, in one step or several; measured before and after.

    Args:
        model: the dense causal LM, on the device to work on.
        batches: calibration token ids, each `[batch, tokens]`; in a process group the same list on every rank.
        config: what to remove.
        accumulate: micro-batches per accumulation window of the criterion.
        evaluation: corpus name -> batches of `input_ids` and `labels` to measure perplexity on, never calibration text.
        source: name of the model, for the plan.
        seed: seed that chose the calibration windows, for the plan.
        corpora: names of the calibration corpora, for the plan.

    Returns:
        The plan from the dense to the pruned model, and the report of both.

    Raises:
        ValueError: if the model, the batches or the budget do not allow it, the model being untouched then; or if the
            scores after an earlier step, or the pruned model's perplexity, are not finite.
    """
    check_finite_weights(model)
    dense_blocks, budget = select_blocks(model, config), read_budget(model, config)
    allocate = ALLOCATIONS[config.allocation]
    if config.rate > 0:
        if not dense_blocks:
            raise budget.unreachable("attention_layers and mlp_layers leave no block to prune")
        if not batches:
            raise ValueError("pruning at a rate above 0 needs at least one calibration batch, got none")
        # An unreachable budget shows on any scores: refuse it before the long work.
        zeros = {block.key: torch.zeros(block.units) for block in dense_blocks}
        allocate(budget_blocks(dense_blocks, zeros, config), budget)
    report = Report(source, asdict(config))
    perplexity = measure_perplexity(model, evaluation or {}, "dense")
    report.stages.append(describe_model("dense", model, perplexity))

    plan = replace(keep_everything(model), model=source)
    if config.rate > 0:
        spending = None
        for step in range(1, config.steps + 1):
            scores = score_units(model, select_blocks(model, config), batches, config.criterion, accumulate)
            block_budgets = budget_blocks(dense_blocks, scores, config)
            spending = spend_share(block_budgets, budget, allocate, step / config.steps, spending)
            step_plan = make_plan(model, dense_blocks, scores, spending.so_far, config)
            apply_plan(model, step_plan)
            plan = plan.then(step_plan)
        plan = replace(
            plan,
            criterion=config.criterion,
            allocation=config.allocation,
            rate=config.rate,
            rate_base=config.rate_base,
            seed=seed,
            corpora=tuple(corpora),
        )
        perplexity = measure_perplexity(model, evaluation or {}, "pruned")

    report.stages.append(describe_model("pruned", model, perplexity))
    return plan, report


def select_blocks(model: PreTrainedModel, config: PruningConfig) -> list[Block]:
    """The blocks that the config's layer ranges allow to shrink.

    Raises:
        ValueError: if a range leaves the model.
    """
    blocks = find_blocks(model, config.granularity)
    layers = read_geometry(model.config).num_layers
    ranges = {"attention": config.attention_layers, "mlp": config.mlp_layers}
    for kind, bounds in ranges.items():
        if bounds is not None and not 0 <= bounds[0] <= bounds[1] <= layers:
            raise ValueError(
                f"{kind}_layers must satisfy 0 <= first <= end <= {layers} on this model of {layers} layers, "
                f"got {list(bounds)}; [0, {layers}] is the whole model"
            )
    allowed = {kind: range(*(bounds or (0, layers))) for kind, bounds in ranges.items()}
    return [block for block in blocks if block.key.layer in allowed[block.key.kind]]


def read_budget(model: PreTrainedModel, config: PruningConfig) -> Budget:
    """What has to go from a dense model, and the limits of its layers."""
    layer_parameters = count_layer_parameters(model)
    return Budget(
        rate=config.rate,
        base_parameters=sum(layer_parameters) if config.rate_base == "decoder" else count_parameters(model),
        layer_parameters=layer_parameters,
        min_rate=config.min_rate,
        max_rate=config.max_rate,
    )


def budget_blocks(dense_blocks: Sequence[Block], scores: Scores, config: PruningConfig) -> list[BlockBudget]:
    """What allocation knows of each block; what goes at once from all its groups is one unit there.

    Args:
        dense_blocks: blocks as they were in the dense model.
        scores: scores of the units that are left; units that are gone count as 0.
        config: limits.
    """
    min_groups = 1 if config.granularity == "query" else config.min_groups
    return [
        BlockBudget(
            key=block.key,
            scores=_sum_scores(block, scores[block.key]),
            unit_parameters=block.unit_parameters * block.groups,
            min_kept=min_groups if block.key.kind == "attention" else config.min_channels,
            multiple=1 if block.key.kind == "attention" else config.channel_multiple,
        )
        for block in dense_blocks
    ]


def make_plan(
    model: PreTrainedModel, dense_blocks: Sequence[Block], scores: Scores, removed: Removed, config: PruningConfig
) -> PruningPlan:
    """Keep the units with the highest scores, so many that each block has lost as many as were counted.

    Args:
        model: the model that was scored, which the plan is for.
        dense_blocks: blocks as they were in the dense model.
        scores: scores of the units that are left.
        removed: units that each dense block has lost then, from each of its groups.
        config: what the units of attention are.
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
    """The plan that removes nothing."""
    geometry = read_geometry(model.config)
    counts = zip(geometry.kv_heads, geometry.channels, strict=True)
    return PruningPlan(geometry, tuple(KeptUnits(tuple(range(kv)), tuple(range(width))) for kv, width in counts))


def _sum_scores(block: Block, score_U: Tensor) -> list[float]:
    # Each group's weakest go together, then each group's next: ascending sums.
    sums = score_U.reshape(block.groups, -1).sort().values.sum(0).tolist()
    return [0.0] * (block.units // block.groups - len(sums)) + sums


def _keep_highest(score_U: Tensor, count: int, groups: int) -> tuple[int, ...]:
    # A stable sort makes ties go to the lower index on every machine.
    order_GU = torch.argsort(score_U.reshape(groups, -1), dim=1, descending=True, stable=True)
    first_G1 = torch.arange(groups)[:, None] * order_GU.shape[1]
    return tuple(sorted((first_G1 + order_GU[:, :count]).flatten().tolist()))
