"""Measure how far the predictions of changed models are from the dense model's, from outputs of their decoders.

Axes in tensor names: B samples, T tokens, D hidden width, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from gqaprune.common.distributed import sum_across_ranks
from gqaprune.common.precision import find_double_device, sum_in_double
from gqaprune.models.layerwise import Stream, run_head

K = TypeVar("K")


@torch.no_grad()
def measure_divergences(
    model: PreTrainedModel, dense: Sequence[Stream], copies: Mapping[K, Sequence[Tensor]]
) -> dict[K, float]:
    """Measure KL(dense ‖ changed) in nats per token over all ranks, each with its own streams.

    Args:
        model: model with the head that all of them share.
        dense: output of the dense model's last decoder layer.
        copies: name of a change, the same on every rank -> the changed output for each stream, `[batch, tokens,
            width]`, on any device.

    Raises:
        ValueError: if a divergence is not finite, with its name.
    """
    device = next(model.parameters()).device
    double = find_double_device(device)
    sums = {name: torch.zeros((), dtype=torch.float64, device=double) for name in map(str, copies)}
    count = sum(stream.hidden_BTD.shape[:2].numel() for stream in dense)
    for index, stream in enumerate(dense):
        for sample in range(len(stream.hidden_BTD)):
            dense_TV = _predict(model, stream.hidden_BTD[sample : sample + 1])
            for name, hidden in copies.items():
                other_TV = _predict(model, hidden[index][sample : sample + 1].to(device))
                divergence_T = functional.kl_div(other_TV, dense_TV, log_target=True, reduction="none").sum(-1)
                sums[str(name)] += sum_in_double(divergence_T)
    total = sum_across_ranks({**sums, "tokens": torch.tensor(float(count), dtype=torch.float64, device=double)})
    values = {name: float(total[str(name)] / total["tokens"]) for name in copies}
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(
                f"the divergence of {name} is not finite: the model's activations overflow (it computes in "
                f"{model.dtype}); load it with dtype bfloat16 or float32"
            )
    return values


def _predict(model: PreTrainedModel, hidden_BTD: Tensor) -> Tensor:
    """Compute log-probabilities of the next tokens of one sample, float32 `[tokens, vocabulary]`."""
    return functional.log_softmax(run_head(model, hidden_BTD)[0].float(), dim=-1)
