"""Average what is measured on calibration batches over tokens and ranks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.console import track
from gqaprune.common.distributed import get_rank_and_world_size, is_true_anywhere, sum_across_ranks
from gqaprune.common.precision import find_double_device
from gqaprune.models.gates import freeze_parameters

K = TypeVar("K")


@torch.no_grad()
def average_over_batches(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    names: Sequence[K],
    measure: Callable[[Tensor], Mapping[K, float]],
    description: str,
) -> dict[K, float]:
    """Average values that are measured on each batch, weighted by tokens.

    In a process group each rank takes every `world_size`-th batch, and every rank gets the same bits.

    Args:
        model: the model, in eval mode while it is measured.
        batches: token ids, each `[batch, tokens]`, the same list on every rank.
        names: names of the values.
        measure: maps a batch on the model's device to name -> mean over its tokens. It may raise FloatingPointError
            with the name of a value that is not finite.
        description: text of the progress bar; empty for none.

    Returns:
        Name -> mean over the tokens of all batches.

    Raises:
        ValueError: if there is no batch, or a value is NaN or infinite, naming the value and the batch.
    """
    if not batches:
        raise ValueError("measuring needs at least one calibration batch, got none")
    device = next(model.parameters()).device
    rank, world_size = get_rank_and_world_size()
    batches_of_rank = range(rank, len(batches), world_size)
    sums, overflow = torch.zeros(len(names), dtype=torch.float64), ""
    with freeze_parameters(model):
        for index in track(batches_of_rank, description, "batches") if description else batches_of_rank:
            try:
                values = measure(batches[index].to(device))
                _check_finite(values)
            except FloatingPointError as error:
                overflow = f"{error} on calibration batch {index}"
                break
            sums += torch.tensor([values[name] for name in names], dtype=torch.float64) * batches[index].numel()
    if is_true_anywhere(bool(overflow), device):
        raise ValueError(
            f"{overflow or 'a value on another rank'} is not finite: the model's activations overflow (it computes "
            f"in {model.dtype}); load it with dtype bfloat16 or float32"
        )
    sums = sum_across_ranks({"sums": sums.to(find_double_device(device))})["sums"]
    sums /= sum(batch.numel() for batch in batches)
    return dict(zip(names, sums.tolist(), strict=True))


def _check_finite(values: Mapping[Any, float]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"the value of {name}")
