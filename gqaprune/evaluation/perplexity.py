"""Token-weighted perplexity, as a torchmetrics Metric and as a function over batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel

from gqaprune.common.console import track
from gqaprune.common.distributed import get_rank_and_world_size, is_true_anywhere
from gqaprune.common.precision import find_double_device, multiply_exactly, sum_in_double
from gqaprune.data.call_checks import check_evaluation, check_model, list_corpora
from gqaprune.models.losses import measure_head_losses, measure_losses
from gqaprune.placement.layer_store import find_store

Evaluation = Mapping[str, Sequence[Mapping[str, Tensor]]]
"""Corpus name -> batches of `input_ids` and `labels`."""


class Perplexity(Metric):
    """Perplexity over all scored tokens: `exp(Σ negative log-likelihood / Σ tokens)`.

    Sums are kept in float64 and added over processes, so the result does not depend on batch sizes or the number of
    devices. Windows of different lengths are weighted by their tokens.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    loss_sum: Tensor
    token_count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("loss_sum", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("token_count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses_B: Tensor, tokens_B: Tensor) -> None:
        """Add the losses of a batch, from `losses.measure_losses` or `losses.sum_token_losses`.

        Args:
            losses_B: sum of the negative log-likelihoods of each sample, in nats, `[batch]`.
            tokens_B: numbers of scored tokens, `[batch]`.
        """
        self.loss_sum += sum_in_double(losses_B)
        self.token_count += sum_in_double(tokens_B)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = ()) -> "Perplexity":
        """Leave the sums where they are when the metric moves to a device without float64."""
        device = fn(torch.zeros(1, device=self.device)).device
        kept = tuple(self._defaults) if find_double_device(device) != device else exclude_state
        super()._apply(fn, kept)
        return self

    def compute(self) -> Tensor:
        """Compute the perplexity so far; NaN if no token was scored."""
        return torch.exp(self.loss_sum / self.token_count)


class CorpusPerplexities(nn.Module):
    """Perplexities of several corpora, for a loop that adds their batches one at a time.

    Args:
        names: name of each corpus, in the loop's order.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        super().__init__()
        self.names = list(names)
        self.metrics = nn.ModuleList(Perplexity() for _ in self.names)

    def update(self, corpus: int, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
        """Add a batch of `input_ids` and `labels` to a corpus, given by its index."""
        metric = cast(Perplexity, self.metrics[corpus])
        metric.update(*measure_losses(model, batch["input_ids"], batch["labels"]))

    def compute(self) -> dict[str, Tensor]:
        """Return the perplexity of each corpus so far, by its name, over the batches of all ranks."""
        measured = (cast(Perplexity, metric).compute().float() for metric in self.metrics)
        return dict(zip(self.names, measured, strict=True))


@multiply_exactly()
@torch.inference_mode()
def measure_perplexity(
    model: PreTrainedModel, corpora: Evaluation, description: str = "perplexity"
) -> dict[str, float]:
    """Measure the perplexity of a model on several corpora.

    In a process group each rank measures every `world_size`-th batch, and every rank gets the whole result.

    Args:
        model: the causal LM; its mode (train or eval) is restored afterwards.
        corpora: name -> batches of `input_ids` and `labels`, each `[batch, tokens]`.
        description: text of the progress bar.

    Returns:
        Perplexity by corpus.

    Raises:
        ValueError: if the model or a batch is not valid, or a loss is NaN or infinite, with corpus and batch.
    """
    check_model(model)
    corpora = list_corpora(corpora)
    for name, batches in corpora.items():
        check_evaluation(model, batches, name)
    rank, world_size = get_rank_and_world_size()
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    result = {}
    try:
        for name, batches in corpora.items():
            metric = Perplexity().to(device)
            overflow = ""
            # Every rank makes the same number of passes, which sharded models need; surplus ones are not counted.
            share = [batches[min(start + rank, len(batches) - 1)] for start in range(0, len(batches), world_size)]
            for index, losses in enumerate(_measure_batches(model, share, f"{description}: {name}")):
                start = index * world_size
                if start + rank < len(batches):
                    metric.update(*losses)
                if not overflow and not torch.isfinite(metric.loss_sum):
                    overflow = f"batch {start + rank}"
            if is_true_anywhere(bool(overflow), device):
                raise ValueError(
                    f"the loss on {name}, {overflow or 'text of another rank'} is not finite: the model's activations "
                    "overflow or its weights contain NaN; load it in bfloat16 or float32"
                )
            result[name] = float(metric.compute())
    finally:
        model.train(was_training)
    return result


def _measure_batches(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], description: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the losses of each batch; if layers are not in memory, all batches pass a layer before the next is read."""
    device = next(model.parameters()).device
    hidden: Sequence[Tensor | None] = [None] * len(batches)
    store = find_store(model)
    if not store.is_in_memory:
        hidden = store.run_decoder([batch["input_ids"] for batch in batches], description)
    for batch, hidden_BTD in zip(track(batches, description, "batches"), hidden, strict=True):
        labels = batch["labels"].to(device)
        if hidden_BTD is None:
            yield measure_losses(model, batch["input_ids"].to(device), labels)
        else:
            yield measure_head_losses(model, hidden_BTD, labels)
