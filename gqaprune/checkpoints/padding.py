"""Pad the layers of a model to equal shapes, with zeros for the units that they lack.

A unit of zeros has output 0, so the logits stay the same and a stock class can store the model, at the price of storing
the zeros and multiplying by them.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil, prod

import torch
from torch import Tensor
from transformers import PretrainedConfig

from gqaprune.geometry import Geometry
from gqaprune.models.architecture import make_stock_config, read_geometry, write_geometry
from gqaprune.models.families import get_family

_MOST_HEADS = 4
"""Head counts are searched up to this many times the largest one."""


def pad_checkpoint(
    config: PretrainedConfig,
    state_dict: Mapping[str, Tensor],
    is_loadable: Callable[[Geometry], bool] = lambda _: True,
    channel_multiple: int = 1,
) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Make config and weights of a stock class, with every layer padded to the units of the largest.

    Args:
        config: config of the pruned model; it is not changed.
        state_dict: its whole weights; tensors that need no padding are not copied.
        is_loadable: a further condition on the padded shapes.
        channel_multiple: widths of the MLPs become multiples of it.

    Returns:
        Config and weights.

    Raises:
        ValueError: if no stock class can store the shapes.
    """
    geometry = read_geometry(config)
    padded, stock = _find_shapes(config, geometry, is_loadable, channel_multiple)
    return stock, pad_state_dict(state_dict, config, geometry, padded)


def find_padded_shapes(
    config: PretrainedConfig, is_loadable: Callable[[Geometry], bool] = lambda _: True, channel_multiple: int = 1
) -> Geometry:
    """Find the shapes to which `pad_checkpoint` pads a model of a config.

    Raises:
        ValueError: if no stock class can store the shapes.
    """
    return _find_shapes(config, read_geometry(config), is_loadable, channel_multiple)[0]


def pad_state_dict(
    state_dict: Mapping[str, Tensor], config: PretrainedConfig, old: Geometry, new: Geometry
) -> dict[str, Tensor]:
    """Pad weights to larger shapes, with zeros for missing units.

    Args:
        state_dict: whole weights.
        config: config of their model.
        old: its shapes.
        new: shapes at least as large, with as many layers.
    """
    family, head = get_family(config), old.head_dim
    weights = dict(state_dict)
    for layer in range(old.num_layers):
        places, sizes = _place_units(old, new, layer)
        for kind, layout in family.layouts.items():
            size = head if kind == "attention" else 1
            prefix = f"{family.layers}.{layer}.{layout.module}"
            for name, parts in layout.inputs.items():
                part_places, totals = [places[part] for part in parts], [sizes[part] for part in parts]
                for tensor in ("weight", "bias"):
                    _pad(weights, f"{prefix}.{name}.{tensor}", 0, part_places, totals, size)
            part = "query" if kind == "attention" else "up"
            _pad(weights, f"{prefix}.{layout.output}.weight", 1, [places[part]], [sizes[part]], size)
    return weights


def _place_units(old: Geometry, new: Geometry, layer: int) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Find the new index of each head and channel of a layer, and their new numbers, by part of the projections."""
    ratio, wider = old.ratios[layer], new.ratios[layer]
    queries = [group * wider + head for group in range(old.kv_heads[layer]) for head in range(ratio)]
    groups, channels = list(range(old.kv_heads[layer])), list(range(old.channels[layer]))
    places = {"query": queries, "key": groups, "value": groups, "gate": channels, "up": channels}
    heads, width = new.kv_heads[layer], new.channels[layer]
    return places, {"query": new.query_heads[layer], "key": heads, "value": heads, "gate": width, "up": width}


def _pad(
    weights: dict[str, Tensor], name: str, dim: int, places: Sequence[list[int]], sizes: Sequence[int], unit: int
) -> None:
    """Spread the rows or columns of a tensor, part after part, over a larger one of zeros."""
    tensor = weights.get(name)
    if tensor is None or sum(sizes) * unit == tensor.shape[dim]:
        return
    starts = [sum(sizes[:part]) for part in range(len(sizes))]
    units = torch.tensor([start + place for start, part in zip(starts, places, strict=True) for place in part])
    indexes = (units[:, None] * unit + torch.arange(unit)).flatten().to(tensor.device)
    shape = list(tensor.shape)
    shape[dim] = sum(sizes) * unit
    weights[name] = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device).index_copy_(dim, indexes, tensor)


def _find_shapes(
    config: PretrainedConfig, geometry: Geometry, is_loadable: Callable[[Geometry], bool], channel_multiple: int
) -> tuple[Geometry, PretrainedConfig]:
    """Find the smallest equal shapes that fit every layer and that a stock class accepts."""
    kv_heads, ratio = max(geometry.kv_heads), max(geometry.ratios)
    width = ceil(max(geometry.channels) / channel_multiple) * channel_multiple
    counts = [
        (kv, r)
        for kv in range(kv_heads, _MOST_HEADS * kv_heads + 1)
        for r in range(ratio, _MOST_HEADS * ratio + 1)
        if "attention" not in get_family(config).whole or (kv, r) == (kv_heads, ratio)
    ]
    for kv, r in sorted(counts, key=lambda pair: (prod(pair), pair[0])):
        layers = geometry.num_layers
        padded = replace(geometry, query_heads=(kv * r,) * layers, kv_heads=(kv,) * layers, channels=(width,) * layers)
        if is_loadable(padded):
            candidate = copy.deepcopy(config)
            write_geometry(candidate, padded)
            stock = make_stock_config(candidate)
            if stock is not None:
                return padded, stock
    raise ValueError(
        f"no stock {config.model_type} can have {kv_heads} KV heads of {ratio} query heads each with a hidden size of "
        f"{geometry.hidden_size}; use format per-layer"
    )
