"""Hold torch modules in another module without registering them in it."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Unregistered(Generic[M]):
    """Wrapper of a torch module, so that a module that has it as an attribute does not register it as a submodule.

    Lightning moves submodules to the device, passes their parameters to the optimizer and saves their weights.

    Args:
        module: the wrapped module.
    """

    module: M
