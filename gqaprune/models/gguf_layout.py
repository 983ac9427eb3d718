"""Convert names, order and rows of a model's tensors to those of a GGUF file, and back.

| architecture | families | sizes of layers | rows of q and k | q, k and v |
| --- | --- | --- | --- | --- |
| `llama` | Llama, Mistral | equal | pairs | three tensors |
| `qwen2`, `qwen3` | Qwen2, Qwen3 | equal | halves | three tensors |
| `deci` | Llama, Mistral, Qwen2 | each its own | pairs | three tensors |
| `openelm` | Qwen3, tied | each its own | halves | one tensor |

Source: llama.cpp, src/models/*.cpp, where only the graphs of `deci` and `openelm` have sizes for each layer.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gqaprune.geometry import Geometry
from gqaprune.models.architecture import find_layer

CONFIG_KEY = "gqaprune.config"
"""Key of the metadata with the config, as JSON, in files that gqaprune wrote."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Types of models that can be written."""
UNEQUAL = ("deci", "openelm")
"""Architectures in which each layer has its own sizes."""
ARCHITECTURES = ("llama", "qwen2", "qwen3", *UNEQUAL)
"""Architectures of files that are written."""
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
BLOCK = 32
"""Widths of MLPs in a file may be rounded up, with zeros, to whole blocks of this many values."""
ROPE_FACTORS = "rope_freqs.weight"
"""Tensor that only files have: divisors of rotary frequencies."""

_PAIRED = ("llama", "deci")
_FUSED = ("openelm",)
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Module of the model or of a layer -> name in a file."""
_MODULES = {name: module for module, name in _NAMES.items()}
_WIDTHS = {"mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1}
"""Module -> axis of the channels of its weight."""
_LAYERS = "model.layers"
_PARTS = tuple(f"self_attn.{part}_proj" for part in "qkv")


def pack_tensors(weights: Mapping[str, Tensor], geometry: Geometry, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of a file, one by one, from a model's weights."""
    for name, tensor in weights.items():
        layer, module, kind = _split_name(name, _LAYERS)
        if layer is None or module not in _PARTS:
            yield _join_name("blk", layer, _NAMES[module], kind), tensor
        elif architecture in _FUSED:
            if module == _PARTS[0]:
                parts = [weights[_join_name(_LAYERS, layer, part, kind)] for part in _PARTS]
                yield _join_name("blk", layer, "attn_qkv", kind), torch.cat(parts)
        else:
            heads = _count_heads(geometry, layer)[_PARTS.index(module)]
            is_paired = architecture in _PAIRED and module != _PARTS[2]
            yield _join_name("blk", layer, _NAMES[module], kind), _pair_rows(tensor, heads) if is_paired else tensor


def unpack_tensor(name: str, tensor: Tensor, geometry: Geometry, architecture: str) -> dict[str, Tensor]:
    """Convert a tensor of a file to the model's tensors by name: the reverse of `pack_tensors` and of rounding widths.

    Raises:
        ValueError: if the number of rows does not fit the heads.
    """
    if name == ROPE_FACTORS:
        return {}
    layer, part, kind = _split_name(name, "blk")
    modules = _PARTS if part == "attn_qkv" else (_MODULES.get(part, part),)
    if layer is None or modules[0] not in _PARTS:
        if layer is not None and modules[0] in _WIDTHS:
            tensor = _drop_rounding(tensor, _WIDTHS[modules[0]], geometry.channels[layer])
        return {_join_name(_LAYERS, layer, modules[0], kind): tensor}
    heads = dict(zip(_PARTS, _count_heads(geometry, layer), strict=True))
    rows = [heads[module] * geometry.head_dim for module in modules]
    if sum(rows) != tensor.shape[0]:
        raise ValueError(f"{name} has {tensor.shape[0]} rows in its file, but the config says {sum(rows)}")
    found = dict(zip(modules, tensor.split(rows), strict=True))
    return {
        _join_name(_LAYERS, layer, module, kind): _part_rows(rows_OI, heads[module])
        if architecture in _PAIRED and module != _PARTS[2]
        else rows_OI
        for module, rows_OI in found.items()
    }


def _drop_rounding(tensor: Tensor, axis: int, width: int) -> Tensor:
    """Drop up to a block of zeros; wider tensors have another width, and are refused later."""
    return tensor.narrow(axis, 0, width) if 0 <= tensor.shape[axis] - width < BLOCK else tensor


def _count_heads(geometry: Geometry, layer: int) -> tuple[int, int, int]:
    return geometry.query_heads[layer], geometry.kv_heads[layer], geometry.kv_heads[layer]


def _split_name(name: str, layers: str) -> tuple[int | None, str, str]:
    """Split `model.layers.3.mlp.up_proj.weight` into 3, `mlp.up_proj` and `weight`."""
    module, _, kind = name.rpartition(".")
    layer = find_layer(name, layers) if name.startswith(f"{layers}.") else None
    return layer, module if layer is None else module.removeprefix(f"{layers}.{layer}."), kind


def _join_name(layers: str, layer: int | None, module: str, kind: str) -> str:
    return f"{module}.{kind}" if layer is None else f"{layers}.{layer}.{module}.{kind}"


def _pair_rows(tensor: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from halves (`0 … d/2`, `d/2 … d`) to pairs (`0, d/2, 1, d/2 + 1 …`)."""
    paired: Tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    return paired


def _part_rows(tensor: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from pairs to halves, the reverse of `_pair_rows`."""
    halves: Tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
    return halves
