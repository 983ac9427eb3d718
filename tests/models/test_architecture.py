"""Shapes read from a model and written to a config; models of other families are refused."""

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from gqaprune.geometry import Geometry
from gqaprune.models.architecture import (
    count_layer_parameters,
    count_parameters,
    find_blocks,
    find_layer,
    make_stock_config,
    name_parameter_place,
    read_context,
    read_geometry,
    write_geometry,
)
from gqaprune.surgery.cut import apply_plan, expand_units

from tiny import make_model


def test_geometry_is_that_of_the_config() -> None:
    geometry = read_geometry(make_model("qwen2", kv_heads=2, ratio=7, head_dim=6, channels=11, layers=2).config)
    assert geometry == Geometry("qwen2", 56, 6, (14, 14), (2, 2), (11, 11))


def test_unit_parameters_are_what_surgery_removes(variant: str) -> None:
    from cuts import make_plan

    dense, pruned = make_model(variant), make_model(variant)
    costs = {block.key: block.unit_parameters for block in find_blocks(dense)}
    apply_plan(pruned, make_plan(pruned, [[1], [0, 1], [0, 1]], [list(range(20)), list(range(17)), list(range(20))]))
    removed = costs[0, "attention"] + 3 * costs[1, "mlp"]
    assert count_parameters(dense) - count_parameters(pruned) == removed
    assert sum(count_layer_parameters(dense)) - sum(count_layer_parameters(pruned)) == removed


def test_parameters_of_query_heads_are_what_surgery_removes(variant: str) -> None:
    from cuts import make_plan

    dense, pruned = make_model(variant), make_model(variant)  # 6 query heads on 2 KV heads
    blocks = {block.key: block for block in find_blocks(dense, "query")}
    attention = blocks[1, "attention"]
    assert (attention.units, attention.groups, attention.columns_per_unit) == (6, 2, 8)
    assert blocks[1, "mlp"] == {block.key: block for block in find_blocks(dense)}[1, "mlp"]
    queries = [None, [0, 2, 3, 4], None]
    apply_plan(pruned, make_plan(pruned, [[0, 1]] * 3, [list(range(20))] * 3, queries))
    assert count_parameters(dense) - count_parameters(pruned) == 2 * attention.unit_parameters


def test_layer_parameters_leave_out_embeddings_head_and_final_norm() -> None:
    model = make_model("llama")
    outside = model.model.embed_tokens.weight.numel() + model.lm_head.weight.numel() + model.model.norm.weight.numel()
    assert sum(count_layer_parameters(model)) == count_parameters(model) - outside


def test_geometry_written_to_a_config_is_read_back(variant: str) -> None:
    config = copy.deepcopy(make_model(variant).config)
    geometry = read_geometry(config)
    uneven = Geometry(geometry.family, geometry.hidden_size, geometry.head_dim, (3, 6, 3), (1, 2, 1), (5, 20, 7))
    write_geometry(config, uneven)
    assert read_geometry(config) == uneven
    assert make_stock_config(config) is None
    write_geometry(config, geometry)
    assert read_geometry(config) == geometry
    assert not config.is_heterogeneous


def test_bias_free_llama_whose_heads_do_not_divide_its_width_becomes_a_mistral() -> None:
    config = make_model("llama", kv_heads=4, ratio=4).config  # hidden size 64
    write_geometry(config, Geometry("llama", 64, 8, (12,) * 3, (3,) * 3, (20,) * 3))
    stock = make_stock_config(config)
    assert stock is not None
    assert (stock.model_type, stock.num_attention_heads, stock.head_dim) == ("mistral", 12, 8)
    assert stock.sliding_window is None


def test_llama_with_biases_whose_heads_do_not_divide_its_width_has_no_stock_config() -> None:
    config = make_model("llama-biases", kv_heads=4, ratio=4).config
    write_geometry(config, Geometry("llama", 64, 8, (12,) * 3, (3,) * 3, (20,) * 3))
    assert make_stock_config(config) is None


def test_weights_that_do_not_fit_the_config_are_refused_by_name() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(24, 19, bias=False)
    with pytest.raises(ValueError, match="layer 1 mlp up_proj has 19 rows, but the config says 20"):
        find_blocks(model)


def test_projection_that_is_no_plain_linear_layer_is_refused() -> None:
    model = make_model("llama")
    model.model.layers[2].self_attn.o_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="layer 2 attention o_proj is Identity"):
        find_blocks(model)


def test_parts_stacked_in_one_projection_are_cut_part_by_part() -> None:
    """Fused projections (Phi-3's `qkv_proj`) are data: rows of several parts in one linear layer."""
    from gqaprune.models.architecture import Block, Projection
    from gqaprune.plan import BlockKey
    from gqaprune.surgery.cut import keep_units

    fused, output = torch.nn.Linear(4, 3 * (4 + 2 + 2)), torch.nn.Linear(12, 4)
    weight = fused.weight.detach().clone()
    block = Block(BlockKey(0, "attention"), 3, (Projection(fused, (4, 2, 2)),), output, 4)
    keep_units(block, (0, 2))
    rows = [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 16, 17, 18, 19, 22, 23]
    assert torch.equal(fused.weight, weight[rows])
    assert output.in_features == 8


def test_query_heads_of_a_fused_projection_go_without_its_keys_and_values() -> None:
    from gqaprune.models.architecture import Block, Projection, _split_groups
    from gqaprune.models.families import BlockLayout
    from gqaprune.plan import BlockKey
    from gqaprune.surgery.cut import keep_units

    fused, output = torch.nn.Linear(4, 2 * (3 * 2 + 2 + 2)), torch.nn.Linear(12, 4)  # 6 query heads of 2 rows, 2 KV
    weight = fused.weight.detach().clone()
    groups = Block(BlockKey(0, "attention"), 2, (Projection(fused, (6, 2, 2)),), output, 6)
    layout = BlockLayout("attention", {"qkv": ("query", "key", "value")}, "out")
    queries = _split_groups(groups, layout, 3)
    assert (queries.units, queries.groups, queries.unit_parameters) == (6, 2, 2 * 5 + 2 * 4)
    keep_units(queries, (0, 2, 3, 5))
    assert torch.equal(fused.weight, weight[[0, 1, 4, 5, 6, 7, 10, 11, *range(12, 20)]])
    assert (fused.out_features, output.in_features) == (16, 8)


def test_expanded_units_are_consecutive() -> None:
    assert expand_units(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", 12),
        ("base_model.model.model.layers.3.mlp.up_proj.lora_A.weight", 3),
        ("model.embed_tokens.weight", None),
        ("model.layers_norm.3.weight", None),
        ("model.layers.norm.3.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_layer_of_a_parameter_is_in_its_name(name: str, layer: int | None) -> None:
    assert find_layer(name, "model.layers") == find_layer(name) == layer
    assert find_layer(name, "transformer.layers") is None
    assert name_parameter_place(name) == (name if layer is None else f"layer {layer} ({name})")


ROPES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({"rope_type": "default"}, 256),
    "extended already": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    "extended by the rope": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
    "linear": ({"rope_type": "linear", "factor": 2.0}, 512),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 512),
}


@pytest.mark.parametrize("name", list(ROPES))
def test_context_is_what_positions_and_a_scaled_rope_reach(name: str) -> None:
    rope, context = ROPES[name]
    config = LlamaConfig(max_position_embeddings=256, rope_parameters={"rope_theta": 1e4, **rope})
    assert read_context(config) == context


def test_context_of_a_family_with_two_ropes_and_windows_is_the_longer_one() -> None:
    assert read_context(make_model("gemma3").config) == 256
    assert read_context(make_model("mistral-sliding").config) == 256
    config = make_model("gemma3").config
    config.rope_parameters["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    assert read_context(config) == 2048
