"""A geometry refuses shapes that no model has, and knows what follows from them."""

from dataclasses import replace

import pytest

from gqaprune.geometry import Geometry

DENSE = Geometry("llama", hidden_size=64, head_dim=8, query_heads=(6, 6), kv_heads=(2, 2), channels=(20, 20))


@pytest.mark.parametrize(("query", "kv"), [(7, 2), (2, 4), (0, 1), (4, 0)])
def test_geometry_without_a_whole_ratio_is_refused_with_its_layer(query: int, kv: int) -> None:
    with pytest.raises(ValueError, match=f"layer 1 has {query} query heads on {kv} KV heads"):
        Geometry("llama", 64, 8, query_heads=(6, query), kv_heads=(2, kv), channels=(20, 20))


def test_geometry_with_lists_of_different_length_is_refused() -> None:
    with pytest.raises(ValueError, match="one count per layer"):
        Geometry("llama", 64, 8, query_heads=(6, 6), kv_heads=(2, 2), channels=(20,))


def test_geometry_is_uniform_only_if_all_layers_are_alike() -> None:
    assert DENSE.is_uniform
    assert not replace(DENSE, channels=(20, 19)).is_uniform


def test_kv_cache_counts_keys_and_values_of_all_layers() -> None:
    geometry = Geometry("llama", 64, head_dim=8, query_heads=(6, 3), kv_heads=(2, 1), channels=(20, 20))
    assert geometry.kv_cache_bytes_per_token(bytes_per_value=2) == 2 * (2 + 1) * 8 * 2
