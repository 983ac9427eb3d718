"""Find a model's decoder layers, blocks, units and shapes; only this file and `families.py` use attribute names."""

import copy
import dataclasses
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import MistralConfig, PretrainedConfig, PreTrainedModel

from gqaprune.geometry import Geometry
from gqaprune.models.config_facts import has_own_code
from gqaprune.models.families import FAMILIES, BlockLayout, get_family
from gqaprune.models.per_layer import LayerConfig
from gqaprune.models.wrapping import check_no_adapters
from gqaprune.plan import BlockKey, BlockKind

GRANULARITIES = ("group", "query")
"""Possible units of an attention block: GQA groups, or query heads."""
_PLAIN_ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Projection:
    """A linear layer that feeds a block, and the number of its rows for one unit, part by part.

    Rows after these parts do not belong to units, such as keys and values of a fused projection if units are query
    heads.
    """

    linear: nn.Linear
    rows_per_unit: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """The attention or MLP of one decoder layer, seen as units that can be removed whole.

    Args:
        key: decoder layer and kind.
        units: GQA groups, query heads or MLP channels in it.
        inputs: projections whose rows belong to units.
        output: projection whose columns belong to units.
        columns_per_unit: columns of `output` that one unit feeds.
        groups: number of runs of `units / groups` consecutive units, which must all lose the same number: the GQA
            groups if units are query heads, else 1.
    """

    key: BlockKey
    units: int
    inputs: tuple[Projection, ...]
    output: nn.Linear
    columns_per_unit: int
    groups: int = 1

    @property
    def unit_parameters(self) -> int:
        """Parameters, biases included, that are removed with one unit."""
        rows = sum(
            sum(projection.rows_per_unit) * (projection.linear.in_features + (projection.linear.bias is not None))
            for projection in self.inputs
        )
        return rows + self.columns_per_unit * self.output.out_features


def get_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a model of a supported family."""
    layers = _get(model, get_family(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def get_module(model: PreTrainedModel, key: BlockKey) -> nn.Module:
    """Return the module of a block: a decoder layer's attention or MLP."""
    family = get_family(model.config)
    module = _get(get_layers(model)[key.layer], family.layouts[key.kind].module)
    assert isinstance(module, nn.Module)
    return module


def read_geometry(config: PretrainedConfig) -> Geometry:
    """Read the shapes of a model from its config, layer by layer."""
    family = get_family(config)
    layers = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
    first = layers[0]
    return Geometry(
        family=config.model_type,
        hidden_size=config.hidden_size,
        head_dim=getattr(first, "head_dim", None) or config.hidden_size // first.num_attention_heads,
        query_heads=tuple(layer.num_attention_heads for layer in layers),
        kv_heads=tuple(layer.num_key_value_heads for layer in layers),
        channels=tuple(getattr(layer, family.width) if family.mlp else 0 for layer in layers),
    )


def read_context(config: PretrainedConfig) -> int:
    """Read the largest number of tokens of a model's context: its config's positions, extended by a scaled rope."""
    positions = int(getattr(config, "max_position_embeddings", None) or sys.maxsize)
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(one for one in rope.values() if isinstance(one, dict))]  # some families have one per kind of layer
    stretched = [(one.get("factor") or 1) * one.get("original_max_position_embeddings", positions) for one in ropes]
    return max(positions, *map(int, stretched))


def check_context(config: PretrainedConfig, tokens: int, name: str) -> None:
    """Raise an error if text is longer than a model's context, because predictions beyond it are meaningless.

    Args:
        config: config of the model.
        tokens: length of the text in tokens.
        name: name of the setting or argument with that length.

    Raises:
        ValueError: with the context.
    """
    if tokens > (context := read_context(config)):
        raise ValueError(f"{name} is {tokens:,} tokens, the model's context {context:,}: set it to {context} or less")


def write_geometry(config: PretrainedConfig, geometry: Geometry) -> None:
    """Write new shapes into a config: as global values if the config class allows it, else layer by layer.

    `head_dim` becomes explicit, because it no longer follows from the number of heads.
    """
    family = get_family(config)
    shapes = [
        {"num_attention_heads": query, "num_key_value_heads": kv} | ({family.width: channels} if family.mlp else {})
        for query, kv, channels in zip(geometry.query_heads, geometry.kv_heads, geometry.channels, strict=True)
    ]
    config.per_layer_config = None
    config.__dict__.pop("allow_global_per_layer_attribute_access", None)
    config.head_dim = geometry.head_dim
    dense = {name: getattr(config, name) for name in shapes[0]}
    if geometry.is_uniform:
        _set_all(config, shapes[0])
        if _is_valid(config):
            return
        _set_all(config, dense)
    config.per_layer_config = dict(enumerate(shapes))
    # Otherwise transformers' validation, which reads the global values, would refuse to save it.
    config.allow_global_per_layer_attribute_access = True


def make_stock_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """Make a config of a stock class with the shapes of a config; None if no stock class can have them.

    `LlamaConfig` refuses head counts that do not divide the hidden size. Without biases a Llama is arithmetically a
    Mistral without sliding window, whose config has no such check.
    """
    geometry = read_geometry(config)
    if not geometry.is_uniform:
        return None
    if not config.is_heterogeneous:
        return copy.deepcopy(config)
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias or has_own_code(config):
        return None
    known = {field.name for field in dataclasses.fields(MistralConfig)}
    values = {name: value for name, value in config.to_dict().items() if name in known}
    stock = MistralConfig(**{**values, "sliding_window": None, "architectures": ["MistralForCausalLM"]})
    write_geometry(stock, dataclasses.replace(geometry, family="mistral"))
    return stock


def write_heads(model: PreTrainedModel, layer: int, query_heads: int, kv_heads: int) -> None:
    """Set the numbers of heads of a layer's attention module, which transformers does not read from shapes."""
    attention: Any = get_module(model, BlockKey(layer, "attention"))
    attention.num_key_value_groups = query_heads // kv_heads
    shapes = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads}
    attention.config = LayerConfig(model.config, shapes)
    if hasattr(attention, "num_key_value_heads"):
        attention.num_key_value_heads = kv_heads


def find_oddity(config: PretrainedConfig) -> str:
    """Name the first feature that a plain Llama lacks, apart from biases; empty if there is none."""
    window = getattr(config, "sliding_window", None)
    rope = config.rope_parameters.get("rope_type", "default")
    oddities = {
        "sliding windows": window is not None and window < config.max_position_embeddings,
        f"rope of type {rope!r}": rope not in _PLAIN_ROPES,
        f"the activation {config.hidden_act!r}": config.hidden_act != "silu",
    }
    return next((what for what, is_there in oddities.items() if is_there), "")


def read_residual_multiplier(config: PretrainedConfig) -> float:
    """Read the factor by which a block's output is multiplied before it is added to the residual stream."""
    return float(getattr(config, "residual_multiplier", 1.0))


def find_adder(model: PreTrainedModel, block: Block) -> nn.Module:
    """Return the module whose output a block adds: its output projection, or of an MLP beside experts both together."""
    family = get_family(model.config)
    if block.key.kind not in family.scaled:
        return block.output
    module = _get(get_layers(model)[block.key.layer], family.layouts[block.key.kind].module.split(".")[0])
    assert isinstance(module, nn.Module)
    return module


def compute_addition(model: PreTrainedModel, key: BlockKey, output_BTD: Tensor) -> Tensor:
    """Compute what a block adds to the residual stream from its adder's output, `[batch, tokens, width]`."""
    norm = get_family(model.config).output_norms.get(key.kind)
    if norm is not None:
        output_BTD = getattr(get_layers(model)[key.layer], norm)(output_BTD)
    return output_BTD * read_residual_multiplier(model.config)


def check_biases(config: PretrainedConfig, kinds: Collection[BlockKind]) -> None:
    """Raise an error if a family's checkpoints cannot store biases of some kinds of blocks.

    Raises:
        ValueError: with the families that can.
    """
    for kind in kinds:
        if kind not in get_family(config).biases:
            able = ", ".join(
                f"{name} ({' and '.join(family.biases)})" for name, family in FAMILIES.items() if family.biases
            )
            raise ValueError(
                f"{config.model_type} checkpoints cannot store a bias of {kind} output projections, only those of "
                f"{able} can: set pruning.repair.bias to false"
            )


def add_biases(model: PreTrainedModel, kinds: Collection[BlockKind]) -> None:
    """Add biases of zeros to all projections of some kinds of blocks that have none, in weights and config.

    Raises:
        ValueError: if the family's checkpoints cannot store them; then the model is not changed.
    """
    check_biases(model.config, kinds)
    flags = get_family(model.config).biases
    for block in find_blocks(model):
        if block.key.kind in kinds:
            for linear in (*(projection.linear for projection in block.inputs), block.output):
                if linear.bias is None:
                    zeros = torch.zeros_like(linear.weight[:, 0], memory_format=torch.contiguous_format)
                    linear.bias = nn.Parameter(zeros, requires_grad=linear.weight.requires_grad)
    for kind in kinds:
        setattr(model.config, flags[kind], True)


def find_blocks(model: PreTrainedModel, granularity: str = "group") -> list[Block]:
    """Find all blocks of a model, attention before MLP, layer by layer; experts do not count as blocks.

    Args:
        model: a model of a supported family.
        granularity: units of the attention blocks, one of `GRANULARITIES`: whole GQA groups, or query heads, which
            leave keys and values unchanged.

    Raises:
        ValueError: if the family is unknown, the model has adapters, or the weights are not the linear layers that
            the config describes.
    """
    check_no_adapters(model)
    family, geometry = get_family(model.config), read_geometry(model.config)
    blocks = []
    for index, layer in enumerate(get_layers(model)):
        group_rows = geometry.ratios[index] * geometry.head_dim
        parts = {"query": group_rows, "key": geometry.head_dim, "value": geometry.head_dim, "gate": 1, "up": 1}
        key = BlockKey(index, "attention")
        attention = _find_block(layer, family.attention, key, geometry.kv_heads[index], parts, group_rows)
        if granularity == "query":
            attention = _split_groups(attention, family.attention, geometry.ratios[index])
        blocks.append(attention)
        if family.mlp is not None:
            mlp = _find_block(layer, family.mlp, BlockKey(index, "mlp"), geometry.channels[index], parts, 1)
            blocks.append(mlp)
    return blocks


def count_parameters(model: PreTrainedModel) -> int:
    """Count all parameters, tied ones once, without LoRA adapters, which are merged in the end."""
    return _count_without_adapters(model)


def measure_parameter_size(model: PreTrainedModel) -> float:
    """Measure the mean bytes of a parameter over all parameters of this process, without LoRA adapters."""
    parameters = [parameter for name, parameter in model.named_parameters() if ".lora_" not in name]
    size: int = sum(parameter.numel() * parameter.itemsize for parameter in parameters)
    count: int = sum(parameter.numel() for parameter in parameters)
    return size / count


def count_layer_parameters(model: PreTrainedModel) -> list[int]:
    """Count the parameters of each decoder layer, with norms and biases but without LoRA adapters."""
    return [_count_without_adapters(layer) for layer in get_layers(model)]


def describe_experts(model: PreTrainedModel) -> str:
    """Describe in a sentence which part of a mixture of experts is not pruned; empty if there are no experts."""
    if not get_family(model.config).has_experts:
        return ""
    experts = sum(
        parameter.numel() for name, parameter in get_layers(model).named_parameters() if ".experts." in f".{name}"
    )
    share = experts / sum(count_layer_parameters(model))
    return f"experts are not pruned: {share:.1%} of the decoder's parameters"


def _count_without_adapters(module: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in module.named_parameters() if ".lora_" not in name)


def find_layer(name: str, layers: str = "layers") -> int | None:
    """Find the index of a parameter's decoder layer from its full name; None outside of the layers.

    Args:
        name: such as `model.layers.12.mlp.up_proj.weight`, with or without prefixes of wrappers.
        layers: path of the decoder layers in the model, or the end of that path.
    """
    index = f".{name}".partition(f".{layers}.")[2].partition(".")[0]
    return int(index) if index.isdigit() else None


def name_parameter_place(name: str) -> str:
    """Turn `model.layers.12.mlp.weight` into `layer 12 (model.layers.12.mlp.weight)`, for error messages."""
    layer = find_layer(name)
    return name if layer is None else f"layer {layer} ({name})"


def _find_block(
    layer: nn.Module, layout: BlockLayout, key: BlockKey, units: int, parts: Mapping[str, int], columns_per_unit: int
) -> Block:
    module = reduce(lambda owner, name: getattr(owner, name, None), layout.module.split("."), cast(Any, layer))
    inputs = []
    for name, stacked in layout.inputs.items():
        rows_per_unit = tuple(parts[part] for part in stacked)
        linear = _check_linear(getattr(module, name, None), f"{key} {name}", rows=units * sum(rows_per_unit))
        inputs.append(Projection(linear, rows_per_unit))
    output = getattr(module, layout.output, None)
    output = _check_linear(output, f"{key} {layout.output}", columns=units * columns_per_unit)
    return Block(key, units, tuple(inputs), output, columns_per_unit)


def _split_groups(block: Block, layout: BlockLayout, ratio: int) -> Block:
    """Turn a block of GQA groups into one of query heads, `ratio` in each group."""
    head_dim = block.columns_per_unit // ratio
    inputs = tuple(
        Projection(projection.linear, (head_dim,))
        for projection, stacked in zip(block.inputs, layout.inputs.values(), strict=True)
        if stacked[0] == "query"
    )
    return Block(block.key, block.units * ratio, inputs, block.output, head_dim, groups=block.units)


def _check_linear(linear: Any, name: str, rows: int | None = None, columns: int | None = None) -> nn.Linear:
    plain = (nn.Parameter, Tensor, DTensor)
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point() or type(linear.weight) not in plain:
        raise ValueError(
            f"{name} is {type(linear).__name__}, not a plain floating-point linear layer: load the model unquantised"
        )
    for found, expected, what in ((linear.out_features, rows, "rows"), (linear.in_features, columns, "columns")):
        if expected is not None and found != expected:
            raise ValueError(
                f"{name} has {found} {what}, but the config says {expected}: the checkpoint is inconsistent, fetch or "
                "export it again"
            )
    return linear


def _set_all(config: PretrainedConfig, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def _is_valid(config: PretrainedConfig) -> bool:
    try:
        config.validate()
    except StrictDataclassError:
        return False
    return True


def _get(module: nn.Module, path: str) -> Any:
    return reduce(getattr, path.split("."), module)
