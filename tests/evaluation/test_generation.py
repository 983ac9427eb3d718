"""Greedy text is the likeliest token after another, whatever a model's generation config asks of `generate`."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from gqaprune.evaluation.generation import continue_greedily, list_ends, split_continuation

from tiny import make_counting_model, make_model, make_tokens

GENERATION: dict[str, dict[str, Any]] = {
    "dictionaries": {"return_dict_in_generate": True, "output_scores": True},
    "stop strings": {"stop_strings": ["a"]},
    "beams": {"num_beams": 3},
    "n-grams": {"no_repeat_ngram_size": 1},
    "penalties": {"repetition_penalty": 5.0},
    "time": {"max_time": 1e-9},
    "a forced end": {"forced_eos_token_id": 5},
    "a least length": {"min_new_tokens": 20, "eos_token_id": 66},
    "bad words": {"bad_words_ids": [[66], [67]]},
    "suppressed tokens": {"suppress_tokens": [66, 67]},
    "sampling": {"do_sample": True, "temperature": 50.0},
    "a cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "several texts": {"do_sample": True, "num_return_sequences": 3},
    "a length": {"max_length": 4},
}


def continue_by_hand(model: PreTrainedModel, ids: torch.Tensor, count: int) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) in list_ends(model):
                break
    return ids


@pytest.mark.parametrize("name", list(GENERATION))
@pytest.mark.parametrize("step", [0, 1])
def test_greedy_text_does_not_follow_the_generation_config(name: str, step: int) -> None:
    model, prompt = make_counting_model(step), torch.tensor([[65]])
    model.generation_config = GenerationConfig(**{"eos_token_id": 257, **GENERATION[name]})
    ids = continue_greedily(model, prompt, 8)
    last = 1 if name == "a least length" and step else 8
    assert ids.tolist() == [[65 + place * step for place in range(last + 1)]]


def test_greedy_text_of_every_family_is_what_whole_passes_give(any_variant: str) -> None:
    model, prompt = make_model(any_variant), make_tokens(1, 9)
    assert torch.equal(continue_greedily(model, prompt, 12), continue_by_hand(model, prompt, 12))


@pytest.mark.parametrize(("ends", "found"), [(66, [66]), ([90, 66], [90, 66]), (None, [257])])
def test_a_text_ends_by_the_tokens_of_either_config(ends: Any, found: list[int]) -> None:
    model = make_counting_model(1)
    model.generation_config.eos_token_id = ends
    assert list_ends(model) == found
    tokens, is_ended = split_continuation(model, continue_greedily(model, torch.tensor([[64]]), 4), 1)
    assert (tokens, is_ended) == (([65], True) if 66 in found else ([65, 66, 67, 68], False))


def test_text_ends_where_the_context_is_full_and_a_prompt_that_fills_it_is_refused() -> None:
    model = make_counting_model(1)
    model.config.max_position_embeddings = 12
    assert continue_greedily(model, make_tokens(1, 9), 60).shape == (1, 12)
    with pytest.raises(ValueError, match="prompt has 12 tokens, but the model's context is 12: give a shorter prompt"):
        continue_greedily(model, make_tokens(1, 12), 60)
