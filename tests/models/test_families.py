"""Families as data: what is known, and what is refused with what works."""

import pytest
from transformers import AutoModelForCausalLM, GPT2Config, OlmoeConfig

from gqaprune.models.architecture import find_blocks
from gqaprune.models.families import FAMILIES, begins_with_bos, get_family

from tiny import VARIANTS, WHOLE_ATTENTION, WHOLE_MLP, make_model


def test_every_family_is_tested_by_a_tiny_model() -> None:
    variants = [*VARIANTS, *WHOLE_ATTENTION, *WHOLE_MLP]
    assert {make_model(variant).config.model_type for variant in variants} == set(FAMILIES)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16),
        OlmoeConfig(
            num_hidden_layers=1, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, vocab_size=16,
            intermediate_size=8, num_experts=2,
        ),
    ],
    ids=["gpt2", "mixture of experts"],
)  # fmt: skip
def test_other_families_get_an_error_that_lists_what_works(config: object) -> None:
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ValueError, match="supported types: exaone4, gemma2, .*, llama, mistral, .*, qwen2, .*, qwen3, .*, smollm3"
    ):
        find_blocks(model)


@pytest.mark.parametrize("setting", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}], ids=str)
def test_layers_with_and_without_experts_are_refused(setting: dict[str, object]) -> None:
    config = make_model("qwen2_moe").config
    for name, value in setting.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match="layers with experts and layers without"):
        get_family(config)


@pytest.mark.parametrize(
    ("model_type", "begins"),
    [("gemma", True), ("gemma2", True), ("gemma3", True), ("gemma3_text", True), ("vaultgemma", True)]
    + [(name, False) for name in ("llama", "mistral", "qwen3", "cohere", "gpt_neox", "phi3", "unknown", "None")],
)
def test_windows_of_gemma_alone_begin_with_bos(model_type: str, begins: bool) -> None:
    assert begins_with_bos(model_type) is begins
