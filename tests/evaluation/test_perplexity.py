"""Perplexity: weighted by tokens, independent of batches, and loud about losses that are not finite."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from gqaprune.data.windows import cut_windows, make_batches
from gqaprune.evaluation.perplexity import CorpusPerplexities, Perplexity, measure_perplexity
from gqaprune.models.losses import IGNORED, sum_token_losses

from tiny import make_model, make_tokens


def list_token_losses(logits: Tensor, ids: Sequence[int]) -> list[float]:
    """Negative log-likelihood of tokens 1, 2, … of one sequence, one by one."""
    scores = log_softmax(logits.double(), dim=-1)
    return [-float(scores[position - 1, token]) for position, token in enumerate(ids) if position > 0]


def list_model_losses(model: torch.nn.Module, ids: Tensor) -> list[float]:
    with torch.no_grad():
        return list_token_losses(model(ids[None]).logits[0], ids.tolist())


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def test_metric_is_exp_of_the_mean_token_loss_of_a_model() -> None:
    model, tokens = make_model("qwen2"), make_tokens(3, 12)
    metric = Perplexity()
    with torch.no_grad():
        metric.update(*sum_token_losses(model(tokens).logits, tokens))
    losses = [loss for ids in tokens for loss in list_model_losses(model, ids)]
    assert len(losses) == 3 * 11
    assert float(metric.compute()) == pytest.approx(math.exp(mean(losses)), rel=1e-5)


def test_metric_weighs_batches_by_their_tokens() -> None:
    metric, losses = Perplexity(), []
    for batch, length in ((1, 3), (4, 9)):
        logits, labels = torch.randn(batch, length, 7) * 3, torch.randint(0, 7, (batch, length))
        metric.update(*sum_token_losses(logits, labels))
        for sample in range(batch):
            losses += list_token_losses(logits[sample], labels[sample].tolist())
    assert float(metric.compute()) == pytest.approx(math.exp(mean(losses)), rel=1e-6)


def test_metric_of_logits_that_know_nothing_is_the_size_of_the_vocabulary() -> None:
    metric = Perplexity()
    metric.update(*sum_token_losses(torch.zeros(2, 5, 37), torch.randint(0, 37, (2, 5))))
    assert float(metric.compute()) == pytest.approx(37)


def test_metric_does_not_count_ignored_labels() -> None:
    logits, labels = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    labels[0, :4] = IGNORED
    labels[1, 5] = IGNORED
    metric = Perplexity()
    metric.update(*sum_token_losses(logits, labels))
    scores = log_softmax(logits.double(), dim=-1)
    scored = [(0, 4), (0, 5), (1, 1), (1, 2), (1, 3), (1, 4)]
    losses = [-float(scores[sample, position - 1, labels[sample, position]]) for sample, position in scored]
    assert int(metric.token_count) == len(scored)
    assert float(metric.compute()) == pytest.approx(math.exp(mean(losses)), rel=1e-6)


def test_metric_does_not_change_by_windows_without_labels() -> None:
    logits, labels = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    metric = Perplexity()
    metric.update(*sum_token_losses(logits, labels))
    before = metric.compute()
    metric.update(*sum_token_losses(torch.randn(3, 6, 11), torch.full((3, 6), IGNORED)))
    assert metric.compute() == before


def test_metric_is_nan_before_any_token_is_scored() -> None:
    metric = Perplexity()
    metric.update(*sum_token_losses(torch.randn(1, 4, 5), torch.full((1, 4), IGNORED)))
    assert math.isnan(metric.compute())


def test_metric_adds_small_losses_to_large_sums() -> None:
    metric = Perplexity()
    metric.loss_sum += 1e9
    metric.update(*sum_token_losses(torch.zeros(1, 2, 2), torch.ones(1, 2, dtype=torch.long)))
    assert float(metric.loss_sum) - 1e9 == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_measured_perplexity_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    model = make_model("llama")
    ids, labels = cut_windows(make_tokens(1, 7 * 16)[0], 16)
    losses = [loss for window in ids for loss in list_model_losses(model, window)]
    measured = measure_perplexity(model, {"text": make_batches(ids, labels, batch_size)})
    assert measured == {"text": pytest.approx(math.exp(mean(losses)), rel=1e-5)}


def test_each_corpus_is_measured_on_its_own() -> None:
    model = make_model("llama")
    corpora = {name: make_batches(*cut_windows(make_tokens(1, 64, seed)[0], 16), 2) for seed, name in enumerate("ab")}
    together = measure_perplexity(model, corpora)
    assert list(together) == ["a", "b"]
    assert together["a"] != together["b"]
    for name, batches in corpora.items():
        assert measure_perplexity(model, {name: batches}) == {name: together[name]}


def test_strided_perplexity_scores_every_token_once_with_its_context() -> None:
    model, tokens, window, stride = make_model("llama"), make_tokens(1, 50)[0], 16, 6
    losses = list_model_losses(model, tokens[:window])
    for start in range(stride, len(tokens) - window + 1, stride):
        losses += list_model_losses(model, tokens[start : start + window])[-stride:]
    assert len(losses) == 15 + 5 * 6
    measured = measure_perplexity(model, {"text": make_batches(*cut_windows(tokens, window, stride), 2)})
    assert measured["text"] == pytest.approx(math.exp(mean(losses)), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_is_done_in_eval_mode_and_restores_the_mode(training: bool) -> None:
    model = make_model("llama")
    batches = {"text": make_batches(*cut_windows(make_tokens(1, 64)[0], 16), 2)}
    expected = measure_perplexity(model, batches)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train(training)
    assert measure_perplexity(model, batches) == expected
    assert all(module.training is training for module in model.modules())


def test_measuring_leaves_no_gradient() -> None:
    model = make_model("llama")
    measure_perplexity(model, {"text": make_batches(*cut_windows(make_tokens(1, 32)[0], 16), 2)})
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_refused_with_corpus_and_batch(value: float) -> None:
    model = make_model("llama").train()
    tokens = make_tokens(4, 16).clamp(max=250)
    tokens[2, 5] = 255  # in batch 1 of two windows each
    with torch.no_grad():
        model.get_input_embeddings().weight[255] = value
    fine = make_batches(tokens[:2], tokens[:2], 2)
    with pytest.raises(ValueError, match=r"loss on broken, batch 1 is not finite"):
        measure_perplexity(model, {"fine": fine, "broken": make_batches(tokens, tokens, 2)})
    assert model.training


def test_perplexities_of_a_loop_are_those_of_corpora_measured_at_once() -> None:
    model = make_model("llama")
    corpora = {name: make_batches(*[make_tokens(4, 16, seed)] * 2, 2) for seed, name in enumerate(("a", "b"))}
    perplexities = CorpusPerplexities(corpora)
    for corpus, batches in enumerate(corpora.values()):
        for batch in batches:
            perplexities.update(corpus, model, batch)
    values = {name: float(value) for name, value in perplexities.compute().items()}
    assert values == pytest.approx(measure_perplexity(model, corpora), rel=1e-6)
    assert values["a"] != pytest.approx(values["b"], rel=1e-3)


def test_windows_longer_than_the_context_are_refused() -> None:
    model = make_model()
    model.config.max_position_embeddings = 15
    with pytest.raises(ValueError, match="a window of own is 16 tokens, the model's context 15: set it to 15 or less"):
        measure_perplexity(model, {"own": make_batches(*cut_windows(make_tokens(1, 64)[0], 16), 2)})
