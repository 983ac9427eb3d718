"""Cut a model's weights and config to a plan."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gqaprune.models.architecture import Block, find_blocks, read_geometry, write_geometry, write_heads
from gqaprune.models.families import get_family
from gqaprune.placement.layer_store import find_store
from gqaprune.plan import PruningPlan, list_query_heads


def apply_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Cut the weights and the config of a dense model to `plan` in place.

    A unit's rows of the input projections, with their biases, are removed together with its columns of the output
    projection. A GQA group is removed as one KV head with exactly its query heads; single query heads are removed
    without their KV head. A plan that removes nothing changes no bit.

    Args:
        model: the model that the plan was made for.
        plan: the units to keep.

    Raises:
        ValueError: if the plan was made for other shapes, or cuts blocks that the family keeps whole. The model is then
            unchanged.
    """
    check_plan(model, plan)
    with torch.inference_mode(False):  # tensors created in inference mode can never require gradients again
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
    """Check that `plan` can be applied to `model`.

    Raises:
        ValueError: if it is not a plan, was made for other shapes, or cuts attention that the family keeps whole.
    """
    if not isinstance(plan, PruningPlan):
        raise ValueError(f"plan must be a PruningPlan, got {type(plan).__name__}; try PruningPlan.load(file)")
    plan.check_fits(read_geometry(model.config))
    whole, geometry = get_family(model.config).whole, plan.geometry
    if "attention" in whole and plan.pruned_geometry.query_heads != geometry.query_heads:
        raise ValueError(f"the plan cuts attention, which {geometry.family} models keep whole: {whole['attention']}")


def cut_block(model: PreTrainedModel, plan: PruningPlan, block: Block, heads: Block) -> None:
    """Cut the weights of one block to `plan`, and update the head counts of its attention module.

    The config describes the dense model until `write_shapes`, so find all blocks before the first cut.

    Args:
        model: the model, of which other blocks may be cut already.
        plan: the units to keep.
        block: the block, still dense.
        heads: the same block with query heads as units.
    """
    kept = plan.layers[block.key.layer]
    if block.key.kind == "mlp":
        keep_units(block, kept.channels)
        return
    keep_units(block, kept.groups)
    heads_of_kept_groups = list_query_heads(kept.groups, heads.units // heads.groups)
    queries = heads_of_kept_groups if kept.queries is None else kept.queries
    keep_units(
        replace(heads, units=len(heads_of_kept_groups)), tuple(heads_of_kept_groups.index(head) for head in queries)
    )
    if len(queries) < heads.units:
        write_heads(model, block.key.layer, len(queries), len(kept.groups))


def write_shapes(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Write the shapes of `plan` to the config and the attention modules, after all blocks have been cut."""
    if not plan.removes_nothing:
        geometry = plan.pruned_geometry
        write_geometry(model.config, geometry)
        for layer, heads in enumerate(zip(geometry.query_heads, geometry.kv_heads, strict=True)):
            write_heads(model, layer, *heads)


def list_kept_columns(plan: PruningPlan, block: Block) -> Tensor:
    """List the columns of a dense block's output projection that `plan` keeps, as ascending indexes `[kept]`."""
    layer, device = block.key.layer, block.output.weight.device
    if block.key.kind == "mlp":
        return torch.tensor(plan.layers[layer].channels, device=device)
    return expand_units(torch.tensor(plan.list_queries(layer), device=device), plan.geometry.head_dim)


def expand_units(units: Tensor, size: int) -> Tensor:
    """List the indexes of the `size` consecutive rows or columns of each unit, in order, `[units * size]`."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def keep_units(block: Block, kept: tuple[int, ...]) -> None:
    """Remove all units of a block but `kept`, given as ascending indexes."""
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
