"""Soft targets: a teacher's likeliest next tokens, and the distance of a student's predictions and hidden states.

Sources: soft targets with a temperature, Hinton et al. 2015 (arXiv 1503.02531); hidden states, Minitron (arXiv
2407.14679).

The gradient of a divergence by the student's logits is a difference of two distributions, so it is computed with the
value, a piece of the logits at a time; autograd would read and write several times as many numbers.

Axes in tensor names: B samples, T tokens, N tokens of all samples, V vocabulary, K likeliest tokens, D hidden width.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.models.losses import attach_slope, cut_logits

_LEAST = -30.0
"""Lower bound of the log-probability of all other tokens, for the case that there are none."""


class Predictions(NamedTuple):
    """A teacher's likeliest next tokens.

    Args:
        log_probability_BTK: their log-probabilities in the softened distribution, in nats.
        token_BTK: their ids.
    """

    log_probability_BTK: Tensor
    token_BTK: Tensor


@torch.inference_mode()
def predict_likeliest(
    teacher: PreTrainedModel, ids_BT: Tensor, top_k: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Predict the likeliest next tokens for every position but the last, on the CPU.

    Args:
        teacher: the causal LM, in eval mode.
        ids_BT: token ids, on its device.
        top_k: number of tokens.
        temperature: divides the logits.

    Returns:
        Log-probabilities, float32, and tokens, `[batch, tokens - 1, k]`.
    """
    logits_BTV = teacher(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    values_BTK, token_BTK = logits_BTV.float().topk(top_k)
    total_BT1 = torch.stack([(row.float() / temperature).logsumexp(-1, keepdim=True) for row in logits_BTV])
    return (values_BTK / temperature - total_BT1).cpu(), token_BTK.cpu()


def measure_divergence(
    student_BTV: Tensor, teacher_BTV: Tensor, temperature: float = 1.0, learned_BT: Tensor | None = None
) -> Tensor:
    """Measure `τ² · KL(teacher ‖ student)` of softened next-token distributions, mean over tokens, in nats; a scalar.

    Args:
        student_BTV: logits, with gradients.
        teacher_BTV: logits for the same tokens, without gradients.
        temperature: `τ`, divides both logits; the factor `τ²` keeps the size of gradients.
        learned_BT: which tokens count; None counts all.
    """
    return _measure(_diverge, student_BTV, (teacher_BTV,), temperature, learned_BT)


def measure_divergence_from_top(
    student_BTV: Tensor, teacher: Predictions, temperature: float = 1.0, learned_BT: Tensor | None = None
) -> Tensor:
    """Measure the same from the teacher's likeliest tokens, with all others as one; at most the whole divergence.

    Args:
        student_BTV: logits, with gradients.
        teacher: log-probabilities of the softened distribution, and their tokens.
        temperature: `τ`, the temperature of the predictions.
        learned_BT: which tokens count; None counts all.
    """
    known = (teacher.log_probability_BTK, teacher.token_BTK)
    return _measure(_diverge_from_top, student_BTV, known, temperature, learned_BT)


def measure_distance(
    student_BTD: Sequence[Tensor], teacher_BTD: Sequence[Tensor], learned_BT: Tensor | None = None
) -> Tensor:
    """Measure the squared distance of hidden states relative to the teacher's, mean over tokens and layers; a scalar.

    Args:
        student_BTD: hidden states of each layer, with gradients.
        teacher_BTD: the teacher's hidden states, without gradients.
        learned_BT: which tokens count; None counts all.
    """
    distances_BT = [
        (student.float() - teacher.float()).square().sum(-1) / teacher.float().square().sum(-1)
        for student, teacher in zip(student_BTD, teacher_BTD, strict=True)
    ]
    if learned_BT is None:
        return torch.stack([distance_BT.mean() for distance_BT in distances_BT]).mean()
    return torch.stack([(distance_BT * learned_BT).sum() / learned_BT.sum() for distance_BT in distances_BT]).mean()


@torch.no_grad()
def _diverge(student_NV: Tensor, temperature: float, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `Σ KL(teacher ‖ student)` over tokens, and its gradient by the student's logits."""
    student_NV, teacher_NV = (_soften(logits_NV, temperature) for logits_NV in (student_NV, teacher_NV))
    probability_NV = teacher_NV.exp()
    divergence = teacher_NV.sub_(student_NV).mul_(probability_NV).sum()
    return divergence, student_NV.exp_().sub_(probability_NV).div_(temperature)


@torch.no_grad()
def _diverge_from_top(
    student_NV: Tensor, temperature: float, teacher_NK: Tensor, token_NK: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the same with all tokens but the likeliest as one."""
    student_NV = _soften(student_NV, temperature)
    top_NK, teacher_NK = student_NV.gather(-1, token_NK), teacher_NK.float()
    rest_N = student_NV.scatter(-1, token_NK, -math.inf).logsumexp(-1).clamp(min=_LEAST)
    teacher_rest_N = torch.log1p(-teacher_NK.exp().sum(-1).clamp(max=1)).clamp(min=_LEAST)
    of_top, of_rest = teacher_NK.exp() * (teacher_NK - top_NK), teacher_rest_N.exp() * (teacher_rest_N - rest_N)
    # Among all other tokens, the student's proportions stay.
    slope_NV = student_NV.exp_().mul_(1 - (teacher_rest_N - rest_N).exp()[:, None])
    slope_NV.scatter_(-1, token_NK, top_NK.exp() - teacher_NK.exp())
    return of_top.sum() + of_rest.sum(), slope_NV.div_(temperature)


def _soften(logits_NV: Tensor, temperature: float) -> Tensor:
    """Compute softened log-probabilities in float32."""
    softened_NV = logits_NV if temperature == 1 else logits_NV.float() / temperature
    return torch.log_softmax(softened_NV, dim=-1, dtype=torch.float32)


def _measure(
    diverge: Callable[..., tuple[Tensor, Tensor]],
    student_BTV: Tensor,
    teacher: Sequence[Tensor],
    temperature: float,
    learned_BT: Tensor | None,
) -> Tensor:
    """Measure `τ²` times the mean divergence over tokens, a piece of the logits at a time."""
    slope_BTV = torch.empty_like(student_BTV, memory_format=torch.contiguous_format)
    total = student_BTV.new_zeros((), dtype=torch.float32)
    for sample, student_TV in enumerate(student_BTV):
        for piece in cut_logits(student_TV):
            parts = [part[sample, piece] for part in teacher]
            own_NV = student_TV[piece]
            if learned_BT is None:
                divergence, slope_BTV[sample, piece] = diverge(own_NV, temperature, *parts)
            else:
                kept = learned_BT[sample, piece].nonzero().flatten()
                slope_NV = torch.zeros_like(own_NV)
                divergence, slope_NV[kept] = diverge(own_NV[kept], temperature, *(part[kept] for part in parts))
                slope_BTV[sample, piece] = slope_NV
            total += divergence
    tokens = student_BTV.shape[:2].numel() if learned_BT is None else learned_BT.sum().clamp(min=1)
    return attach_slope(total, student_BTV, slope_BTV) * (temperature**2 / tokens)
