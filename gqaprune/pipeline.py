"""The whole path from a dense model to a pruned one, without Lightning. Reads top to bottom like the method itself."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.allocation import ALLOCATIONS, BlockBudget, Budget
from gqaprune.architecture import Block, count_layer_parameters, count_parameters, find_blocks, read_geometry
from gqaprune.importance import CRITERIA, Scores, check_finite_weights, score_units
from gqaprune.perplexity import measure_perplexity
from gqaprune.plan import KeptUnits, PruningPlan
from gqaprune.report import Report, describe_model
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
        attention_layers: decoder layers whose attention may lose GQA groups, first and one past the last; null means
            all, equal ends mean none.
        mlp_layers: decoder layers whose MLP may lose channels, likewise.
        min_groups: GQA groups that stay in every layer, at least 1.
        min_channels: MLP channels that stay in every layer, at least 1.
        min_rate: least share of its parameters that each layer loses that has a removable unit, 0 to 1.
        max_rate: largest share of its parameters that any layer loses, 0 to 1.
        channel_multiple: kept MLP widths are multiples of it (64 or 128 runs fast on GPUs).

    Raises:
        ValueError: if a setting is out of its bounds.
    """

    rate: float = 0.2
    rate_base: str = "decoder"
    criterion: str = "fisher"
    allocation: str = "uniform"
    attention_layers: LayerRange | None = None
    mlp_layers: LayerRange | None = None
    min_groups: int = 1
    min_channels: int = 1
    min_rate: float = 0.0
    max_rate: float = 1.0
    channel_multiple: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be in [0, 1), a share of the parameters, got {self.rate}; 0.2 removes 20 %")
        if not 0 <= self.min_rate <= self.max_rate <= 1:
            raise ValueError(
                "min_rate and max_rate must satisfy 0 <= min_rate <= max_rate <= 1, "
                f"got {self.min_rate} and {self.max_rate}"
            )
        for name in ("min_groups", "min_channels", "channel_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, members in (
            ("rate_base", ("decoder", "all")),
            ("criterion", tuple(CRITERIA)),
            ("allocation", tuple(ALLOCATIONS)),
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
    """Prune a dense model in place: score, allocate, plan, cut; measured before and after.

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
        The plan that was applied and the report of the dense and the pruned model.

    Raises:
        ValueError: if the model, the batches or the budget do not allow it, the model being untouched then; or if the
            pruned model's perplexity is not finite.
    """
    check_finite_weights(model)
    blocks = select_blocks(model, config)
    if config.rate > 0:
        if not batches:
            raise ValueError("pruning at a rate above 0 needs at least one calibration batch, got none")
        # An unreachable budget shows on any scores: refuse it before the long work.
        make_plan(model, blocks, {block.key: torch.zeros(block.units) for block in blocks}, config)
    report = Report(source, asdict(config))
    perplexity = measure_perplexity(model, evaluation or {}, "dense")
    report.stages.append(describe_model("dense", model, perplexity))

    if config.rate == 0:
        plan = replace(keep_everything(model), model=source)
    else:
        scores = score_units(model, blocks, batches, config.criterion, accumulate)
        plan = make_plan(model, blocks, scores, config)
        plan = replace(plan, model=source, seed=seed, corpora=tuple(corpora))
        apply_plan(model, plan)
        perplexity = measure_perplexity(model, evaluation or {}, "pruned")

    report.stages.append(describe_model("pruned", model, perplexity))
    return plan, report


def select_blocks(model: PreTrainedModel, config: PruningConfig) -> list[Block]:
    """The blocks that the config's layer ranges allow to shrink.

    Raises:
        ValueError: if a range leaves the model.
    """
    blocks = find_blocks(model)
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


def make_plan(model: PreTrainedModel, blocks: Sequence[Block], scores: Scores, config: PruningConfig) -> PruningPlan:
    """Choose how many units each block keeps, then keep those with the highest scores.

    Raises:
        ValueError: if the budget cannot be met, with the nearest reachable rate.
    """
    layer_parameters = count_layer_parameters(model)
    budget = Budget(
        rate=config.rate,
        base_parameters=sum(layer_parameters) if config.rate_base == "decoder" else count_parameters(model),
        layer_parameters=layer_parameters,
        min_rate=config.min_rate,
        max_rate=config.max_rate,
    )
    if not blocks:
        raise budget.unreachable("attention_layers and mlp_layers leave no block to prune")
    budgets = [
        BlockBudget(
            key=block.key,
            scores=scores[block.key].sort().values.tolist(),
            unit_parameters=block.unit_parameters,
            min_kept=config.min_groups if block.key.kind == "attention" else config.min_channels,
            multiple=1 if block.key.kind == "attention" else config.channel_multiple,
        )
        for block in blocks
    ]
    removed = ALLOCATIONS[config.allocation](budgets, budget)
    whole = keep_everything(model)
    groups, channels = [kept.groups for kept in whole.layers], [kept.channels for kept in whole.layers]
    for block in blocks:
        kept = _keep_highest(scores[block.key], block.units - removed[block.key])
        (groups if block.key.kind == "attention" else channels)[block.key.layer] = kept
    return PruningPlan(
        geometry=whole.geometry,
        layers=tuple(KeptUnits(g, c) for g, c in zip(groups, channels, strict=True)),
        criterion=config.criterion,
        allocation=config.allocation,
        rate=config.rate,
        rate_base=config.rate_base,
    )


def keep_everything(model: PreTrainedModel) -> PruningPlan:
    """The plan that removes nothing."""
    geometry = read_geometry(model.config)
    counts = zip(geometry.kv_heads, geometry.channels, strict=True)
    return PruningPlan(geometry, tuple(KeptUnits(tuple(range(kv)), tuple(range(width))) for kv, width in counts))


def _keep_highest(score_U: Tensor, count: int) -> tuple[int, ...]:
    # A stable sort makes ties go to the lower index on every machine.
    order = torch.argsort(score_U, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))
