"""Tensors in GGUF files: names, order of rows and rounded widths, there and back."""

from dataclasses import replace

import pytest
import torch

from gqaprune.models.architecture import read_geometry
from gqaprune.models.gguf_layout import ROPE_FACTORS, pack_tensors, unpack_tensor

from cuts import UNEVEN, make_pruned


@pytest.mark.parametrize(
    ("variant", "architecture"),
    [("llama", "llama"), ("llama", "deci"), ("qwen2", "deci"), ("qwen2", "qwen2"), ("qwen3", "openelm")],
)
def test_what_is_packed_is_unpacked_as_it_was(variant: str, architecture: str) -> None:
    model = make_pruned(variant, UNEVEN)
    weights, geometry = model.state_dict(), read_geometry(model.config)
    packed = dict(pack_tensors(weights, geometry, architecture))
    assert ("blk.0.attn_qkv.weight" in packed) == (architecture == "openelm")
    unpacked = {}
    for name, tensor in packed.items():
        unpacked |= unpack_tensor(name, tensor, geometry, architecture)
    assert unpacked.keys() == weights.keys()
    assert all(torch.equal(unpacked[name], weights[name]) for name in weights)


def test_rows_of_queries_and_keys_are_pairs_head_by_head_and_those_of_values_stay() -> None:
    model = make_pruned("qwen2", UNEVEN)
    weights, geometry = model.state_dict(), read_geometry(model.config)
    packed = dict(pack_tensors(weights, geometry, "deci"))
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # of a head of 8
    for part, heads in (("q", geometry.query_heads[2]), ("k", geometry.kv_heads[2])):
        rows = [8 * head + row for head in range(heads) for row in order]
        for kind in ("weight", "bias"):
            own = weights[f"model.layers.2.self_attn.{part}_proj.{kind}"]
            assert torch.equal(packed[f"blk.2.attn_{part}.{kind}"], own[rows])
    assert torch.equal(packed["blk.2.attn_v.bias"], weights["model.layers.2.self_attn.v_proj.bias"])


def test_rounded_widths_are_cut_back_and_wider_ones_are_not() -> None:
    geometry = replace(read_geometry(make_pruned("llama", UNEVEN).config), channels=(2, 20, 7))
    for name, shape in (("blk.2.ffn_up.weight", (32, 24)), ("blk.2.ffn_down.weight", (24, 32))):
        (tensor,) = unpack_tensor(name, torch.ones(shape), geometry, "deci").values()
        assert sorted(tensor.shape) == [7, 24]
    (tensor,) = unpack_tensor("blk.2.ffn_up.weight", torch.ones(64, 24), geometry, "deci").values()
    assert tensor.shape == (64, 24)


def test_factors_of_frequencies_are_of_the_file_alone_and_other_heads_are_refused() -> None:
    geometry = read_geometry(make_pruned("llama", UNEVEN).config)
    assert unpack_tensor(ROPE_FACTORS, torch.ones(4), geometry, "deci") == {}
    with pytest.raises(ValueError, match="blk.0.attn_q.weight has 8 rows in its file, but the config says 16"):
        unpack_tensor("blk.0.attn_q.weight", torch.ones(8, 24), geometry, "deci")
