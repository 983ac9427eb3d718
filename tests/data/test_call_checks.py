"""Models and token ids that a call cannot work with are refused at its door, in one sentence."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from gqaprune import CalibrationSet, apply_plan, prune
from gqaprune.data.windows import make_batches
from gqaprune.evaluation.generation import continue_greedily
from gqaprune.evaluation.perplexity import measure_perplexity

from tiny import make_model, make_plain, make_tokens

TOKENS = make_tokens()
CONFIG = make_plain(rate=0.15, allocation="global")


def move_a_layer_to_meta() -> nn.Module:
    model = make_model()
    model.model.layers[1].to("meta")
    return model


def make_under_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return make_model()


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "meta": (lambda: make_model().to("meta"), "have no values .* load it with load_model"),
    "a layer on meta": (move_a_layer_to_meta, "have no values"),
    "compiled": (lambda: torch.compile(make_model()), "the model is compiled: pass .* model._orig_mod"),
    "wrapped": (lambda: nn.DataParallel(make_model()), "wrapped in DataParallel: pass the wrapped model, model.module"),
    "adapted": (lambda: get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])), "has PEFT adapters"),
    "without a head": (lambda: make_model().model, "must be a causal LM of transformers, .* got LlamaModel"),
    "another module": (lambda: nn.Linear(2, 2), "must be a causal LM of transformers, .* got Linear"),
    "a name": (lambda: "smollm2-135m", "must be a causal LM of transformers, .* got str"),
    "inference mode": (make_under_inference_mode, "loaded under torch.inference_mode, .*: load it outside"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_a_whole_model_with_values_is_refused(name: str) -> None:
    make, sentence = MODELS[name]
    with pytest.raises(ValueError, match=sentence):
        prune(make(), [TOKENS], CONFIG)
    with pytest.raises(ValueError, match=sentence):
        measure_perplexity(make(), {"text": make_batches(TOKENS, TOKENS)})


BATCHES: dict[str, tuple[Any, str]] = {
    "one token": ([make_tokens(2, 1)], "has 2 windows of 1 tokens: pass at least 1 window of 2 tokens"),
    "no window": ([make_tokens(0, 8)], "has 0 windows of 8 tokens"),
    "no batches": (iter(()), "at least one"),
    "no list": (None, "must be a list of batches, got NoneType"),
    "a name": ("text", "must be a list of batches, got str"),
    "one axis": (TOKENS, r"must be token ids, torch.int64 \[batch, tokens\], got torch.int64 \[16\]"),
    "numbers with fractions": ([TOKENS.float()], r"must be token ids, .*, got torch.float32 \[2, 16\]"),
    "bytes": ([TOKENS.to(torch.uint8)], "must be token ids, .*, got torch.uint8"),
    "lists": ([TOKENS.tolist()], "must be token ids, .*, got list"),
    "below zero": ([TOKENS, -TOKENS], "batch 1 of .* has the token id -2.*, but the model embeds ids from 0 to 259"),
    "beyond the rows": ([TOKENS + 100], "batch 0 of .* has the token id 3.*, but the model embeds ids from 0 to 259"),
    "longer than the context": ([make_tokens(1, 257)], "is 257 tokens, the model's context 256"),
}


def as_corpus(batches: Any) -> Any:
    if not isinstance(batches, list):
        return batches
    return [{"input_ids": batch, "labels": batch} for batch in batches]


@pytest.mark.parametrize("name", BATCHES)
def test_text_that_a_model_cannot_read_is_refused(name: str) -> None:
    batches, sentence = BATCHES[name]
    with pytest.raises(ValueError, match=sentence):
        prune(make_model(), batches, CONFIG)
    if name not in ("one axis", "lists"):
        with pytest.raises(ValueError, match=sentence):
            measure_perplexity(make_model(), {"text": as_corpus(batches)})
        with pytest.raises(ValueError, match=sentence):
            prune(make_model(), [TOKENS], CONFIG, evaluation={"text": as_corpus(batches)})


@pytest.mark.parametrize(
    ("corpora", "sentence"),
    [
        ([TOKENS], "corpora must be a dict of name -> list of batches, got list"),
        ({"text": [TOKENS]}, "batch 0 of text must have input_ids and labels, got Tensor"),
        ({"text": [{"input_ids": TOKENS, "labels": TOKENS[:, 1:]}]}, r"has labels \[2, 15\] for input_ids \[2, 16\]"),
        ({"text": [{"input_ids": TOKENS, "labels": TOKENS + 100}]}, "batch 0 of text, labels, has the token id 3"),
        ({"text": [{"input_ids": TOKENS, "labels": TOKENS * 0 - 100}]}, "text has no token to predict in 1 batches"),
    ],
)
def test_text_without_labels_of_its_own_is_refused(corpora: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        measure_perplexity(make_model(), corpora)


@pytest.mark.parametrize("batches", [iter([TOKENS, TOKENS]), torch.stack([TOKENS] * 2), [TOKENS.int()] * 2])
def test_batches_that_come_once_or_in_a_tensor_or_in_32_bits_are_those_of_a_list(batches: Iterable[Tensor]) -> None:
    expected, pruned = make_model(), make_model()
    prune(expected, [TOKENS] * 2, CONFIG)
    prune(pruned, batches, CONFIG)  # type: ignore[arg-type]
    assert all(map(torch.equal, pruned.parameters(), expected.parameters()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("criterion", ["fisher", "param_first"])
def test_a_caller_that_forbids_gradients_gets_the_same_model(mode: Callable[[], Any], criterion: str) -> None:
    config = make_plain(rate=0.15, allocation="global", criterion=criterion, repair={"method": "least_squares"})
    expected, pruned = make_model(), make_model()
    prune(expected, [TOKENS], config)
    with mode():
        prune(pruned, [TOKENS.clone()], config)
    assert all(map(torch.equal, pruned.parameters(), expected.parameters()))
    pruned(TOKENS, labels=TOKENS).loss.backward()  # it can be trained


def test_a_plan_applied_under_inference_mode_leaves_a_model_that_can_be_trained() -> None:
    model = make_model()
    plan, _ = prune(make_model(), [TOKENS], CONFIG)
    with torch.inference_mode():
        apply_plan(model, plan)
    model(TOKENS, labels=TOKENS).loss.backward()


@pytest.mark.parametrize("mode", [True, False])
def test_a_model_in_train_mode_with_dropout_is_pruned_as_in_eval_mode(mode: bool) -> None:
    model, expected = make_model(), make_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    prune(model.train(mode).requires_grad_(mode), [TOKENS], CONFIG)
    prune(expected, [TOKENS], CONFIG)
    assert all(map(torch.equal, model.parameters(), expected.parameters())) and model.training is mode


def test_settings_and_plans_of_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"config must be a PruningConfig, got dict; try PruningConfig\(rate=0.2\)"):
        prune(make_model(), [TOKENS], {"rate": 0.2})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="plan must be a PruningPlan, got str; try"):
        apply_plan(make_model(), "plan.json")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a list of batches, got int"):
        CalibrationSet(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (TOKENS[:1] + 100, "a prompt has the token id 3"),
        (TOKENS[0], "a prompt must be token ids"),
        (TOKENS[:1, :0], "a prompt has no tokens"),
    ],
)
def test_prompts_that_a_model_cannot_read_are_refused(ids: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        continue_greedily(make_model(), ids, 2)


@pytest.mark.parametrize("variant", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_that_report_their_routing_have_the_same_perplexity(variant: str) -> None:
    model, text = make_model(variant), {"text": make_batches(TOKENS, TOKENS)}
    expected = measure_perplexity(model, text)
    model.config.output_router_logits = True
    assert measure_perplexity(model, text) == expected
