"""Torch modules that belong to another one without being registered in it."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Unregistered(Generic[M]):
    """Wrap a torch module, so that a module which has it as an attribute does not take it for a submodule.

    Lightning moves submodules to the device, hands their parameters to the optimizer and saves their weights.

    Args:
        module: the wrapped one.
    """

    module: M
