"""The terms of all costs: matrix products, and forward and backward passes of layers and head.

Only products count: norms, softmax, rotary embeddings and activation functions are a few operations per number, fused
into other kernels. Attention counts all pairs of tokens, as torch's counter does; a kernel that skips masked pairs
computes half of them. Bytes are the operands and results of each product, each read or written once; weights are read
in every call.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from transformers import PretrainedConfig

from gqaprune.models.architecture import Block, read_geometry
from gqaprune.plan import BlockKey

SINGLE, DOUBLE = 4, 8
"""Bytes of a number in float32 and in float64."""
ATTENTION_BACKWARD = 2.5
"""Attention's cost in a backward pass relative to a forward pass: five products (one recomputes scores) over two."""


@dataclass(frozen=True)
class Cost:
    """The cost of some work.

    Args:
        flops: floating-point operations of products in the model's dtype.
        single_flops: operations of products that are always in float32.
        double_flops: operations of products, factorisations and solutions in float64.
        bytes_moved: bytes read from and written to the device's memory.
        host_bytes: bytes moved between the device and the host.
    """

    flops: float = 0.0
    single_flops: float = 0.0
    double_flops: float = 0.0
    bytes_moved: float = 0.0
    host_bytes: float = 0.0

    @property
    def all_flops(self) -> float:
        """Operations in all dtypes."""
        return self.flops + self.single_flops + self.double_flops

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: float) -> "Cost":
        return Cost(*(getattr(self, field.name) * times for field in fields(self)))

    __rmul__ = __mul__


NOTHING = Cost()


def add_costs(costs: Iterable[Cost]) -> Cost:
    """Sum costs."""
    return sum(costs, NOTHING)


@dataclass(frozen=True)
class Text:
    """Windows of tokens, in batches.

    Args:
        windows: number of windows.
        window: tokens per window.
        batch: windows per call of the model.
    """

    windows: int
    window: int
    batch: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self.windows * self.window

    @property
    def calls(self) -> int:
        """Calls of the model that read all windows."""
        return math.ceil(self.windows / self.batch)

    def take(self, windows: int) -> "Text":
        """Return a text of this many windows, or of all if there are fewer."""
        return replace(self, windows=min(self.windows, windows))


@dataclass(frozen=True)
class LayerShape:
    """Widths of a decoder layer.

    Args:
        query: width of all query heads.
        kv: width of all KV heads.
        channels: channels of the MLP that can be pruned.
        expert_channels: channels of all experts that a token is routed to.
        experts: channels of all experts.
    """

    query: int
    kv: int
    channels: int
    expert_channels: int = 0
    experts: int = 0


@dataclass(frozen=True)
class ModelShape:
    """The shapes of a model on which costs depend.

    Args:
        hidden: width of the residual stream.
        vocabulary: rows of the head.
        layers: widths of each decoder layer.
        itemsize: bytes of a weight.
    """

    hidden: int
    vocabulary: int
    layers: tuple[LayerShape, ...]
    itemsize: int

    def count_weights(self, layer: LayerShape) -> int:
        """Count the weights of a layer's projections."""
        return self.hidden * (2 * layer.query + 2 * layer.kv + 3 * (layer.channels + layer.experts))

    @property
    def weights(self) -> int:
        """Weights of all projections and of the head."""
        return sum(map(self.count_weights, self.layers)) + self.hidden * self.vocabulary

    def cut(self, kept: dict[BlockKey, int], blocks: Sequence[Block]) -> "ModelShape":
        """Return the shape after a cut.

        Args:
            kept: columns of the output projection that each cut block keeps.
            blocks: blocks of the model. Their groups tell whether attention loses KV heads or only query heads.
        """
        layers = list(self.layers)
        for block in blocks:
            columns, layer = kept.get(block.key), layers[block.key.layer]
            if columns is None:
                continue
            if block.key.kind == "mlp":
                layers[block.key.layer] = replace(layer, channels=columns)
            else:
                kv = layer.kv if block.groups > 1 else layer.kv * columns // layer.query
                layers[block.key.layer] = replace(layer, query=columns, kv=kv)
        return replace(self, layers=tuple(layers))


def read_shape(config: PretrainedConfig, itemsize: int) -> ModelShape:
    """Read a model's shape from its config.

    Raises:
        ValueError: if the family is not supported.
    """
    geometry = read_geometry(config)
    active = getattr(config, "num_experts_per_tok", None) or 0
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    count = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    layers = tuple(
        LayerShape(query * geometry.head_dim, kv * geometry.head_dim, channels, active * width, count * width)
        for query, kv, channels in zip(geometry.query_heads, geometry.kv_heads, geometry.channels, strict=True)
    )
    return ModelShape(geometry.hidden_size, config.vocab_size, layers, itemsize)


def multiply(text: Text, inputs: int, outputs: int, itemsize: int, tokens: float | None = None) -> Cost:
    """Cost of a linear layer on a text: of its output, of its gradient by the input, or of that by the weight.

    Args:
        text: text that runs through the layer, call by call.
        inputs: columns of the weight.
        outputs: rows of the weight.
        itemsize: bytes of a number.
        tokens: number of tokens to multiply, if not all.
    """
    tokens = text.tokens if tokens is None else tokens
    moved = itemsize * (tokens * (inputs + outputs) + text.calls * inputs * outputs)
    return Cost(flops=2.0 * tokens * inputs * outputs, bytes_moved=moved)


def run_projections(shape: ModelShape, layer: LayerShape, text: Text) -> Cost:
    """Cost of a layer's queries, keys and values, forward or backward by the input."""
    widths = (layer.query, layer.kv, layer.kv)
    return add_costs(multiply(text, shape.hidden, width, shape.itemsize) for width in widths)


def run_heads(shape: ModelShape, layer: LayerShape, text: Text) -> Cost:
    """Cost of a layer's attention scores and weighted values, forward."""
    flops = 4.0 * text.tokens * text.window * layer.query
    return Cost(flops=flops, bytes_moved=2.0 * shape.itemsize * text.tokens * (layer.query + layer.kv))


def run_output(shape: ModelShape, layer: LayerShape, text: Text) -> Cost:
    """Cost of the output projection of a layer's attention, forward or backward by the input."""
    return multiply(text, layer.query, shape.hidden, shape.itemsize)


def run_attention(shape: ModelShape, layer: LayerShape, text: Text) -> Cost:
    """Cost of a layer's attention, forward."""
    return run_projections(shape, layer, text) + run_heads(shape, layer, text) + run_output(shape, layer, text)


def run_mlp(shape: ModelShape, layer: LayerShape, text: Text) -> Cost:
    """Cost of a layer's MLP and the experts beside it, forward or backward by the input."""
    mlp = 3 * multiply(text, shape.hidden, layer.channels, shape.itemsize)
    if not layer.expert_channels:
        return mlp
    # The weights of all experts are read, but a token is multiplied only by those of a few.
    read = 3.0 * shape.itemsize * text.calls * shape.hidden * (layer.experts - layer.expert_channels)
    return mlp + 3 * multiply(text, shape.hidden, layer.expert_channels, shape.itemsize) + Cost(bytes_moved=read)


def run_layer(shape: ModelShape, index: int, text: Text) -> Cost:
    """Cost of a decoder layer, forward."""
    return run_attention(shape, shape.layers[index], text) + run_mlp(shape, shape.layers[index], text)


def run_layers(shape: ModelShape, layers: range, text: Text) -> Cost:
    """Cost of some decoder layers, forward."""
    return add_costs(run_layer(shape, index, text) for index in layers)


def run_decoder(shape: ModelShape, text: Text) -> Cost:
    """Cost of all decoder layers, forward."""
    return run_layers(shape, range(len(shape.layers)), text)


def run_head(shape: ModelShape, text: Text, tokens: float | None = None) -> Cost:
    """Cost of a text's logits, forward or backward by the input."""
    return multiply(text, shape.hidden, shape.vocabulary, shape.itemsize, tokens)


def run_model(shape: ModelShape, text: Text) -> Cost:
    """Cost of one forward pass, the unit in which the costs of stages are given."""
    return run_decoder(shape, text) + run_head(shape, text)


def count_predicting(text: Text) -> int:
    """Count the tokens whose next token is predicted: all but the last of each window."""
    return text.windows * (text.window - 1)


def go_back_through_layer(shape: ModelShape, index: int, text: Text) -> Cost:
    """Cost of a backward pass through a decoder layer by its inputs, without gradients of weights."""
    layer = shape.layers[index]
    heads = run_heads(shape, layer, text)
    back = replace(heads, flops=ATTENTION_BACKWARD * heads.flops, bytes_moved=2 * heads.bytes_moved)
    return run_projections(shape, layer, text) + back + run_output(shape, layer, text) + run_mlp(shape, layer, text)


def go_back_through_block(shape: ModelShape, key: BlockKey, text: Text) -> Cost:
    """Cost of a backward pass from the end of a layer to the input of one block's output projection."""
    layer = shape.layers[key.layer]
    if key.kind == "mlp":
        return multiply(text, layer.channels, shape.hidden, shape.itemsize)
    return run_mlp(shape, layer, text) + run_output(shape, layer, text)


def share_of_panels(size: int, rows: Sequence[slice]) -> float:
    """Compute the share of a symmetric matrix that panels hold: rows up to the end of their diagonal blocks."""
    held: int = sum((panel.stop - panel.start) * panel.stop for panel in rows)
    return held / (size * size) if size else 0.0
