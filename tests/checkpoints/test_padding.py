"""Padding: equal shapes in a stock class, the same logits, zeros only where units were missing."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gqaprune.checkpoints.padding import pad_checkpoint
from gqaprune.models.architecture import read_geometry
from gqaprune.surgery.cut import apply_plan

from cuts import UNEVEN, drop_query_heads, get_logits, make_plan, make_pruned
from tiny import make_model


def load_padded(config: PretrainedConfig, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights, strict=not config.tie_word_embeddings)
    return model


def check_padded(model: PreTrainedModel) -> PretrainedConfig:
    config, weights = pad_checkpoint(model.config, model.state_dict())
    assert not config.is_heterogeneous and read_geometry(config).is_uniform
    torch.testing.assert_close(get_logits(load_padded(config, weights)), get_logits(model), atol=1e-4, rtol=0)
    return config


def test_padded_models_give_the_same_logits_in_a_stock_class(variant: str) -> None:
    model = make_pruned(variant, UNEVEN)
    config = check_padded(model)
    geometry = read_geometry(config)
    assert (geometry.kv_heads[0], geometry.ratios[0], geometry.channels[0]) == (3, 2, 20)
    old, new = (
        sum(tensor.count_nonzero() for tensor in weights.values())
        for weights in (model.state_dict(), pad_checkpoint(model.config, model.state_dict())[1])
    )
    assert old == new


def test_padded_query_heads_stay_with_their_own_kv_head(variant: str) -> None:
    check_padded(drop_query_heads(variant, [[0, 1, 7, 8], None, [6, 7]]))


def test_channels_of_families_that_keep_attention_whole_are_padded() -> None:
    model = make_model("olmo2", kv_heads=2, ratio=2)
    apply_plan(model, make_plan(model, [[0, 1]] * 3, [[3, 9], [1], list(range(20))]))
    assert read_geometry(check_padded(model)).channels == (20, 20, 20)


@pytest.mark.parametrize(("variant", "heads"), [("llama", (3, 12)), ("llama-biases", (4, 16)), ("gemma2", (4, 16))])
def test_head_counts_that_a_stock_class_refuses_are_padded_until_it_does_not(
    variant: str, heads: tuple[int, int]
) -> None:
    model = make_model(variant, kv_heads=4, ratio=4)  # width 64: 12 heads do not divide it, but a Mistral may have them
    apply_plan(model, make_plan(model, [[0, 1, 3], [2], [1]], [[3, 9], [1], list(range(20))]))
    geometry = read_geometry(check_padded(model))
    assert (geometry.kv_heads[0], geometry.query_heads[0]) == heads


def test_widths_are_padded_to_a_multiple() -> None:
    model = make_pruned("qwen2", UNEVEN)
    config, weights = pad_checkpoint(model.config, model.state_dict(), channel_multiple=32)
    assert config.intermediate_size == 32
    torch.testing.assert_close(get_logits(load_padded(config, weights)), get_logits(model), atol=1e-4, rtol=0)


def test_no_shape_that_can_be_loaded_is_an_error() -> None:
    model = make_pruned("llama", UNEVEN)
    with pytest.raises(ValueError, match="no stock llama can have 3 KV heads of 2 query heads each.*use format per-l"):
        pad_checkpoint(model.config, model.state_dict(), is_loadable=lambda _: False)
