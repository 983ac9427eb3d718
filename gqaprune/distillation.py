"""Distillation losses: how far a student's predictions and hidden states are from its teacher's.

Sources: soft targets with a temperature, Hinton et al. 2015 (arXiv 1503.02531); hidden states, Minitron (arXiv
2407.14679).

Axes in tensor names: B samples, T tokens, V vocabulary, D hidden width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gqaprune.teacher import Predictions

_CHUNK_TOKENS = 1024
"""Tokens whose distributions are held in float32 at a time."""
_LEAST = -30.0
"""Log-probability that the rest has at least, where the likeliest tokens are all there are."""


def measure_divergence(student_BTV: Tensor, teacher_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """`τ² · KL(teacher ‖ student)` of softened next-token distributions, mean over tokens, in nats; a scalar.

    Args:
        student_BTV: logits, with gradients.
        teacher_BTV: logits of the same tokens, without.
        temperature: `τ`, divides both; the factor keeps gradients of the same size.
    """
    student_NV, teacher_NV = student_BTV.flatten(0, 1), teacher_BTV.flatten(0, 1)
    chunks = zip(student_NV.split(_CHUNK_TOKENS), teacher_NV.split(_CHUNK_TOKENS), strict=True)
    sums = [checkpoint(_sum_divergence, *chunk, temperature, use_reentrant=False) for chunk in chunks]
    return torch.stack(sums).sum() * (temperature**2 / len(student_NV))


def measure_divergence_from_top(student_BTV: Tensor, teacher: Predictions, temperature: float = 1.0) -> Tensor:
    """The same where only the teacher's likeliest tokens are known, all others being one; at most the whole divergence.

    Args:
        student_BTV: logits, with gradients.
        teacher: log-probabilities of the softened distribution, and their tokens.
        temperature: `τ`, that of the predictions.
    """
    parts = (student_BTV, teacher.log_probability_BTK, teacher.token_BTK)
    chunks = zip(*(part.flatten(0, 1).split(_CHUNK_TOKENS) for part in parts), strict=True)
    sums = [checkpoint(_sum_divergence_from_top, *chunk, temperature, use_reentrant=False) for chunk in chunks]
    return torch.stack(sums).sum() * (temperature**2 / student_BTV.shape[:2].numel())


def measure_distance(student_BTD: Sequence[Tensor], teacher_BTD: Sequence[Tensor]) -> Tensor:
    """Squared distance of hidden states relative to the teacher's square, mean over tokens and layers; a scalar."""
    distances = [
        ((student.float() - teacher.float()).square().sum(-1) / teacher.float().square().sum(-1)).mean()
        for student, teacher in zip(student_BTD, teacher_BTD, strict=True)
    ]
    return torch.stack(distances).mean()


def _sum_divergence(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    student_NV, teacher_NV = (
        functional.log_softmax(logits_NV.float() / temperature, dim=-1) for logits_NV in (student_NV, teacher_NV)
    )
    return functional.kl_div(student_NV, teacher_NV, log_target=True, reduction="sum")


def _sum_divergence_from_top(student_NV: Tensor, teacher_NK: Tensor, token_NK: Tensor, temperature: float) -> Tensor:
    student_NV = functional.log_softmax(student_NV.float() / temperature, dim=-1)
    rest_N = student_NV.scatter(-1, token_NK, -math.inf).logsumexp(-1).clamp(min=_LEAST)
    teacher_rest_N = torch.log1p(-teacher_NK.exp().sum(-1).clamp(max=1)).clamp(min=_LEAST)
    sum_top = functional.kl_div(student_NV.gather(-1, token_NK), teacher_NK, log_target=True, reduction="sum")
    return sum_top + functional.kl_div(rest_N, teacher_rest_N, log_target=True, reduction="sum")
