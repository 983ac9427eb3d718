"""Surgery: cut the weights as the plan says."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gqaprune.models.architecture import Block, find_blocks, read_geometry, write_geometry, write_heads
from gqaprune.models.families import get_family
from gqaprune.placement.layer_store import find_store
from gqaprune.plan import PruningPlan, list_query_heads


def apply_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Cut a dense model to a plan, in place, weights and config.

    Rows of the input projections and columns of the output projection go together, with biases; a GQA group goes as one
    KV head with exactly its query heads, and query heads of groups that stay go without their KV head. A plan that
    removes nothing changes no bit.

    Args:
        model: the model that the plan was made for.
        plan: which units stay.

    Raises:
        ValueError: if the plan was made for other shapes, or cuts what the family cannot lose; the model is untouched
            then.
    """
    check_plan(model, plan)
    with torch.inference_mode(False):  # what is made in that mode could never require gradients again
        _apply_plan(model, plan)


def _apply_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    pairs = list(zip(find_blocks(model), find_blocks(model, "query"), strict=True))
    cut = {block.key.layer for block, _ in pairs if len(list_kept_columns(plan, block)) < block.output.in_features}
    for layer in find_store(model).hold_each(sorted(cut), cut):
        for block, heads in pairs:
            if block.key.layer == layer:
                cut_block(model, plan, block, heads)
    write_shapes(model, plan)


def check_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Refuse a plan that cannot be applied to a model.

    Raises:
        ValueError: if it is none, was made for other shapes, or cuts attention that the family cannot lose.
    """
    if not isinstance(plan, PruningPlan):
        raise ValueError(f"the plan must be a PruningPlan, such as PruningPlan.load(file), got {type(plan).__name__}")
    plan.check_fits(read_geometry(model.config))
    whole, geometry = get_family(model.config).whole, plan.geometry
    if "attention" in whole and plan.pruned_geometry.query_heads != geometry.query_heads:
        raise ValueError(f"the plan cuts attention, which {geometry.family} models keep whole: {whole['attention']}")


def cut_block(model: PreTrainedModel, plan: PruningPlan, block: Block, heads: Block) -> None:
    """Cut one block of a dense model to a plan: its weights, and the heads that its attention works with.

    The config stays dense until `write_shapes`, so blocks have to be found before the first cut.

    Args:
        model: the model.
        plan: which units stay.
        block: the dense block.
        heads: the same block with query heads for units.
    """
    kept = plan.layers[block.key.layer]
    if block.key.kind == "mlp":
        keep_units(block, kept.channels)
        return
    keep_units(block, kept.groups)
    left = list_query_heads(kept.groups, heads.units // heads.groups)
    queries = left if kept.queries is None else kept.queries
    keep_units(replace(heads, units=len(left)), tuple(left.index(head) for head in queries))
    if len(queries) < heads.units:
        write_heads(model, block.key.layer, len(queries), len(kept.groups))


def write_shapes(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Make config and attention modules describe a model whose every block has been cut to a plan."""
    if not plan.removes_nothing:
        geometry = plan.pruned_geometry
        write_geometry(model.config, geometry)
        for layer, heads in enumerate(zip(geometry.query_heads, geometry.kv_heads, strict=True)):
            write_heads(model, layer, *heads)


def list_kept_columns(plan: PruningPlan, block: Block) -> Tensor:
    """Ascending indexes of the columns of a dense block's output projection that stay with a plan. Shape `[kept]`."""
    layer, device = block.key.layer, block.output.weight.device
    if block.key.kind == "mlp":
        return torch.tensor(plan.layers[layer].channels, device=device)
    return expand_units(torch.tensor(plan.list_queries(layer), device=device), plan.geometry.head_dim)


def expand_units(units: Tensor, size: int) -> Tensor:
    """Indexes of the `size` consecutive rows or columns of each unit, in order. Shape `[units * size]`."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def keep_units(block: Block, kept: tuple[int, ...]) -> None:
    """Cut the units of a block down to some, by ascending index."""
    if len(kept) == block.units:
        return
    units = torch.tensor(kept, device=block.output.weight.device)
    for projection in block.inputs:
        rows, offset = [], 0
        for size in projection.rows_per_unit:
            rows.append(offset + expand_units(units, size))
            offset += block.units * size
        rows.append(torch.arange(offset, projection.linear.out_features, device=units.device))
        _keep_rows(projection.linear, torch.cat(rows))
    _keep_columns(block.output, expand_units(units, block.columns_per_unit))


def _keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight = _cut(linear.weight, 0, rows)
    if linear.bias is not None:
        linear.bias = _cut(linear.bias, 0, rows)
    linear.out_features = len(rows)


def _keep_columns(linear: nn.Linear, columns: Tensor) -> None:
    linear.weight = _cut(linear.weight, 1, columns)
    linear.in_features = len(columns)


def _cut(parameter: Tensor, dim: int, indexes: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, indexes), requires_grad=parameter.requires_grad)
