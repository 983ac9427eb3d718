"""Check that a model of an unknown family can be pruned like a Llama: its shapes and what its first layer computes."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gqaprune.common.errors import first_line
from gqaprune.common.precision import multiply_exactly, to_double
from gqaprune.models.architecture import Block, compute_addition, find_blocks, get_layers, read_geometry, write_heads
from gqaprune.models.families import FAMILIES, get_family
from gqaprune.models.gates import apply_gates, freeze_parameters
from gqaprune.models.layerwise import embed_batches, run_layer
from gqaprune.models.per_layer import LayerConfig
from gqaprune.placement.layer_store import find_store
from gqaprune.surgery.cut import keep_units

_TOLERANCE = 1e-3
"""Relative difference of hidden states that rounding can explain in float32; in narrower types, ten times as much."""
_TOKENS = 8
"""Tokens to run through the first layer."""


@multiply_exactly()
@torch.no_grad()
def check_compatibility(model: PreTrainedModel) -> None:
    """Refuse a model of an unknown family that does not compute as a Llama does; known families are not checked.

    All layers must have Llama's parameters. The first layer must add the outputs of attention and MLP to the residual
    stream unchanged, and removing a unit must be the same as setting its gate to 0.

    Raises:
        ValueError: naming the first difference.
    """
    if model.config.model_type in FAMILIES:
        return
    try:
        layers = get_layers(model)
    except AttributeError:
        raise _make_error(model, "its decoder layers are not where Llama's are") from None
    for index, layer in enumerate(layers):
        _check_parts(model, index, layer)
    blocks = find_blocks(model)[:2]
    tokens_BT = torch.arange(_TOKENS)[None] % model.get_input_embeddings().num_embeddings
    with freeze_parameters(model), find_store(model).hold(0):
        (stream,) = embed_batches(model, [tokens_BT])
        with _record_outputs(blocks) as outputs_BTD:
            after_BTD = run_layer(model, 0, stream)
        added_BTD = sum(
            compute_addition(model, block.key, output) for block, output in zip(blocks, outputs_BTD, strict=True)
        )
        difference = "does not just add attention and MLP to the residual stream"
        _check_equal(model, stream.hidden_BTD + added_BTD, after_BTD, difference)
        gates = {block.key: torch.ones(1, block.units, device=after_BTD.device) for block in blocks if block.units > 1}
        for gate_BU in gates.values():
            gate_BU[:, 0] = 0
        with apply_gates(blocks, gates):
            gated_BTD = run_layer(model, 0, stream)
        with _replace_first_layer(model):
            attention, mlp = find_blocks(model)[:2]
            for block in (attention, mlp):
                if block.key in gates:
                    keep_units(block, tuple(range(1, block.units)))
            groups = attention.units - (attention.key in gates)
            write_heads(model, 0, groups * read_geometry(model.config).ratios[0], groups)
            _check_shapes(model, groups, mlp.units - (mlp.key in gates))
            try:
                cut_BTD = run_layer(model, 0, stream)
            except RuntimeError as error:
                raise _make_error(model, f"its first layer does not run after a cut ({first_line(error)})") from None
        _check_equal(model, gated_BTD, cut_BTD, "computes something else with units removed than with their gates at 0")


def _check_parts(model: PreTrainedModel, index: int, layer: nn.Module) -> None:
    """Refuse a layer that lacks one of Llama's projections or has parameters other than these and norms."""
    family, head_dim = get_family(model.config), read_geometry(model.config).head_dim
    attention = family.attention.module
    projections = {layout.module: {*layout.inputs, layout.output} for layout in family.layouts.values()}
    for name, parameter in layer.named_parameters():
        block, _, rest = name.partition(".")
        module, _, kind = rest.rpartition(".")
        if block not in projections:
            is_known = parameter.ndim == 1
        elif block == attention and module in ("q_norm", "k_norm"):
            is_known = parameter.shape == (head_dim,)
        else:
            is_known = module in projections[block] and kind in ("weight", "bias")
        if not is_known:
            raise _make_error(
                model, f"layer {index} has a parameter {name} of shape {list(parameter.shape)}, which Llama lacks"
            )
    present = {name for name, _ in layer.named_parameters()}
    for block, names in projections.items():
        for name in sorted(names):
            if f"{block}.{name}.weight" not in present:
                raise _make_error(model, f"layer {index} has no {block}.{name}")


def _check_shapes(model: PreTrainedModel, groups: int, channels: int) -> None:
    """Refuse a cut first layer whose shapes differ from those that its class builds from the cut config."""
    family, geometry, layer = get_family(model.config), read_geometry(model.config), get_layers(model)[0]
    heads = {"num_attention_heads": groups * geometry.ratios[0], "num_key_value_heads": groups}
    sizes = {**heads, "head_dim": geometry.head_dim, family.width: channels}
    try:
        with torch.device("meta"):
            rebuilt = type(layer)(LayerConfig(model.config, sizes), 0)
    except ValueError as error:
        raise _make_error(model, f"its first layer cannot be built after a cut ({first_line(error)})") from None
    shapes = {name: list(parameter.shape) for name, parameter in layer.named_parameters()}
    for name, parameter in rebuilt.named_parameters():
        if list(parameter.shape) != shapes.get(name):
            expected = list(parameter.shape)
            raise _make_error(model, f"after a cut {name} has shape {shapes.get(name)}, its config asks for {expected}")


@contextmanager
def _record_outputs(blocks: list[Block]) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []
    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.output.register_forward_hook(lambda _, __, output: outputs.append(output)).remove)
        yield outputs


@contextmanager
def _replace_first_layer(model: PreTrainedModel) -> Iterator[None]:
    """Replace the first layer by a copy within the context."""
    layers = get_layers(model)
    original = layers[0]
    layers[0] = copy.deepcopy(original)
    try:
        yield
    finally:
        layers[0] = original


def _check_equal(model: PreTrainedModel, expected: Tensor, actual: Tensor, difference: str) -> None:
    difference_BTD, size_BTD = to_double(actual) - to_double(expected), to_double(expected)
    error = difference_BTD.norm() / size_BTD.norm()
    if not error <= (_TOLERANCE if model.dtype == torch.float32 else 10 * _TOLERANCE):
        raise _make_error(model, f"its first layer {difference} (relative difference {float(error):.1e})")


def _make_error(model: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(
        f"models of type {model.config.model_type!r} cannot be pruned yet: {reason}; supported types: "
        f"{', '.join(sorted(FAMILIES))}, and models that compute as a Llama does"
    )
