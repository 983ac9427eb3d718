"""Detect whether training has changed any weight."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class ChangeWatch:
    """Compares the trained weights with their earlier values.

    Args:
        parameters: parameters of the model; those that do not require gradients are left out.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._before = _summarise(parameters)

    def sees_none(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Return whether no parameter has changed; of sharded parameters it compares this process's shards."""
        after = _summarise(parameters)
        is_same = [len(self._before) == len(after)]
        is_same += [a.equal(b.to(a.device)) for a, b in zip(after, self._before, strict=False)]
        return all(is_same) and bool(after)


def _summarise(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the sum and the sum of absolute values of each parameter, float32 `[2]`."""
    summaries = []
    for parameter in parameters:
        if parameter.requires_grad:
            weight = parameter.detach()
            local = (weight.to_local() if isinstance(weight, DTensor) else weight).float()
            summaries.append(torch.stack((local.sum(), local.abs().sum())))
    return summaries
