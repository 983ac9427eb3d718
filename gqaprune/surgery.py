"""Surgery: cut the weights as the plan says."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gqaprune.architecture import Block, find_blocks, read_geometry, write_geometry, write_ratios
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
        ValueError: if the plan was made for other shapes; the model is untouched then.
    """
    plan.check_fits(read_geometry(model.config))
    for block, heads in zip(find_blocks(model), find_blocks(model, "query"), strict=True):
        kept = plan.layers[block.key.layer]
        _cut_block(block, kept.groups if block.key.kind == "attention" else kept.channels)
        if block.key.kind == "attention" and kept.queries is not None:
            left = list_query_heads(kept.groups, heads.units // heads.groups)
            _cut_block(replace(heads, units=len(left)), tuple(left.index(head) for head in kept.queries))
    if not plan.removes_nothing:
        write_geometry(model.config, plan.pruned_geometry)
        write_ratios(model, plan.pruned_geometry)


def expand_units(units: Tensor, size: int) -> Tensor:
    """Indexes of the `size` consecutive rows or columns of each unit, in order. Shape `[units * size]`."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def _cut_block(block: Block, kept: tuple[int, ...]) -> None:
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
