"""Surgery: cut the weights as the plan says."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gqaprune.architecture import Block, find_blocks, read_geometry, write_geometry
from gqaprune.plan import PruningPlan


def apply_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Cut a dense model to a plan, in place, weights and config.

    Rows of the input projections and columns of the output projection go together, with biases; a GQA group goes as one
    KV head with exactly its query heads. A plan that removes nothing changes no bit.

    Args:
        model: the model that the plan was made for.
        plan: which units stay.

    Raises:
        ValueError: if the plan was made for other shapes; the model is untouched then.
    """
    plan.check_fits(read_geometry(model.config))
    blocks = find_blocks(model)
    for block in blocks:
        kept = plan.layers[block.key.layer]
        _cut_block(block, kept.groups if block.key.kind == "attention" else kept.channels)
    if not plan.removes_nothing:
        write_geometry(model.config, plan.pruned_geometry)


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
