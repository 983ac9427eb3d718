"""Finds a model's decoder layers, blocks, units and shapes; it and `families.py` are all that knows attribute names."""

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

from gqaprune.models.config_facts import has_own_code
from gqaprune.models.families import FAMILIES, BlockLayout, get_family
from gqaprune.models.per_layer import LayerConfig
from gqaprune.models.wrapping import check_no_adapters
from gqaprune.plan import BlockKey, BlockKind, Geometry

GRANULARITIES = ("group", "query")
"""What the units of an attention block can be: GQA groups, or query heads."""
_PLAIN_ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Projection:
    """A linear layer that feeds a block, and how many of its rows belong to one unit, part by part.

    Rows after those parts belong to no unit: keys and values in a fused projection whose units are query heads.
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
        groups: runs of `units / groups` consecutive units, each of which has to lose as many as the others: the GQA
            groups where units are query heads, else 1.
    """

    key: BlockKey
    units: int
    inputs: tuple[Projection, ...]
    output: nn.Linear
    columns_per_unit: int
    groups: int = 1

    @property
    def unit_parameters(self) -> int:
        """Parameters, biases included, that go when one unit goes."""
        rows = sum(
            sum(projection.rows_per_unit) * (projection.linear.in_features + (projection.linear.bias is not None))
            for projection in self.inputs
        )
        return rows + self.columns_per_unit * self.output.out_features


def get_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a model of a supported family."""
    layers = _get(model, get_family(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def get_module(model: PreTrainedModel, key: BlockKey) -> nn.Module:
    """The module of a block: a decoder layer's attention or MLP."""
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
    """Tokens that a model can read at once: its config's positions, or those that a scaled rope stretches them to."""
    positions = int(getattr(config, "max_position_embeddings", None) or sys.maxsize)
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(one for one in rope.values() if isinstance(one, dict))]  # some families have one per kind of layer
    stretched = [(one.get("factor") or 1) * one.get("original_max_position_embeddings", positions) for one in ropes]
    return max(positions, *map(int, stretched))


def check_context(config: PretrainedConfig, tokens: int, name: str) -> None:
    """Refuse text that is longer than a model's context, where its predictions mean nothing.

    Args:
        config: of the model.
        tokens: that the model is to read at once.
        name: of the setting or argument that says so.

    Raises:
        ValueError: with the context.
    """
    if tokens > (context := read_context(config)):
        raise ValueError(f"{name} is {tokens:,} tokens, the model's context {context:,}: set it to {context} or less")


def write_geometry(config: PretrainedConfig, geometry: Geometry) -> None:
    """Make a config describe new shapes: by its global values where the config class allows it, else layer by layer.

    `head_dim` becomes explicit, for it no longer follows from the number of heads.
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
    # transformers' own validation reads the global values on saving and would refuse otherwise.
    config.allow_global_per_layer_attribute_access = True


def make_stock_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """A config of a stock class for the shapes that a config describes; None where there is no such class.

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
    """Tell a layer's attention module how many heads it has; transformers reads that off no shape."""
    attention: Any = get_module(model, BlockKey(layer, "attention"))
    attention.num_key_value_groups = query_heads // kv_heads
    own = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads}
    attention.config = LayerConfig(model.config, own)
    if hasattr(attention, "num_key_value_heads"):
        attention.num_key_value_heads = kv_heads


def find_oddity(config: PretrainedConfig) -> str:
    """Name the first thing in which a model is not a plain Llama to engines, apart from biases; empty if none."""
    window = getattr(config, "sliding_window", None)
    rope = config.rope_parameters.get("rope_type", "default")
    oddities = {
        "sliding windows": window is not None and window < config.max_position_embeddings,
        f"rope of type {rope!r}": rope not in _PLAIN_ROPES,
        f"the activation {config.hidden_act!r}": config.hidden_act != "silu",
    }
    return next((what for what, is_there in oddities.items() if is_there), "")


def read_residual_multiplier(config: PretrainedConfig) -> float:
    """What a block's output is multiplied by before it is added to the residual stream."""
    return float(getattr(config, "residual_multiplier", 1.0))


def find_adder(model: PreTrainedModel, block: Block) -> nn.Module:
    """The module that gives what a block adds: its output projection; of an MLP beside experts, the whole of both."""
    family = get_family(model.config)
    if block.key.kind not in family.scaled:
        return block.output
    module = _get(get_layers(model)[block.key.layer], family.layouts[block.key.kind].module.split(".")[0])
    assert isinstance(module, nn.Module)
    return module


def compute_addition(model: PreTrainedModel, key: BlockKey, output_BTD: Tensor) -> Tensor:
    """What a block adds to the residual stream, from what its adder gives; `[batch, tokens, width]`."""
    norm = get_family(model.config).output_norms.get(key.kind)
    if norm is not None:
        output_BTD = getattr(get_layers(model)[key.layer], norm)(output_BTD)
    return output_BTD * read_residual_multiplier(model.config)


def check_biases(config: PretrainedConfig, kinds: Collection[BlockKind]) -> None:
    """Refuse biases of blocks of some kinds where a family's checkpoints have no place for them.

    Raises:
        ValueError: with the families that have.
    """
    for kind in kinds:
        if kind not in get_family(config).biases:
            able = ", ".join(
                f"{name} ({' and '.join(family.biases)})" for name, family in FAMILIES.items() if family.biases
            )
            raise ValueError(
                f"{config.model_type} checkpoints have no place for a bias of {kind} output projections, only those of "
                f"{able} have; repair without bias"
            )


def add_biases(model: PreTrainedModel, kinds: Collection[BlockKind]) -> None:
    """Give all projections of all blocks of some kinds a bias, of zeros where there was none, in weights and config.

    Raises:
        ValueError: if the family's checkpoints have no place for it; the model is untouched then.
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
    """All blocks of a model, attention before MLP, layer by layer; experts are none.

    Args:
        model: a model of a supported family.
        granularity: units of the attention blocks, one of `GRANULARITIES`: whole GQA groups, or query heads, whose
            keys and values stay.

    Raises:
        ValueError: if the family is unknown, the model has adapters, or the weights are not the linear layers that the
            config promises.
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
    """All parameters, tied ones once; not those of LoRA adapters, which are merged in the end."""
    return _count_without_adapters(model)


def measure_parameter_size(model: PreTrainedModel) -> float:
    """Bytes of a parameter, the mean over all that this process holds, LoRA adapters left out."""
    own = [parameter for name, parameter in model.named_parameters() if ".lora_" not in name]
    size: int = sum(parameter.numel() * parameter.itemsize for parameter in own)
    count: int = sum(parameter.numel() for parameter in own)
    return size / count


def count_layer_parameters(model: PreTrainedModel) -> list[int]:
    """Parameters of each decoder layer, norms and biases included, LoRA adapters left out."""
    return [_count_without_adapters(layer) for layer in get_layers(model)]


def describe_experts(model: PreTrainedModel) -> str:
    """What is left alone of a mixture of experts, in a sentence; empty where there is none."""
    if not get_family(model.config).has_experts:
        return ""
    experts = sum(
        parameter.numel() for name, parameter in get_layers(model).named_parameters() if ".experts." in f".{name}"
    )
    share = experts / sum(count_layer_parameters(model))
    return f"experts are left alone: {share:.1%} of the decoder's parameters"


def _count_without_adapters(module: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in module.named_parameters() if ".lora_" not in name)


def find_layer(name: str, layers: str = "layers") -> int | None:
    """Index of the decoder layer that a parameter belongs to, by its full name; None outside of them.

    Args:
        name: such as `model.layers.12.mlp.up_proj.weight`, with or without what wrappers put before it.
        layers: path of the decoder layers in the model, as a family has it, or its end.
    """
    index = f".{name}".partition(f".{layers}.")[2].partition(".")[0]
    return int(index) if index.isdigit() else None


def name_parameter_place(name: str) -> str:
    """`model.layers.12.mlp.up_proj.weight` -> `layer 12 (model.layers.12.mlp.up_proj.weight)`, for error messages."""
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
    """See a block of GQA groups as one of query heads, `ratio` in each group."""
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
                f"{name} has {found} {what}, the config promises {expected}: the checkpoint is inconsistent"
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
