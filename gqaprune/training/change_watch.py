"""Whether training has changed any weight."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class ChangeWatch:
    """Compares the trained weights with what they were.

    Args:
        parameters: of the model; those that do not require gradients are left out.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._before = _summarise(parameters)

    def sees_none(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether the parameters, of this process alone where they are sharded, are what they were."""
        after = _summarise(parameters)
        is_same = [len(self._before) == len(after)]
        is_same += [a.equal(b.to(a.device)) for a, b in zip(after, self._before, strict=False)]
        return all(is_same) and bool(after)


def _summarise(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Sum and sum of sizes of each, float32 `[2]`: weights change them, however little, or their digits stay."""
    summaries = []
    for parameter in parameters:
        if parameter.requires_grad:
            weight = parameter.detach()
            own = (weight.to_local() if isinstance(weight, DTensor) else weight).float()
            summaries.append(torch.stack((own.sum(), own.abs().sum())))
    return summaries
