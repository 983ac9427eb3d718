"""Token-weighted perplexity, as a torchmetrics Metric and as a function over batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from transformers import PreTrainedModel

from gqaprune.distributed import get_rank_and_world_size, is_true_anywhere
from gqaprune.offload import compute_logits
from gqaprune.progress import track

IGNORED = -100
"""Label of tokens that are context only."""

Evaluation = Mapping[str, Sequence[Mapping[str, Tensor]]]
"""Corpus name -> batches of `input_ids` and `labels`."""


class Perplexity(Metric):
    """Perplexity over all scored tokens: `exp(Σ negative log-likelihood / Σ tokens)`.

    Sums are kept in float64 and added over processes, so the result depends neither on batch sizes nor on the number
    of devices. Windows of different lengths weigh by their tokens.
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

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: `[batch, tokens, vocabulary]`; position t predicts label t + 1.
            labels: `[batch, tokens]`, `IGNORED` where a token is context only.
        """
        losses_B, tokens_B = sum_token_losses(logits, labels)
        self.loss_sum += losses_B.double().sum()
        self.token_count += tokens_B.sum()

    def compute(self) -> Tensor:
        """Perplexity so far; NaN if no token was scored."""
        return torch.exp(self.loss_sum / self.token_count)


def sum_token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every sample.

    Args:
        logits: `[batch, tokens, vocabulary]`.
        labels: `[batch, tokens]`.

    Returns:
        Sums in nats, float32 `[batch]`, and numbers of scored tokens, `[batch]`.
    """
    targets = labels[:, 1:]
    losses = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(targets).sum(1), (targets != IGNORED).sum(1)


@torch.inference_mode()
def measure_perplexity(
    model: PreTrainedModel, corpora: Evaluation, description: str = "perplexity"
) -> dict[str, float]:
    """Perplexity of a model on several corpora.

    In a process group each rank takes every `world_size`-th batch, and every rank gets the whole result.

    Args:
        model: the causal LM; its mode (train or eval) is restored afterwards.
        corpora: name -> batches of `input_ids` and `labels`, each `[batch, tokens]`.
        description: what the progress bar says.

    Returns:
        Perplexity by corpus.

    Raises:
        ValueError: if a loss is NaN or infinite, with corpus and batch.
    """
    rank, world_size = get_rank_and_world_size()
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    result = {}
    try:
        for name, batches in corpora.items():
            metric = Perplexity().to(device)
            overflow = ""
            # Every rank makes the same number of passes, as sharded models need; surplus ones are not counted.
            starts, title = range(0, len(batches), world_size), f"{description}: {name}"
            own = [batches[min(start + rank, len(batches) - 1)] for start in starts]
            all_logits = compute_logits(model, [batch["input_ids"] for batch in own], title)
            for start, batch, logits in zip(track(starts, title, "batches"), own, all_logits, strict=True):
                if start + rank < len(batches):
                    metric.update(logits, batch["labels"].to(device))
                if not overflow and not torch.isfinite(metric.loss_sum):
                    overflow = f"batch {start + rank}"
            if is_true_anywhere(bool(overflow), device):
                raise ValueError(
                    f"the loss on {name}, {overflow or 'text of another rank'} is not finite: the model's activations "
                    "overflow or its weights hold NaN; load it in bfloat16 or float32"
                )
            result[name] = float(metric.compute())
    finally:
        model.train(was_training)
    return result
