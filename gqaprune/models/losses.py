"""Measure losses of a causal LM's tokens without having the logits of a whole batch in memory.

The head runs over a piece of the window at a time: with a vocabulary of 128,000, the logits of 2,048 tokens take a
gibibyte in float32, and their gradient and softmax as much again.

Axes in tensor names: B samples, T tokens, D hidden width, V vocabulary.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from gqaprune.common.precision import sum_in_double
from gqaprune.models.layerwise import run_decoder, run_head
from gqaprune.models.wrapping import is_sharded

IGNORED = -100
"""Label of tokens that are only context."""

PIECE_LOGITS = 2**24
"""Largest number of logits in memory at once, 64 MiB in float32."""


def sum_token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the negative log-likelihoods of every sample's tokens.

    Args:
        logits: `[batch, tokens, vocabulary]`; position t predicts label t + 1.
        labels: `[batch, tokens]`, `IGNORED` for tokens that are only context.

    Returns:
        Sums in nats, float32 `[batch]`, and numbers of scored tokens, `[batch]`.
    """
    return _sum_losses(logits[:, :-1], labels[:, 1:]), count_scored(labels)


def count_scored(labels: Tensor) -> Tensor:
    """Count the tokens with a loss, `[batch]`, of labels `[batch, tokens]`; the first token of a window has none."""
    return (labels[:, 1:] != IGNORED).sum(1)


def average_losses(losses_B: Tensor, tokens_B: Tensor) -> Tensor:
    """Average what `measure_losses` returns: nats per token over all samples, a scalar in float64."""
    return sum_in_double(losses_B) / sum_in_double(tokens_B)


def measure_mean_loss(logits_BTV: Tensor, labels: Tensor) -> Tensor:
    """Measure the mean loss of all scored tokens in nats, a scalar, with its gradient by the logits if they need one.

    The gradient is computed with the loss, in the type of the logits, a piece at a time, and nothing else has their
    size; autograd would need logits, softmax and gradient in float32.

    Args:
        logits_BTV: position t predicts label t + 1.
        labels: `[batch, tokens]`, `IGNORED` for tokens that are only context.
    """
    logits_NV = logits_BTV.flatten(0, 1)
    targets_N = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    total, has_slope = logits_NV.new_zeros((), dtype=torch.float32), logits_NV.requires_grad and torch.is_grad_enabled()
    slope_NV = torch.empty_like(logits_NV if has_slope else logits_NV[:0])
    with torch.no_grad():
        for piece in cut_logits(logits_NV):
            if has_slope:
                sums_1, slope_1NV = _differentiate_sums(logits_NV[None, piece], targets_N[None, piece])
                slope_NV[piece] = slope_1NV[0]
            else:
                sums_1 = _sum_losses(logits_NV[None, piece], targets_N[None, piece])
            total += sums_1[0]
        if has_slope:
            slope_NV[targets_N == IGNORED] = 0
    return attach_slope(total, logits_NV, slope_NV) / (targets_N != IGNORED).sum()


def cut_logits(logits_NV: Tensor) -> Iterator[slice]:
    """Cut positions into pieces with at most `PIECE_LOGITS` logits each."""
    step = max(1, PIECE_LOGITS // logits_NV.shape[1])
    return (slice(start, start + step) for start in range(0, len(logits_NV), step))


def attach_slope(value: Tensor, logits: Tensor, slope: Tensor) -> Tensor:
    """Attach a gradient that was computed by hand to a scalar that was computed from logits."""
    attached: Tensor = _WithSlope.apply(logits, value, slope)  # type: ignore[no-untyped-call]
    return attached


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradient, None, None


def measure_losses(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Measure `sum_token_losses` of a model, a piece of its logits at a time, without gradients.

    A batch that does not fit in the device's memory is halved repeatedly. For a model sharded over devices, whose
    weights are only whole within its own forward pass, all logits exist at once and batches are not halved.

    Args:
        model: the causal LM.
        input_ids: tokens `[batch, tokens]`.
        labels: `[batch, tokens]`.
    """
    if is_sharded(model):
        return sum_token_losses(model(input_ids=input_ids, use_cache=False).logits, labels)
    try:
        with torch.no_grad():
            return measure_head_losses(model, run_decoder(model, input_ids), labels)
    except torch.OutOfMemoryError:
        if len(labels) == 1:
            raise
    # After the handler, because its traceback keeps the tensors that did not fit.
    warnings.warn(
        f"{len(labels)} windows of {labels.shape[1]} tokens do not fit in the device's memory, so they are measured in "
        f"halves; set data.evaluation.batch_size to {(len(labels) + 1) // 2} to avoid this",
        stacklevel=2,
    )
    halves = [measure_losses(model, *half) for half in zip(input_ids.chunk(2), labels.chunk(2), strict=True)]
    sums_B, tokens_B = (torch.cat(parts) for parts in zip(*halves, strict=True))
    return sums_B, tokens_B


@torch.no_grad()
def measure_head_losses(model: PreTrainedModel, hidden_BTD: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Measure the same from the last decoder layer's output, `[batch, tokens, width]`."""
    sums_B = torch.zeros(len(labels), device=labels.device)
    for piece in _cut_pieces(model, labels):
        sums_B += _sum_losses(run_head(model, hidden_BTD[:, piece]), labels[:, 1:][:, piece])
    return sums_B, count_scored(labels)


def differentiate_losses(model: PreTrainedModel, hidden_BTD: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute every sample's mean loss and its gradient by the last decoder layer's output.

    This is the end of a forward pass and the beginning of a backward pass, piece by piece;
    `hidden_BTD.backward(gradient)` does the rest. Parameters must not require gradients.

    Args:
        model: the causal LM.
        hidden_BTD: output of `run_decoder`, `[batch, tokens, width]`.
        labels: `[batch, tokens]`.

    Returns:
        Mean losses in nats per token, float32 `[batch]`, and the gradient of their sum, `[batch, tokens, width]`.
    """
    tokens_B = count_scored(labels)
    losses_B = torch.zeros(len(labels), device=labels.device)
    gradient_BTD = torch.zeros_like(hidden_BTD)
    for piece in _cut_pieces(model, labels):
        sums_B, gradient_BTD[:, piece] = _differentiate_piece(model, hidden_BTD[:, piece], labels[:, 1:][:, piece])
        losses_B += sums_B
    # The head treats every position separately, so the weights of positions apply to their hidden states.
    weight_BT = (labels[:, 1:] != IGNORED) / tokens_B[:, None]
    gradient_BTD[:, :-1] *= weight_BT[..., None]
    return losses_B / tokens_B, gradient_BTD


def _sum_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    losses = functional.cross_entropy(
        logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(targets_BT).sum(1)


def _differentiate_piece(model: PreTrainedModel, hidden_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Compute sums of losses and the gradient of some positions; a function, so that logits are freed at its end."""
    hidden_BTD = hidden_BTD.detach().requires_grad_()
    with torch.enable_grad():
        logits_BTV = run_head(model, hidden_BTD)
    sums_B, slope_BTV = _differentiate_sums(logits_BTV.detach(), targets_BT)
    (gradient_BTD,) = torch.autograd.grad(logits_BTV, [hidden_BTD], slope_BTV)
    return sums_B, gradient_BTD


def _differentiate_sums(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Compute every sample's sum of losses, and each position's gradient, also of `IGNORED` ones.

    The gradient is the softmax minus one at the target. Autograd would write and read as many numbers once more.
    """
    target_BT1 = targets_BT.clamp(min=0)[..., None]
    slope_BTV = functional.log_softmax(logits_BTV, -1, dtype=torch.float32)
    losses_BT = -slope_BTV.gather(-1, target_BT1)[..., 0]
    slope_BTV.exp_().scatter_add_(-1, target_BT1, -torch.ones_like(losses_BT)[..., None])
    return (losses_BT * (targets_BT != IGNORED)).sum(1), slope_BTV.to(logits_BTV.dtype)


def _cut_pieces(model: PreTrainedModel, labels: Tensor) -> Iterator[slice]:
    """Cut positions that predict a token into pieces with few logits.

    A piece is at most half of the window, so that its logits and their gradient are not larger than all logits of a
    plain forward pass.
    """
    batch, last = len(labels), labels.shape[1] - 1
    size = max(1, min(PIECE_LOGITS // (batch * model.config.vocab_size), (last + 1) // 2))
    return (slice(start, min(start + size, last)) for start in range(0, last, size))
